// What a driver is given and what it gives back. A driver is a folder: protocol (wire structs, constexpr), channel or queue (the ring, no
// policy), the driver itself (probe, submit, complete). It knows its device and nothing of hypervisors or of other drivers.
export module drivers.driver;
import core.std;
import core.result;
import core.time;
import core.dma;
import core.interrupt;
import io.executor;
import io.block;
import io.shutdown;

export namespace fl::drivers {

/// Features that a driver shall not negotiate (features=-name on the command line).
enum class Feature : u32 { persistent = 1, indirect = 2, ring_pages = 4, flush = 8, barrier = 16 };

/// Where drivers announce disks. A disk number says which disk of the machine it is, whichever driver shows it: primary master is 0, primary
/// slave 1, secondary master 2, and so on; a synthetic disk's bus says which number its emulated twin would have. Disks without a twin use
/// `no_twin`.
class DiskSink {
  public:
    static constexpr u32 no_twin = ~u32{0};
    /// Whether a driver may touch this disk at all: false when another driver has it already, or the table withholds it. Ask before the first
    /// access.
    virtual bool offered(u32 disk_number) = 0;
    /// The disk is ready; it lives until the machine ends. Error{busy}: another driver attached the same disk first; the driver lets go of it.
    virtual Result<void> announce(io::BlockDevice& disk, u32 disk_number) = 0;
    /// The host has taken the disk away: what is announced under that number later is another one.
    virtual void gone(u32 disk_number) { static_cast<void>(disk_number); }

  protected:
    ~DiskSink() = default;
};

/// Everything a driver may use. References live as long as the machine.
struct Environment {
    io::Executor& executor;
    DmaAllocator& dma;
    InterruptController& interrupts;
    DiskSink& disks;
    Nanoseconds timeout = 5'000'000'000; // bound of every wait for the other side, and of one request
    u32 withheld_features = 0;           // Feature bits
    /// One executor per processor that runs, index = processor, the first one is `executor`; empty: there is one processor. Work gets to another
    /// one through Executor::post or io::run_on.
    std::span<io::Executor* const> executors{};
    /// Where a driver says that somebody asks for an orderly end; nullptr: nobody would listen.
    io::Shutdown* shutdown = nullptr;

    bool allows(Feature feature) const { return (withheld_features & to_underlying(feature)) == 0; }
};

} // namespace fl::drivers
