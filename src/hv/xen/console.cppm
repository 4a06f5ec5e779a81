// Xen's consoles, usable from entry on, before memory, clock or backend exist. The guest's console is a ring that
// xenconsoled (or a device model) reads [xen-public io/console.h]. Xen's log takes bytes written to port 0xe9, and
// shows them only if its log level permits (guest_loglvl).
export module hv.xen.console;
import core.std;
import core.result;
import core.cpuid;
import core.log;
import io.ring.memory;
import hv.backend;
export import hv.xen.hypercall;

export namespace fl::hv::xen {

/// Xen's log splits guest lines before this many characters (DOMAIN_PBUF_SIZE is 200).
inline constexpr usize log_line_max = 190;

/// Result of find_consoles().
struct Consoles {
    bool found = false;    // Xen or an emulation of it: `calls` works
    bool emulated = false; // KVM's emulation, not Xen itself: port 0xe9 may belong to another device
    Hypercalls calls;
    u64 ring = 0;           // physical address of the console's ring; 0: no ring, or not connected
    Port port = Port::none; // its event channel
    u64 tsc_khz = 0;        // 0: not reported by Xen
};

/// The ring of the guest's console, and its event channel. Nothing: it has none, or nobody is at the other end of it.
struct ConsoleChannel {
    u64 frame = 0; // guest frame number of the page
    Port port = Port::none;
};
/// `emulated`: as in Consoles. Under Xen, xenconsoled may still be starting; an emulated console that is not bound
/// stays that way.
std::optional<ConsoleChannel> find_console(Hypercalls& calls, bool emulated);

/// Detects Xen with a few CPUIDs (`cpuid` executes one) and queries this guest's consoles. Fills the gate's page at
/// guest-physical address `page`; the backend's install() does so again later. Needs neither memory nor a backend.
/// Returns Consoles{} if nothing is found.
Consoles find_consoles(CpuidRegisters (*cpuid)(u32 leaf, u32 subleaf), Privileged& cpu, const Gate& gate, u64 page);

/// The guest's console. Every wait for its reader is bounded; after a wait that timed out, output is dropped without
/// waiting until the reader makes progress, and then the number of lost bytes is written to the console. Lines end with
/// "\r\n".
class ConsoleRing final : public log::Sink {
  public:
    /// How long to wait, in ms, for a reader that makes no progress. The first wait may be for one that is still
    /// starting.
    static constexpr u64 timeout_ms = 500;

    /// `page`: the mapped ring. `cycles`: a counter with `cycles_per_ms`; 0: unknown, a fast counter is assumed.
    void open(const Hypercalls& calls, std::byte* page, Port port, u64 (*cycles)(), u64 cycles_per_ms);
    bool is_open() const { return page_ != nullptr; }
    /// The same ring is now mapped at `page`.
    void move(std::byte* page) { page_ = page; }
    void write(std::string_view text) override;
    /// In another domain: an empty ring at the same place, with another event channel. Before, flush().
    void restart(Port port);
    /// Waits until everything has been read, even for a reader that was considered stalled.
    void flush() override;
    u64 lost() const { return lost_; }

  private:
    u32 free();
    bool wait_for(u32 room);
    bool put(std::string_view text);
    void publish();
    bool report_lost();

    Hypercalls calls_;
    std::byte* page_ = nullptr;
    Port port_ = Port::none;
    u64 (*cycles_)() = nullptr;
    u64 timeout_ = 0;  // in cycles
    u32 produced_ = 0; // position up to which the ring is filled; made visible by publish()
    bool stalled_ = false;
    u64 lost_ = 0;            // bytes, in total
    u64 lost_unreported_ = 0; // bytes, of these, not yet reported on the console
};

/// What is typed at the guest's console, as by `xl console`. The other end is not trusted.
class ConsoleInput {
  public:
    /// `page`: the mapped ring.
    explicit ConsoleInput(std::byte* page) : page_(page) {}

    /// Copies out what has been typed, at most into.size() bytes, and returns how many. If it was not 0, the other end
    /// may be waiting for room: notify it. Error{protocol}: its position cannot be.
    Result<u32> take(std::span<char> into);

  private:
    std::byte* page_;
};

/// The ring that was opened; nullptr: none. One per guest.
ConsoleRing* guest_console();

} // namespace fl::hv::xen
