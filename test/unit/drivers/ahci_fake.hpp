// A strict AHCI HBA for tests: registers behind a BAR, command lists and FISes in memory, disks with NCQ. Written from
// the specifications [ahci-1.3.1, sata, ACS], not from the driver. A rule violation fails the running test. Include
// after unit/drivers/ata_fake.hpp, unit/drivers/pci_fake.hpp and unit/drivers/ata_machine.hpp.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.mmio;
import core.interrupt;
import drivers.ahci;

namespace ahci_test {
using namespace fl;
namespace pci = fl::drivers::pci;
namespace ahci = fl::drivers::ahci;
namespace ata = fl::drivers::ata;
using ata_test::Clock;
using ata_test::Drive;
using ata_test::Memory;
using ata_test::Sink;

/// Lines and messages, each with the handlers attached to it.
class Interrupts final : public InterruptController {
  public:
    struct Attached {
        u32 number; // a GSI or a vector
        InterruptHandler handler;
        void* context;
    };
    std::vector<Attached> lines;
    std::vector<Attached> messages;

    bool full = false; // nothing can be attached
    std::function<void()> on_attach;

    Result<void> attach_line(InterruptLine line, InterruptHandler handler, void* context, u32) override {
        if (full) {
            return Error{Code::exhausted, "no vector is free"};
        }
        lines.push_back({line.gsi, handler, context});
        return {};
    }
    void detach_line(InterruptLine line, InterruptHandler handler, void* context) override {
        std::erase_if(lines, [&](const Attached& a) {
            return a.number == line.gsi && a.handler == handler && a.context == context;
        });
    }
    Result<InterruptVector> attach_message(u32 processor, InterruptHandler handler, void* context) override {
        if (full) {
            return Error{Code::exhausted, "no vector is free"};
        }
        messages.push_back({0x40, handler, context});
        if (on_attach) {
            on_attach();
        }
        return InterruptVector{0x40, 0, processor};
    }
    Result<InterruptMessage> message_for(InterruptVector v) const override {
        return InterruptMessage{0xfee00000, v.vector};
    }
    Result<InterruptVector> attach_vector(InterruptHandler, void*, bool) override {
        return Error{Code::not_supported, "not in this test"};
    }
    void detach_vector(InterruptVector) override { messages.clear(); }
    static void call(const std::vector<Attached>& handlers) {
        for (usize i = 0; i < handlers.size(); ++i) { // allocates nothing: the driver may be what is measured
            handlers[i].handler(handlers[i].context);
        }
    }
};

constexpr u32 is_dhrs = 1u << 0, is_pss = 1u << 1, is_sdbs = 1u << 3, is_pcs = 1u << 6, is_prcs = 1u << 22,
              is_ifs = 1u << 27, is_tfes = 1u << 30;
constexpr u32 serr_n = 1u << 16, serr_x = 1u << 26;
constexpr u32 cmd_st = 1, cmd_sud = 2, cmd_fre = 1u << 4, cmd_fr = 1u << 14, cmd_cr = 1u << 15;

class Hba;

class Port {
  public:
    struct Command {
        u32 slot = 0;
        u8 code = 0;
        bool queued = false;
        bool to_device = false;
        u64 lba = 0;
        u32 count = 0; // sectors
        std::array<std::pair<u64, u32>, 8> memory{};
        u32 pieces = 0;
        io::Op op() const {
            return code == 0xe7 || code == 0xea || code == 0xef ? io::Op::flush
                   : code == 0x06                               ? io::Op::discard
                   : to_device                                  ? io::Op::write
                                                                : io::Op::read;
        }
    };
    enum class How : u8 { ok, unreadable, garbled, refused };

    std::optional<Drive> drive;
    u32 signature = 0x101;
    bool link = true;            // there is a link if there is a drive
    bool hold = false;           // commands wait for answer()
    bool busy = false;           // BSY after a reset
    bool dead = false;           // no command is ever completed
    bool no_log = false;         // READ LOG EXT is refused
    bool keeps_cache = false;    // SET FEATURES is refused
    bool cache_off = false;      // the write cache, until the next reset
    bool bad_log = false;        // its checksum is wrong
    bool nonsense = false;       // what is stored instead of Set Device Bits FISes
    bool lose_interrupt = false; // events set no bit in PxIS
    bool runs_on = false;        // CR stays set
    Nanoseconds stops_after = 0; // CR stays set for so long
    u32 extra_tags = 0;          // that answer_all() reports as ended besides those that have
    u32 short_reads = 0;         // non-queued reads that end after half of their data
    u32 stray = 0;               // bits that read as set in PxSACT and PxCI
    u32 fail_codes_left = 0;     // commands that end as refused
    std::set<u64> bad;           // unreadable sectors
    std::vector<u8> codes;       // of the commands received
    std::vector<std::pair<u64, u64>> trimmed;
    u32 resets = 0;
    u32 issues = 0;        // writes of PxCI
    Instant link_from = 0; // no link before

    u32 read(Hba& hba, u32 at);
    void write(Hba& hba, u32 at, u32 value);
    void reset();
    const std::vector<Command>& held() const { return under_way_; }
    void answer(Hba& hba, usize index, How how);
    /// Completes everything, with one Set Device Bits FIS for all queued ones.
    void answer_all(Hba& hba);
    void unplug(Hba& hba);
    void plug(Hba& hba);
    void event(Hba& hba, u32 cause);
    bool reachable(u64 bus, u64 size) const {
        return (cmd_ & cmd_cr) != 0 && std::ranges::any_of(under_way_, [&](const Command& c) {
                   return std::ranges::any_of(
                       c.memory, [&](const auto& m) { return m.first < bus + size && bus < m.first + m.second; });
               });
    }
    bool pending() const { return (is_ & ie_) != 0; }
    std::byte* fis_area(Memory& memory) { return memory.at(fb_, 256); }
    bool running() const { return (cmd_ & cmd_cr) != 0; }

  private:
    void command(Hba& hba, u32 value);
    void issue(Hba& hba, u32 bits);
    void take_issued(Hba& hba);
    /// A device was connected: the HBA sends no command before PxSERR.DIAG.X is cleared.
    bool waits_for_software() const { return (serr_ & serr_x) != 0; }
    void fetch(Hba& hba, u32 slot);
    void end(Hba& hba, Command command, How how, bool notify = true);
    void first_fis(Hba& hba);
    void store(Hba& hba, u32 at, std::initializer_list<u8> bytes);
    void register_fis(Hba& hba, u8 status, u8 error, u8 type, u32 at);
    bool move(Hba& hba, const Command& c, std::byte* data, u64 size);

    u64 clb_ = 0, fb_ = 0;
    u32 is_ = 0, ie_ = 0, cmd_ = 0, sctl_ = 0, serr_ = 0, sact_ = 0, ci_ = 0;
    u32 fetched_ = 0; // of ci_
    u32 sig_ = ~0u;
    u32 tfd_ = 0x7f;
    bool first_pending_ = true;
    Instant reset_at_ = 0;
    std::optional<std::pair<u8, u8>> queue_error_; // tag and error: only READ LOG EXT is accepted
    std::vector<Command> under_way_;
};

class Hba final : public MmioModel {
  public:
    Clock& clock;
    Memory& memory;
    Interrupts& interrupts;
    pci_test::Function& function;
    std::array<Port, 32> ports;
    u32 cap = 0xc0001f00 | 5; // S64A, SNCQ, 32 slots, 6 ports
    u32 pi = 0x3f;
    u32 cap2 = 0;
    u32 bohc = 0;
    bool firmware_releases = true;
    bool gone = false;
    bool hangs_in_reset = false;
    Nanoseconds latency = 50'000;
    u64 accesses = 0;
    u32 interrupts_raised = 0;
    u32 resets = 0;

    Hba(Clock& c, Memory& m, Interrupts& i, pci_test::Function& f) : clock(c), memory(m), interrupts(i), function(f) {}

    u64 read(u64 at, u32 width) override {
        ++accesses;
        EXPECT_EQ(width, 4u);
        if (gone) {
            return ~u32{0};
        }
        switch (at) {
        case 0x00: return cap;
        case 0x04: return ghc_;
        case 0x08: return is_;
        case 0x0c: return pi;
        case 0x24: return cap2;
        case 0x28: return bohc;
        default: break;
        }
        if (Port* port = port_at(at)) {
            return port->read(*this, at % 0x80);
        }
        ADD_FAILURE() << "no register at " << std::hex << at;
        return 0;
    }
    void write(u64 at, u32 width, u64 wide) override {
        ++accesses;
        EXPECT_EQ(width, 4u);
        const u32 value = static_cast<u32>(wide);
        if (gone) {
            return;
        }
        if (at == 0x04) {
            EXPECT_EQ(value & ~0x80000003u, 0u);
            if ((value & 1) != 0) {
                EXPECT_NE(ghc_ & 0x80000000, 0u) << "HR without AE";
                ++resets;
                for (Port& port : ports) {
                    port.reset();
                }
                is_ = 0;
                ghc_ = hangs_in_reset ? 0x80000001 : 0;
                return;
            }
            ghc_ = value;
            return update(true);
        }
        EXPECT_NE(ghc_ & 0x80000000, 0u) << "a register is written before AE is set: " << std::hex << at;
        if (at == 0x08) {
            is_ &= ~value;
            return update(true);
        }
        if (at == 0x28) {
            EXPECT_NE(cap2 & 1, 0u);
            bohc = (bohc & ~2u) | (value & 2);
            if ((value & 2) != 0 && firmware_releases) {
                bohc &= ~1u;
            }
            return;
        }
        if (Port* port = port_at(at)) {
            port->write(*this, at % 0x80, value);
            return update(false);
        }
        ADD_FAILURE() << "no register at " << std::hex << at;
    }
    /// `acknowledged`: IS was written: what remains in it interrupts again.
    void update(bool acknowledged) {
        const u32 before = acknowledged ? 0 : is_;
        for (u32 i = 0; i < 32; ++i) {
            is_ |= ports[i].pending() ? u32{1} << i : 0;
        }
        if ((ghc_ & 2) == 0) {
            return;
        }
        if (message()) {
            if (before == 0 && is_ != 0) {
                EXPECT_NE(function.bytes[4] & 4, 0) << "a message without bus mastering";
                ++interrupts_raised;
                Interrupts::call(interrupts.messages);
            }
            return;
        }
        if (in_handler_) {
            return;
        }
        in_handler_ = true;
        for (u32 times = 0; is_ != 0 && !interrupts.lines.empty(); ++times) {
            if (times == 8) {
                ADD_FAILURE() << "the handler leaves the line asserted: IS is " << std::hex << is_;
                break;
            }
            ++interrupts_raised;
            Interrupts::call(interrupts.lines);
        }
        in_handler_ = false;
    }
    bool message() const { return (function.bytes[0x82] & 1) != 0; }
    void spurious() { Interrupts::call(message() ? interrupts.messages : interrupts.lines); }
    bool wide() const { return (cap & 0x80000000) != 0; }
    u32 slots() const { return (cap >> 8 & 0x1f) + 1; }

  private:
    Port* port_at(u64 at) {
        const u64 index = (at - 0x100) / 0x80;
        if (at < 0x100 || index >= 32) {
            return nullptr;
        }
        EXPECT_NE(pi >> index & 1, 0u) << "port " << index << " is not implemented";
        return &ports[index];
    }
    u32 ghc_ = 0;
    u32 is_ = 0;
    bool in_handler_ = false;
};

inline u32 Port::read(Hba& hba, u32 at) {
    switch (at) {
    case 0x10: return is_;
    case 0x14: return ie_;
    case 0x18: return cmd_;
    case 0x20: return tfd_ | (busy || waits_for_software() ? 0x80 : 0);
    case 0x24: return sig_;
    case 0x28: return drive && link && (sctl_ & 0xf) == 0 && hba.clock.time >= link_from ? 0x113 : 0;
    case 0x2c: return sctl_;
    case 0x30: return serr_;
    case 0x34: return sact_ | stray;
    case 0x38: return ci_ | stray;
    default: ADD_FAILURE() << "read of port register " << std::hex << at; return 0;
    }
}

inline void Port::write(Hba& hba, u32 at, u32 value) {
    const auto base = [&](u64& reg, bool high, u32 aligned, u32 flag) {
        EXPECT_EQ(cmd_ & flag, 0u) << "an address changes while the HBA uses it";
        EXPECT_TRUE(high || value % aligned == 0) << "alignment of " << std::hex << value;
        EXPECT_TRUE(!high || value == 0 || hba.wide()) << "an address above 4 GiB";
        reg = high ? (reg & 0xffffffff) | u64{value} << 32 : (reg & ~u64{0xffffffff}) | value;
    };
    switch (at) {
    case 0x00: return base(clb_, false, 1024, cmd_st | cmd_cr);
    case 0x04: return base(clb_, true, 1, cmd_st | cmd_cr);
    case 0x08: return base(fb_, false, 256, cmd_fre | cmd_fr);
    case 0x0c: return base(fb_, true, 1, cmd_fre | cmd_fr);
    case 0x10: is_ &= ~(value & ~(is_pcs | is_prcs)); return;
    case 0x14: ie_ = value; return;
    case 0x18: return command(hba, value);
    case 0x2c:
        EXPECT_EQ(cmd_ & (cmd_st | cmd_cr), 0u) << "COMRESET while the command list runs";
        if ((value & 0xf) == 1) {
            reset_at_ = hba.clock.time;
        } else if ((sctl_ & 0xf) == 1) {
            EXPECT_GE(hba.clock.time - reset_at_, 1'000'000u) << "COMRESET is too short";
            const u32 keep[] = {cmd_, ie_, is_, serr_};
            reset();
            cmd_ = keep[0], ie_ = keep[1], is_ = keep[2], serr_ = keep[3];
            ++resets;
            if (drive && link) { // the device answers by COMINIT
                serr_ |= serr_n | serr_x;
                is_ |= is_prcs | is_pcs;
            }
            queue_error_.reset();
            cache_off = false;
        }
        sctl_ = value;
        return;
    case 0x30:
        serr_ &= ~value;
        if ((value & serr_x) != 0 && (ci_ & ~fetched_) != 0) {
            take_issued(hba); // what the HBA has held back
        }
        is_ &= (serr_ & serr_n) != 0 ? ~0u : ~is_prcs;
        is_ &= (serr_ & serr_x) != 0 ? ~0u : ~is_pcs;
        return;
    case 0x34:
        EXPECT_NE(cmd_ & cmd_st, 0u) << "PxSACT without ST";
        EXPECT_EQ(value & (sact_ | ci_), 0u) << "a tag is used twice";
        sact_ |= value;
        return;
    case 0x38: return issue(hba, value);
    default: ADD_FAILURE() << "write of port register " << std::hex << at;
    }
}

inline void Port::reset() {
    is_ = ie_ = serr_ = sact_ = ci_ = fetched_ = sctl_ = cmd_ = 0;
    sig_ = ~0u;
    tfd_ = 0x7f;
    first_pending_ = true;
    under_way_.clear();
}

inline void Port::command(Hba& hba, u32 value) {
    if ((value & cmd_fre) != 0 && (cmd_ & cmd_fre) == 0) {
        EXPECT_NE(fb_, 0u);
        cmd_ |= cmd_fr;
    }
    if ((value & cmd_fre) == 0 && (cmd_ & cmd_fre) != 0) {
        EXPECT_EQ(cmd_ & cmd_cr, 0u) << "FRE is cleared while the command list runs";
        cmd_ &= ~cmd_fr;
    }
    if ((value & cmd_st) != 0 && (cmd_ & cmd_st) == 0) {
        EXPECT_NE(cmd_ & cmd_fr, 0u) << "ST without FRE";
        EXPECT_EQ(cmd_ & cmd_cr, 0u) << "ST while CR is still set";
        EXPECT_EQ(tfd_ & 0x88, 0u) << "ST while the device is busy";
        EXPECT_TRUE(drive && link) << "ST without a device";
        EXPECT_EQ(is_ & is_tfes, 0u) << "ST before the error is cleared";
        cmd_ |= cmd_cr;
    }
    if ((value & cmd_st) == 0 && (cmd_ & cmd_st) != 0 && stops_after != 0) {
        hba.clock.at(hba.clock.time + stops_after, [this] {
            cmd_ &= ~cmd_cr;
            ci_ = sact_ = fetched_ = 0;
            under_way_.clear();
        });
    } else if ((value & cmd_st) == 0 && (cmd_ & cmd_st) != 0 && !runs_on) {
        cmd_ &= ~cmd_cr;
        ci_ = sact_ = fetched_ = 0;
        under_way_.clear();
    }
    cmd_ = (cmd_ & (cmd_fr | cmd_cr)) | (value & ~(cmd_fr | cmd_cr));
    if ((cmd_ & cmd_fre) != 0 && first_pending_ && drive && link && !busy) {
        first_fis(hba);
    }
}

inline void Port::store(Hba& hba, u32 at, std::initializer_list<u8> bytes) {
    if ((cmd_ & cmd_fr) == 0) {
        return;
    }
    if (std::byte* area = hba.memory.at(fb_, 256)) {
        for (const u8 b : bytes) {
            area[at++] = std::byte{b};
        }
    }
}
inline void Port::register_fis(Hba& hba, u8 status, u8 error, u8 type, u32 at) {
    tfd_ = status | u32{error} << 8;
    store(hba, at, {type, 0x40, status, error, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
}
inline void Port::first_fis(Hba& hba) {
    first_pending_ = false;
    sig_ = signature;
    register_fis(hba, 0x50, 1, 0x34, 0x40);
}

inline void Port::issue(Hba& hba, u32 bits) {
    ++issues;
    EXPECT_EQ(cmd_ & (cmd_st | cmd_cr), cmd_st | cmd_cr) << "PxCI while the command list does not run";
    EXPECT_EQ(bits & ci_, 0u) << "a slot is issued twice";
    EXPECT_EQ(hba.slots() == 32 ? 0 : bits >> hba.slots(), 0u) << "a slot beyond CAP.NCS";
    ci_ |= bits;
    if (!waits_for_software()) {
        take_issued(hba);
    }
}

inline void Port::take_issued(Hba& hba) {
    const u32 bits = ci_ & ~fetched_;
    under_way_.reserve(32);
    const usize before = under_way_.size();
    for (u32 slot = 0; slot < 32; ++slot) {
        if ((bits >> slot & 1) != 0) {
            fetch(hba, slot);
        }
    }
    fetched_ = ci_;
    // The HBA chooses the order of the commands of one write.
    std::ranges::sort(std::span(under_way_).subspan(before), {}, &Command::lba);
}

inline void Port::fetch(Hba& hba, u32 slot) {
    u32 header[8] = {};
    std::byte* at = hba.memory.at(clb_ + slot * 32, 32);
    if (at == nullptr) {
        return;
    }
    std::memcpy(header, at, 32);
    EXPECT_EQ(header[0] & 0x1f, 5u) << "length of the command FIS in dwords";
    EXPECT_EQ(header[0] & 0xffa0, 0u) << "A, P, R, B, C and PMP";
    EXPECT_EQ(header[1], 0u) << "PRDBC";
    EXPECT_EQ(header[2] % 128, 0u) << "alignment of the command table";
    EXPECT_EQ(header[4] | header[5] | header[6] | header[7], 0u);
    const u64 table = header[2] | u64{header[3]} << 32;
    const u32 entries = header[0] >> 16;
    std::byte* bytes = hba.memory.at(table, 0x80 + 16 * entries);
    if (bytes == nullptr) {
        return;
    }
    std::array<u8, 20> f{};
    std::memcpy(f.data(), bytes, 20);
    EXPECT_EQ(f[0], 0x27);
    EXPECT_EQ(f[1], 0x80);
    EXPECT_EQ(f[14] | f[15] | f[16] | f[17] | f[18] | f[19], 0);
    Command c{.slot = slot, .code = f[2], .to_device = (header[0] & 0x40) != 0};
    u64 total = 0;
    for (u32 i = 0; i < entries; ++i) {
        u32 prd[4];
        std::memcpy(prd, bytes + 0x80 + 16 * i, 16);
        EXPECT_EQ(prd[0] & 1, 0u) << "a descriptor's address is odd";
        EXPECT_EQ(prd[3] & 1, 1u) << "a descriptor's length is odd";
        EXPECT_EQ(prd[3] & ~0x3fffffu, 0u);
        EXPECT_TRUE(hba.wide() || prd[1] == 0) << "a descriptor above 4 GiB";
        EXPECT_EQ(prd[2], 0u);
        c.memory.at(c.pieces) = {prd[0] | u64{prd[1]} << 32, (prd[3] & 0x3fffff) + 1};
        total += c.memory[c.pieces++].second;
    }
    codes.push_back(c.code);
    c.queued = c.code == 0x60 || c.code == 0x61;
    const u64 lba48 = f[4] | u64{f[5]} << 8 | u64{f[6]} << 16 | u64{f[8]} << 24 | u64{f[9]} << 32 | u64{f[10]} << 40;
    const u32 count = f[12] | u32{f[13]} << 8;
    c.lba = lba48;
    switch (c.code) {
    case 0x60:
    case 0x61: {
        EXPECT_EQ(f[7] & 0x40, 0x40);
        EXPECT_EQ(f[12] >> 3, slot) << "tag";
        EXPECT_EQ(f[12] & 7, 0);
        EXPECT_EQ(f[13], 0);
        EXPECT_NE(sact_ >> slot & 1, 0u) << "a queued command without its bit in PxSACT";
        EXPECT_TRUE(drive && (drive->id.words[76] & 0x100) != 0 && (hba.cap >> 30 & 1) != 0) << "no NCQ here";
        EXPECT_LE(slot, drive->id.words[75] & 0x1fu) << "a tag beyond the queue depth";
        const u32 sectors = f[3] | u32{f[11]} << 8;
        c.count = sectors == 0 ? 65536 : sectors;
        ci_ &= ~(u32{1} << slot); // accepted
        tfd_ = 0x50;
        break;
    }
    case 0x25:
    case 0x35: c.count = count == 0 ? 65536 : count; break;
    case 0xc8:
    case 0xca:
        EXPECT_EQ(f[8] | f[9] | f[10] | f[11] | f[13] | f[3], 0) << "48-bit fields of a 28-bit command";
        c.lba = (lba48 & 0xffffff) | u64{f[7] & 0xfu} << 24;
        c.count = f[12] == 0 ? 256 : f[12];
        break;
    case 0xe7:
    case 0xea: break;
    case 0xec: EXPECT_EQ(total, 512u); break;
    case 0xef: EXPECT_EQ(f[3], 0x82) << "disable the write cache"; break;
    case 0x2f:
        EXPECT_EQ(total, 512u);
        EXPECT_EQ(lba48, 0x10u) << "log address 10h, page 0";
        EXPECT_EQ(count, 1u);
        break;
    case 0x06:
        EXPECT_EQ(f[3], 1) << "TRIM";
        EXPECT_EQ(count * 512, total);
        EXPECT_TRUE(c.to_device);
        break;
    default: ADD_FAILURE() << "command " << std::hex << int{c.code};
    }
    if (!c.queued) {
        EXPECT_EQ(sact_, 0u) << "a command that is not queued among queued ones";
        EXPECT_TRUE(under_way_.empty()) << "a command that is not queued beside another one";
        tfd_ = 0xd0;
    }
    if (c.count != 0) {
        EXPECT_EQ(f[7] & 0x40, 0x40) << "LBA";
        EXPECT_EQ(total, u64{c.count} * drive->sector_size) << "length of the descriptors";
        EXPECT_LE(c.lba + c.count, drive->sectors);
        EXPECT_EQ(c.to_device, c.code == 0x61 || c.code == 0x35 || c.code == 0xca);
    }
    for (const Command& other : under_way_) {
        EXPECT_TRUE(other.queued) << "a command beside one that is not queued";
    }
    under_way_.push_back(c);
    const bool own = c.code == 0xec || c.code == 0x2f || c.code == 0xef;
    if (!dead && (!hold || own)) {
        hba.clock.at(hba.clock.time + hba.latency, [this, &hba, slot] {
            for (usize i = 0; i < under_way_.size(); ++i) {
                if (under_way_[i].slot == slot) {
                    return answer(hba, i, How::ok);
                }
            }
        });
    }
}

inline bool Port::move(Hba& hba, const Command& c, std::byte* data, u64 size) {
    u64 done = 0;
    for (const auto& [bus, length] : std::span(c.memory).first(c.pieces)) {
        for (u64 at = bus; at < bus + length && done < size;) { // page by page: allocations may adjoin
            const u64 part = std::min({4096 - at % 4096, bus + length - at, size - done});
            std::byte* const memory = hba.memory.at(at, part);
            if (memory == nullptr) {
                return false;
            }
            c.to_device ? std::memcpy(data + done, memory, part) : std::memcpy(memory, data + done, part);
            done += part;
            at += part;
        }
    }
    if (!c.queued) {
        u32 moved = static_cast<u32>(done);
        std::memcpy(hba.memory.at(clb_ + c.slot * 32 + 4, 4), &moved, 4);
    }
    return true;
}

inline void Port::answer(Hba& hba, usize index, How how) {
    const Command c = under_way_.at(index);
    end(hba, c, how);
}
inline void Port::answer_all(Hba& hba) {
    const auto all = under_way_;
    u32 tags = 0;
    for (const Command& c : all) {
        end(hba, c, How::ok, false);
        tags |= u32{1} << c.slot;
    }
    tags |= extra_tags;
    store(hba, 0x58,
          {0xa1, 0x40, 0x50, 0, static_cast<u8>(tags), static_cast<u8>(tags >> 8), static_cast<u8>(tags >> 16),
           static_cast<u8>(tags >> 24)});
    event(hba, is_sdbs);
}

inline void Port::end(Hba& hba, Command c, How how, bool notify) {
    for (u64 i = 0; i < c.count; ++i) {
        how = bad.contains(c.lba + i) ? How::unreadable : how;
    }
    if (fail_codes_left != 0 || (c.code == 0x2f && no_log) || (c.code == 0xef && keeps_cache) ||
        (queue_error_ && c.code != 0x2f)) {
        fail_codes_left -= fail_codes_left != 0 ? 1 : 0;
        how = How::refused;
    }
    const u8 error = how == How::unreadable ? 0x40 : how == How::garbled ? 0x84 : how == How::refused ? 0x04 : 0;
    if (how != How::ok) {
        if (c.queued) {
            queue_error_ = {static_cast<u8>(c.slot), error};
            tfd_ = 0x41 | u32{error} << 8;
            store(hba, 0x58, {0xa1, 0x40, 0x41, error, 0, 0, 0, 0});
        } else {
            register_fis(hba, 0x51, error, 0x34, 0x40);
        }
        return event(hba, is_tfes | (c.queued ? is_sdbs : is_dhrs)); // everything stays under way
    }
    std::erase_if(under_way_, [&](const Command& other) { return other.slot == c.slot; });
    std::vector<std::byte> data(u64{c.count} * (drive ? drive->sector_size : 512));
    u32 cause = is_dhrs;
    switch (c.op()) {
    case io::Op::write_zeroes:
    case io::Op::secure_discard: ADD_FAILURE() << "ATA has no such command"; break;
    case io::Op::flush:
        cache_off = cache_off || c.code == 0xef;
        if (c.code == 0xef) {
            break;
        }
        drive->is_flushed = true;
        ++drive->flushes;
        break;
    case io::Op::discard: {
        std::array<u64, 64> ranges;
        if (move(hba, c, reinterpret_cast<std::byte*>(ranges.data()), 512)) {
            for (const u64 r : ranges) {
                if (r >> 48 != 0) {
                    trimmed.emplace_back(r & 0xffff'ffff'ffff, r >> 48);
                    for (u64 i = 0; i < r >> 48; ++i) {
                        drive->written[(r & 0xffff'ffff'ffff) + i].assign(drive->sector_size, std::byte{0});
                    }
                }
            }
        }
        break;
    }
    case io::Op::read:
        if (c.code == 0xec) {
            move(hba, c, reinterpret_cast<std::byte*>(drive->id.words.data()), 512);
            cause = is_pss;
        } else if (c.code == 0x2f) {
            std::array<u8, 512> page{};
            page[0] = queue_error_ ? queue_error_->first : 0x80;
            page[2] = 0x41;
            page[3] = queue_error_ ? queue_error_->second : 0;
            u8 sum = bad_log ? 1 : 0;
            for (const u8 b : page) {
                sum = static_cast<u8>(sum + b);
            }
            page[511] = static_cast<u8>(-sum);
            move(hba, c, reinterpret_cast<std::byte*>(page.data()), 512);
            if (queue_error_) { // all queued commands are discarded
                store(hba, 0x58, {0xa1, 0x00, 0x50, 0, 0xff, 0xff, 0xff, 0xff});
            }
            queue_error_.reset();
            cause = is_pss;
        } else {
            for (u64 i = 0; i < c.count; ++i) {
                drive->read(c.lba + i, data.data() + i * drive->sector_size);
            }
            move(hba, c, data.data(), !c.queued && short_reads != 0 ? --short_reads, data.size() / 2 : data.size());
        }
        break;
    case io::Op::write:
        move(hba, c, data.data(), data.size());
        for (u64 i = 0; i < c.count; ++i) {
            drive->write(c.lba + i, data.data() + i * drive->sector_size);
        }
        break;
    }
    if (c.queued) {
        sact_ &= ~(u32{1} << c.slot);
        tfd_ = 0x40;
        if (!notify) {
            return;
        }
        const u32 tag = u32{1} << c.slot;
        if (nonsense) {
            store(hba, 0x58, {0xa1, 0xff, 0x40, 0x77, 0, 0, 0, 0});
        } else {
            store(hba, 0x58,
                  {0xa1, 0x40, 0x40, 0, static_cast<u8>(tag), static_cast<u8>(tag >> 8), static_cast<u8>(tag >> 16),
                   static_cast<u8>(tag >> 24)});
        }
        return event(hba, is_sdbs);
    }
    ci_ &= ~(u32{1} << c.slot);
    fetched_ &= ci_;
    if (cause == is_dhrs) {
        register_fis(hba, 0x50, 0, 0x34, 0x40);
    } else {
        tfd_ = 0x50;
    }
    event(hba, cause);
}

inline void Port::event(Hba& hba, u32 cause) {
    if (lose_interrupt) {
        return;
    }
    is_ |= cause;
    hba.update(false);
}
inline void Port::unplug(Hba& hba) {
    link = false;
    first_pending_ = true;
    cache_off = false;
    queue_error_.reset();
    under_way_.clear();
    serr_ |= serr_n;
    event(hba, is_prcs);
}
inline void Port::plug(Hba& hba) {
    link = true;
    serr_ |= serr_n | serr_x;
    event(hba, is_prcs | is_pcs);
}

/// A machine with one HBA, and a controller of the driver.
struct Machine {
    Clock clock;
    Memory memory;
    Interrupts interrupts;
    Sink sink;
    io::Executor executor{clock.platform()};
    pci_test::Space space;
    pci_test::Function& function = space.add(0, 31, 2, 0x8086, 0x2922, 0x010601);
    pci_test::Mapper mapper;
    Hba hba{clock, memory, interrupts, function};
    drivers::Environment environment;
    std::optional<ahci::Controller> controller;
    static constexpr u64 base = 0xfebd1000;

    explicit Machine(Nanoseconds timeout = 100'000'000)
        : environment{.executor = executor,
                      .dma = memory,
                      .interrupts = interrupts,
                      .disks = sink,
                      .timeout = timeout,
                      .mmio = mapper} {
        function.set32(0x24, base);
        function.bar_mask[5] = 0xffffe000;
        function.set32(0x24, 0xfebd0000);
        mapper.places[0xfebd0000] = {&hba, 0x2000};
        function.add_capability(0x80, 0x05); // MSI, one message, 64-bit address
        function.set16(0x82, 0x0080);
        function.bytes[0x3c] = 10;
        function.bytes[0x3d] = 1;
    }
    void withhold(drivers::Feature feature) { environment.withheld_features |= to_underlying(feature); }
    /// A disk with NCQ; `depth` 0: without.
    Port& add(u32 number, u64 sectors = 1 << 20, u32 sector_size = 512, u32 depth = 32) {
        Port& port = hba.ports[number];
        Drive& d = port.drive.emplace();
        d.sectors = sectors;
        d.sector_size = sector_size;
        d.id = ata_test::identify_words(sectors, sector_size);
        d.id.words[75] = depth != 0 ? static_cast<u16>(depth - 1) : 0;
        d.id.words[76] = depth != 0 ? 0x0106 : 0x0006;
        d.id.words[169] = 1;
        set_serial_number(d, number);
        return port;
    }
    static void set_serial_number(Drive& d, u32 number) { // ten words of ASCII
        std::fill_n(d.id.words.begin() + 10, 10, u16{0x3030});
        d.id.words[19] = static_cast<u16>(0x3030 + number);
    }
    /// Another disk in the place of the port's, of the same model and size.
    void replace(u32 number, u32 serial_number) {
        Port& port = hba.ports[number];
        port.unplug(hba);
        port.drive->written.clear();
        port.codes.clear();
        set_serial_number(*port.drive, serial_number);
        port.plug(hba);
    }
    Result<void> attach() {
        controller.emplace(environment);
        return executor.run(controller->attach(*pci::look_up(space, {0, 31, 2})));
    }
    ahci::Disk& disk(u32 port = 0) { return *controller->disk(port); }
    template <class F>
    bool turns_until(F&& f, Nanoseconds bound = 10'000'000'000) {
        for (const Instant end = clock.time + bound; !f();) {
            if (clock.time > end) {
                return false;
            }
            executor.turn();
        }
        return true;
    }
    Result<void> read(io::BlockDevice& d, u64 lba, DmaSpan into) {
        return executor.run(ata_test::Machine::do_read(d, lba, into));
    }
    Result<void> write(io::BlockDevice& d, u64 lba, DmaSpan from) {
        return executor.run(ata_test::Machine::do_write(d, lba, from));
    }
    Result<void> flush(io::BlockDevice& d) { return executor.run(ata_test::Machine::do_flush(d)); }
};

} // namespace ahci_test
