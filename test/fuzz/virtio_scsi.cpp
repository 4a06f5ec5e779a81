// A virtio SCSI host that says anything: in its configuration and features, as the answers to the scan of its units, in
// the responses to requests, on its control and event queues, and in its parts of the queues and of the commands'
// memory; while disks are announced, resized and removed, and requests are submitted, cancelled and abandoned. Checked:
// every request ends once and in time; it succeeds only if the host has answered it with success; memory that the host
// may still access is not freed; while the host conforms, so do the driver's requests; at the end the host is reset,
// and the driver keeps no coroutine, no interrupt and no memory but that of commands that were never answered.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>
import core.std;
import core.result;
import core.text;
import core.dma;
import core.interrupt;
import core.log;
import core.mmio;
import core.time;
import io.executor;
import io.block;
import io.task;
import drivers.driver;
import drivers.scsi.units;
import drivers.virtio.controller;
import drivers.virtio_scsi;
import drivers.virtio_scsi.protocol;

#include "fuzz/input.hpp"
#include "fuzz/log.hpp"
// Depend on the imports above.
#include "unit/io/ring_virtqueue_fake.hpp"
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using fuzz::require;
using virtqueue_fake::Chain;
using virtqueue_fake::Guest;
using virtqueue_fake::PackedDevice;
using virtqueue_fake::SplitDevice;
namespace virtio = drivers::virtio;
namespace virtio_scsi = drivers::virtio_scsi;
constexpr Nanoseconds timeout = 100'000'000;
constexpr u32 blocks_each = 8; // per request; requests do not overlap
constexpr usize max_requests = 40;
constexpr u32 request_bytes = blocks_each * 4096; // with the largest blocks
constexpr u32 queues = 3;                         // control, events, requests

/// Guest memory in whole pages.
class Memory final : public DmaAllocator {
  public:
    explicit Memory(Guest& guest) : guest_(guest), used_(guest.size() / 4096) {}
    Result<DmaSpan> allocate(u32 size, u64) override {
        const u32 pages = (size + 4095) / 4096;
        for (u32 at = 0; at + pages <= used_.size(); ++at) {
            if (std::none_of(used_.begin() + at, used_.begin() + at + pages, [](bool b) { return b; })) {
                std::fill_n(used_.begin() + at, pages, true);
                blocks_.push_back({at, pages});
                const DmaSpan span{guest_.data() + at * 4096, guest_.bus + at * 4096, pages * 4096};
                return span; // zeroes: not used before, or cleared by free()
            }
        }
        return Error{Code::exhausted, "no memory"};
    }
    void free(DmaSpan span) override {
        if (freed) {
            freed(span);
        }
        const u32 at = static_cast<u32>((span.bus - guest_.bus) / 4096);
        std::memset(span.data, 0, span.size);
        require(std::erase(blocks_, Block{at, span.size / 4096}) == 1);
        std::fill_n(used_.begin() + at, span.size / 4096, false);
    }
    u32 pages_in_use() const { return static_cast<u32>(std::ranges::count(used_, true)); }
    /// In pages, of the allocations from page `from` on.
    u32 largest_in_use(u32 from) const {
        u32 most = 0;
        for (const Block& block : blocks_) {
            most = std::max(most, block.at < from ? 0 : block.pages);
        }
        return most;
    }
    std::function<void(DmaSpan)> freed{}; // before a free()

  private:
    Guest& guest_;
    std::vector<bool> used_;
    struct Block {
        u32 at, pages;
        bool operator==(const Block&) const = default;
    };
    std::vector<Block> blocks_{};
};

struct Sink final : drivers::DiskSink {
    std::vector<io::BlockDevice*> disks{};
    bool offered(u32) override { return true; }
    FixedText<16> free_name(std::string_view prefix) override {
        return drivers::disk_name(prefix, static_cast<u32>(disks.size()));
    }
    Result<void> announce(io::BlockDevice& disk, u32) override {
        disks.push_back(&disk);
        return {};
    }
};

struct Unit {
    u8 target = 0;
    u16 lun = 0;
    bool present = true;
    u64 blocks = max_requests * blocks_each;
    u32 block_bytes = 512;
    u8 revision = '1';
};

/// What is written for a command.
struct Answer {
    u8 response = 0;
    u8 status = 0;
    u32 residual = 0;
    u32 sense_length = 0;
    std::array<u8, 96> sense{};
    std::vector<u8> data{};
    std::optional<u32> used{}; // the used length; else as it is
};

struct Port {
    std::optional<std::variant<SplitDevice, PackedDevice>> device{};
    SplitDevice::Setup setup{};
    std::deque<Chain> held{}; // taken and not answered
    std::deque<Chain> done{}; // answered
    bool unreadable = false;  // the host has overwritten descriptors, which are no buffers any more
};

struct Machine final : virtio::Device, private MmioModel {
    Machine(fuzz::Input& i, io::Executor& e, const test::FakeMachine& c, Guest& g)
        : input(i), executor(e), clock(c), guest(g) {
        const u8 shape = input.byte();
        offered = virtio_scsi::feature_hotplug | virtio_scsi::feature_change | virtio::feature_version_1;
        offered |= (shape & 1) != 0 ? virtio::feature_packed : 0;
        offered |= (shape & 2) != 0 ? virtio::feature_event_idx : 0;
        offered |= (shape & 4) != 0 ? virtio::feature_indirect : 0;
        line = (shape & 8) != 0;
        obliging = (shape & 0x10) == 0;
        static constexpr std::array<u32, 4> sizes{256, 16, 64, 99};
        size = sizes[shape >> 6];
        set(virtio_scsi::config::queue_count, 1, 4);
        set(virtio_scsi::config::seg_max, 126, 4);
        set(virtio_scsi::config::max_sectors, (shape & 0x20) != 0 ? 16 : 0xffff, 4); // 8 KiB: requests are divided
        set(virtio_scsi::config::cmd_per_lun, 128, 4);
        set(virtio_scsi::config::event_info_size, 16, 4);
        set(virtio_scsi::config::sense_size, 96, 4);
        set(virtio_scsi::config::cdb_size, 32, 4);
        set(virtio_scsi::config::max_target, 1, 2);
        set(virtio_scsi::config::max_lun, 255, 4);
        for (u8 odd = input.byte(); odd != 0; odd >>= 1) {
            if ((odd & 1) != 0) {
                spoil(input.byte());
            }
        }
    }
    /// Something else than usual in the configuration, features or registers.
    void spoil(u8 what) {
        static constexpr std::array<u64, 9> fields{0, 4, 8, 12, 16, 20, 24, 30, 32};
        static constexpr std::array<u32, 8> values{0, ~u32{0}, 1, 2, 7, 31, 95, 3};
        const u8 kind = input.byte();
        const u32 value = kind < values.size() ? values[kind] : kind < 128 ? kind : input.word();
        if (what % 16 < fields.size()) {
            const u64 at = fields[what % 16];
            set(at, value, at == virtio_scsi::config::max_target ? 2 : 4);
        } else if (what % 16 == 9) {
            offered ^= u64{1} << kind % 64;
        } else if (what % 16 == 10) {
            restless = true;
        } else if (what % 16 == 11) {
            refuses_features = true;
        } else if (what % 16 == 12) {
            size = value;
        } else if (what % 16 == 13) {
            status = static_cast<u8>(value); // left over from somebody else
        }
    }
    void set(u64 at, u64 value, u32 bytes) {
        for (u32 i = 0; i < bytes; ++i) {
            config_bytes[at + i] = static_cast<u8>(value >> 8 * i);
        }
    }

    fuzz::Input& input;
    io::Executor& executor;
    const test::FakeMachine& clock;
    Guest& guest;
    Sink sink{};
    // The device, and its faults.
    u64 offered = 0;
    u64 accepted = 0;
    u32 size = 256; // of the queues
    bool line = false;
    bool obliging = true;          // the scan before the first use is answered as it should be
    bool restless = false;         // the configuration changes all the time
    bool refuses_features = false; // clears FEATURES_OK
    u8 status = 0;
    u8 isr = 0;
    std::array<u8, 36> config_bytes{};
    std::array<Port, queues> ports{};
    std::array<virtio::InterruptUse, 2> uses{}; // attached
    std::array<Unit, 3> units{{{0, 0}, {0, 1}, {1, 5}}};
    bool attached = false;   // the first scan has ended
    bool sound = true;       // the host has conformed so far
    bool violated = false;   // it has given an answer that the specification does not allow
    bool unanswered = false; // it has kept a command of the driver's own, or may have
    Instant acted = 0;       // last action of the host, or of the requests' owner
    Instant answered = 0;    // last answer of the host
    std::array<bool, max_requests * blocks_each> served{}; // success was written for the block
    u32 flushed = 0;                                       // for so many flushes
    u32 flushes_ok = 0;
    struct Sent {
        std::unique_ptr<io::Request> request;
        io::BlockDevice* disk;
        Instant at;
    };
    std::vector<Sent> requests{};
    DmaSpan buffers{};
    usize submitted = 0;

    // ---- virtio::Device ----

    FixedText<48> name() const override { return FixedText<48>("the fuzzer's host"); }
    u32 max_size(u16 queue) override { return queue < queues ? size : 0; }
    Result<virtio::Notifier> enable(u16 queue, u32 n, const virtio::QueueAddresses& at, u16) override {
        require(queue < queues);
        Port& port = ports[queue];
        port = {};
        port.setup = {n, at.descriptors, at.driver, at.device, (accepted & virtio::feature_event_idx) != 0};
        if (packed()) {
            port.device.emplace(std::in_place_type<PackedDevice>, guest, port.setup);
        } else {
            port.device.emplace(std::in_place_type<SplitDevice>, guest, port.setup);
        }
        std::visit([](auto& d) { d.want(1); }, *port.device);
        return virtio::Notifier(Mmio(static_cast<MmioModel&>(*this), 4), 0, queue, true);
    }
    Result<u32> attach(std::span<const virtio::InterruptUse> given, bool) override {
        const usize n = line ? 1 : std::min(given.size(), uses.size());
        std::copy_n(given.begin(), n, uses.begin());
        return static_cast<u32>(n);
    }
    void detach() override { uses = {}; }
    bool by_line() const override { return line; }
    u8 take_interrupt(u32& accesses) override {
        ++accesses;
        return std::exchange(isr, u8{0});
    }
    Result<void> set_config_vector(u16) override { return {}; }
    void write_config(u64, u8) override {}
    u32 generation() override { return restless ? ++generations_ : 0; }
    u32 config_field(u64 at, u32 width) override {
        u32 value = 0;
        for (u32 i = 0; i < width; ++i) {
            value |= u32{at + i < config_bytes.size() ? config_bytes[at + i] : u8{0xff}} << 8 * i;
        }
        return value;
    }
    u8 read_status() override { return status; }
    void write_status(u8 value) override {
        status = value;
        if (refuses_features) {
            status = static_cast<u8>(status & ~virtio::status_features_ok);
        }
        if (value == 0) {
            Port& commands = ports[virtio_scsi::first_request_queue];
            unanswered = unanswered || !commands.held.empty() ||
                         (commands.device && std::visit([](auto& d) { return d.pending(); }, *commands.device) != 0);
            for (Port& port : ports) {
                port = {};
            }
        }
    }
    u32 read_features(u32 half) override { return static_cast<u32>(offered >> 32 * half); }
    void write_features(u32 half, u32 features) override {
        accepted |= u64{features} << 32 * half;
        sound = sound && (accepted & virtio::feature_in_order) == 0; // it does not keep the order
    }
    u64 read(u64, u32) override { return 0; }
    void write(u64, u32, u64) override {}
    bool packed() const { return (accepted & virtio::feature_packed) != 0; }

    // ---- the queues ----

    void take() {
        for (Port& port : ports) {
            if (!port.device || (status & virtio::status_driver_ok) == 0) {
                continue;
            }
            std::visit(
                [&](auto& d) {
                    while (port.held.size() < port.setup.size && !port.unreadable) {
                        auto chain = d.pop();
                        if (!chain) {
                            break;
                        }
                        if (sound) {
                            examine(port, *chain);
                        }
                        port.held.push_back(*chain);
                    }
                    d.want(1);
                },
                *port.device);
        }
        require(!sound || guest.fault.empty());
    }
    /// The driver's messages conform [virtio-1.2 §5.6.6].
    void examine(const Port& port, const Chain& chain) {
        const auto& p = chain.pieces;
        for (const auto& piece : p) {
            require(guest.has(piece.bus, piece.length));
        }
        if (&port == &ports[virtio_scsi::event_queue]) {
            require(p.size() == 1 && p[0].writable && p[0].length == 16);
        } else if (&port == &ports[virtio_scsi::control_queue]) {
            require(p.size() == 2 && p[0].length == 24 && !p[0].writable && p[1].length == 1 && p[1].writable);
            require(guest.get(p[0].bus, 8) == u64{5} << 32 && guest.get(p[0].bus + 8, 1) == 1);
        } else {
            require(p.size() >= 2 && p[0].length == 19 + config_field(virtio_scsi::config::cdb_size, 4));
            require(!p[0].writable && guest.get(p[0].bus, 1) == 1);
            const usize at = response_of(chain);
            require(at < p.size() && p[at].length == 12 + config_field(virtio_scsi::config::sense_size, 4));
            require(guest.get(p[at].bus + 11, 1) == 0xff); // no success is left over
            const auto [op, first, count] = range(chain);
            u64 data = 0;
            for (usize i = 1; i < p.size(); ++i) {
                data += i == at ? 0 : p[i].length;
            }
            require(data <= std::min<u64>(u64{config_field(virtio_scsi::config::max_sectors, 4)} * 512, 1 << 20));
            require(op != io::Op::read || data % 512 == 0);
        }
    }
    static usize response_of(const Chain& chain) {
        usize at = 0;
        while (at < chain.pieces.size() && !chain.pieces[at].writable) {
            ++at;
        }
        return at;
    }
    u8 opcode(const Chain& chain) { return chain.pieces.empty() ? u8{0} : cdb(chain, 0, 1); }
    /// Big endian.
    u64 cdb(const Chain& chain, u32 at, u32 bytes) { return big(chain.pieces.front().bus + 19 + at, bytes); }
    u64 big(u64 from, u32 bytes) {
        u64 value = 0;
        for (u32 i = 0; i < bytes; ++i) {
            value = value << 8 | guest.get(from + i, 1);
        }
        return value;
    }
    struct Range {
        io::Op op = io::Op::flush;
        u64 first = 0, count = 0; // in blocks
    };
    Range range(const Chain& chain) {
        switch (opcode(chain)) {
        case 0x28:
        case 0x2a: return {opcode(chain) == 0x28 ? io::Op::read : io::Op::write, cdb(chain, 2, 4), cdb(chain, 7, 2)};
        case 0x88:
        case 0x8a: return {opcode(chain) == 0x88 ? io::Op::read : io::Op::write, cdb(chain, 2, 8), cdb(chain, 10, 4)};
        case 0x93: return {io::Op::write_zeroes, cdb(chain, 2, 8), cdb(chain, 10, 4)};
        case 0x41: return {io::Op::write_zeroes, cdb(chain, 2, 4), cdb(chain, 7, 2)};
        case 0x42: return {io::Op::discard, big(chain.pieces[1].bus + 8, 8), big(chain.pieces[1].bus + 16, 4)};
        default: return {};
        }
    }
    bool of_request(const Chain& chain) {
        static constexpr std::array<u8, 9> codes{0x28, 0x2a, 0x88, 0x8a, 0x35, 0x91, 0x93, 0x41, 0x42};
        return std::ranges::find(codes, opcode(chain)) != codes.end();
    }
    void serve(const Chain& chain) {
        if (chain.pieces.size() < 2 || !of_request(chain)) {
            return;
        }
        const Range r = range(chain);
        for (u64 i = r.first; i < std::min<u64>(r.first + std::min<u64>(r.count, served.size()), served.size()); ++i) {
            served[i] = true;
        }
        flushed += r.op == io::Op::flush ? 1 : 0;
    }
    /// The host no longer knows what it has written.
    void anything_served() {
        served.fill(true);
        flushed = ~0u / 2;
    }
    void push(Port& port, const Chain& chain, u32 length) {
        if (!port.device) {
            return;
        }
        if (std::visit(
                [&](auto& d) {
                    d.push(chain, length);
                    return d.interrupt();
                },
                *port.device)) {
            event(port);
        }
        answered = clock.time;
        guest.fault = sound ? guest.fault : std::string();
    }
    void interrupt(u32 use, u8 reason) {
        if (line) {
            isr = static_cast<u8>(isr | reason);
            use = 0;
        }
        if (uses[use].handler != nullptr) {
            uses[use].handler(uses[use].context);
        }
    }
    void event(const Port& port) {
        if (&port != &ports[virtio_scsi::control_queue]) {
            interrupt(&port == &ports[virtio_scsi::event_queue] ? 1 : 0, virtio::isr_queue);
        }
    }
    /// One of the buffers that the host holds; it is then answered.
    std::optional<Chain> choose(Port& port) {
        if (port.held.empty()) {
            return std::nullopt;
        }
        const auto at = port.held.begin() + static_cast<std::ptrdiff_t>(input.byte() % port.held.size());
        const Chain chain = *at;
        port.held.erase(at);
        port.done.push_back(chain);
        return chain;
    }

    // ---- answers to commands ----

    /// Whether the specification allows no such answer to a request: the driver must close the host.
    bool violates(const Chain& chain, const Answer& answer) {
        if (answer.response != 0) {
            return answer.response > 9 && answer.response != 12; // of task management functions only, or undefined
        }
        u64 bytes = 0;
        for (usize i = 1; i < chain.pieces.size(); ++i) {
            bytes += i == response_of(chain) ? 0 : chain.pieces[i].length;
        }
        return answer.residual > bytes ||
               (answer.status != 0 && answer.sense_length > config_field(virtio_scsi::config::sense_size, 4));
    }
    void respond(const Chain& chain, const Answer& answer, bool late = false) {
        const usize at = response_of(chain);
        Port& port = ports[virtio_scsi::first_request_queue];
        violated = violated || (sound && !late && of_request(chain) && violates(chain, answer));
        u32 moved = 0;
        const auto write = [&] {
            if (at >= chain.pieces.size() || chain.pieces[at].length < 12 || !guest.has(chain.pieces[at].bus, 12)) {
                return;
            }
            const u64 to = chain.pieces[at].bus;
            guest.put(to, answer.sense_length, 4);
            guest.put(to + 4, answer.residual, 4);
            guest.put(to + 10, answer.status, 1);
            guest.put(to + 11, answer.response, 1);
            for (u32 i = 0; i < std::min<u32>(answer.sense.size(), chain.pieces[at].length - 12); ++i) {
                guest.put(to + 12 + i, answer.sense[i], 1);
            }
        };
        if (at + 1 < chain.pieces.size()) {
            for (; moved < std::min<usize>(answer.data.size(), chain.pieces[at + 1].length); ++moved) {
                guest.put(chain.pieces[at + 1].bus + moved, answer.data[moved], 1);
            }
        }
        if (!late) {
            write();
        }
        push(port, chain, answer.used.value_or(static_cast<u32>(chain.writable())));
        if (late) {
            write();
        }
    }
    static void fail(Answer& answer, u8 key, u8 asc, u8 ascq = 0) { // CHECK CONDITION, fixed format [SPC-4 §4.5.3]
        answer.status = 2;
        answer.sense_length = 18;
        answer.sense = {0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, ascq};
    }
    /// As a host should answer a command of the driver's own.
    Answer proper(const Chain& chain) {
        Answer answer;
        const u8 target = static_cast<u8>(guest.get(chain.pieces[0].bus + 1, 1));
        const u16 lun = static_cast<u16>(big(chain.pieces[0].bus + 2, 2) & 0x3fff);
        const auto at = [&](const Unit& unit) { return unit.present && unit.target == target; };
        const auto unit = std::ranges::find_if(units, [&](const Unit& u) { return at(u) && u.lun == lun; });
        const auto number = [&](u64 value, u32 bytes) {
            while (bytes-- != 0) {
                answer.data.push_back(static_cast<u8>(value >> 8 * bytes));
            }
        };
        const u8 op = opcode(chain);
        if (std::ranges::none_of(units, at)) {
            answer.response = 3; // BAD_TARGET
        } else if (op == 0xa0) { // REPORT LUNS
            number(static_cast<u64>(std::ranges::count_if(units, at)) * 8, 4);
            number(0, 4);
            for (const Unit& u : units) {
                if (at(u)) {
                    number(u64{u.lun} << 48, 8);
                }
            }
        } else if (unit == units.end()) {
            fail(answer, 5, 0x25);
        } else if (op == 0x12 && cdb(chain, 1, 1) == 0) { // INQUIRY
            answer.data.assign(36, ' ');
            answer.data[0] = answer.data[1] = 0;
            answer.data[4] = 31;
            answer.data[35] = unit->revision;
        } else if (op == 0x12 && cdb(chain, 2, 1) == 0) {
            answer.data = {0, 0, 0, 4, 0, 0x83, 0xb0, 0xb2};
        } else if (op == 0x12 && cdb(chain, 2, 1) == 0x83) {
            answer.data = {0, 0x83, 0, 12, 1, 3, 0, 8, 0x50, 1, 2, 3, 4, 5, 6, target};
        } else if (op == 0x12 && cdb(chain, 2, 1) == 0xb0) { // limits: 64 blocks to unmap, 64 to write
            answer.data.assign(64, 0);
            answer.data[1] = 0xb0;
            answer.data[3] = 60;
            answer.data[23] = answer.data[27] = answer.data[43] = 64;
        } else if (op == 0x12 && cdb(chain, 2, 1) == 0xb2) {
            answer.data = {0, 0xb2, 0, 4, 0, 0xe0, 2, 0};
        } else if (op == 0x9e) { // READ CAPACITY(16), thin
            number(unit->blocks - 1, 8);
            number(unit->block_bytes, 4);
            number(0x0000'8000, 4);
            answer.data.resize(32);
        } else if (op == 0x25) {
            number(std::min<u64>(unit->blocks - 1, ~u32{0}), 4);
            number(unit->block_bytes, 4);
        } else if (op == 0x1a) { // MODE SENSE(6): DPOFUA, the caching page with WCE
            answer.data = {23, 0, 0x10, 0, 0x08, 0x12, 4};
            answer.data.resize(24);
        } else if (op != 0) {
            fail(answer, 5, 0x20);
        }
        if (const usize into = response_of(chain) + 1; into < chain.pieces.size()) {
            const u32 room = chain.pieces[into].length;
            answer.residual = room - static_cast<u32>(std::min<usize>(room, answer.data.size()));
        }
        return answer;
    }
    static constexpr std::array<std::array<u8, 3>, 14> senses{{{6, 0x29, 0},
                                                               {6, 0x3f, 0x0e},
                                                               {6, 0x2a, 9},
                                                               {6, 0x28, 0},
                                                               {5, 0x20, 0},
                                                               {5, 0x25, 0},
                                                               {3, 0x11, 0},
                                                               {1, 0x17, 1},
                                                               {2, 4, 1},
                                                               {2, 0x3a, 0},
                                                               {7, 0x27, 0},
                                                               {0, 0, 0},
                                                               {5, 0x24, 0},
                                                               {11, 0x47, 0}}};
    /// A command of the driver's own.
    void answer_own(const Chain& chain) {
        Port& port = ports[virtio_scsi::first_request_queue];
        Answer answer = proper(chain);
        const u8 how = obliging && !attached ? u8{0} : input.byte();
        switch (how % 16) {
        case 8: answer.data.resize(std::min<usize>(input.byte(), answer.data.size())); break;
        case 9: answer.residual = (how & 0x10) != 0 ? input.word() : input.byte(); break;
        case 10: { // arbitrary data
            const auto bytes = input.take(input.byte());
            answer.data.resize(std::max(answer.data.size(), bytes.size()));
            std::ranges::transform(bytes, answer.data.begin(), std::to_integer<u8>);
            answer.residual = (how & 0x10) != 0 ? 0 : answer.residual;
            break;
        }
        case 11: {
            const auto& sense = senses[input.byte() % senses.size()];
            fail(answer, sense[0], sense[1], sense[2]);
            answer.sense_length = (how & 0x10) != 0 ? input.byte() : 18;
            break;
        }
        case 12: answer.response = input.byte(); break;
        case 13: answer.status = input.byte(); break;
        case 14: // not now
            unanswered = true;
            port.held.push_back(chain);
            return;
        case 15: // another value in the data
            for (u32 n = 1 + (how >> 4); n != 0; --n) {
                const u8 at = input.byte();
                const u8 value = input.byte();
                if (at < answer.data.size()) {
                    answer.data[at] = value;
                }
            }
            break;
        default: break;
        }
        port.done.push_back(chain);
        respond(chain, answer);
    }

    // ---- the owner of the requests ----

    void submit() {
        if (submitted == max_requests || sink.disks.empty()) {
            return;
        }
        const usize i = submitted++;
        static constexpr std::array<io::Op, 8> ops{io::Op::read,    io::Op::write, io::Op::read,         io::Op::flush,
                                                   io::Op::discard, io::Op::write, io::Op::write_zeroes, io::Op::read};
        const io::Op op = ops[i % ops.size()];
        io::BlockDevice& disk = *sink.disks[i % sink.disks.size()];
        const u32 block = disk.geometry().sector_size;
        const u32 bytes = (i % 3 == 0 ? blocks_each : 1) * block;
        if (bytes > request_bytes || (i + 1) * blocks_each > disk.geometry().sectors) {
            return; // a hostile capacity
        }
        DmaSpan span = buffers.subspan(static_cast<u32>(i) * request_bytes, bytes);
        if (op == io::Op::flush) {
            span = {};
        } else if (!io::has_data(op)) {
            span = {nullptr, 0, bytes};
        }
        requests.push_back({std::make_unique<io::Request>(disk, op, i * blocks_each, span), &disk, clock.time});
        disk.submit(*requests.back().request);
    }
    void look(const Sent& sent) {
        const io::Request& r = *sent.request;
        const io::Geometry& geometry = sent.disk->geometry();
        require(r.status != io::Status::not_written);
        if (r.status != io::Status::ok) {
            return;
        }
        if (r.op == io::Op::flush) {
            // A disk without a cache has nothing to flush.
            require(!geometry.flush || ++flushes_ok <= flushed);
            return;
        }
        const auto first = served.begin() + static_cast<std::ptrdiff_t>(r.lba);
        require(std::all_of(first, first + r.buffer.size / geometry.sector_size, [](bool s) { return s; }));
    }
    bool reachable(DmaSpan span) {
        return std::ranges::any_of(ports, [&](const Port& port) {
            return std::ranges::any_of(port.held, [&](const Chain& chain) {
                return std::ranges::any_of(chain.pieces, [&](const auto& p) {
                    return p.bus < span.bus + span.size && span.bus < p.bus + p.length;
                });
            });
        });
    }
    /// The request has ended, or is abandoned: its frame is destroyed.
    void forget(usize at) {
        const io::Request& r = *requests[at].request;
        const bool pending = r.pending();
        const DmaSpan span = r.buffer;
        if (!pending) {
            look(requests[at]);
        }
        requests.erase(requests.begin() + static_cast<std::ptrdiff_t>(at));
        require(!pending || !sound || span.empty() || !reachable(span) || is_quarantined(span));
    }
    /// A silent host is reset unit by unit after a time-out, and closed after another one; the same holds for one that
    /// does not answer a request, whatever else it does.
    bool in_time(usize at) const {
        return !requests[at].request->pending() ||
               clock.time - std::max({acted, answered, requests[at].at}) < 8 * timeout;
    }

    // ---- the host's actions ----

    void step() {
        if (input.empty() && (attached || !obliging)) {
            return;
        }
        acted = clock.time;
        take();
        Port& port = ports[virtio_scsi::first_request_queue];
        std::deque<Chain> own; // commands of the driver's own, answered at once or not
        std::erase_if(port.held, [&](const Chain& chain) {
            if (of_request(chain) || chain.pieces.size() < 2) {
                return false;
            }
            own.push_back(chain);
            return true;
        });
        for (const Chain& chain : own) {
            answer_own(chain);
        }
        if (!attached && obliging) {
            return;
        }
        act(port);
    }
    void act(Port& port) {
        const u8 what = input.byte();
        switch (what % 16) {
        case 0:
        case 1: // success
            for (u32 n = (what & 0x40) != 0 ? 32 : 1; n != 0; --n) {
                if (const auto chain = choose(port)) {
                    serve(*chain);
                    respond(*chain, {});
                }
            }
            break;
        case 2: // CHECK CONDITION, with sense data
            if (const auto chain = choose(port)) {
                const auto& sense = senses[input.byte() % senses.size()];
                Answer answer;
                fail(answer, sense[0], sense[1], sense[2]);
                answer.residual = (what & 0x10) != 0 ? input.word() : 0;
                answer.sense_length = (what & 0x20) != 0 ? input.word() : 18;
                if (sense[0] <= 1 || answer.sense_length != 18) {
                    serve(*chain);
                }
                respond(*chain, answer);
            }
            break;
        case 3: // anything, with whatever sense data there is
            if (const auto chain = choose(port)) {
                Answer answer;
                answer.response = (what & 0x10) != 0 ? input.byte() : 0;
                answer.status = (what & 0x20) != 0 ? input.byte() : 0;
                answer.residual = (what & 0x40) != 0 ? input.word() : input.byte();
                answer.sense_length = (what & 0x80) != 0 ? input.word() : input.byte();
                const auto bytes = input.take(input.byte() % 97);
                std::ranges::transform(bytes, answer.sense.begin(), std::to_integer<u8>);
                answer.sense[0] = (what & 0x20) != 0 ? static_cast<u8>(0x70 | (answer.sense[0] & 3)) : answer.sense[0];
                if (answer.response == 0 &&
                    (answer.residual == 0 || range(*chain).op > io::Op::write || answer.status != 0)) {
                    serve(*chain);
                }
                respond(*chain, answer);
            }
            break;
        case 4: // an arbitrary used length
            if (const auto chain = choose(port)) {
                serve(*chain);
                Answer answer;
                answer.used = (what & 0x10) != 0 ? input.word() : input.byte();
                respond(*chain, answer);
            }
            break;
        case 5: { // no response, or one that is written after the buffer was returned
            if (const auto chain = choose(port)) {
                if ((what & 0x10) != 0) {
                    serve(*chain);
                    respond(*chain, {}, true);
                } else {
                    push(port, *chain, 1);
                }
            }
            break;
        }
        case 6: { // a buffer that was answered before, or an arbitrary one
            Port& any = ports[(what >> 4) % queues];
            sound = false;
            any.unreadable = packed();
            Chain chain;
            if ((what & 0x40) != 0 && !any.done.empty()) {
                chain = any.done[input.byte() % any.done.size()];
            } else {
                chain.id = static_cast<u16>((what & 0x80) != 0 ? input.word() : input.byte());
                chain.descriptors = input.byte() % 4;
            }
            anything_served();
            push(any, chain, input.byte());
            break;
        }
        case 7: { // anything in the host's part of a queue
            Port& any = ports[(what >> 4) % queues];
            if (!any.device) {
                break;
            }
            sound = false;
            any.unreadable = packed();
            anything_served();
            const u64 at = packed() ? any.setup.descriptors : any.setup.device;
            const u32 most = packed() ? 16 * any.setup.size : 6 + 8 * any.setup.size;
            const u32 from = input.word() % most;
            const auto bytes = input.take(std::min<u32>(input.byte(), most - from));
            std::copy(bytes.begin(), bytes.end(), guest.data() + (at - guest.bus) + from);
            answered = clock.time;
            break;
        }
        case 8: // anything in the memory of a command
            if (const auto chain = choose(port); chain && !chain->pieces.empty()) {
                sound = false;
                anything_served();
                const u64 at = chain->pieces.front().bus;
                const auto bytes = input.take(input.byte());
                if (guest.has(at, bytes.size())) {
                    std::copy(bytes.begin(), bytes.end(), guest.data() + (at - guest.bus));
                }
                push(port, *chain, 1);
            }
            break;
        case 9: // spurious interrupts
            for (u32 n = (what & 0x10) != 0 ? 300 : 1; n != 0; --n) {
                interrupt(what >> 5 & 1, what >> 6);
            }
            break;
        case 10: { // task management functions are answered: carried out or not
            Port& control = ports[virtio_scsi::control_queue];
            const u8 answer = (what & 0x10) != 0 ? input.byte() : 0;
            if (const auto chain = choose(control)) {
                if ((what & 0x20) != 0) { // ends every command
                    for (const Chain& c : std::exchange(port.held, {})) {
                        port.done.push_back(c);
                        Answer reset;
                        reset.response = 4;
                        respond(c, reset);
                    }
                }
                if (chain->pieces.size() == 2 && guest.has(chain->pieces[1].bus, 1)) {
                    guest.put(chain->pieces[1].bus, answer, 1);
                }
                push(control, *chain, (what & 0x40) != 0 ? input.word() : 1);
            }
            break;
        }
        case 11:
            for (u32 n = what >> 4 & 7; n != 0; --n) {
                submit();
            }
            break;
        case 12:
            if (!requests.empty()) {
                const usize at = input.byte() % requests.size();
                if ((what & 0x10) != 0) {
                    static_cast<void>(requests[at].disk->cancel(*requests[at].request));
                } else {
                    forget(at);
                }
            }
            break;
        case 13: { // an event
            Port& events = ports[virtio_scsi::event_queue];
            if (const auto chain = choose(events)) {
                const u8 kind = input.byte();
                const Unit& unit = units[(kind >> 4) % units.size()];
                Answer unused;
                std::array<u8, 16> bytes{};
                bytes[0] = kind & 7;
                bytes[3] = (kind & 8) != 0 ? 0x80 : 0; // events were missed
                bytes[4] = 1;
                bytes[5] = unit.target;
                bytes[7] = static_cast<u8>(unit.lun);
                bytes[12] = input.byte() % 4;
                if ((what & 0x10) != 0) { // with another address, or type
                    const auto other = input.take(16);
                    std::ranges::transform(other, bytes.begin(), std::to_integer<u8>);
                }
                for (u32 i = 0; i < 16 && guest.has(chain->pieces.at(0).bus, 16); ++i) {
                    guest.put(chain->pieces[0].bus + i, bytes[i], 1);
                }
                push(events, *chain, (what & 0x20) != 0 ? input.word() : 16);
            }
            break;
        }
        case 14: { // what leads to a retry
            for (u32 n = (what & 0x40) != 0 ? 32 : 1; n != 0; --n) {
                if (const auto chain = choose(port)) {
                    Answer answer;
                    answer.response = (what & 0x10) != 0 ? 5 : 0;  // BUSY
                    answer.status = (what & 0x20) != 0 ? 0x28 : 8; // TASK SET FULL, BUSY
                    respond(*chain, answer);
                }
            }
            break;
        }
        default: other(what >> 4); break;
        }
    }
    void other(u8 what) {
        Unit& unit = units[what % units.size()];
        switch (what) {
        case 0:
        case 1:
        case 2: unit.present = !unit.present; break;
        case 3:
        case 4:
        case 5: unit.blocks = input.byte() * u64{16} + 1; break;
        case 6: unit.block_bytes = unit.block_bytes == 512 ? 4096 : 512; break;
        case 7: ++unit.revision; break;
        case 8: // DEVICE_NEEDS_RESET
            status |= virtio::status_needs_reset;
            interrupt(1, virtio::isr_config);
            break;
        case 9: interrupt(1, virtio::isr_config); break;
        case 10:
            if (!sink.disks.empty()) {
                static_cast<void>(sink.disks[0]->removed());
            }
            break;
        default: break; // time passes
        }
    }

  private:
    u32 generations_ = 0;
};
} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    const usize frames = io::frame_pool().in_use();
    fuzz::Input input(data, size);
    test::FakeMachine clock;
    clock.step = 20'000; // time per clock reading: waits that do not sleep end soon
    const fuzz::Log log;
    {
        io::Executor executor(clock.platform());
        Guest guest(4 << 20);
        Memory dma(guest);
        const auto machine = std::make_unique<Machine>(input, executor, clock, guest);
        clock.on_idle_context = machine.get();
        clock.on_idle = [](void* self) { static_cast<Machine*>(self)->step(); };
        auto buffers = dma.buffer(max_requests * request_bytes);
        machine->buffers = buffers->span();
        dma.freed = [&](DmaSpan span) { require(!machine->sound || !machine->reachable(span)); };
        const u32 pages = dma.pages_in_use();
        struct NoInterrupts final : InterruptController {
            Result<void> attach_line(InterruptLine, InterruptHandler, void*, u32) override { return {}; }
            void detach_line(InterruptLine, InterruptHandler, void*) override {}
            Result<InterruptVector> attach_vector(InterruptHandler, void*, bool) override { return InterruptVector{}; }
            Result<InterruptVector> attach_message(u32, InterruptHandler, void*) override { return InterruptVector{}; }
            Result<InterruptMessage> message_for(InterruptVector) const override { return InterruptMessage{}; }
            void detach_vector(InterruptVector) override {}
        } interrupts; // the device itself has them
        drivers::Environment environment{executor, dma, interrupts, machine->sink, timeout};
        require(executor.run(machine->start(executor, timeout)).has_value());
        const auto features =
            machine->negotiate(virtio_scsi::feature_hotplug | virtio_scsi::feature_change | virtio::feature_packed |
                                   virtio::feature_event_idx | virtio::feature_indirect | virtio::feature_version_1 |
                                   virtio::feature_in_order,
                               virtio::feature_version_1, 0, virtio_scsi::feature_names);
        if (features) {
            const std::unique_ptr<virtio::Controller> controller(
                virtio_scsi::make_controller(environment, *machine, *features));
            const bool use = executor.run(controller->attach()).has_value();
            machine->attached = true;
            if (!use) {
                require(executor.run(controller->detach()).has_value());
            }
            for (u32 i = 0; i < 10; ++i) {
                machine->submit();
            }
            bool some = true;
            const auto open = [&] { return use && machine->status != 0; };
            for (u32 turns = 0; some || (open() && (!input.empty() || machine->violated)); ++turns) {
                require(turns < 100'000); // everything must end for any behaviour of the host
                executor.turn();
                some = false;
                for (usize i = machine->requests.size(); i-- > 0;) {
                    const bool pending = machine->requests[i].request->pending();
                    some = some || pending;
                    require(machine->in_time(i));
                    if (!pending) {
                        machine->forget(i);
                    }
                }
            }
            if (use) { // the end, unless there was one: the watcher resets the device
                machine->status |= machine->status != 0 ? virtio::status_needs_reset : u8{0};
                machine->interrupt(1, virtio::isr_config);
            }
            for (u32 turns = 0; io::frame_pool().in_use() != frames; ++turns) {
                require(turns < 100'000);
                executor.turn();
            }
            require(machine->uses[0].handler == nullptr); // and no queue is left, by a reset if there were any:
            require(std::ranges::none_of(machine->ports, [](const Port& port) { return port.device.has_value(); }));
        }
        // What is left is memory of commands that were not answered, or the one's under way when the host was closed.
        require(dma.largest_in_use(pages) <= 1);
        require(dma.pages_in_use() <= pages + 1 || machine->unanswered || !machine->sound);
        dma.freed = nullptr;
    }
    clear_quarantine();
    return 0;
}
