// A strict IDE channel for tests: two devices, a bus-master engine, memory, interrupts and a clock that jumps. Written
// from the specifications [ATA-7, ACS, BMIDE], not from the driver. A rule violation fails the running test. Include
// after gtest and the standard headers.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.time;
import core.text;
import core.dma;
import core.interrupt;
import io.task;
import io.executor;
import io.block;
import drivers.driver;
import drivers.ata;

#include "unit/core/interrupt_fake.hpp"

namespace ata_test {
using namespace fl;
namespace ata = fl::drivers::ata;

/// Time advances only while the executor sleeps: to the next event or the end of the sleep.
class Clock {
  public:
    Instant time = 1'000'000;

    io::Platform platform() {
        return {
            this, [](void* c) { return static_cast<Clock*>(c)->time; },
            [](void* c, Instant until, const std::atomic<bool>& wake) { static_cast<Clock*>(c)->idle(until, wake); }};
    }
    void at(Instant when, std::function<void()> what) { events_.emplace(when, std::move(what)); }
    /// Stops the whole machine, devices included: pending operations take as long afterwards as before.
    void stop(Nanoseconds length) {
        time += length;
        std::multimap<Instant, std::function<void()>> later;
        for (auto& [when, what] : events_) {
            later.emplace(when + length, std::move(what));
        }
        events_ = std::move(later);
    }
    void idle(Instant until, const std::atomic<bool>& wake) {
        while (!wake && !events_.empty() && events_.begin()->first <= until) {
            auto node = events_.extract(events_.begin());
            time = std::max(time, node.key());
            node.mapped()();
        }
        if (!wake) {
            // An unbounded sleep ends with a spurious interrupt.
            time = std::max(time, until == never ? time + 10'000'000 : until);
        }
    }

  private:
    std::multimap<Instant, std::function<void()>> events_;
};

/// Physical memory: the test chooses the bus address of every allocation.
class Memory final : public DmaAllocator {
  public:
    u64 next_bus = 0x100000;
    u64 high_bus = 0; // if not 0, the address of memory allocated without a limit
    u32 allocations = 0;
    bool refuse = false;

    Result<DmaSpan> allocate(u32 size, u64 limit) override {
        size = align_up(size, u32{4096});
        if (high_bus != 0 && limit == ~u64{0}) {
            const DmaSpan span = place(high_bus, size);
            high_bus += size;
            return span;
        }
        if (refuse || next_bus + size > limit) {
            return Error{Code::exhausted, "no memory"};
        }
        ++allocations;
        const DmaSpan span = place(next_bus, size);
        next_bus += size;
        return span;
    }
    void free(DmaSpan span) override { blocks_.erase(span.bus); }
    DmaSpan place(u64 bus, u32 size) {
        auto& block = blocks_[bus];
        block.assign(size, std::byte{0});
        return {block.data(), bus, size};
    }
    /// Host address of a range accessed by the device; if it is not inside one allocation, nullptr and a failed test.
    std::byte* at(u64 bus, u64 size) {
        auto it = blocks_.upper_bound(bus);
        if (it != blocks_.begin()) {
            --it;
            if (bus + size <= it->first + it->second.size()) {
                return it->second.data() + (bus - it->first);
            }
        }
        ADD_FAILURE() << "DMA outside of all allocations: " << std::hex << bus << " + " << size;
        return nullptr;
    }

  private:
    std::map<u64, std::vector<std::byte>> blocks_;
};

struct Sink final : drivers::DiskSink {
    std::vector<bool> offer = std::vector<bool>(8, true);
    std::map<u32, io::BlockDevice*> disks;
    std::map<std::string, drivers::Unused> left; // units that were found but are not driven
    std::string reasons;
    bool busy = false;
    bool offered(u32 n) override { return n >= offer.size() || offer[n]; }
    bool twins = false; // the disks of native drivers can be those of synthetic ones
    u32 twin_at(u32 position) override { return twins ? position : no_twin; }
    void unused(const drivers::UnusedUnit& unit) override {
        EXPECT_TRUE(left.emplace(std::string(unit.address), unit.why).second) << unit.address << " twice";
        reasons += std::string(unit.reason) + "\n";
    }
    FixedText<16> free_name(std::string_view prefix) override {
        return drivers::disk_name(prefix, static_cast<u32>(disks.size()));
    }
    Result<void> announce(io::BlockDevice& disk, u32 n) override {
        if (busy) {
            return Error{Code::busy, "another driver has it"};
        }
        disks[n] = &disk;
        return {};
    }
};

/// A disk. Sectors never written hold their own LBA in every 8 bytes.
struct Drive {
    bool packet = false;
    bool no_multiple = false;  // rejects SET MULTIPLE MODE
    bool no_signature = false; // a packet device that shows no signature when it rejects IDENTIFY DEVICE
    u64 sectors = 1 << 20;
    u32 sector_size = 512;
    ata::IdentifyData id;
    std::map<u64, std::vector<std::byte>> written;
    bool is_flushed = true;
    u32 flushes = 0;
    bool keeps_cache = false; // refuses to switch off its write cache
    bool cache_off = false;   // until the next reset

    void read(u64 lba, std::byte* into) const {
        if (auto it = written.find(lba); it != written.end()) {
            std::memcpy(into, it->second.data(), sector_size);
            return;
        }
        for (u32 i = 0; i < sector_size; i += 8) {
            std::memcpy(into + i, &lba, 8);
        }
    }
    void write(u64 lba, const std::byte* from) {
        written[lba].assign(from, from + sector_size);
        is_flushed = is_flushed && cache_off;
    }
};

class Channel {
  public:
    Clock& clock;
    Memory& memory;
    test::Interrupts& interrupts;
    u16 command = 0x1f0;
    u16 control = 0x3f6;
    u16 bus_master = 0xc040;
    u32 gsi = 14;
    bool level = false;
    std::array<std::optional<Drive>, 2> drives;

    // Faults to inject, each counted down.
    u32 hang = 0;     // commands that are never completed
    u8 hang_code = 0; // one command of this code, to this unit, is never completed either
    int hang_unit = 0;
    u32 refuse_features = 0;   // SET FEATURES commands that are rejected
    bool dead = false;         // not even after a reset
    u32 lose_interrupt = 0;    // commands whose interrupt does not arrive
    u32 bus_error = 0;         // transfers that end with the bus-master error bit set
    u32 crc_error = 0;         // transfers that end with ICRC
    u32 abort = 0;             // commands that are rejected
    u8 abort_status = 0x51;    // the status for them
    u32 short_transfer = 0;    // transfers that end well before the end of the memory
    std::set<u64> bad;         // LBAs that fail with UNC
    bool words = true;         // 16-bit accesses reach both registers
    bool command_words = true; // the same for the command register
    bool floating = false;
    bool answers_for_absent = false; // device 0 drives the bus when device 1 is selected [ATA-7 §9.16.2]
    // QEMU's behaviour: without a master, the slave's cable keeps registers, reads 50h and aborts every command
    bool empty_master = false;
    bool one_device = false; // the device bit is not decoded: device 0 answers for both devices
    Nanoseconds latency = 50'000;
    Nanoseconds latency_per_sector = 0; // additional time of a transfer
    Nanoseconds pio_latency = 0;
    Nanoseconds reset_latency = 0; // busy time after a reset
    bool hold = false;             // transfers and flushes stay in progress until release()

    // Observations.
    u64 accesses = 0;
    u32 commands = 0;
    u32 resets = 0;
    std::vector<u8> codes;
    std::vector<std::string> trace; // accesses, if tracing
    bool tracing = false;

    Channel(Clock& c, Memory& m, test::Interrupts& i) : clock(c), memory(m), interrupts(i) {}

    u8 in8(u16 port) {
        ++accesses;
        note("in8", port);
        if (port == control) {
            return status_seen(false);
        }
        if (port >= command && port < command + 8) {
            return read_register(port - command);
        }
        if (port == bus_master) {
            return bm_command_;
        }
        if (port == bus_master + 2) {
            return bm_status_;
        }
        ADD_FAILURE() << "in8 from port " << std::hex << port;
        return 0xff;
    }
    void out8(u16 port, u8 value) {
        ++accesses;
        note("out8", port);
        if (port == control) {
            write_control(value);
        } else if (port >= command && port < command + 8) {
            write_register(port - command, value);
        } else if (port == bus_master) {
            write_bm_command(value);
        } else if (port == bus_master + 2) {
            bm_status_ = static_cast<u8>((value & 0x60) | (bm_status_ & 1) | (bm_status_ & ~value & 6));
        } else {
            ADD_FAILURE() << "out8 to port " << std::hex << port;
        }
    }
    void out16(u16 port, u16 value) {
        ++accesses;
        note("out16", port);
        const int r = port - command;
        if (r < 2 || r > 6 || r % 2 != 0) {
            ADD_FAILURE() << "out16 to port " << std::hex << port;
            return;
        }
        write_register(r, static_cast<u8>(value));
        if (r == 6 ? command_words && words : words) {
            write_register(r + 1, static_cast<u8>(value >> 8));
        }
    }
    void out32(u16 port, u32 value) {
        ++accesses;
        note("out32", port);
        EXPECT_EQ(port, bus_master + 4);
        EXPECT_EQ(value % 4, 0u) << "the table must be aligned to 4";
        EXPECT_FALSE(bm_status_ & 1) << "table changed while active";
        bm_table_ = value;
    }
    void in16_string(u16 port, u16* into, u64 count) {
        ++accesses;
        note("ins16", port);
        EXPECT_EQ(port, command);
        ASSERT_EQ(count, 256u);
        ASSERT_TRUE(status_ & 0x08) << "data read without DRQ";
        std::memcpy(into, drives[unit()]->id.words.data(), 512);
        status_ = 0x50;
    }
    bool started() const { return (bm_status_ & 1) != 0; }
    struct Transfer {
        bool is_write = false;
        u64 lba = 0;
        u32 count = 0; // sectors; 0: a flush
        u64 generation = 0;
    };
    /// The transfer or flush held for release(); none after the engine was stopped or the channel reset.
    std::optional<Transfer> held() const { return held_ && held_->generation == generation_ ? held_ : std::nullopt; }
    /// Completes it, with the faults set above; a flush with ABRT if `abort` is set.
    void release() {
        if (const auto t = held()) {
            held_.reset();
            Drive& d = *drives[unit()];
            if (t->count == 0) {
                if (abort > 0) {
                    --abort;
                    return end(abort_status, 0x04, 0);
                }
                return end_flush(d);
            }
            transfer(*drives[unit()], t->lba, t->count, t->is_write);
        }
    }
    /// Whether the engine may access any part of it.
    bool reachable(u64 bus, u64 size) {
        if (!held() || held()->count == 0) {
            return false;
        }
        for (const auto& [base, length] : regions()) {
            if (base < bus + size && bus < u64{base} + length) {
                return true;
            }
        }
        return false;
    }
    /// An interrupt of this channel that no command causes: the engine reports it [BMIDE §2.2].
    void raise_own() {
        bm_status_ |= 4;
        interrupts.raise(gsi);
    }
    /// An interrupt from another device on the same line, or a spurious one.
    void raise_line() { interrupts.raise(gsi); }

  private:
    static constexpr Instant no = ~Instant{0};
    int unit() const { return one_device ? 0 : regs_[6] >> 4 & 1; }
    bool phantom() const { return empty_master && unit() == 0 && !drives[0]; }
    bool there() const { return drives[unit()].has_value() || (answers_for_absent && drives[0]) || phantom(); }
    void note(const char* what, u16 port) {
        if (tracing) {
            std::ostringstream s;
            s << what << ' '
              << (port >= bus_master && port < bus_master + 8 ? "bm"
                  : port == control                           ? "ctl"
                                                              : "cmd")
              << '+'
              << (port == control                               ? 0
                  : port >= bus_master && port < bus_master + 8 ? port - bus_master
                                                                : port - command);
            trace.push_back(s.str());
        }
    }
    u8 status_seen(bool clears) {
        if (floating) {
            return 0xff;
        }
        if (released_at_ != no) {
            EXPECT_GE(clock.time, released_at_ + 2'000'000) << "status read less than 2 ms after a reset";
            EXPECT_FALSE(in_reset_) << "status read in reset";
        }
        if (phantom()) {
            return status_;
        }
        if (!drives[unit()].has_value()) {
            return 0; // no device, or device 0 answering for device 1: 00h
        }
        if (clears) {
            intrq_ = false;
        }
        return status_;
    }
    u8 read_register(int r) {
        if (floating) {
            return 0xff;
        }
        if (r == 7) {
            return status_seen(true);
        }
        if (!there()) {
            return 0;
        }
        if (r == 1) {
            return error_;
        }
        EXPECT_NE(r, 0) << "8-bit read of the data register";
        EXPECT_FALSE(status_ & 0x80) << "register " << r << " read while BSY";
        return regs_[r];
    }
    void write_register(int r, u8 value) {
        if (floating) {
            return;
        }
        EXPECT_FALSE(status_ & 0x88) << "register " << r << " written while BSY or DRQ";
        EXPECT_FALSE(in_reset_) << "register " << r << " written in reset";
        EXPECT_NE(r, 0) << "8-bit write to the data register";
        if (r == 7) {
            execute(value);
            return;
        }
        previous_[r] = regs_[r];
        regs_[r] = value;
    }
    void write_control(u8 value) {
        if ((value & 4) != 0 && !in_reset_) {
            in_reset_ = true;
            reset_at_ = clock.time;
            EXPECT_FALSE(started()) << "reset while the engine runs";
        } else if ((value & 4) == 0 && in_reset_) {
            EXPECT_GE(clock.time, reset_at_ + 5'000) << "reset held for less than 5 us";
            in_reset_ = false;
            released_at_ = clock.time;
            ++resets;
            for (auto& drive : drives) {
                if (drive) {
                    drive->cache_off = false; // power-on defaults [ATA-7 §9.2, SET FEATURES 66h]
                }
            }
            ++generation_;
            pending_ = 0;
            status_ = dead || reset_latency != 0 ? 0x80 : 0x50;
            if (!dead && reset_latency != 0) {
                later(reset_latency, [this] { status_ = 0x50; });
            }
            error_ = 1;
            regs_ = {0, 0, 1, 1, 0, 0, 0, 0};
            if (drives[0] && drives[0]->packet) {
                regs_[4] = 0x14;
                regs_[5] = 0xeb;
            }
        }
        interrupts_off_ = (value & 2) != 0;
    }
    void write_bm_command(u8 value) {
        const bool was = (bm_command_ & 1) != 0;
        const bool is = (value & 1) != 0;
        if (is) {
            EXPECT_FALSE(was) << "start without a stop before it";
            EXPECT_EQ(bm_command_ & 8, value & 8) << "direction not set before the start";
            EXPECT_NE(commands, commands_at_start_) << "start without a command";
            commands_at_start_ = commands;
            EXPECT_NE(bm_table_, 0u) << "start without a table";
            bm_status_ |= 1;
            bm_command_ = value & 9;
            if (pending_ != 0) {
                begin_transfer();
            }
            return;
        }
        if (was) {
            bm_status_ &= ~1;
            ++generation_; // transfers in progress no longer access memory
        }
        bm_command_ = value & 9;
    }
    void execute(u8 code) {
        ++commands;
        codes.push_back(code);
        intrq_ = false;
        if (phantom()) {
            return end(0x41, 0x04, 0);
        }
        if (!drives[unit()]) {
            return;
        }
        Drive& d = *drives[unit()];
        error_ = 0;
        if (hang > 0) {
            --hang;
            status_ = 0x80; // permanently
            return;
        }
        if (code == hang_code && unit() == hang_unit) {
            hang_code = 0;
            status_ = 0x80;
            return;
        }
        if (abort > 0) {
            --abort;
            return end(abort_status, 0x04, latency);
        }
        switch (code) {
        case 0xec:
            if (d.packet) {
                if (!d.no_signature) {
                    regs_[4] = 0x14;
                    regs_[5] = 0xeb;
                }
                return end(0x51, 0x04, 0);
            }
            status_ = 0x80;
            if (pio_latency == 0) {
                status_ = 0x58;
                interrupt();
            } else {
                later(pio_latency, [this] {
                    status_ = 0x58;
                    interrupt();
                });
            }
            return;
        case 0xa1:
            if (!d.packet) {
                return end(0x51, 0x04, 0);
            }
            status_ = 0x58;
            return interrupt();
        case 0xc6:
            if (d.no_multiple) {
                return end(0x51, 0x04, 0);
            }
            d.id.words[59] = static_cast<u16>(0x100 | regs_[2]);
            return end(0x50, 0, 0);
        case 0xef: {
            EXPECT_TRUE(regs_[1] == 3 || regs_[1] == 0x82) << "SET FEATURES " << int{regs_[1]};
            if (regs_[1] == 0x82 && (d.keeps_cache || refuse_features != 0)) {
                refuse_features -= refuse_features == 0 ? 0 : 1;
                return end(0x51, 0x04, latency);
            }
            d.cache_off = d.cache_off || regs_[1] == 0x82;
            return end(0x50, 0, regs_[1] == 0x82 ? latency : 0);
        }
        case 0xe7:
        case 0xea:
            status_ = 0x80;
            if (hold) {
                held_ = {.generation = generation_};
                return;
            }
            return later(latency, [this, &d] { end_flush(d); });
        case 0xc8:
        case 0xca:
        case 0x25:
        case 0x35:
            pending_ = code;
            status_ = 0xd0; // BSY until the engine is started
            return;
        default: ADD_FAILURE() << "unknown command " << std::hex << int{code};
        }
    }
    void begin_transfer() {
        const bool wide = pending_ == 0x25 || pending_ == 0x35;
        const bool is_write = pending_ == 0xca || pending_ == 0x35;
        EXPECT_EQ((bm_command_ & 8) == 0, is_write) << "the engine's direction is not the command's";
        Drive& d = *drives[unit()];
        u64 lba = u64{regs_[5]} << 16 | u64{regs_[4]} << 8 | regs_[3];
        u32 count = regs_[2];
        EXPECT_TRUE(regs_[6] & 0x40) << "LBA bit";
        if (wide) {
            lba |= u64{previous_[5]} << 40 | u64{previous_[4]} << 32 | u64{previous_[3]} << 24;
            count |= u32{previous_[2]} << 8;
            count = count == 0 ? 65536 : count;
        } else {
            lba |= u64{regs_[6] & 0x0fu} << 24;
            count = count == 0 ? 256 : count;
        }
        pending_ = 0;
        status_ = 0xd8;
        ASSERT_LE(lba + count, d.sectors) << "LBA out of range";
        if (hold) {
            held_ = {is_write, lba, count, generation_};
            return;
        }
        later(latency + count * latency_per_sector,
              [this, &d, lba, count, is_write] { transfer(d, lba, count, is_write); });
    }
    /// The memory regions of the transfer, from its table.
    std::vector<std::pair<u32, u32>> regions() {
        std::vector<std::pair<u32, u32>> found;
        for (u32 i = 0;; ++i) {
            EXPECT_LT((bm_table_ & 0xffff) + 8 * i, 0x10000u) << "the table crosses 64 KiB, or has no end";
            std::array<u8, 8> raw{};
            const std::byte* at = memory.at(bm_table_ + 8 * i, 8);
            if (at == nullptr || i == 0x2000) {
                return found;
            }
            std::memcpy(raw.data(), at, 8);
            const u32 base = raw[0] | raw[1] << 8 | raw[2] << 16 | u32{raw[3]} << 24;
            u32 length = raw[4] | raw[5] << 8;
            length = length == 0 ? 0x10000 : length;
            EXPECT_EQ(base % 2, 0u);
            EXPECT_EQ(length % 2, 0u);
            EXPECT_LE((base & 0xffff) + length, 0x10000u) << "a region crosses 64 KiB";
            found.emplace_back(base, length);
            if ((raw[7] & 0x80) != 0) {
                return found;
            }
        }
    }
    void transfer(Drive& d, u64 lba, u32 count, bool is_write) {
        const u64 total = u64{count} * d.sector_size;
        const auto memory_regions = regions();
        u64 room = 0;
        for (const auto& [base, length] : memory_regions) {
            room += length;
        }
        EXPECT_EQ(room, total) << "the table is not as long as the transfer";
        if (bus_error > 0) {
            --bus_error;
            bm_status_ = static_cast<u8>((bm_status_ & ~1) | 2);
            return end(0x50, 0, 0);
        }
        if (crc_error > 0) {
            --crc_error;
            return end(0x51, 0x84, 0);
        }
        std::vector<std::byte> data(total);
        if (is_write) {
            u64 done = 0;
            for (auto [base, length] : memory_regions) {
                std::memcpy(data.data() + done, memory.at(base, length), length);
                done += length;
            }
        }
        for (u32 i = 0; i < count; ++i) {
            if (bad.contains(lba + i)) {
                return end(0x51, 0x40, 0); // the engine stays active: memory is left over
            }
            is_write ? d.write(lba + i, data.data() + u64{i} * d.sector_size)
                     : d.read(lba + i, data.data() + u64{i} * d.sector_size);
        }
        if (short_transfer > 0) {
            --short_transfer;
            return end(0x50, 0, 0);
        }
        if (!is_write) {
            u64 done = 0;
            for (auto [base, length] : memory_regions) {
                std::memcpy(memory.at(base, length), data.data() + done, length);
                done += length;
            }
        }
        bm_status_ &= ~1;
        end(0x50, 0, 0);
    }
    void end_flush(Drive& d) {
        d.is_flushed = true;
        ++d.flushes;
        end(0x50, 0, 0);
    }
    void end(u8 status, u8 error, Nanoseconds after) {
        if (after != 0) {
            status_ = 0x80;
            return later(after, [this, status, error] { end(status, error, 0); });
        }
        status_ = status;
        error_ = error;
        interrupt();
    }
    void interrupt() {
        intrq_ = true;
        if (interrupts_off_) {
            return;
        }
        if (lose_interrupt > 0) {
            --lose_interrupt;
            return;
        }
        bm_status_ |= 4;
        interrupts.raise(gsi);
        if (level && drives[unit()]) {
            EXPECT_FALSE(intrq_) << "the handler leaves a level-triggered line asserted";
        }
    }
    void later(Nanoseconds length, std::function<void()> what) {
        clock.at(clock.time + length, [this, generation = generation_, what = std::move(what)] {
            if (generation == generation_) {
                what();
            }
        });
    }

    std::array<u8, 8> regs_{};
    std::array<u8, 8> previous_{};
    u8 status_ = 0x50;
    u8 error_ = 1;
    u8 bm_command_ = 0;
    u8 bm_status_ = 0;
    u32 bm_table_ = 0;
    u8 pending_ = 0; // a DMA command waiting for the engine
    bool in_reset_ = false;
    bool interrupts_off_ = false;
    bool intrq_ = false;
    Instant reset_at_ = 0;
    Instant released_at_ = no;
    u64 generation_ = 0;
    std::optional<Transfer> held_;
    u32 commands_at_start_ = 0;
};

/// The machine's I/O ports: dispatches to the channels. A model of PortAccess.
struct Ports {
    std::vector<Channel*>* channels;

    Channel& channel(u16 port) {
        for (Channel* c : *channels) {
            if ((port >= c->command && port < c->command + 8) || port == c->control ||
                (port >= c->bus_master && port < c->bus_master + 8)) {
                return *c;
            }
        }
        ADD_FAILURE() << "no device at port " << std::hex << port;
        return *channels->front();
    }
    u8 in8(u16 port) { return channel(port).in8(port); }
    void out8(u16 port, u8 value) { channel(port).out8(port, value); }
    void out16(u16 port, u16 value) { channel(port).out16(port, value); }
    void out32(u16 port, u32 value) { channel(port).out32(port, value); }
    void in16_string(u16 port, u16* into, u64 count) { channel(port).in16_string(port, into, count); }
};
static_assert(ata::PortAccess<Ports>);

} // namespace ata_test
