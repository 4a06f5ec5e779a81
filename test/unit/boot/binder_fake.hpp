// Sources, drivers and hypervisors for tests of the binder. Include after the imports.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

#include "unit/core/interrupt_fake.hpp"

namespace binder_test {
using namespace fl;

struct Capture final : log::Sink {
    std::string text;
    Capture() { log::attach(*this); }
    ~Capture() { log::detach(*this); }
    void write(std::string_view t) override { text += t; }
    usize count(const std::string& part) const {
        usize n = 0;
        for (usize at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
            ++n;
        }
        return n;
    }
    bool has(const std::string& part) const { return count(part) != 0; }
};

/// The drivers' actions, in order: "driver:address ".
inline std::string trace;

/// How a fake driver handles its device. It announces `disks` disks, the first with the number of the device's twin; it
/// claims a device of another class.
struct Behaviour {
    std::optional<Error> error;
    u32 disks = 1;
    std::optional<drivers::Unused> unused; // reported for the device itself
    Nanoseconds takes = 0;
    bool asks = true; // calls offered() first, as drivers must
};

/// The disks live until the end of the test.
struct Disk final : io::BlockDevice {
    Disk(io::Executor& executor, std::string_view name) : BlockDevice(executor) {
        identity_.name = FixedText<16>(name);
        identity_.driver = "fake";
        geometry_.sectors = 64;
        geometry_.sector_size = 512;
    }

  protected:
    void start(io::Request& request) override { complete(request, io::Status::ok); }
    bool cancel_now(io::Request&) override { return false; }
    void forget(io::Request&) override {}
};
inline std::vector<std::unique_ptr<Disk>> made;

inline io::Task<Result<void>> attach(drivers::Environment& environment, std::string driver, std::string bus,
                                     std::string address, drivers::DeviceId id, Behaviour behaviour) {
    trace += driver + ":" + address + " ";
    if (behaviour.takes != 0) {
        co_await environment.executor.sleep(behaviour.takes);
    }
    if (behaviour.asks && !environment.devices->offered(id)) {
        environment.devices->unused({bus, address, "thing", drivers::Unused::taken, {}, id.number, id.kind});
        co_return Result<void>{};
    }
    if (behaviour.error) {
        co_return *behaviour.error;
    }
    if (behaviour.unused) {
        environment.devices->unused(
            {bus, address, "thing", *behaviour.unused, "as the test wants", id.number, id.kind});
        co_return Result<void>{};
    }
    if (id.kind != drivers::DeviceKind::disk) {
        co_return environment.devices->claim(id);
    }
    for (u32 i = 0; i < behaviour.disks; ++i) {
        made.push_back(std::make_unique<Disk>(environment.executor, driver.substr(0, 6) + std::to_string(made.size())));
        auto announced = environment.disks.announce(*made.back(), i == 0 ? id.number : drivers::no_twin);
        if (!announced) {
            co_return announced;
        }
    }
    co_return Result<void>{};
}

struct FakeDevice {
    std::string address;
    std::string type; // matched by drivers
    drivers::DeviceId id = {};
    bool early = false; // `first`
};
struct FakeDriver {
    std::string name;
    std::string type;
    Behaviour behaviour = {};
};

/// A bus for the test.
class Source final : public boot::DeviceSource {
  public:
    std::vector<FakeDevice> devices;
    std::vector<FakeDriver> drivers;
    std::vector<u32> indices; // the indices given to drivers
    std::string_view bus = "fake";
    bool lists = true;

    std::string_view name() const override { return bus; }
    u32 count() const override { return static_cast<u32>(devices.size()); }
    u32 driver_count() const override { return static_cast<u32>(drivers.size()); }
    std::string_view driver(u32 n) const override { return drivers[n].name; }
    bool matches(u32 driver, u32 device) const override { return drivers[driver].type == devices[device].type; }
    bool first(u32, u32 device) const override { return devices[device].early; }
    bool listed() const override { return lists; }
    io::Task<Result<void>> probe(u32 driver, fl::drivers::Environment& environment, u32 device, u32 index) override {
        indices.push_back(index);
        return attach(environment, drivers[driver].name, std::string(bus), devices[device].address, devices[device].id,
                      drivers[driver].behaviour);
    }
    boot::DeviceEntry describe(u32 device) const override {
        boot::DeviceEntry entry;
        entry.bus.write(bus);
        entry.address.write(devices[device].address);
        entry.what.write("thing");
        entry.kind = boot::class_of(devices[device].id.kind);
        return entry;
    }
};

/// A hypervisor whose bus is a list. `late`: pending hot-added devices.
struct Hypervisor {
    struct Bus {
        explicit Bus(io::Executor& executor) : latch(executor) {}
        std::vector<hv::SyntheticDevice> there;
        std::vector<hv::SyntheticDevice> late;
        u32 lost = 0;
        u32 not_listed = 0; // devices without room in enumerate()
        std::optional<Error> broken;
        io::Latch latch;

        static io::Task<Result<void>> list(Bus& self, hv::DeviceList& into) {
            for (const auto& device : self.there) {
                into.add(device);
            }
            into.dropped += self.not_listed;
            co_return self.broken ? Result<void>(*self.broken) : Result<void>{};
        }
        io::Task<Result<void>> enumerate(hv::DeviceList& into) { return list(*this, into); }
        std::optional<hv::SyntheticDevice> next_device() {
            if (late.empty()) {
                return std::nullopt;
            }
            const auto device = late.front();
            late.erase(late.begin());
            return device;
        }
        u32 new_dropped() { return std::exchange(lost, 0); }
        io::Latch& changes() { return latch; }
        void come(const hv::SyntheticDevice& device) {
            late.push_back(device);
            latch.open();
        }
        void lose(u32 count) {
            lost += count;
            latch.open();
        }
    };
    static constexpr std::string_view name = "xen";
    static constexpr hv::VmGuest guest = hv::VmGuest::xen;
    static bool recognises(const hv::Sightings&) { return true; }
    Result<void> install(hv::Environment&) { return {}; }
    Result<void> start(hv::Services&) { return {}; }
    std::optional<u64> tsc_hz() const { return 5; }
    std::string_view clock_name() const { return "fake clock"; }
    Bus* bus() { return at; }
    Result<void> unplug(hv::EmulatedClasses classes) {
        trace += "unplug ";
        asked.push_back(classes);
        return refuses ? Result<void>(Error{Code::not_supported, "this host does not"}) : Result<void>{};
    }
    Bus* at = nullptr;
    std::vector<hv::EmulatedClasses> asked;
    bool refuses = false;
};
static_assert(hv::Backend<Hypervisor> && hv::BusRoot<Hypervisor> && hv::LateDevices<Hypervisor> &&
              hv::EmulatedDevices<Hypervisor>);

inline hv::SyntheticDevice synthetic(std::string_view type, std::string_view address, u32 number) {
    return {FixedText<40>(type), FixedText<64>(address), number};
}

// Drivers on that bus: one for disks, one for network cards, one service; the test sets their behaviour.
inline Behaviour on_disk, on_network;
inline io::Task<Result<void>> probe_disk(drivers::Environment& environment, Hypervisor::Bus&,
                                         const hv::SyntheticDevice& device) {
    return attach(environment, "xdisk", "xen", std::string(device.address.view()), drivers::disk_id(device.number),
                  on_disk);
}
inline io::Task<Result<void>> probe_network(drivers::Environment& environment, Hypervisor::Bus&,
                                            const hv::SyntheticDevice& device) {
    return attach(environment, "xnet", "xen", std::string(device.address.view()),
                  {drivers::DeviceKind::network, device.number}, on_network);
}
inline io::Task<Result<void>> probe_service(drivers::Environment&, Hypervisor::Bus&,
                                            const hv::SyntheticDevice& device) {
    trace += "service:" + std::string(device.address.view()) + " ";
    co_return Result<void>{};
}
inline constexpr std::array<boot::BusDriver<Hypervisor::Bus>, 3> bus_drivers{{
    {{"service", "clock"}, probe_service},
    {{"xdisk", "vbd"}, probe_disk},
    {{"xnet", "vif"}, probe_network},
}};

// The driver table of these tests: two device classes, each with a native and a synthetic driver.
inline constexpr std::array<drivers::DriverInfo, 5> known{{
    {"xdisk", true, drivers::DeviceKind::disk},
    {"xnet", true, drivers::DeviceKind::network},
    {"ndisk", false, drivers::DeviceKind::disk, {.disks = true}},
    {"nnet", false, drivers::DeviceKind::network, {.nics = true}},
    {"other", false, drivers::DeviceKind::disk},
}};
inline constexpr std::array<drivers::Rule, 2> rules{{
    {hv::VmGuest::xen, &known[2], &known[0], 100, drivers::Twin::leave},
    {hv::VmGuest::xen, &known[3], &known[1], 100, drivers::Twin::leave},
}};

/// A kernel with a native bus and a hypervisor's bus.
struct Kernel : boot::DriverMachine {
    explicit Kernel(std::string_view rule = {}, std::optional<drivers::Twin> twin = std::nullopt) {
        trace.clear();
        on_disk = on_network = {};
        if (!rule.empty()) {
            EXPECT_TRUE(table.apply_word(rule)) << table.diagnostics()[0].message.view();
        }
        plan = table.plan(hv::VmGuest::xen, twin);
        hypervisor.at = &bus;
        native.drivers = {{"ndisk", "ide"}, {"nnet", "nic"}};
    }
    virtual ~Kernel() {
        vector_detail::fail_after(~u64{0});
        binder.reset();
        made.clear();
    }
    drivers::Environment environment(boot::DriverSinks& sinks, io::Shutdown& shutdown) override {
        return {.executor = executor,
                .dma = dma,
                .interrupts = interrupts,
                .disks = sinks.disks,
                .shutdown = &shutdown,
                .devices = &sinks.devices};
    }
    std::span<io::Executor* const> executors() override { return processors; }
    boot::Binder& make() { return binder ? *binder : binder.emplace(executor, plan, *this); }
    /// Unplugs, adds both buses and binds all devices.
    Result<void> bind() {
        make().unplug(backend);
        EXPECT_TRUE(executor.run(source.enumerate()));
        binder->add(native);
        binder->add(source);
        const Result<void> done = executor.run(binder->bind());
        binder->devices().list();
        return done;
    }
    boot::Outcome verdict() {
        boot::Outcome outcome{Verdict::success, FixedText<240>("done")};
        boot::judge(outcome, binder->devices(), table.wrong(), false);
        return outcome;
    }
    std::string disks() const { return std::string(binder->disks().names().view()); }

    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    std::span<io::Executor* const> processors; // empty: one processor; set before make()
    test::HeapDma dma;
    test::Interrupts interrupts;
    Capture capture;
    drivers::Table table{known, rules};
    drivers::Plan plan;
    Hypervisor hypervisor;
    Hypervisor::Bus bus{executor};
    boot::BackendOf<Hypervisor> backend{hypervisor, bus_drivers};
    Source native;
    boot::SyntheticSource source{backend};
    std::optional<boot::Binder> binder;
};

} // namespace binder_test
