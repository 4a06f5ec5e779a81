// The consoles that Xen gives a guest, usable from the entry on: before there is memory, a clock or a backend. The
// guest's own console is a ring that xenconsoled (or a device model) empties [xen-public io/console.h]; Xen's log takes
// what is written to port 0xe9, and shows it only where its own log level lets it (guest_loglvl).
export module hv.xen.console;
import core.std;
import core.result;
import core.cpuid;
import core.log;
import io.ring.memory;
import hv.backend;
export import hv.xen.hypercall;

export namespace fl::hv::xen {

/// Xen's log cuts a guest's line before this many characters (DOMAIN_PBUF_SIZE is 200).
inline constexpr usize log_line_max = 190;

/// What find_consoles() has found out.
struct Consoles {
    bool found = false;    // Xen, or its emulation: `calls` works
    bool emulated = false; // by KVM, not by Xen itself: port 0xe9 may be somebody else's
    Hypercalls calls;
    u64 ring = 0;           // the physical address of the console's ring; 0: there is none, or nobody at its other end
    Port port = Port::none; // its event channel
    u64 tsc_khz = 0;        // 0: Xen does not say
};

/// Looks for Xen by a few CPUIDs (`cpuid` executes one) and asks it for this guest's consoles. Fills the gate's page
/// itself, at guest-physical address `page`, as the backend's install() will do again. Needs neither memory nor a
/// backend. Nothing found: Consoles{}.
Consoles find_consoles(CpuidRegisters (*cpuid)(u32 leaf, u32 subleaf), Privileged& cpu, const Gate& gate, u64 page);

/// The guest's console. Every wait for its reader has a bound, and after one that was in vain there is none until the
/// reader has read on: then what was lost is told in the console itself. Lines end with "\r\n", as terminals want it.
class ConsoleRing final : public log::Sink {
  public:
    /// How long a reader may take nothing. The first wait may be for one that is only about to come.
    static constexpr u64 patience_ms = 500;

    /// `page`: the ring, mapped. `cycles`: a counter that runs at `cycles_per_ms`; 0: not known, and a fast one is
    /// assumed.
    void open(const Hypercalls& calls, std::byte* page, Port port, u64 (*cycles)(), u64 cycles_per_ms);
    bool is_open() const { return page_ != nullptr; }
    /// From now on the same ring is at `page`.
    void move(std::byte* page) { page_ = page; }
    void write(std::string_view text) override;
    /// Waits until everything has been read; one more chance for a reader that was given up.
    void flush() override;
    u64 lost() const { return lost_; }

  private:
    u32 free();
    bool wait_for(u32 room);
    bool put(std::string_view text);
    void publish();
    bool tell_lost();

    Hypercalls calls_;
    std::byte* page_ = nullptr;
    Port port_ = Port::none;
    u64 (*cycles_)() = nullptr;
    u64 patience_ = 0; // in cycles
    u32 produced_ = 0; // as far as the ring is filled; published by publish()
    bool stalled_ = false;
    u64 lost_ = 0;        // bytes, in all
    u64 lost_untold_ = 0; // of them, not told in the console yet
};

} // namespace fl::hv::xen
