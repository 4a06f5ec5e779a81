// The chosen hypervisor's backend behind one run-time interface, so that its users are compiled once. Only
// `BackendOf<B>` knows the concrete types of the backend and its bus. Capabilities that B does not model [hv.backend]
// get the interface's defaults. Not used on the I/O path.
export module boot.backend;
import core.std;
import core.interrupt;
import core.log;
import core.processor;
import core.result;
import core.time;
import core.timer;
import io.executor;
import io.latch;
import io.task;
import hv.backend;
import drivers.driver;

export namespace fl::boot {

/// How a driver of synthetic devices is matched.
struct BusMatch {
    std::string_view name; // as in drivers::known_drivers; a service has its own
    std::string_view type; // device type as the bus names it: hv::SyntheticDevice::type
};
/// A driver of synthetic devices. `Bus`: B::Bus of its backend.
template <class Bus>
struct BusDriver {
    BusMatch match;
    io::Task<Result<void>> (*probe)(drivers::Environment& environment, Bus& bus, const hv::SyntheticDevice& device);
};

class Backend {
  public:
    /// Static storage.
    virtual std::string_view name() const = 0;
    /// hv::Clock
    virtual std::optional<u64> tsc_hz() const = 0;
    virtual std::string_view clock_name() const = 0;
    /// hv::Console; nullptr: none.
    virtual log::Sink* console() { return nullptr; }

    /// hv::BusRoot: appends the bus's devices; appends nothing if there is no bus. Every wait is bounded.
    virtual io::Task<Result<void>> enumerate(hv::DeviceList& into);
    /// hv::LateDevices; changes() is nullptr if the bus has no hot-added devices.
    virtual io::Latch* changes() { return nullptr; }
    virtual std::optional<hv::SyntheticDevice> next_device() { return std::nullopt; }
    virtual u32 new_dropped() { return 0; }
    /// Drivers for the bus's devices, numbered 0 to driver_count() - 1.
    virtual u32 driver_count() const { return 0; }
    virtual const BusMatch& driver(u32 number) const = 0;
    /// Only for a device that the bus reported.
    virtual io::Task<Result<void>> probe(u32 driver, drivers::Environment& environment,
                                         const hv::SyntheticDevice& device) = 0;

    /// hv::EmulatedDevices; Error{not_supported} without it.
    virtual Result<void> unplug(hv::EmulatedClasses classes);
    /// hv::Processors, LeavesProcessors, TearDown: no-ops without them.
    virtual Result<void> join(u32 processor, io::Executor& executor);
    virtual void leave(u32 processor) { static_cast<void>(processor); }
    virtual void uninstall() {}
    /// hv::StartsProcessors; processor_count() is 0 without it.
    virtual u32 processor_count() { return 0; }
    virtual Result<void> start_processor(u32 index, const ProcessorStart& state);
    virtual void stop_processor(u32 index) { static_cast<void>(index); }
    virtual void yield() {}
    /// hv::KicksProcessors; without it kick() does nothing.
    virtual void take_kicks(InterruptHandler handler, void* context) {
        static_cast<void>(handler);
        static_cast<void>(context);
    }
    virtual bool kick(u32 processor) {
        static_cast<void>(processor);
        return false;
    }
    /// hv::OneShotTimer; nullptr: none.
    virtual OneShotTimer* timer() { return nullptr; }
    /// hv::StolenTime; nothing without it.
    virtual std::optional<Nanoseconds> stolen() { return std::nullopt; }

  protected:
    ~Backend() = default;
};

namespace backend_detail {

struct None {};
template <class B>
struct Of {
    using Bus = None;
    using Timer = None;
};
template <hv::BusRoot B>
    requires(!hv::OneShotTimer<B>)
struct Of<B> {
    using Bus = typename B::Bus;
    using Timer = None;
};
template <hv::OneShotTimer B>
    requires(!hv::BusRoot<B>)
struct Of<B> {
    using Bus = None;
    using Timer = typename B::Timer;
};
template <class B>
    requires(hv::BusRoot<B> && hv::OneShotTimer<B>)
struct Of<B> {
    using Bus = typename B::Bus;
    using Timer = typename B::Timer;
};

template <class T>
class TimerOf final : public OneShotTimer {
  public:
    T* timer = nullptr;
    Result<void> start(InterruptHandler handler, void* context) override { return timer->start(handler, context); }
    bool arm(Nanoseconds length) override { return timer->arm(length); }
    std::string_view name() const override { return timer->name(); }
};
template <>
class TimerOf<None> {};

} // namespace backend_detail

/// B's bus type, or an empty type if B has none.
template <class B>
using BusOf = typename backend_detail::Of<B>::Bus;

template <hv::Backend B>
class BackendOf final : public Backend {
  public:
    /// Both must outlive this.
    BackendOf(B& backend, std::span<const BusDriver<BusOf<B>>> drivers) : backend_(backend), drivers_(drivers) {}

    std::string_view name() const override { return B::name; }
    std::optional<u64> tsc_hz() const override { return backend_.tsc_hz(); }
    std::string_view clock_name() const override { return backend_.clock_name(); }
    log::Sink* console() override {
        if constexpr (hv::Console<B>) {
            return backend_.console();
        } else {
            return nullptr;
        }
    }
    io::Task<Result<void>> enumerate(hv::DeviceList& into) override {
        if constexpr (hv::BusRoot<B>) {
            if (auto* const bus = backend_.bus()) {
                return bus->enumerate(into);
            }
        }
        return Backend::enumerate(into);
    }
    io::Latch* changes() override {
        if constexpr (hv::LateDevices<B>) {
            auto* const bus = backend_.bus();
            return bus != nullptr ? &bus->changes() : nullptr;
        } else {
            return nullptr;
        }
    }
    std::optional<hv::SyntheticDevice> next_device() override {
        if constexpr (hv::LateDevices<B>) {
            return backend_.bus()->next_device();
        } else {
            return std::nullopt;
        }
    }
    u32 new_dropped() override {
        if constexpr (hv::LateDevices<B>) {
            return backend_.bus()->new_dropped();
        } else {
            return 0;
        }
    }
    u32 driver_count() const override { return static_cast<u32>(drivers_.size()); }
    const BusMatch& driver(u32 number) const override { return drivers_[number].match; }
    io::Task<Result<void>> probe(u32 driver, drivers::Environment& environment,
                                 const hv::SyntheticDevice& device) override {
        if constexpr (hv::BusRoot<B>) {
            return drivers_[driver].probe(environment, *backend_.bus(), device);
        } else {
            return {};
        }
    }
    Result<void> unplug(hv::EmulatedClasses classes) override {
        if constexpr (hv::EmulatedDevices<B>) {
            return backend_.unplug(classes);
        } else {
            return Backend::unplug(classes);
        }
    }
    Result<void> join(u32 processor, io::Executor& executor) override {
        if constexpr (hv::Processors<B>) {
            return backend_.join(processor, executor);
        } else {
            return Backend::join(processor, executor);
        }
    }
    void leave(u32 processor) override {
        if constexpr (hv::LeavesProcessors<B>) {
            backend_.leave(processor);
        }
    }
    u32 processor_count() override {
        if constexpr (hv::StartsProcessors<B>) {
            return backend_.processor_count();
        } else {
            return 0;
        }
    }
    Result<void> start_processor(u32 index, const ProcessorStart& state) override {
        if constexpr (hv::StartsProcessors<B>) {
            return backend_.start_processor(index, state);
        } else {
            return Backend::start_processor(index, state);
        }
    }
    void stop_processor(u32 index) override {
        if constexpr (hv::StartsProcessors<B>) {
            backend_.stop_processor(index);
        }
    }
    void yield() override {
        if constexpr (hv::StartsProcessors<B>) {
            backend_.yield();
        }
    }
    void take_kicks(InterruptHandler handler, void* context) override {
        if constexpr (hv::KicksProcessors<B>) {
            backend_.take_kicks(handler, context);
        }
    }
    bool kick(u32 processor) override {
        if constexpr (hv::KicksProcessors<B>) {
            return backend_.kick(processor);
        }
        return false;
    }
    void uninstall() override {
        if constexpr (hv::TearDown<B>) {
            backend_.uninstall();
        }
    }
    OneShotTimer* timer() override {
        if constexpr (hv::OneShotTimer<B>) {
            timer_.timer = backend_.timer();
            return timer_.timer != nullptr ? &timer_ : nullptr;
        } else {
            return nullptr;
        }
    }
    std::optional<Nanoseconds> stolen() override {
        if constexpr (hv::StolenTime<B>) {
            return backend_.stolen();
        } else {
            return std::nullopt;
        }
    }

  private:
    B& backend_;
    std::span<const BusDriver<BusOf<B>>> drivers_;
    [[no_unique_address]] backend_detail::TimerOf<typename backend_detail::Of<B>::Timer> timer_;
};

} // namespace fl::boot
