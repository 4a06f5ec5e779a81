// A virtio device, independent of its bus [virtio-1.2 §2, §3.1]: reset, negotiation of features, queues,
// configuration space. drivers.virtio.pci and drivers.virtio.mmio are the two buses.
//
//     CO_CHECK(co_await device.start(executor, timeout));      // reset, ACKNOWLEDGE, DRIVER
//     CO_CHECK(device.negotiate(wanted, required, …));          // FEATURES_OK
//     CO_TRY(const Notifier notifier, device.enable(0, …));    // each queue
//     device.run();                                            // DRIVER_OK
//
// Status bits are set one at a time, in the specified order, because some devices accept nothing else.
export module drivers.virtio.device;
import core.std;
import core.interrupt;
import core.mmio;
import core.result;
import core.text;
import core.time;
import io.executor;
import io.task;
export import drivers.virtio.protocol;

export namespace fl::drivers::virtio {

/// Bus addresses of a queue's three areas [virtio-1.2 §2.6].
struct QueueAddresses {
    u64 descriptors = 0;
    u64 driver = 0;
    u64 device = 0;
};

/// Notifies the device of a queue's new buffers: one write, one VM exit [virtio-1.2 §4.1.5.2, §4.2.3.3].
class Notifier {
  public:
    Notifier() = default;
    Notifier(Mmio registers, u64 at, u16 queue, bool wide)
        : registers_(registers), at_(at), queue_(queue), wide_(wide) {}
    inline void notify() const {
        if (wide_) {
            registers_.write<u32>(at_, queue_);
        } else {
            registers_.write<u16>(at_, queue_);
        }
    }

  private:
    Mmio registers_{};
    u64 at_ = 0;
    u16 queue_ = 0;
    bool wide_ = false;
};

/// What an interrupt is for. `context` is passed to the handlers, which run as InterruptHandler does.
struct InterruptUse {
    u32 processor = 0;
    InterruptHandler handler = nullptr;
    void* context = nullptr;
};

class Device {
  public:
    /// For log lines.
    virtual FixedText<48> name() const = 0;
    /// The interface before version 1.0 [virtio-1.2 §4.2.4]: no FEATURES_OK, and queues have a fixed layout.
    virtual bool legacy() const { return false; }

    /// Resets the device and announces a driver. The reset of a device that is already in its initial state is left
    /// out. Error{timed_out}: it does not finish its reset; some VMMs cannot reset a device in use.
    io::Task<Result<void>> start(io::Executor& executor, Nanoseconds timeout);
    /// Accepts those of the offered features that are in `supported`, and returns them. Error{not_supported}: the
    /// device does not offer `required` (all of these), or refuses the choice. One line names the rest; `names`: those
    /// of the device type's own features. `withheld`: those of which the user does not want any; another line says
    /// which of them the device offers, and which it does not.
    Result<u64> negotiate(u64 supported, u64 required, u64 withheld, std::span<const FeatureName> names);
    /// Call once all queues are enabled.
    void run() { set_status(static_cast<u8>(status_ | status_driver_ok)); }
    /// For a device that cannot be used: tells it so [virtio-1.2 §2.1.2].
    void fail() { set_status(static_cast<u8>(status_ | status_failed)); }
    /// Returns the device to its initial state: it accesses no memory of ours from then on. Bounded by `timeout`.
    io::Task<Result<void>> reset(io::Executor& executor, Nanoseconds timeout);
    /// The device has found an error and wants a reset. One access.
    bool needs_reset() { return (read_status() & status_needs_reset) != 0; }

    /// Maximum size of a queue in descriptors; 0: there is no such queue.
    virtual u32 max_size(u16 queue) = 0;
    /// Gives the device a queue. `vector`: of the interrupts attached, or no_vector. The notifier is valid until the
    /// next reset. Error{protocol}: the device's description of it is invalid; Error{not_supported}: the addresses do
    /// not fit, or it does not accept the vector.
    virtual Result<Notifier> enable(u16 queue, u32 size, const QueueAddresses& at, u16 vector) = 0;

    /// Attaches one handler for each of `uses`, as far as the device and the machine have interrupts, and returns
    /// their number; use number N is vector N. With one interrupt line for everything the number is 1 and by_line()
    /// is true: the handler must call take_interrupt() first. `messages`: MSI-X may be used. Errors: as
    /// pci::Interrupts::attach(), InterruptController::attach_line().
    virtual Result<u32> attach(std::span<const InterruptUse> uses, bool messages) = 0;
    /// On return no handler is running or will run.
    virtual void detach() = 0;
    virtual bool by_line() const = 0;
    /// Reads and acknowledges the reasons of an interrupt on a line, isr_queue and isr_config; 0: another device on
    /// the line. From a handler. `accesses` is increased by the number of accesses.
    virtual u8 take_interrupt(u32& accesses) = 0;
    /// The vector of configuration changes. Error{not_supported}: the device does not accept it.
    virtual Result<void> set_config_vector(u16 vector) = 0;

    /// A field of the device's configuration; all ones beyond its end. Fields of 64 bits are read as two halves: see
    /// read_config().
    u32 config(u64 at, u32 width) {
        const u32 value = config_field(at, width);
        if (fields_.count < fields_.values.size()) {
            fields_.values[fields_.count] = value;
        }
        ++fields_.count;
        return value;
    }
    /// Calls `read` until the configuration has not changed meanwhile, at most 16 times [virtio-1.2 §2.5.1]. The legacy
    /// interface has no generation: there the same values must have been read twice in a row [virtio-1.2 §2.5.4].
    /// `read`: at most max_fields calls of config(). Error{protocol}: it changes all the time.
    template <class F>
    Result<void> read_config(F&& read) {
        for (u32 attempt = 0; attempt < 16; ++attempt) {
            const u32 before = generation();
            const Fields last = std::exchange(fields_, {});
            read();
            if (legacy() ? attempt != 0 && fields_.count <= max_fields && fields_ == last : generation() == before) {
                return {};
            }
        }
        return Error{Code::protocol, "the device's configuration changes each time that it is read"};
    }
    /// Writes a field of one byte.
    virtual void write_config(u64 at, u8 value) = 0;
    u64 config64(u64 at) { return config(at, 4) | u64{config(at + 4, 4)} << 32; }

    static constexpr u32 max_fields = 16;

  protected:
    ~Device() = default;
    /// Changes whenever the configuration may have been changed by the device; constant in the legacy interface.
    virtual u32 generation() = 0;
    /// As config().
    virtual u32 config_field(u64 at, u32 width) = 0;
    virtual u8 read_status() = 0;
    virtual void write_status(u8 status) = 0;
    /// 32 features, `half` 0 or 1.
    virtual u32 read_features(u32 half) = 0;
    virtual void write_features(u32 half, u32 features) = 0;

  private:
    /// What config() returned since read_config() began; further values are only counted.
    struct Fields {
        std::array<u32, max_fields> values{};
        u32 count = 0;
        friend bool operator==(const Fields&, const Fields&) = default;
    };
    void set_status(u8 status) {
        status_ = status;
        write_status(status);
    }
    u8 status_ = 0;
    Fields fields_;
};

/// "EVENT_IDX, RING_PACKED": the names of these features; those without one by number.
FixedText<240> names_of(u64 features, std::span<const FeatureName> names);

} // namespace fl::drivers::virtio
