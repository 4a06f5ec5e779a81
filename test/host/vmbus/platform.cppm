// What the test host's VMBus server needs from the VMM: guest memory, messages and event flags to the guest, the
// contents of disks, a log, and counters. The VMM implements these with KVM, the unit tests with arrays. Code that uses
// them makes no system calls.
//
// Threads: everything in host.* runs on the thread that calls Server::poll(), except for functions documented
// otherwise.
module;
#include <cstdarg>
#include <cstdio>
export module host.platform;
import host.std;

export namespace fl::host {

/// The guest's memory as mapped in this process: a few regions of whole pages. Addresses are given by the guest and not
/// trusted. The regions are added before the first guest instruction and never removed.
class GuestMemory {
  public:
    /// `bytes` (page aligned, whole pages, not owned) is guest physical memory at `address`.
    void add(u64 address, std::span<std::byte> bytes) { regions_.push_back({address, bytes}); }
    /// The `length` bytes at `address`; empty if not all of them are memory, and for length 0.
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

/// Messages and events to the guest. Implemented by the VMM.
class Delivery {
  public:
    enum class Message : u8 {
        delivered, // in the slot; interrupt raised
        // the slot is full: pending bit set; Server::on_end_of_message() is called when the guest has freed it
        busy,
        refused, // SynIC, message page or SINT is not enabled: not delivered
    };
    enum class Event : u8 {
        raised,  // flag set, interrupt raised
        pending, // the flag was set already: no interrupt
        refused, // SynIC, event page or SINT is not enabled
    };
    virtual ~Delivery() = default;
    /// Writes a message (type, at most 240 bytes) to the slot of `sint` on virtual processor `vp` [hv-tlfs §11.8].
    virtual Message post(u32 vp, u8 sint, u32 type, std::span<const std::byte> payload) = 0;
    /// Sets event flag `flag` (0..2047) of `sint` on `vp` [hv-tlfs §11.9]. `always`: interrupts even if the flag was
    /// already set.
    virtual Event set_event(u32 vp, u8 sint, u16 flag, bool always) = 0;
    /// Connection `id` of Server::on_signal() begins or ceases to exist: for a VMM whose kernel converts signals to
    /// eventfds.
    virtual void connection(u32 id, bool exists) {
        static_cast<void>(id);
        static_cast<void>(exists);
    }
};

/// A disk's contents. A mapped one is accessed directly, without read() and write(); flush() and unmap() are still
/// called. All ranges are within size(), checked by the caller.
class BlockStore {
  public:
    virtual ~BlockStore() = default;
    virtual u64 size() const = 0; // bytes, a multiple of 512
    virtual bool read_only() const { return false; }
    /// The whole contents in memory; empty: not mapped, use the functions below.
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

/// Log output: one line per call, without a line end.
class Log {
  public:
    virtual ~Log() = default;
    virtual void line(std::string_view text) = 0;
};

/// Event counts. They only increase; the VMM prints the differences between two phases.
struct Counters {
    u64 messages_in = 0;      // HvPostMessage
    u64 messages_out = 0;     // messages put into a slot
    u64 messages_waited = 0;  // of those: the slot was busy first
    u64 signals_in = 0;       // HvSignalEvent
    u64 events_out = 0;       // event flags set
    u64 interrupts_out = 0;   // of those: with an interrupt
    u64 interrupts_saved = 0; // publications that needed none (interrupt masked, or ring not empty before)
    u64 turns = 0;            // times a channel's ring was served
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
    u64 later = 0;      // SRBs whose answer did not come in the turn that took them
    u64 heartbeats = 0; // answered by the guest
    u64 faults = 0;     // injected
    u64 violations = 0; // protocol violations by the guest
    std::array<u64, 256> opcodes{};

    /// f(name, value) for each of the above except `opcodes`, in that order.
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
        f("later", later), f("heartbeats", heartbeats), f("faults", faults), f("violations", violations);
    }
};

/// Reports the guest's protocol violations: all are counted, the first `limit` are logged.
class Judge {
  public:
    Judge(Log& log, Counters& counters, u32 limit = 64) : log_(log), counters_(counters), left_(limit) {}

    /// Reports one violation in one line. printf-like.
    [[gnu::format(printf, 2, 3)]] void violation(const char* format, ...) {
        ++counters_.violations;
        if (left_ == 0) {
            return;
        }
        va_list arguments;
        va_start(arguments, format);
        print_line("guest violation: ", format, arguments);
        va_end(arguments);
        if (--left_ == 0) {
            log_.line("guest violation: further ones are only counted");
        }
    }
    /// Logs an informational line. printf-like.
    [[gnu::format(printf, 2, 3)]] void note(const char* format, ...) {
        va_list arguments;
        va_start(arguments, format);
        print_line("vmbus: ", format, arguments);
        va_end(arguments);
    }

  private:
    void print_line(const char* prefix, const char* format, va_list arguments) {
        std::array<char, 512> text;
        std::vsnprintf(text.data(), text.size(), format, arguments);
        log_.line(std::string(prefix) + text.data());
    }
    Log& log_;
    Counters& counters_;
    u32 left_;
};

} // namespace fl::host
