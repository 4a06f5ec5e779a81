module;
#include <cstddef>
module hv.xen.console;
import core.std;
import core.result;
import core.cpuid;
import core.text;
import core.log;
import io.ring.memory;
import hv.backend;
import hv.xen.hypercall;

namespace fl::hv::xen {

namespace {
constinit ConsoleRing* opened_console = nullptr;
}

std::optional<ConsoleChannel> find_console(Hypercalls& calls, bool emulated) {
    const auto frame = calls.hvm_parameter(HvmParam::console_frame);
    const auto port = frame ? calls.hvm_parameter(HvmParam::console_event_channel) : frame;
    if (!frame || !port || *frame == 0 || *frame >= u64{1} << 40 || *port == 0 || *port >= event_channels) {
        return std::nullopt;
    }
    EventStatus status{domain_self, 0, static_cast<Port>(static_cast<u32>(*port)), 0, 0, {}};
    const bool known = calls.call(Hypercall::event_channel_op, EventOp::status, status) >= 0;
    if (known && status.status != event_interdomain && (emulated || status.status != event_unbound)) {
        return std::nullopt;
    }
    return ConsoleChannel{*frame, static_cast<Port>(static_cast<u32>(*port))};
}

Consoles find_consoles(CpuidRegisters (*cpuid)(u32 leaf, u32 subleaf), Privileged& cpu, const Gate& gate, u64 page) {
    Consoles found;
    if (gate.call == nullptr || (cpuid(1, 0).ecx >> 31 & 1) == 0) { // Xen always sets the hypervisor bit
        return found;
    }
    // Xen uses the first base, or the second one after Hyper-V's leaves [xen-public arch-x86/cpuid.h].
    std::optional<HypervisorBase> xen;
    for (const u32 base : {0x40000000u, 0x40000100u}) {
        xen = hypervisor_at(base, cpuid(base, 0));
        if (xen && xen->signature.view() == "XenVMMXenVMM" && xen->max_leaf >= base + 2) {
            break;
        }
        xen.reset();
    }
    const CpuidRegisters pages = xen ? cpuid(xen->base + 2, 0) : CpuidRegisters{};
    if (pages.eax == 0 || pages.ebx == 0) {
        return found;
    }
    if (gate.page != nullptr) {
        cpu.write_msr(pages.ebx, page);
    }
    found.calls = Hypercalls(gate);
    if (found.calls.version() < (3 << 16)) {
        return found;
    }
    found.found = true;
    found.emulated = found.calls.console_write({}) == error_no_such_call;
    if (xen->max_leaf >= xen->base + 3) {
        found.tsc_khz = cpuid(xen->base + 3, 0).ecx;
    }
    const auto console = find_console(found.calls, found.emulated);
    if (!console) {
        return found;
    }
    found.ring = console->frame * 4096;
    found.port = console->port;
    return found;
}

void ConsoleRing::open(const Hypercalls& calls, std::byte* page, Port port, u64 (*cycles)(), u64 cycles_per_ms) {
    static constexpr u64 fast = 5'000'000;
    calls_ = calls;
    page_ = page;
    port_ = port;
    cycles_ = cycles;
    timeout_ = timeout_ms * (cycles_per_ms != 0 ? cycles_per_ms : fast);
    // A loader may have written before; keep what has not been read yet.
    produced_ = io::MappedMemory(page_, 4096).load_acquire<u32>(offsetof(ConsolePage, out_producer));
    opened_console = this;
}

ConsoleRing* guest_console() { return opened_console; }

void ConsoleRing::restart(Port port) {
    port_ = port;
    stalled_ = false;
    produced_ = io::MappedMemory(page_, 4096).load_acquire<u32>(offsetof(ConsolePage, out_producer));
}

// Free bytes in the ring. An invalid reader position counts as no room.
u32 ConsoleRing::free() {
    // Acquire: bytes are overwritten only after they have been copied out. Pairs with the reader's store of its
    // position.
    const u32 used = produced_ - io::MappedMemory(page_, 4096).load_acquire<u32>(offsetof(ConsolePage, out_consumer));
    return used <= console_out_bytes ? console_out_bytes - used : 0;
}

void ConsoleRing::publish() {
    // Release: the bytes before the position. Pairs with the reader's load of it.
    io::MappedMemory(page_, 4096).store_release<u32>(offsetof(ConsolePage, out_producer), produced_);
    EventPort argument{port_};
    static_cast<void>(calls_.call(Hypercall::event_channel_op, EventOp::send, argument));
}

// False: the reader has made no progress for the permitted time.
bool ConsoleRing::wait_for(u32 room) {
    u32 seen = free();
    if (seen >= room) {
        return true;
    }
    publish();
    u64 last = cycles_();
    u64 still = 0; // cycles without progress
    u64 all = 0;
    while (seen < room) {
        static_cast<void>(calls_.call(Hypercall::sched_op, to_underlying(SchedOp::yield)));
        // A large step means that the machine was stopped, and the reader with it: count little of it.
        const u64 now = cycles_();
        const u64 step = std::min(now - last, timeout_ / 8);
        last = now;
        still += step;
        all += step;
        if (const u32 room_now = free(); room_now != seen) {
            seen = room_now;
            still = 0;
        } else if (still > timeout_) {
            return false;
        }
        if (all > 8 * timeout_) { // a reader that keeps moving but makes no room
            return seen >= room;
        }
    }
    return true;
}

// False: part of the text was lost.
bool ConsoleRing::put(std::string_view text) {
    io::MappedMemory memory(page_, 4096);
    while (!text.empty()) {
        if (!wait_for(1)) {
            stalled_ = true;
            lost_ += text.size();
            lost_unreported_ += text.size();
            return false;
        }
        const u32 at = produced_ % console_out_bytes;
        const u32 size = std::min(
            {free(), static_cast<u32>(std::min<usize>(text.size(), console_out_bytes)), console_out_bytes - at});
        memory.copy_in(offsetof(ConsolePage, out) + at, std::as_bytes(std::span(text)).data(), size);
        produced_ += size;
        text.remove_prefix(size);
    }
    return true;
}

// Reports the lost bytes on a line of their own, once there is room for it.
bool ConsoleRing::report_lost() {
    FixedText<80> note;
    print(note, "\r\n[{} bytes are lost here: this console was not read]\r\n", lost_unreported_);
    if (free() < note.size()) {
        return false;
    }
    stalled_ = false;
    lost_unreported_ = 0;
    return put(note);
}

void ConsoleRing::write(std::string_view text) {
    if (page_ == nullptr) {
        return;
    }
    while (!text.empty()) {
        if (stalled_ && !report_lost()) {
            lost_ += text.size();
            lost_unreported_ += text.size();
            return;
        }
        const usize end = text.find('\n');
        const bool ends = end != std::string_view::npos;
        const std::string_view part = text.substr(0, end);
        text.remove_prefix(part.size() + (ends ? 1 : 0));
        if (put(part) && ends) {
            static_cast<void>(put("\r\n"));
        }
    }
    publish();
}

void ConsoleRing::flush() {
    if (page_ == nullptr) {
        return;
    }
    if (stalled_) {
        static_cast<void>(wait_for(console_out_bytes / 2)); // room for the note and the text that follows
        if (!report_lost()) {
            return;
        }
    }
    publish();
    static_cast<void>(wait_for(console_out_bytes));
}

Result<u32> ConsoleInput::take(std::span<char> into) {
    io::MappedMemory memory(page_, 4096);
    const u32 consumed = memory.load_relaxed<u32>(offsetof(ConsolePage, in_consumer)); // written here alone
    // Acquire: the bytes before the position. Pairs with the other end's store of it.
    const u32 typed = memory.load_acquire<u32>(offsetof(ConsolePage, in_producer)) - consumed;
    if (typed > console_in_bytes) {
        return Error{Code::protocol, "the console's input position is impossible (bytes in the ring)", console_in_bytes,
                     typed};
    }
    const u32 count = std::min(typed, static_cast<u32>(std::min<usize>(into.size(), console_in_bytes)));
    for (u32 done = 0; done < count;) {
        const u32 at = (consumed + done) % console_in_bytes;
        const u32 size = std::min(count - done, console_in_bytes - at);
        memory.copy_out(offsetof(ConsolePage, in) + at, std::as_writable_bytes(into.subspan(done)).data(), size);
        done += size;
    }
    // Release: the bytes have been copied before their room is given back.
    memory.store_release<u32>(offsetof(ConsolePage, in_consumer), consumed + count);
    return count;
}

} // namespace fl::hv::xen
