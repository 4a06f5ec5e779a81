module vmm.ide;
import core.std;
import vmm.image;
import vmm.memory;
import vmm.ports;

namespace fl::vmm {
namespace {

// Status and error bits [ATA-7 §6.9, §6.14].
constexpr u8 busy = 0x80;
constexpr u8 ready = 0x50; // and the obsolete "seek complete"
constexpr u8 data_request = 0x08;
constexpr u8 failed = 0x01;
constexpr u8 aborted = 0x04;
constexpr u8 not_found = 0x10;
// Device control.
constexpr u8 interrupts_off = 0x02;
constexpr u8 software_reset = 0x04;
constexpr u8 previous = 0x80;
// Bus-master status [BMIDE §2.2].
constexpr u8 engine_active = 0x01;
constexpr u8 engine_error = 0x02;
constexpr u8 engine_interrupt = 0x04;
constexpr u8 engine_start = 0x01;
constexpr u8 engine_to_memory = 0x08;
constexpr usize max_regions = 8192; // in one table, which may not cross 64 KiB

void put_text(std::span<u16> words, std::string_view text) {
    for (usize i = 0; i < words.size(); ++i) { // two characters per word, the first in the high byte [ACS §3.3.10]
        const auto at = [&](usize n) { return static_cast<u16>(static_cast<u8>(n < text.size() ? text[n] : ' ')); };
        words[i] = static_cast<u16>(at(2 * i) << 8 | at(2 * i + 1));
    }
}

} // namespace

void IdeChannel::reset() {
    // The signature of a disk [ACS §4.3].
    count_ = {1, 0};
    low_ = {1, 0};
    mid_ = high_ = {};
    device_ = 0;
    error_ = 1; // diagnostics passed
    status_ = ready;
    pending_ = false;
    transfer_ = {};
    words_left_ = 0;
    update_line();
}

void IdeChannel::update_line() {
    const bool wanted = pending_ && (control_ & interrupts_off) == 0;
    if (wanted != raised_) {
        raised_ = wanted;
        line_.set(wanted);
    }
}

void IdeChannel::end(u8 status, u8 error) {
    status_ = status;
    error_ = error;
    pending_ = true;
    bus_status_ |= engine_interrupt;
    update_line();
}

void IdeChannel::identify() {
    const u64 sectors = drive().sectors();
    auto& w = words_;
    w = {};
    w[0] = 0x0040;
    put_text(std::span{w}.subspan(10, 10), (device_ >> 4 & 1) == 0 ? "FLIDE0" : "FLIDE1");
    put_text(std::span{w}.subspan(23, 4), "1");
    put_text(std::span{w}.subspan(27, 20), "FIRSTLIGHT IDE DISK");
    w[47] = 0x8000;
    w[49] = 0x0b00; // LBA, DMA, IORDY
    w[53] = 0x0006;
    const u32 small = static_cast<u32>(std::min<u64>(sectors, 0x0fff'ffff));
    w[60] = static_cast<u16>(small);
    w[61] = static_cast<u16>(small >> 16);
    w[63] = 0x0407; // multiword DMA 0 to 2, mode 2 selected
    w[64] = 0x0003;
    w[65] = w[66] = w[67] = w[68] = 120;
    w[80] = 0x00f0;
    w[82] = 0x4020; // NOP, write cache
    w[83] = 0x7400; // FLUSH CACHE EXT, FLUSH CACHE, 48 bits
    w[84] = 0x4000;
    w[85] = 0x4020;
    w[86] = 0x3400;
    w[87] = 0x4000;
    w[88] = 0x003f;
    w[93] = 0x6001;
    for (unsigned i = 0; i < 4; ++i) {
        w[100 + i] = static_cast<u16>(sectors >> (16 * i));
    }
    words_left_ = w.size();
    end(ready | data_request);
}

void IdeChannel::start_transfer(bool to_disk, bool wide) {
    Transfer t{.active = true, .to_disk = to_disk};
    u64 count = count_.now;
    if (wide) {
        count |= static_cast<u64>(count_.before) << 8;
        count = count == 0 ? 65536 : count;
        t.lba = static_cast<u64>(low_.now) | static_cast<u64>(mid_.now) << 8 | static_cast<u64>(high_.now) << 16 |
                static_cast<u64>(low_.before) << 24 | static_cast<u64>(mid_.before) << 32 |
                static_cast<u64>(high_.before) << 40;
    } else {
        count = count == 0 ? 256 : count;
        t.lba = static_cast<u64>(low_.now) | static_cast<u64>(mid_.now) << 8 | static_cast<u64>(high_.now) << 16 |
                static_cast<u64>(device_ & 0x0f) << 24;
    }
    t.bytes = count * 512;
    if (t.lba > drive().sectors() || count > drive().sectors() - t.lba) {
        end(ready | failed, not_found);
        return;
    }
    if (to_disk && drive().image->read_only()) {
        end(ready | failed, aborted);
        return;
    }
    transfer_ = t;
    status_ = busy;
    if ((bus_command_ & engine_start) != 0) {
        run_transfer();
    }
}

/// Walks the region table [BMIDE §1.2]. Every entry is copied before it is used.
void IdeChannel::run_transfer() {
    const Transfer t = std::exchange(transfer_, {});
    const auto disk = drive().image->bytes().subspan(t.lba * 512, t.bytes);
    u64 done = 0;
    bool last = false;
    for (usize i = 0; !last && i < max_regions && done < t.bytes; ++i) {
        std::array<u8, 8> entry{};
        if (!memory_.read(u64{table_} + 8 * i, std::as_writable_bytes(std::span{entry}))) {
            break;
        }
        u32 address = 0;
        u16 size = 0;
        std::memcpy(&address, entry.data(), 4);
        std::memcpy(&size, entry.data() + 4, 2);
        last = (entry[7] & 0x80) != 0;
        const u64 length = std::min<u64>(size == 0 ? 65536 : size & 0xfffe, t.bytes - done);
        const auto memory = memory_.at(address & ~1u, length);
        if (memory.empty()) {
            break;
        }
        if (t.to_disk) {
            std::memcpy(disk.data() + done, memory.data(), length);
        } else {
            std::memcpy(memory.data(), disk.data() + done, length);
        }
        done += length;
    }
    if (done != t.bytes) { // the table is too short, or refers to an address outside memory
        bus_status_ = static_cast<u8>((bus_status_ & ~engine_active) | engine_error);
        end(ready | failed, aborted);
        return;
    }
    if (last) {
        bus_status_ &= static_cast<u8>(~engine_active); // otherwise the engine keeps waiting for data [BMIDE §2.2]
    }
    end(ready);
}

void IdeChannel::start(u8 command) {
    pending_ = false;
    update_line();
    error_ = 0;
    if (drive().image == nullptr) {
        return; // no device is present
    }
    ++drive().commands;
    switch (command) {
    case 0xec: identify(); break;
    case 0xc8: start_transfer(false, false); break;
    case 0xca: start_transfer(true, false); break;
    case 0x25: start_transfer(false, true); break;
    case 0x35: start_transfer(true, true); break;
    case 0xe7: // FLUSH CACHE
    case 0xea: end(drive().image->flush() ? ready : ready | failed, 0); break;
    // SET FEATURES: transfer mode, write cache on and off, read look-ahead; all accepted without effect
    case 0xef:
    case 0x91: // INITIALIZE DEVICE PARAMETERS
    case 0xe0: // STANDBY IMMEDIATE, IDLE IMMEDIATE
    case 0xe1: end(ready); break;
    case 0xe5: // CHECK POWER MODE: active
        count_.now = 0xff;
        end(ready);
        break;
    case 0x90: // EXECUTE DEVICE DIAGNOSTIC
        reset();
        end(ready, 1);
        break;
    default: end(ready | failed, aborted); break;
    }
}

u8 IdeChannel::read_command(unsigned at) {
    if (drive().image == nullptr && at != 6) {
        return 0; // the other disk answers for an absent one
    }
    const bool before = (control_ & previous) != 0;
    const auto value = [&](const TwoDeep& r) { return before ? r.before : r.now; };
    switch (at) {
    case 1: return error_;
    case 2: return value(count_);
    case 3: return value(low_);
    case 4: return value(mid_);
    case 5: return value(high_);
    case 6: return device_;
    case 7:
        pending_ = false; // reading clears the interrupt [ATA-7 §6.14]
        update_line();
        return status_;
    default: return 0xff;
    }
}

void IdeChannel::write_command(unsigned at, u8 value) {
    control_ &= static_cast<u8>(~previous);
    switch (at) {
    case 1: features_.write(value); break;
    case 2: count_.write(value); break;
    case 3: low_.write(value); break;
    case 4: mid_.write(value); break;
    case 5: high_.write(value); break;
    case 6: device_ = value; break;
    case 7: start(value); break;
    default: break;
    }
}

u8 IdeChannel::read_bus_master(unsigned at) const {
    switch (at) {
    case 0: return bus_command_;
    case 2: return bus_status_;
    case 4:
    case 5:
    case 6:
    case 7: return static_cast<u8>(table_ >> (8 * (at - 4)));
    default: return 0xff;
    }
}

void IdeChannel::write_bus_master(unsigned at, u8 value) {
    if (at == 0) {
        const bool starts = (value & engine_start) != 0 && (bus_command_ & engine_start) == 0;
        bus_command_ = value & (engine_start | engine_to_memory);
        if (starts) {
            bus_status_ |= engine_active;
            if (transfer_.active) {
                run_transfer();
            }
        } else if ((value & engine_start) == 0) {
            bus_status_ &= static_cast<u8>(~engine_active);
        }
    } else if (at == 2) { // error and interrupt are write-one-to-clear; the two "capable" bits are for software
        bus_status_ = static_cast<u8>((bus_status_ & ~(value & 0x06) & ~0x60) | (value & 0x60));
    } else if (at >= 4) {
        const unsigned shift = 8 * (at - 4);
        table_ = ((table_ & ~(u32{0xff} << shift)) | u32{value} << shift) & ~u32{3};
    }
}

u32 IdeChannel::in(u16 port, unsigned size) {
    if (port == ports_.command) { // the data register, in words
        u32 value = 0;
        for (unsigned i = 0; i < size; i += 2) {
            const u16 word = words_left_ != 0 ? words_[words_.size() - words_left_--] : 0xffff;
            value |= static_cast<u32>(word) << (8 * i);
            if (words_left_ == 0) {
                status_ = ready;
            }
        }
        return value;
    }
    if (port == ports_.control) {
        return drive().image == nullptr ? 0 : status_;
    }
    u32 value = 0;
    for (unsigned i = 0; i < size; ++i) {
        const bool command = port < ports_.command + 8 && port >= ports_.command;
        const u8 byte =
            command ? read_command(port - ports_.command + i) : read_bus_master(port - ports_.bus_master + i);
        value |= static_cast<u32>(byte) << (8 * i);
    }
    return value;
}

void IdeChannel::out(u16 port, unsigned size, u32 value) {
    if (port == ports_.command) {
        return; // no command receives data by PIO
    }
    if (port == ports_.control) {
        if ((control_ & software_reset) != 0 && (value & software_reset) == 0) {
            ++resets_;
            reset();
        }
        control_ = static_cast<u8>(value);
        update_line();
        return;
    }
    for (unsigned i = 0; i < size; ++i) { // a word access reaches two registers, the lower one first
        const u8 byte = static_cast<u8>(value >> (8 * i));
        if (port < ports_.command + 8 && port >= ports_.command) {
            write_command(port - ports_.command + i, byte);
        } else {
            write_bus_master(port - ports_.bus_master + i, byte);
        }
    }
}

} // namespace fl::vmm
