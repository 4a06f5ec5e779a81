// An 8254x network card in memory, written from the manual [8254x] with its own offsets and bits: registers, rings,
// EEPROM, interrupt causes. It records every rule that the driver breaks. Bus addresses are pointers. Include after the
// imports.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

namespace e1000_fake {
using namespace fl;

class Nic final : public MmioModel {
  public:
    // Behaviour.
    bool gone = false; // every register reads as all ones
    bool hold = false; // sends nothing
    bool echo = false; // receives what it sends
    bool resets_for_ever = false;
    u32 reset_reads = 1; // reads of CTRL before RST is clear
    bool eeprom_silent = false;
    std::array<u16, 3> eeprom{0x1600, 0x013e, 0x0302}; // 00:16:3e:01:02:03
    bool valid_address = true;                         // of RAL0 and RAH0 at power on
    u64 tx_status = 1;                                 // written back: DD
    bool link = true;
    bool bus_master = true;
    std::function<void()> interrupt; // while a cause is unmasked

    // What happened.
    std::vector<std::string> sent;
    std::set<std::string> broken;
    u32 writes = 0, resets = 0, doorbells = 0, offers = 0, lost = 0, unmasks_txdw = 0;

    Nic() { power_on(); }

    u64 read(u64 at, u32 width) override {
        rule(width == 4, "an access of another width than 32 bits");
        if (gone) {
            return ~u32{0};
        }
        rule(resetting_ == 0 || at == 0, "an access during a reset");
        switch (at) {
        case 0x0000:
            if (resetting_ != 0 && !resets_for_ever && --resetting_ == 0) {
                regs_[0] &= ~(1u << 26);
            }
            return regs_[0];
        case 0x0008: return 0x80 | (link ? 2u : 0) | 1;
        case 0x00c0: return std::exchange(regs_[0xc0], 0);
        case 0x2810: return head_rx_;
        case 0x3810: return head_tx_;
        default: return regs_[at];
        }
    }
    void write(u64 at, u32 width, u64 value64) override {
        const u32 value = static_cast<u32>(value64);
        ++writes;
        rule(width == 4, "an access of another width than 32 bits");
        if (gone) {
            return;
        }
        rule(resetting_ == 0, "an access during a reset");
        const bool ring_register = (at >= 0x2800 && at <= 0x2810) || (at >= 0x3800 && at <= 0x3810);
        rule(!ring_register || !enabled(at < 0x3800), "a ring is moved while it is in use");
        switch (at) {
        case 0x0000:
            if ((value & 1u << 26) != 0) {
                reset();
                return;
            }
            break;
        case 0x0014: {
            rule((value >> 8 & 0xff) < 3, "another word of the EEPROM than the address");
            const u32 word = eeprom[(value >> 8 & 0xff) % 3];
            regs_[at] = eeprom_silent ? 0 : word << 16 | (value & 0xff00) | 0x10;
            return;
        }
        case 0x00d0:
            unmasks_txdw += value & 1;
            regs_[0xd0] |= value;
            signal();
            return;
        case 0x00d8: regs_[0xd0] &= ~value; return;
        case 0x0100:
            if ((value & 2) != 0 && (regs_[at] & 2) == 0) {
                check_receiver(value);
            }
            break;
        case 0x0400:
            if ((value & 2) != 0 && (regs_[at] & 2) == 0) {
                rule((value & 8) != 0, "short frames are not padded (TCTL.PSP)");
                rule((value >> 4 & 0xff) == 15 && (value >> 12 & 0x3ff) == 0x40,
                     "TCTL.CT or COLD is not what full duplex needs");
                check_ring(0x3800);
            }
            break;
        case 0x2810: head_rx_ = value; return;
        case 0x3810: head_tx_ = value; return;
        case 0x2818:
            rule(value < entries(0x2800), "RDT beyond the ring");
            ++offers;
            break;
        case 0x3818:
            rule(value < entries(0x3800), "TDT beyond the ring");
            ++doorbells;
            regs_[at] = value;
            send();
            return;
        default: break;
        }
        regs_[at] = value;
    }

    /// Sends what is in the ring, as far as it is not held.
    void send() {
        while (!hold && enabled(false) && head_tx_ != regs_[0x3818] && link) {
            take();
        }
    }
    /// A frame from the wire. False: the card lost it.
    bool receive(const std::string& frame, u64 errors = 0) {
        if (!link || !enabled(true) || !accepts(frame)) {
            return false;
        }
        if (frame.size() > 1518 && (regs_[0x100] & 0x20) == 0) {
            return false;
        }
        return put(frame, u64{3} | errors << 8);
    }
    /// A descriptor with these bits from 32 on (status, errors), whatever they mean. `length` instead of the data's.
    bool put(const std::string& data, u64 status, std::optional<u16> length = {}) {
        if (head_rx_ == regs_[0x2818]) { // none is left
            ++lost;
            cause(1u << 6);
            return false;
        }
        auto* const d = descriptor(0x2800, head_rx_);
        std::memcpy(reinterpret_cast<void*>(d[0]), data.data(), std::min<usize>(data.size(), 2048));
        std::atomic_ref(d[1]).store((length ? *length : data.size()) | status << 32, std::memory_order_release);
        head_rx_ = (head_rx_ + 1) % entries(0x2800);
        cause(1u << 7);
        return true;
    }
    /// Writes any word into a ring.
    void scribble(bool receiver, u32 entry, u64 word) {
        const u64 ring = receiver ? 0x2800 : 0x3800;
        if (enabled(receiver)) {
            std::atomic_ref(descriptor(ring, entry)[1]).store(word, std::memory_order_release);
        }
    }
    void set_link(bool up) {
        link = up;
        cause(1u << 2);
        send();
    }
    void cause(u32 bits) {
        regs_[0xc0] |= bits;
        signal();
    }
    bool enabled(bool receiver) const {
        const auto found = regs_.find(receiver ? 0x100 : 0x400);
        return found != regs_.end() && (found->second & 2) != 0;
    }
    u32 mask() { return regs_[0xd0]; }
    u32 in_ring() { return (regs_[0x3818] + entries(0x3800) - head_tx_) % entries(0x3800); }

  private:
    void rule(bool kept, const char* what) {
        if (!kept) {
            broken.insert(what);
        }
    }
    u32 entries(u64 ring) { return std::max(regs_[ring + 8] / 16, 1u); }
    u64* descriptor(u64 ring, u32 entry) {
        return reinterpret_cast<u64*>(u64{regs_[ring + 4]} << 32 | regs_[ring]) + 2 * usize{entry};
    }
    void power_on() {
        regs_.clear();
        regs_[0x100] = regs_[0x400] = 0;
        head_rx_ = head_tx_ = 0;
        regs_[0x5400] = 0x013e1600; // 00:16:3e:01
        regs_[0x5404] = 0x0302 | (valid_address ? 1u << 31 : 0);
    }
    void reset() {
        rule(!enabled(true) && !enabled(false) && regs_[0xd0] == 0, "a reset without stopping the card first");
        ++resets;
        power_on();
        for (u32 i = 0; i < 128; ++i) {
            regs_[0x5200 + 4 * i] = 0xdead; // undefined
        }
        regs_[0] = 1u << 26;
        resetting_ = reset_reads;
    }
    void check_ring(u64 ring) {
        rule(regs_[ring] % 16 == 0, "a ring that is not aligned");
        rule(regs_[ring + 8] % 128 == 0 && regs_[ring + 8] != 0, "a ring whose length is no multiple of 128");
        rule(bus_master, "a ring without bus mastering");
    }
    void check_receiver(u32 value) {
        check_ring(0x2800);
        rule((value >> 16 & 3) == 0 && (value & 1u << 25) == 0, "another buffer size than 2048");
        rule((value & 0x3c) == 0, "frames for others, long or damaged ones are taken");
        rule((value & 1u << 15) != 0, "broadcasts are not taken");
        rule((regs_[0] & 0x40) != 0 && (regs_[0] & (1u << 3 | 1u << 7 | 1u << 31 | 1u << 30)) == 0, "CTRL");
        rule(regs_[0x5404] >> 31 == 1, "the hardware address is not valid");
        for (u32 i = 0; i < 128; ++i) {
            rule(regs_[0x5200 + 4 * i] == 0, "the multicast table is not clear");
        }
    }
    bool accepts(const std::string& frame) {
        std::string own(6, 0);
        for (u32 i = 0; i < 6; ++i) {
            own[i] = static_cast<char>(i < 4 ? regs_[0x5400] >> 8 * i : regs_[0x5404] >> 8 * (i - 4));
        }
        return frame.starts_with(own) || frame.starts_with(std::string(6, '\xff'));
    }
    void take() {
        auto* const d = descriptor(0x3800, head_tx_);
        const u64 word = d[1];
        const u32 length = word & 0xffff;
        rule((word >> 24 & 0xff) == 0x0b, "a transmit command that is not EOP, IFCS and RS");
        rule((word >> 32) == 0 && (word >> 16 & 0xff) == 0, "fields of a transmit descriptor that are not zero");
        rule(length >= 14 && length <= 1514, "the length of a frame");
        rule(bus_master, "sending without bus mastering");
        std::string frame(reinterpret_cast<const char*>(d[0]), std::min(length, 2048u));
        std::atomic_ref(d[1]).store(word | tx_status << 32, std::memory_order_release);
        head_tx_ = (head_tx_ + 1) % entries(0x3800);
        sent.push_back(frame);
        cause(1);
        if (echo) {
            receive(frame);
        }
    }
    void signal() {
        if ((regs_[0xc0] & regs_[0xd0]) != 0 && interrupt) {
            interrupt();
        }
    }

    std::map<u64, u32> regs_;
    u32 head_rx_ = 0, head_tx_ = 0, resetting_ = 0;
};

} // namespace e1000_fake
