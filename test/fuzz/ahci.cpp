// An AHCI HBA and its disk that end commands arbitrarily, late, twice or never, fail them, fail themselves, lose the
// link, store nonsense where the driver looks for FISes and the error log, or disappear, while requests are submitted,
// cancelled and abandoned. Checked: every request ends once and in time; it succeeds only if the device has confirmed
// each of its sectors; commands are only issued to a port that runs, and refer only to the request's memory and to the
// port's own; after the end the port is stopped, or the HBA is gone.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <vector>
import core.std;
import core.result;
import core.text;
import core.dma;
import core.log;
import core.mmio;
import core.time;
import io.executor;
import io.block;
import io.block_queue;
import drivers.ahci.sata_disk;

#include "fuzz/input.hpp"
// Depends on the imports above.
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using fuzz::require;
namespace ahci = drivers::ahci;
constexpr Nanoseconds timeout = 100'000'000;
constexpr u32 sectors_each = 256; // maximum per request; requests do not overlap
constexpr usize max_requests = 40;
constexpr u32 list_at = 0, fis_at = 1024, block_at = 1536;

template <class T>
T load(const std::byte* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
template <class T>
void store(std::byte* at, T value) {
    std::memcpy(at, &value, sizeof value);
}

struct Machine final : MmioModel {
    Machine(fuzz::Input& in, const test::FakeMachine& c) : input(in), clock(c) {}

    fuzz::Input& input;
    const test::FakeMachine& clock;
    Instant acted = 0;
    ahci::HbaEvents* hba = nullptr;
    ahci::Disk* disk = nullptr;
    DmaSpan memory{}, buffer{};
    bool wide = true;
    bool gone = false, sticky = false, ended = false; // sticky: CR stays set
    bool damaged = false;                             // the device's registers and memory are nonsense
    bool unidentified = false;                        // reset, and has not said since who it is
    bool replaced = false;                            // by another disk
    drivers::ata::IdentifyData identity{};
    u32 is = 0, ie = 0, cmd = 0, tfd = 0x50, ssts = 0x123, sact = 0, ci = 0, pending = 0;
    struct Asked {
        u32 slot;
        u8 code;
        bool queued;
        u64 lba;
        u32 sectors;
    };
    std::vector<Asked> asked{};
    std::array<bool, max_requests * sectors_each> served{};
    std::array<bool, max_requests> served_whole{};
    std::vector<std::unique_ptr<io::Request>> requests{};
    std::vector<Instant> submitted_at{};
    usize submitted = 0;

    // ---- registers ----

    u64 read(u64 at, u32 width) override {
        require(width == 4);
        if (gone) {
            return ~u32{0};
        }
        switch (at) {
        case 0x08: return pending;
        case 0x110: return is;
        case 0x114: return ie;
        case 0x118: return cmd | ((cmd & 1) != 0 || sticky ? 1u << 15 : 0) | ((cmd & 0x10) != 0 ? 1u << 14 : 0);
        case 0x120: return tfd;
        case 0x128: return ssts;
        case 0x130: return 0;
        case 0x134: return sact;
        case 0x138: return ci;
        default: require(false); return 0;
        }
    }
    void write(u64 at, u32 width, u64 wide_value) override {
        require(width == 4);
        const u32 value = static_cast<u32>(wide_value);
        if (gone) {
            return;
        }
        switch (at) {
        case 0x08: pending &= ~value; break;
        case 0x110: is &= ~value; break;
        case 0x114: ie = value; break;
        case 0x118:
            if ((value & 1) == 0) { // the commands are withdrawn
                asked.clear();
                sact = ci = 0;
            }
            cmd = value;
            break;
        case 0x12c:
            if ((value & 0xf) == 1) { // COMRESET
                require((cmd & 1) == 0);
                tfd = 0x50;
                unidentified = true;
            }
            break;
        case 0x130: break;
        case 0x134:
            require((cmd & 1) != 0 && (damaged || (sact & value) == 0));
            sact |= value;
            break;
        case 0x138:
            require((cmd & 1) != 0);
            for (u32 left = value & ~ci; left != 0; left &= left - 1) {
                fetch(static_cast<u32>(std::countr_zero(left)));
            }
            ci |= value;
            break;
        default: require(false);
        }
    }

    // ---- the device ----

    void fetch(u32 slot) {
        const std::byte* header = memory.data + list_at + slot * 32;
        const u32 flags = load<u32>(header);
        const u64 at = load<u64>(header + 8);
        require((flags & 0x1f) == 5 && at >= memory.bus && at + 256 <= memory.bus + memory.size);
        const auto* table = reinterpret_cast<const u8*>(at);
        require(table[0] == 0x27 && table[1] == 0x80);
        u64 bytes = 0;
        for (u32 i = 0; i < flags >> 16; ++i) {
            const auto* prd = reinterpret_cast<const std::byte*>(at + 0x80 + i * 16);
            const u64 bus = load<u64>(prd);
            const u32 size = (load<u32>(prd + 12) & 0x3fffff) + 1;
            const auto in = [&](DmaSpan span) { return bus >= span.bus && bus + size <= span.bus + span.size; };
            require(!wide || in(buffer) || in(memory)); // else it may be bounced
            bytes += size;
        }
        Asked a{slot, table[2], table[2] == 0x60 || table[2] == 0x61, 0, 0};
        for (const u32 i : {10u, 9u, 8u, 6u, 5u, 4u}) {
            a.lba = a.lba << 8 | table[i];
        }
        const bool transfers = a.queued || a.code == 0x25 || a.code == 0x35;
        if (transfers) {
            a.sectors = a.queued ? table[3] | table[11] << 8 : table[12] | table[13] << 8;
            require(a.sectors != 0 && bytes == a.sectors * u64{512} && a.lba + a.sectors <= served.size());
            require(((flags & 0x40) != 0) == (a.code == 0x61 || a.code == 0x35));
        }
        if (a.queued) {
            require(table[12] >> 3 == slot && (damaged || (sact >> slot & 1) != 0));
        } else {
            require(asked.empty() || damaged); // alone at the port
        }
        const bool own = a.code == 0x2f || a.code == 0xec || a.code == 0xef;
        require(own || !unidentified || damaged); // no command for a disk that may be another one
        asked.push_back(a);
    }
    void serve(const Asked& a) {
        if (a.sectors != 0) {
            std::fill_n(served.begin() + static_cast<std::ptrdiff_t>(a.lba), a.sectors, true);
        } else if (a.code == 0xea || a.code == 0x06) {
            std::fill(served_whole.begin(), served_whole.begin() + static_cast<std::ptrdiff_t>(submitted), true);
        }
    }
    void anything_served() {
        served.fill(true);
        served_whole.fill(true);
    }
    void bits_fis(u32 slots, u8 status) {
        store<u32>(memory.data + fis_at + 0x58 + 4, slots);
        store<u32>(memory.data + fis_at + 0x58, 0xa1u | 0x4000u | u32{status} << 16);
    }
    void register_fis(u8 status) { store<u32>(memory.data + fis_at + 0x40, 0x34u | 0x4000u | u32{status} << 16); }
    // Ends asked[at] without an error. `fis`: as a device does.
    void end(usize at, bool fis, bool whole) {
        const Asked a = asked[at];
        asked.erase(asked.begin() + static_cast<std::ptrdiff_t>(at));
        const u32 bit = u32{1} << a.slot;
        sact &= ~bit;
        ci &= ~bit;
        if (!a.queued) {
            const u32 bytes = whole ? a.sectors * 512 : a.sectors * 256;
            store<u32>(memory.data + list_at + a.slot * 32 + 4, bytes);
        }
        if (whole || a.code != 0x25) { // a short read
            serve(a);
        }
        if (a.code == 0x2f) {
            error_log();
        }
        if (a.code == 0xec) {
            identify(whole);
        }
        if (fis && a.queued) {
            const u32 before =
                load<u8>(memory.data + fis_at + 0x58) == 0xa1 ? load<u32>(memory.data + fis_at + 0x5c) : 0;
            bits_fis(bit | ((is & 8) != 0 ? before : 0), 0x40);
        } else if (fis) {
            register_fis(0x50);
        }
        cause(a.queued ? 8 : 1);
    }
    // The page that READ LOG EXT returns: a tag, and a checksum that is right or not.
    void error_log() {
        std::byte* page = memory.data + block_at;
        std::memset(page, 0, 512);
        const u8 how = input.byte();
        page[0] = std::byte{static_cast<u8>(how & 0x9f)}; // NQ, tag
        page[2] = std::byte{0x41};
        page[3] = std::byte{static_cast<u8>((how & 0x20) != 0 ? 0x40 : 0x04)};
        u8 sum = 0;
        for (u32 i = 0; i < 511; ++i) {
            sum = static_cast<u8>(sum + load<u8>(page + i));
        }
        page[511] = static_cast<std::byte>((how & 0x40) != 0 ? sum : static_cast<u8>(-sum));
    }
    // The answer to IDENTIFY DEVICE after a reset: in most cases that of the same disk.
    void identify(bool whole) {
        std::byte* page = memory.data + block_at;
        std::memcpy(page, &identity, 512);
        const u8 how = input.byte();
        replaced = replaced || (how & 7) == 7;
        if (replaced) {
            page[20 + how % 20] ^= std::byte{1}; // its serial number
        }
        store<u32>(memory.data + list_at + 4, whole ? 512 : how);
        unidentified = replaced || !whole;
    }
    void cause(u32 bits) {
        is |= bits;
        pending |= 1;
    }
    void interrupt() {
        if (!ended && !gone && ((is & ie) != 0 || damaged)) {
            ahci::HbaEvents::handler(hba);
        } else if (!ended && gone) {
            ahci::HbaEvents::handler(hba);
        }
    }

    // ---- the owner of the requests ----

    void submit() {
        if (submitted == max_requests) {
            return;
        }
        const usize i = submitted++;
        static constexpr io::Op ops[] = {io::Op::read, io::Op::write, io::Op::read,    io::Op::write,
                                         io::Op::read, io::Op::write, io::Op::discard, io::Op::flush};
        const io::Op op = ops[i % 8];
        const u32 bytes = i % 3 == 0 ? sectors_each * 512 : 4096;
        const DmaSpan span = op == io::Op::flush ? DmaSpan{}
                             : io::has_data(op)  ? buffer.subspan(static_cast<u32>(i % 4) * 512, bytes)
                                                 : DmaSpan{nullptr, 0, bytes};
        requests.push_back(std::make_unique<io::Request>(*disk, op, i * sectors_each, span));
        submitted_at.push_back(clock.time);
        disk->submit(*requests.back());
    }
    void forget(usize at) {
        const io::Request& r = *requests[at];
        if (!r.pending()) {
            require(r.status != io::Status::not_written);
            if (r.status == io::Status::ok && r.op <= io::Op::write) {
                const auto first = served.begin() + static_cast<std::ptrdiff_t>(r.lba);
                require(std::all_of(first, first + r.buffer.size / 512, [](bool s) { return s; }));
            } else if (r.status == io::Status::ok) {
                require(served_whole[r.lba / sectors_each]);
            }
        }
        requests.erase(requests.begin() + static_cast<std::ptrdiff_t>(at));
        submitted_at.erase(submitted_at.begin() + static_cast<std::ptrdiff_t>(at));
    }
    // Each reset waits for the command list, for COMRESET and for the disk, and a command that is sent afterwards for
    // its time-out; a few in a row close the disk.
    bool in_time(usize at) const {
        return !requests[at]->pending() || clock.time - std::max(acted, submitted_at[at]) < 60 * timeout;
    }

    void step() {
        if (input.empty()) {
            return;
        }
        acted = clock.time;
        const u8 what = input.byte();
        switch (what % 16) {
        case 0:
        case 1:
        case 2:
            for (u32 n = (what & 0x40) != 0 ? 32 : 1; n != 0 && !asked.empty(); --n) {
                end(input.byte() % asked.size(), (what & 0x80) == 0, (what & 0x20) == 0);
            }
            break;
        case 3: { // a command has failed
            static constexpr u8 errors[] = {0x40, 0x04, 0x84, 0x10, 0x01, 0x00};
            tfd = 0x41u | u32{errors[input.byte() % std::size(errors)]} << 8;
            if ((what & 0x10) != 0) {
                tfd |= (what & 0x20) != 0 ? 0x80u : 0x08u; // BSY or DRQ
            }
            if ((what & 0x40) != 0) {
                bits_fis(0, 0x41);
            }
            cause(1u << 30);
            break;
        }
        case 4: cause((what & 0x10) != 0 ? 1u << 29 : 1u << 27); break; // HBFS, IFS
        case 5:                                                         // the link
            ssts = (what & 0x10) != 0 ? 0 : 0x123;
            cause((what & 0x20) != 0 ? 1u << 22 : 1u << 6);
            break;
        case 6: { // nonsense in the memory that the HBA writes
            const u32 at = (what & 0x10) != 0 ? fis_at + 0x40 + input.byte() % 0x30 : input.word() % 2048;
            const auto bytes = input.take(input.byte() % 16);
            anything_served();
            damaged = damaged || at < fis_at;
            if (at < fis_at) { // only the counts of command headers
                store<u32>(memory.data + at / 32 * 32 + 4, at);
            } else {
                std::copy(bytes.begin(), bytes.end(), memory.data + at);
            }
            break;
        }
        case 7: // nonsense in registers
            anything_served();
            damaged = true;
            ((what & 0x10) != 0 ? sact : (what & 0x20) != 0 ? ci : is) = input.word();
            break;
        case 8: sticky = (what & 0x10) != 0; break;
        case 9: tfd = input.byte(); break; // BSY …
        case 10:
            for (u32 n = (what & 0x10) != 0 ? 300 : 1; n != 0; --n) {
                ahci::HbaEvents::handler(hba);
            }
            break;
        case 11:
            for (u32 n = what >> 4 & 3; n != 0; --n) {
                submit();
            }
            break;
        case 12:
            if (!requests.empty()) {
                const usize at = input.byte() % requests.size();
                if ((what & 0x10) != 0) {
                    static_cast<void>(disk->cancel(*requests[at]));
                } else {
                    forget(at);
                }
            }
            break;
        case 13: is |= input.byte(); break; // causes without an interrupt: a lost one
        default:
            switch (what >> 4) {
            case 1: gone = true; break;
            case 3: disk->queue().close(io::Status::device_gone, {Code::device_gone, "closed by the fuzzer"}); break;
            default: return; // time passes
            }
            break;
        }
        interrupt();
    }
};
} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    const u8 shape = input.byte();
    test::FakeMachine clock;
    clock.step = 20'000;
    io::Executor executor(clock.platform());
    test::HeapDma dma;
    Machine machine(input, clock);
    clock.on_idle_context = &machine;
    clock.on_idle = [](void* self) { static_cast<Machine*>(self)->step(); };
    auto memory = dma.buffer(ahci::PortMemory::bytes);
    auto buffer = dma.buffer(sectors_each * 512 + 4096);
    machine.memory = memory->span();
    machine.buffer = buffer->span();
    machine.wide = (shape & 1) == 0;
    {
        const Mmio abar(machine, 0x180);
        ahci::HbaEvents hba(executor);
        ahci::Port port(abar, 0);
        port.command(true);
        ahci::Disk disk(executor, dma, hba, port, ahci::PortMemory(*memory), machine.wide, timeout);
        machine.hba = &hba;
        machine.disk = &disk;
        hba.add(0, disk.events(), disk.queue());
        hba.open(abar, (shape & 2) != 0);
        ahci::Terms terms;
        terms.info.sectors = max_requests * sectors_each;
        terms.info.sector_size = terms.info.physical_sector_size = 512;
        terms.info.lba48 = true;
        terms.info.flush_ext = true;
        terms.depth = (shape & 4) != 0 ? 0 : (shape & 8) != 0 ? 4 : 32;
        terms.flush = terms.discard = true;
        std::fill_n(machine.identity.words.begin() + 10, 10, u16{0x3031}); // serial number
        terms.identity = drivers::ata::DeviceIdentity(machine.identity);
        terms.write_through = (shape & 16) != 0;
        disk.open(terms, {}, timeout);
        for (u32 i = 0; i < 10; ++i) {
            machine.submit();
        }
        bool some = true;
        for (u32 turns = 0; some || !input.empty(); ++turns) {
            require(turns < 100'000);
            executor.turn();
            some = false;
            for (usize i = machine.requests.size(); i-- > 0;) {
                const bool pending = machine.requests[i]->pending();
                some = some || pending;
                require(machine.in_time(i));
                if (!pending) {
                    machine.forget(i);
                }
            }
        }
        disk.close();
        require((machine.cmd & 1) == 0 || machine.gone || !disk.queue().is_open());
        machine.ended = true;
        disk.queue().reclaim();
    }
    buffer->abandon();
    memory->abandon();
    return 0;
}
