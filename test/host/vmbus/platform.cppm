// What the test host's VMBus side needs from the machine around it: guest memory, the two ways to reach a guest
// (messages and event flags), a disk's contents, a place for lines of text, and counters. The VMM models these with
// KVM, the unit tests with arrays. No system call is made on this side of them.
//
// Threads: everything in host.* runs on one thread, that which calls Server::poll(), except for the functions that say
// otherwise.
module;
#include <cstdarg>
#include <cstdio>
export module host.platform;
import host.std;

export namespace fl::host {

/// The guest's memory as this process has it mapped: a few regions of whole pages. Addresses come from the guest and
/// may be anything. The regions are added before the first guest instruction and stay.
class GuestMemory {
  public:
    /// `bytes` (page aligned, whole pages, not owned) is what the guest sees at `address`.
    void add(u64 address, std::span<std::byte> bytes) { regions_.push_back({address, bytes}); }
    /// The `length` bytes at `address`; empty where not all of them are memory, and for length 0.
    std::span<std::byte> at(u64 address, usize length) const {
        for (const Region& region : regions_) {
            const u64 offset = address - region.address; // wraps below the region, and is then too large
            if (offset < region.bytes.size() && length <= region.bytes.size() - offset) {
                return region.bytes.subspan(static_cast<usize>(offset), length);
            }
        }
        return {};
    }
    /// Page number `frame`; nullptr: no memory there.
    std::byte* page(u64 frame) const {
        const auto bytes = frame < (u64{1} << 52) ? at(frame << 12, 4096) : std::span<std::byte>{};
        return bytes.empty() ? nullptr : bytes.data();
    }

  private:
    struct Region {
        u64 address;
        std::span<std::byte> bytes;
    };
    std::vector<Region> regions_;
};

/// The ways from here into the guest. The VMM models it.
class Delivery {
  public:
    enum class Message : u8 {
        delivered, // in the slot, and the interrupt raised
        // the slot holds a message: pending bit set; Server::on_end_of_message() follows when the guest has taken it
        busy,
        refused, // SynIC, message page or SINT are not enabled: it will never arrive
    };
    enum class Event : u8 {
        raised,  // flag set, interrupt raised
        pending, // the flag was set already: no interrupt
        refused, // SynIC, event page or SINT are not enabled
    };
    virtual ~Delivery() = default;
    /// Puts a message (type, at most 240 bytes) into the slot of `sint` on virtual processor `vp` [hv-tlfs §11.8].
    virtual Message post(u32 vp, u8 sint, u32 type, std::span<const std::byte> payload) = 0;
    /// Sets event flag `flag` (0..2047) of `sint` on `vp` [hv-tlfs §11.9]. Interrupts even if the flag was set when
    /// `always`.
    virtual Event set_event(u32 vp, u8 sint, u16 flag, bool always) = 0;
    /// From now on, or no longer, Server::on_signal() knows connection `id`: for a VMM that lets the kernel turn
    /// signals into eventfds.
    virtual void connection(u32 id, bool exists) {
        static_cast<void>(id);
        static_cast<void>(exists);
    }
};

/// A disk's contents. One that can be mapped is read and written without a call; `write`, `flush` and `unmap` are
/// called all the same when the store asks for them. All ranges are inside size(), checked by the caller.
class BlockStore {
  public:
    virtual ~BlockStore() = default;
    virtual u64 size() const = 0; // bytes, a multiple of 512
    virtual bool read_only() const { return false; }
    /// The whole contents in memory; empty: only the functions below.
    virtual std::span<std::byte> mapped() { return {}; }
    virtual bool read(u64 offset, std::span<std::byte> into) = 0;
    virtual bool write(u64 offset, std::span<const std::byte> from) = 0;
    virtual bool flush() { return true; }
    virtual bool unmap(u64 offset, u64 length) = 0; // reads as zero afterwards
};

/// A disk in memory. Does not own it.
class MemoryStore final : public BlockStore {
  public:
    explicit MemoryStore(std::span<std::byte> bytes, bool read_only = false) : bytes_(bytes), read_only_(read_only) {}
    u64 size() const override { return bytes_.size(); }
    bool read_only() const override { return read_only_; }
    std::span<std::byte> mapped() override { return bytes_; }
    bool read(u64 offset, std::span<std::byte> into) override {
        std::memcpy(into.data(), bytes_.data() + offset, into.size());
        return true;
    }
    bool write(u64 offset, std::span<const std::byte> from) override {
        std::memcpy(bytes_.data() + offset, from.data(), from.size());
        return true;
    }
    bool unmap(u64 offset, u64 length) override {
        std::memset(bytes_.data() + offset, 0, static_cast<usize>(length));
        return true;
    }

  private:
    std::span<std::byte> bytes_;
    bool read_only_;
};

/// Where lines for a person go; without line end.
class Log {
  public:
    virtual ~Log() = default;
    virtual void line(std::string_view text) = 0;
};

/// What happened, by kind. Only grows; the VMM prints differences between two phases.
struct Counters {
    u64 messages_in = 0;      // HvPostMessage
    u64 messages_out = 0;     // messages put into a slot
    u64 messages_waited = 0;  // of those: the slot was busy first
    u64 signals_in = 0;       // HvSignalEvent
    u64 events_out = 0;       // event flags set
    u64 interrupts_out = 0;   // of those: with an interrupt
    u64 interrupts_saved = 0; // publications for which the guest wanted none (mask, or ring not empty before)
    u64 turns = 0;            // times a channel's ring was looked at
    u64 packets_in = 0;
    u64 packets_out = 0;
    u64 ring_full = 0; // times a channel waited for room in its ring
    u64 requests = 0;  // SRBs
    u64 reads = 0;
    u64 writes = 0;
    u64 flushes = 0;
    u64 unmaps = 0;
    u64 others = 0;
    u64 errors = 0; // SRBs that did not end with success
    u64 bytes_read = 0;
    u64 bytes_written = 0;
    u64 heartbeats = 0; // that the guest answered
    u64 faults = 0;     // rules broken on purpose
    u64 violations = 0; // rules that the guest broke
    std::array<u64, 256> opcodes{};

    /// f(name, value) for each of the plain ones, in the order above.
    template <class F>
    void each(F f) const {
        f("messages_in", messages_in), f("messages_out", messages_out), f("messages_waited", messages_waited);
        f("signals_in", signals_in), f("events_out", events_out), f("interrupts_out", interrupts_out);
        f("interrupts_saved", interrupts_saved), f("turns", turns), f("packets_in", packets_in),
            f("packets_out", packets_out);
        f("ring_full", ring_full), f("requests", requests), f("reads", reads), f("writes", writes),
            f("flushes", flushes);
        f("unmaps", unmaps), f("others", others), f("errors", errors), f("bytes_read", bytes_read),
            f("bytes_written", bytes_written);
        f("heartbeats", heartbeats), f("faults", faults), f("violations", violations);
    }
};

/// One place for what the guest did wrong: counted always, said up to `limit` times.
class Judge {
  public:
    Judge(Log& log, Counters& counters, u32 limit = 64) : log_(log), counters_(counters), left_(limit) {}

    /// A rule that the guest broke, in one line. printf-like.
    [[gnu::format(printf, 2, 3)]] void violation(const char* format, ...) {
        ++counters_.violations;
        if (left_ == 0) {
            return;
        }
        va_list arguments;
        va_start(arguments, format);
        say("guest violation: ", format, arguments);
        va_end(arguments);
        if (--left_ == 0) {
            log_.line("guest violation: further ones are only counted");
        }
    }
    /// What a person wants to know of the course of things.
    [[gnu::format(printf, 2, 3)]] void note(const char* format, ...) {
        va_list arguments;
        va_start(arguments, format);
        say("vmbus: ", format, arguments);
        va_end(arguments);
    }

  private:
    void say(const char* prefix, const char* format, va_list arguments) {
        std::array<char, 512> text;
        std::vsnprintf(text.data(), text.size(), format, arguments);
        log_.line(std::string(prefix) + text.data());
    }
    Log& log_;
    Counters& counters_;
    u32 left_;
};

} // namespace fl::host
