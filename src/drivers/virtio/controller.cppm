// A virtio device in use, of any type: set-up, interrupts, a queue for each processor, changes of its configuration,
// and its end. A driver derives from Controller; probe() finds the device on its bus and negotiates.
//
//     probe: reset, features → configure() → make_lane() for each processor → interrupts → enable() → DRIVER_OK
//            → the lanes start, each on its processor → find() → changes are served until a lane closes → detach()
export module drivers.virtio.controller;
import core.std;
import core.result;
import core.text;
import io.executor;
import io.latch;
import io.task;
import drivers.driver;
import drivers.pci;
export import drivers.virtio.device;
export import drivers.virtio.lane;

export namespace fl::drivers::virtio {

class Controller {
  public:
    static constexpr u32 max_lanes = 64;

    /// `device`: owned by the caller, started; `features`: negotiated.
    Controller(Environment& environment, Device& device, u64 features);
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;
    /// Only after detach() without an error: no queue may be registered.
    virtual ~Controller();

    io::Task<Result<void>> attach();
    /// Ends everything and resets the device. On an Error it, or another processor, may still access the controller's
    /// memory.
    io::Task<Result<void>> detach();
    /// After a failed attach() and detach(): no other processor and no user knows anything of it.
    bool disposable() const { return started_ <= 1 && unknown(); }

    Controller* next = nullptr; // for probe(): the list of those in use

  protected:
    bool has(u64 feature) const { return (features_ & feature) != 0; }
    u64 features() const { return features_; }
    u32 lane_count() const { return lane_count_; }
    Lane& lane(u32 index) const { return *lanes_[index]; }
    /// The interrupt vector of a lane's queue, and of queues that are served with changes. By line there is none.
    u16 vector_of(u32 lane) const { return device_.by_line() ? no_vector : static_cast<u16>(lane == 0 ? 0 : lane + 1); }
    u16 change_vector() const { return device_.by_line() ? no_vector : u16{change_vector_}; }
    /// Wakes look(). From any processor, and from interrupt handlers.
    void changed() { changes_.raise(); }
    /// "packed event-idx msix queues=1 queue-size=256": what is in use.
    void print_features(FixedText<96>& text, u32 queue_size) const;

    // The driver's part, on the boot processor, in the order of the calls.

    /// Reads the configuration. Returns the number of queues of which each processor may have one.
    virtual Result<u32> configure() = 0;
    /// nullptr: no memory.
    virtual Lane* make_lane(io::Executor& executor) = 0;
    /// Makes and enables all queues. Lanes and vectors are known.
    virtual Result<void> enable() = 0;
    /// The device runs: finds what it has, and announces it.
    virtual io::Task<Result<void>> find() = 0;
    /// The device's configuration may have changed.
    virtual void config_changed() {}
    /// After changed() or a request of a lane, and after each interrupt of a device that has one for everything, while
    /// the first lane is open: takes what queues with change_vector() have. True: serve() has something to do. Not a
    /// coroutine, which needs a frame: this may be called once for each I/O.
    virtual Result<bool> look() { return false; }
    virtual io::Task<Result<void>> serve() { co_return Result<void>{}; }
    /// The device may still access its memory: memory besides that of the lanes is given up permanently.
    virtual void abandon() {}
    /// After an error of attach(): nothing has been announced. find() may announce several things, one by one.
    virtual bool unknown() const { return true; }

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    Device& device_;
    Shared shared_;

  private:
    static constexpr u32 config_request = u32{1} << 31; // the configuration has changed

    Result<void> make_lanes(u32 queues);
    Result<void> attach_interrupts();
    io::Task<Result<void>> watch();

    static void on_first(void* self);  // vector 0, or the line
    static void on_change(void* self); // vector 1: the configuration, and queues with change_vector()
    static void on_lane(void* lane);   // vectors 2…: the lanes after the first, each on its own processor

    u64 features_;
    std::array<Lane*, max_lanes> lanes_{}; // owned
    u32 made_ = 0;                         // lanes that exist
    u32 lane_count_ = 0;                   // of these, in use
    u32 started_ = 0;                      // of these, known to their processor
    bool change_vector_ = false;           // changes have a vector of their own
    io::Signal changes_;                   // see watch()
    io::TaskGroup tasks_;
};

/// A driver of one device type. Static storage.
struct Type {
    /// The type's own features that the environment allows, of those that the driver knows.
    u64 (*features)(const Environment& environment, bool legacy);
    std::span<const FeatureName> names;
    /// nullptr: no memory.
    Controller* (*make)(Environment& environment, Device& device, u64 features);
};

/// Attaches a PCI function.
io::Task<Result<void>> probe(const Type& type, Environment& environment, pci::Device function);
/// Attaches the device whose registers are at `base`, a physical address. `gsi`: its interrupt, if known.
io::Task<Result<void>> probe(const Type& type, Environment& environment, u64 base, std::optional<u32> gsi);

} // namespace fl::drivers::virtio
