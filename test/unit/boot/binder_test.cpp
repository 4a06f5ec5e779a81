// Which driver gets which device, and what is reported about the others.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.dma;
import core.interrupt;
import core.log;
import core.result;
import core.text;
import core.time;
import core.vector;
import core.verdict;
import io.block;
import io.executor;
import io.latch;
import io.shutdown;
import io.task;
import hv.backend;
import drivers.driver;
import drivers.table;
import boot.backend;
import boot.binder;
import boot.devices;
import boot.disks;
import boot.jobs;
import boot.sinks;
import boot.sources;

#include "unit/drivers/pci_fake.hpp"
#include "unit/io/support.hpp"

#include "unit/boot/binder_fake.hpp"

namespace {
using namespace binder_test;
using drivers::DeviceKind;
using drivers::disk_id;
using drivers::Twin;
using drivers::Unused;

drivers::DeviceId network_id(u32 number) { return {DeviceKind::network, number}; }
Error failure(Code code) { return {code, "as the test wants"}; }

// ---- order ----

TEST(Binder, DriversProbeInThePlansOrderAndServicesLast) {
    Kernel k;
    k.native.devices = {{"i0", "ide", disk_id(0)}, {"n0", "nic", network_id(0)}, {"i1", "ide", disk_id(1)}};
    k.bus.there = {synthetic("clock", "c", 0), synthetic("vif", "1", 1), synthetic("vbd", "2", 2)};
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(trace, "xdisk:2 xnet:1 ndisk:i0 ndisk:i1 nnet:n0 service:c ");
}

TEST(Binder, ARankTurnsTheOrderRound) {
    Kernel k("rank,xen,ndisk,xdisk,-5");
    k.native.devices = {{"i0", "ide", disk_id(0)}};
    k.bus.there = {synthetic("vbd", "0", 0)};
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(trace, "ndisk:i0 xdisk:0 ");
    EXPECT_EQ(k.disks(), "ndisk0");
    EXPECT_TRUE(k.capture.has("device xen 0, thing: left to ndisk, which has the same disk\n")) << k.capture.text;
    EXPECT_TRUE(k.capture.has("\"state\":\"taken\""));
}

// ---- twins, of each class ----

TEST(Binder, ASyntheticDiskHidesItsTwin) {
    Kernel k;
    k.native.devices = {{"i0", "ide", disk_id(0)}};
    k.bus.there = {synthetic("vbd", "0", 0)};
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(k.disks(), "xdisk0");
    EXPECT_TRUE(k.capture.has("device fake i0, thing: left to xdisk, which has the same disk\n")) << k.capture.text;
    EXPECT_EQ(k.capture.count("\"record\":\"device\""), 2u) << "each device is listed once";
    EXPECT_EQ(k.verdict().verdict, Verdict::success);
}

TEST(Binder, TheNativeDriverGetsTheDiskWhenTheSyntheticOneFails) {
    Kernel k;
    on_disk.error = failure(Code::timed_out);
    k.native.devices = {{"i0", "ide", disk_id(0)}};
    k.bus.there = {synthetic("vbd", "0", 0)};
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(trace, "xdisk:0 ndisk:i0 ");
    EXPECT_EQ(k.disks(), "ndisk0");
    EXPECT_TRUE(k.capture.has("error: xdisk: timed out: as the test wants\n")) << k.capture.text;
    EXPECT_TRUE(k.capture.has("\"bus\":\"xen\",\"address\":\"0\",\"id\":\"\",\"class\":\"disk\","
                              "\"what\":\"Xen virtual block device\",\"driver\":\"\",\"state\":\"failed\","
                              "\"reason\":\"xdisk: as the test wants\""))
        << k.capture.text;
    EXPECT_EQ(k.verdict().verdict, Verdict::error);
}

TEST(Binder, BothAttachWithKeep) {
    Kernel k({}, Twin::keep);
    k.native.devices = {{"i0", "ide", disk_id(0)}, {"n0", "nic", network_id(0)}};
    k.bus.there = {synthetic("vbd", "0", 0), synthetic("vif", "1", 0)};
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(k.disks(), "xdisk0, ndisk1");
    EXPECT_EQ(k.capture.count("\"driver\":\"nnet\",\"state\":\"in use\""), 1u) << k.capture.text;
    EXPECT_EQ(k.capture.count("\"driver\":\"xnet\",\"state\":\"in use\""), 1u);
    EXPECT_EQ(k.capture.count("\"state\":\"taken\""), 0u);
}

TEST(Binder, TwinsOfNetworkCardsAreClaimedLikeDisks) {
    Kernel k;
    k.native.devices = {{"n0", "nic", network_id(0)}, {"n1", "nic", network_id(1)}, {"i0", "ide", disk_id(0)}};
    k.bus.there = {synthetic("vif", "0", 0)};
    ASSERT_TRUE(k.bind());
    EXPECT_TRUE(k.capture.has("device fake n0, thing: left to xnet, which has the same network card\n"))
        << k.capture.text;
    EXPECT_TRUE(k.capture.has("\"address\":\"n1\",\"id\":\"\",\"class\":\"network\",\"what\":\"thing\","
                              "\"driver\":\"nnet\",\"state\":\"in use\""))
        << "another card";
    EXPECT_EQ(k.disks(), "ndisk0") << "a claim of one class is none of another";
}

TEST(Binder, ANetworkCardWhoseSyntheticDriverFailsIsLeftToTheNativeOne) {
    Kernel k;
    on_network.error = failure(Code::device_gone);
    k.native.devices = {{"n0", "nic", network_id(0)}};
    k.bus.there = {synthetic("vif", "0", 0)};
    ASSERT_TRUE(k.bind());
    EXPECT_TRUE(k.capture.has("\"driver\":\"nnet\",\"state\":\"in use\"")) << k.capture.text;
}

// ---- unplugging ----

TEST(Binder, TheHostUnplugsOnlyWhatThePlanSays) {
    {
        Kernel k;
        ASSERT_TRUE(k.bind());
        EXPECT_TRUE(k.hypervisor.asked.empty());
        EXPECT_FALSE(k.capture.has("unplugged"));
    }
    {
        Kernel k("add,xen,nnet,xnet,100,unplug");
        k.bus.there = {synthetic("vif", "0", 0)};
        ASSERT_TRUE(k.bind());
        ASSERT_EQ(k.hypervisor.asked.size(), 1u);
        EXPECT_EQ(k.hypervisor.asked[0], hv::EmulatedClasses{.nics = true});
        EXPECT_EQ(trace, "unplug xnet:0 ") << "before anything is probed";
        EXPECT_TRUE(k.capture.has("emulated network cards unplugged\n"));
    }
    {
        Kernel k({}, Twin::unplug);
        ASSERT_TRUE(k.bind());
        ASSERT_EQ(k.hypervisor.asked.size(), 1u);
        EXPECT_EQ(k.hypervisor.asked[0], (hv::EmulatedClasses{.disks = true, .nics = true}));
        EXPECT_TRUE(k.capture.has("emulated IDE disks, network cards unplugged\n")) << k.capture.text;
    }
}

TEST(Binder, AHostThatDoesNotUnplugIsAWarning) {
    Kernel k("add,xen,ndisk,xdisk,100,unplug");
    k.hypervisor.refuses = true;
    k.native.devices = {{"i0", "ide", disk_id(0)}};
    k.native.drivers[0].behaviour.disks = 0;
    ASSERT_TRUE(k.bind());
    EXPECT_TRUE(k.capture.has("warning: emulated IDE disks are not unplugged: this host does not\n")) << k.capture.text;
    EXPECT_FALSE(k.binder->unplugged().any());
    EXPECT_TRUE(k.capture.has("device fake i0, thing: driven by ndisk, 0 disks\n")) << "it is there, and is empty";
    EXPECT_EQ(k.verdict().verdict, Verdict::success);
}

struct Plain {
    static constexpr std::string_view name = "plain";
    static constexpr hv::VmGuest guest = hv::VmGuest::kvm;
    static bool recognises(const hv::Sightings&) { return true; }
    Result<void> install(hv::Environment&) { return {}; }
    Result<void> start(hv::Services&) { return {}; }
    std::optional<u64> tsc_hz() const { return 7; }
    std::string_view clock_name() const { return "plain clock"; }
};

TEST(Binder, AHypervisorThatCannotUnplugIsAWarning) {
    Plain plain;
    Kernel k({}, Twin::unplug);
    boot::BackendOf<Plain> backend(plain, {});
    k.make().unplug(backend);
    EXPECT_TRUE(k.capture.has("are not unplugged: this hypervisor cannot unplug emulated devices")) << k.capture.text;
    // A capability that is not modelled does nothing and is not an error.
    EXPECT_EQ(backend.name(), "plain");
    EXPECT_EQ(backend.tsc_hz(), 7u);
    EXPECT_EQ(backend.clock_name(), "plain clock");
    EXPECT_EQ(backend.console(), nullptr);
    EXPECT_EQ(backend.timer(), nullptr);
    EXPECT_EQ(backend.changes(), nullptr);
    EXPECT_EQ(backend.driver_count(), 0u);
    EXPECT_FALSE(backend.next_device());
    EXPECT_TRUE(backend.join(1, k.executor));
    backend.leave(1);
    backend.uninstall();
    boot::SyntheticSource none(backend);
    EXPECT_TRUE(k.executor.run(none.enumerate()));
    EXPECT_EQ(none.count(), 0u);
}

TEST(Binder, WhatWasUnpluggedIsListedAsThat) {
    Kernel k("add,xen,ndisk,xdisk,100,unplug");
    k.native.devices = {{"i0", "ide", disk_id(4)}, {"n0", "nic", network_id(0)}};
    k.native.drivers[0].behaviour.disks = 0;
    k.native.drivers[1].behaviour.error = failure(Code::not_supported);
    ASSERT_TRUE(k.bind());
    EXPECT_TRUE(k.capture.has("device fake i0, thing: the host has unplugged its disks as requested\n"))
        << k.capture.text;
    EXPECT_TRUE(k.capture.has("\"address\":\"i0\",\"id\":\"\",\"class\":\"disk\",\"what\":\"thing\",\"driver\":\"\","
                              "\"state\":\"unplugged\""));
    EXPECT_FALSE(
        k.capture.has("\"address\":\"n0\",\"id\":\"\",\"class\":\"network\",\"what\":\"thing\",\"driver\":\"\","
                      "\"state\":\"unplugged\""))
        << "network cards were not requested";

    Kernel reset("add,xen,ndisk,xdisk,100,unplug");
    reset.native.devices = {{"i0", "ide", disk_id(4)}};
    reset.native.drivers[0].behaviour.error = failure(Code::not_supported);
    ASSERT_TRUE(reset.bind());
    EXPECT_TRUE(reset.capture.has("\"state\":\"unplugged\"")) << "a controller that was reset by it";
    EXPECT_FALSE(reset.capture.has("error:"));

    Kernel broken("add,xen,ndisk,xdisk,100,unplug");
    broken.native.devices = {{"i0", "ide", disk_id(4)}};
    broken.native.drivers[0].behaviour.error = failure(Code::timed_out);
    ASSERT_TRUE(broken.bind());
    EXPECT_TRUE(broken.capture.has("\"state\":\"failed\"")) << "any other error is one";
}

// ---- state of a device ----

TEST(Binder, ADriverThatFindsNothing) {
    Kernel k;
    k.native.devices = {{"i0", "ide", disk_id(4)}};
    k.native.drivers[0].behaviour.disks = 0;
    ASSERT_TRUE(k.bind());
    EXPECT_TRUE(k.capture.has("\"driver\":\"ndisk\",\"state\":\"in use\",\"reason\":\"0 disks\"")) << k.capture.text;
    EXPECT_EQ(k.binder->devices().why_no_disk().view(),
              "of 1 device that could be or have one: 1 without disks; see the device lines");
}

TEST(Binder, TheDisksOfAControllerAreCounted) {
    Kernel k;
    k.native.devices = {{"i0", "ide", disk_id(4)}, {"i1", "ide", disk_id(5)}};
    k.native.drivers[0].behaviour.disks = 3;
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(k.capture.count("\"driver\":\"ndisk\",\"state\":\"in use\",\"reason\":\"3 disks\""), 2u)
        << k.capture.text;
}

TEST(Binder, EveryProcessorHasALaneOfEveryDisk) {
    Kernel k;
    io::Executor second(k.clock.platform(), 1);
    io::Executor third(k.clock.platform(), 2);
    const std::array<io::Executor*, 3> all{&k.executor, &second, &third};
    k.processors = all;
    k.native.drivers[0].behaviour.disks = 2;
    k.native.devices = {{"i0", "ide", disk_id(0)}};
    ASSERT_TRUE(k.bind());
    ASSERT_EQ(k.binder->disks().all().size(), 2u);
    for (io::BlockDevice* disk : k.binder->disks().all()) {
        ASSERT_EQ(disk->lanes(), 3u);
        EXPECT_EQ(&disk->lane(1).executor(), &second);
        EXPECT_EQ(&disk->lane(2).executor(), &third);
    }
    EXPECT_TRUE(k.capture.has("\"queues\":1,\"lanes\":3}"));
    EXPECT_EQ(k.verdict().verdict, Verdict::success);
}

TEST(Binder, ADiskWithoutMemoryForItsLanesWorksOnItsOwnProcessor) {
    Kernel k;
    io::Executor second(k.clock.platform(), 1);
    const std::array<io::Executor*, 2> all{&k.executor, &second};
    k.processors = all;
    boot::Attached attached(k.plan);
    attached.executors = all;
    boot::DriverSinks sinks(attached, "ndisk");
    Disk disk(k.executor, "lonely");
    vector_detail::fail_after(0);
    ASSERT_TRUE(sinks.disks.announce(disk, drivers::no_twin));
    EXPECT_EQ(disk.lanes(), 1u);
    EXPECT_TRUE(k.capture.has("warning: lonely: lanes for 1 of 2 processors: "));
    EXPECT_EQ(attached.disks.all().size(), 1u);
}

TEST(Binder, ADriverThatAnswersNotSupported) {
    Kernel k;
    k.native.devices = {{"i0", "ide", disk_id(4)}};
    k.native.drivers[0].behaviour.error = failure(Code::not_supported);
    ASSERT_TRUE(k.bind());
    EXPECT_TRUE(k.capture.has("\"driver\":\"\",\"state\":\"no driver\",\"reason\":\"ndisk: as the test wants\""))
        << k.capture.text;
    EXPECT_EQ(k.verdict().verdict, Verdict::success) << "no driver is no failure";
}

TEST(Binder, ADriverThatReportsTheDeviceItselfIsNotContradicted) {
    Kernel k;
    k.native.devices = {{"i0", "ide", disk_id(4)}, {"i1", "ide", disk_id(5)}};
    k.native.drivers[0].behaviour.unused = Unused::not_a_disk;
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(k.capture.count("\"address\":\"i0\""), 1u) << k.capture.text;
    EXPECT_EQ(k.capture.count("\"address\":\"i1\""), 1u);
    EXPECT_EQ(k.capture.count("\"state\":\"not a disk\""), 2u);
}

TEST(Binder, ADeviceWithoutADriver) {
    Kernel k;
    k.native.devices = {{"s0", "scsi", disk_id(4)}};
    k.bus.there = {synthetic("vfb", "0", 0)};
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(trace, "");
    EXPECT_TRUE(k.capture.has("device fake s0, thing: no driver for this thing in this build\n")) << k.capture.text;
    EXPECT_TRUE(k.capture.has("device xen 0, Xen virtual framebuffer: no driver for this Xen virtual framebuffer"));
    EXPECT_EQ(k.verdict().verdict, Verdict::success);
}

TEST(Binder, ADeviceThatTwoDriversMatchIsGivenToTheFirstInThePlan) {
    Kernel k;
    k.native.drivers = {{"other", "ide"}, {"ndisk", "ide"}};
    k.native.devices = {{"i0", "ide", disk_id(4)}};
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(trace, "ndisk:i0 ");
    EXPECT_EQ(k.capture.count("\"record\":\"device\""), 1u);
}

TEST(Binder, ADriverThatDeclinesLeavesTheDeviceToTheNext) {
    Kernel k;
    k.native.drivers = {{"other", "ide"}, {"ndisk", "ide", {.error = failure(Code::not_supported)}}};
    k.native.devices = {{"i0", "ide", disk_id(4)}};
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(trace, "ndisk:i0 other:i0 ");
    EXPECT_TRUE(k.capture.has("\"driver\":\"other\",\"state\":\"in use\",\"reason\":\"1 disk\"")) << k.capture.text;
    EXPECT_FALSE(k.capture.has("error")) << "nothing is wrong";
    EXPECT_EQ(k.capture.count("\"record\":\"device\""), 1u);
}

TEST(Binder, ADriverThatFailsEndsTheDevice) {
    Kernel k;
    k.native.drivers = {{"other", "ide"}, {"ndisk", "ide", {.error = failure(Code::device_gone)}}};
    k.native.devices = {{"i0", "ide", disk_id(4)}};
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(trace, "ndisk:i0 ") << "its state is not known";
    EXPECT_TRUE(k.capture.has("\"state\":\"failed\""));
}

TEST(Binder, UnlistedDevicesAreListedOnlyWhenTheyFail) {
    Kernel k;
    k.native.lists = false;
    k.native.drivers = {{"other", "ide"}};
    k.native.devices = {{"i0", "ide", disk_id(drivers::no_twin)}};
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(k.disks(), "other0");
    EXPECT_FALSE(k.capture.has("probing"));
    EXPECT_FALSE(k.capture.has("\"record\":\"device\""));

    Kernel bad;
    bad.native.lists = false;
    bad.native.drivers = {{"other", "ide", {.error = failure(Code::exhausted)}}};
    bad.native.devices = {{"i0", "ide"}};
    ASSERT_TRUE(bad.bind());
    EXPECT_TRUE(bad.capture.has("\"address\":\"i0\",\"id\":\"\",\"class\":\"disk\",\"what\":\"thing\",\"driver\":\"\","
                                "\"state\":\"no room\""))
        << bad.capture.text;
    EXPECT_EQ(bad.verdict().verdict, Verdict::error);
}

TEST(Binder, ABusWithoutAccessHasNoFunctions) {
    Kernel k;
    k.bus.broken = failure(Code::timed_out);
    EXPECT_FALSE(k.executor.run(k.source.enumerate()));
    EXPECT_EQ(k.source.count(), 0u);
}

// ---- PCI ----

struct Probed {
    u8 bus;
    u8 device;
    u32 index;
    friend bool operator==(const Probed&, const Probed&) = default;
};
std::vector<Probed> probed;
io::Task<Result<void>> probe_function(drivers::Environment&, drivers::pci::Device device, u32 index) {
    probed.push_back({device.at.bus, device.at.device, index});
    co_return Result<void>{};
}
bool is_legacy(const drivers::pci::Device& device) { return device.prog_if == 0x80; }
constexpr drivers::pci::Match ide_ids[] = {{.class_code = 1, .subclass = 1}};
constexpr drivers::pci::Match usb_ids[] = {{.class_code = 0x0c}};
constexpr std::array<boot::PciDriver, 2> pci_drivers{{
    {"ndisk", ide_ids, probe_function, is_legacy},
    {"other", usb_ids, probe_function, nullptr},
}};

struct WithPci : Kernel {
    pci_test::Space space;
    boot::PciSource pci{pci_drivers};
    Result<void> find() {
        pci.count_found(drivers::pci::enumerate(space, boot::PciSource::found, &pci));
        make().add(pci);
        return bind();
    }
};

TEST(BinderPci, FunctionsOfADriverKeepTheirIndexAndTheFirstComesFirst) {
    probed.clear();
    WithPci k;
    k.space.add(0, 1, 0, 0x8086, 1, 0x010185);
    k.space.add(0, 2, 0, 0x8086, 2, 0x010185);
    k.space.add(0, 3, 0, 0x8086, 3, 0x010180); // at the legacy ports
    k.space.add(0, 4, 0, 0x8086, 4, 0x0c0330); // not listed, but has a driver
    k.space.add(0, 5, 0, 0x8086, 5, 0x060000); // neither
    k.space.add(0, 6, 0, 0x8086, 6, 0x020000); // listed, without a driver
    ASSERT_TRUE(k.find());
    EXPECT_EQ(probed, (std::vector<Probed>{{0, 3, 0}, {0, 1, 1}, {0, 2, 2}, {0, 4, 0}}));
    EXPECT_EQ(k.pci.functions(), 6u);
    EXPECT_EQ(k.pci.count(), 5u);
    EXPECT_TRUE(k.capture.has("ndisk: probing 00:03.0 [8086:0003]\n")) << k.capture.text;
    EXPECT_TRUE(k.capture.has("device pci 00:06.0 [8086:0006], network controller: no driver for this network"));
    EXPECT_EQ(k.capture.count("\"record\":\"device\""), 5u);
}

TEST(BinderPci, PlacesThatCannotBeReachedAreAnError) {
    WithPci k;
    k.space.unreachable.insert({0, 9, 0});
    ASSERT_TRUE(k.find());
    EXPECT_TRUE(k.capture.has("{\"record\":\"left_out\",\"what\":\"places on PCI buses\",\"count\":1,\"disk\":true"))
        << k.capture.text;
    EXPECT_EQ(k.verdict().verdict, Verdict::error);
}

TEST(BinderPci, FunctionsWithoutMemoryAreAnError) {
    WithPci k;
    for (int device = 0; device < 10; ++device) {
        k.space.add(0, device, 0, 0x8086, 1, 0x020000);
    }
    vector_detail::fail_after(1); // room for eight
    k.pci.count_found(drivers::pci::enumerate(k.space, boot::PciSource::found, &k.pci));
    vector_detail::fail_after(~u64{0});
    EXPECT_EQ(k.pci.count(), 8u);
    k.make().add(k.pci);
    ASSERT_TRUE(k.bind());
    EXPECT_TRUE(k.capture.has("{\"record\":\"left_out\",\"what\":\"PCI functions\",\"count\":2,\"disk\":true"))
        << k.capture.text;
    EXPECT_EQ(k.verdict().verdict, Verdict::error);
}

// ---- virtio-mmio and null disks ----

io::Task<Result<void>> probe_mmio(drivers::Environment&, const boot::VirtioMmioDevice& device, u32 index) {
    trace += "mmio:" + std::to_string(device.base) + ":" + std::to_string(index) + " ";
    co_return Result<void>{};
}
constexpr std::array<boot::VirtioMmioDriver, 1> mmio_drivers{{{"other", 2, probe_mmio}}};

TEST(BinderMmio, DevicesAreMatchedByTheirId) {
    Kernel k;
    boot::VirtioMmioSource mmio(mmio_drivers);
    constexpr u32 magic = 0x74726976;
    mmio.add({0x1000, magic, 2, 2});
    mmio.add({0x2000, magic, 2, 0}); // a placeholder without a device
    mmio.add({0x3000, magic, 1, 1});
    mmio.add({0x4000, ~u32{0}, ~u32{0}, 2});
    mmio.add({0x5000, magic, 2, 2});
    EXPECT_TRUE(mmio.seen(0x2000));
    EXPECT_FALSE(mmio.seen(0x2200));
    mmio.leave_out_words(2);
    mmio.leave_out_acpi(1);
    k.make().add(mmio);
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(trace, "mmio:4096:0 mmio:20480:1 ");
    EXPECT_TRUE(k.capture.has("\"address\":\"0x1000\",\"id\":\"virtio 2\",\"class\":\"disk\",\"what\":\"virtio block "
                              "device\",\"driver\":\"other\",\"state\":\"in use\",\"reason\":\"0 disks\""))
        << k.capture.text;
    EXPECT_TRUE(
        k.capture.has("\"address\":\"0x3000\",\"id\":\"virtio 1\",\"class\":\"network\",\"what\":\"virtio network "
                      "device\",\"driver\":\"\",\"state\":\"no driver\",\"reason\":\"no driver for this virtio "
                      "network device in this build (virtio-mmio version 1)\""));
    EXPECT_TRUE(k.capture.has("\"address\":\"0x4000\"")) << "and is not given to a driver";
    EXPECT_EQ(k.capture.count("\"record\":\"device\""), 4u);
    EXPECT_TRUE(k.capture.has("\"what\":\"virtio_mmio.device words\",\"count\":2,\"disk\":true"));
    EXPECT_TRUE(k.capture.has("\"what\":\"virtio-mmio devices of ACPI\",\"count\":1,\"disk\":true"));
    EXPECT_EQ(k.verdict().verdict, Verdict::error);
}

TEST(BinderMmio, DevicesWithoutMemoryAreAnError) {
    Kernel k;
    boot::VirtioMmioSource mmio(mmio_drivers);
    vector_detail::fail_after(0);
    mmio.add({0x1000, 0x74726976, 2, 1});
    vector_detail::fail_after(~u64{0});
    k.make().add(mmio);
    ASSERT_TRUE(k.bind());
    EXPECT_TRUE(k.capture.has("\"what\":\"virtio-mmio devices\",\"count\":1,\"disk\":true")) << k.capture.text;
    EXPECT_EQ(k.verdict().verdict, Verdict::error);
}

TEST(BinderNull, NullDisksAttachAndAreNotListed) {
    Kernel k;
    boot::NullSource null(3);
    k.make().add(null);
    ASSERT_TRUE(k.bind());
    static auto& attached = *new std::vector<io::BlockDevice*>; // never freed, and reachable: no leak
    for (io::BlockDevice* disk : k.binder->disks().all()) {
        attached.push_back(disk);
    }
    EXPECT_EQ(k.disks(), "null0, null1, null2");
    EXPECT_FALSE(k.capture.has("\"record\":\"device\""));
    EXPECT_FALSE(k.capture.has("probing"));
}

// ---- hot-added devices ----

io::Task<Result<void>> wait_for(Kernel& k, Nanoseconds length) {
    co_await k.executor.sleep(length);
    co_return Result<void>{};
}

TEST(BinderLate, ADeviceHotAddedWhileTheJobRuns) {
    Kernel k;
    k.bus.there = {synthetic("vbd", "0", 0)};
    ASSERT_TRUE(k.bind());
    k.binder->watch();
    static_cast<void>(k.executor.run(wait_for(k, 1'000'000)));
    k.bus.come(synthetic("vbd", "8", 8));
    k.bus.come(synthetic("vif", "1", 1));
    k.bus.come(synthetic("vfb", "2", 2));
    static_cast<void>(k.executor.run(wait_for(k, 1'000'000)));
    EXPECT_EQ(trace, "xdisk:0 xdisk:8 xnet:1 ");
    EXPECT_EQ(k.disks(), "xdisk0, xdisk1");
    EXPECT_TRUE(k.capture.has("device xen 8, Xen virtual block device: driven by xdisk, 1 disk\n")) << k.capture.text;
    EXPECT_TRUE(k.capture.has("device xen 2, Xen virtual framebuffer: no driver for this"));
    k.bus.come(synthetic("vbd", "9", 9));
    static_cast<void>(k.executor.run(wait_for(k, 1'000'000)));
    EXPECT_EQ(k.disks(), "xdisk0, xdisk1, xdisk2") << "and the next one";
}

TEST(BinderLate, TheSameRulesHold) {
    Kernel k;
    on_disk.error = failure(Code::timed_out);
    k.native.devices = {{"i0", "ide", disk_id(0)}};
    k.bus.there = {synthetic("vbd", "0", 0)};
    ASSERT_TRUE(k.bind());
    k.binder->watch();
    on_disk.error.reset();
    k.bus.come(synthetic("vbd", "0", 0)); // offered again: the native driver has the disk
    k.bus.come(synthetic("vbd", "1", 1));
    static_cast<void>(k.executor.run(wait_for(k, 1'000'000)));
    EXPECT_EQ(k.disks(), "ndisk0, xdisk1");
    EXPECT_TRUE(k.capture.has("device xen 0, thing: left to ndisk, which has the same disk\n")) << k.capture.text;
}

TEST(BinderLate, NothingIsProbedAfterAShutdownRequest) {
    Kernel k;
    ASSERT_TRUE(k.bind());
    k.binder->watch();
    on_disk.takes = 1'000'000; // the first one is in progress when the shutdown is requested
    k.bus.come(synthetic("vbd", "0", 0));
    k.bus.come(synthetic("vbd", "1", 1));
    static_cast<void>(k.executor.run(wait_for(k, 500'000)));
    EXPECT_TRUE(k.binder->shutdown().request("the test"));
    static_cast<void>(k.executor.run(wait_for(k, 10'000'000)));
    EXPECT_EQ(trace, "xdisk:0 ");
    k.bus.come(synthetic("vbd", "2", 2));
    static_cast<void>(k.executor.run(wait_for(k, 10'000'000)));
    EXPECT_EQ(trace, "xdisk:0 ");
    EXPECT_EQ(k.disks(), "xdisk0") << "what was begun is ended";
}

TEST(BinderLate, DroppedDevicesAreReportedAsOftenAsTheirLogarithm) {
    Kernel k;
    ASSERT_TRUE(k.bind());
    k.binder->watch();
    for (u32 i = 0; i < 1000; ++i) {
        k.bus.lose(1);
        static_cast<void>(k.executor.run(wait_for(k, 1000)));
    }
    const usize lines = k.capture.count("\"record\":\"left_out\",\"what\":\"synthetic devices\"");
    EXPECT_GE(lines, 5u);
    EXPECT_LE(lines, 18u) << "1000 is 1.5 to the power of 17";
    EXPECT_TRUE(
        k.capture.has("\"what\":\"synthetic devices\",\"count\":1,\"disk\":true,\"reason\":\"no room for them\""));
    EXPECT_EQ(k.verdict().verdict, Verdict::error);
}

TEST(BinderLate, WithoutMemoryForTheWatchThereIsAWarning) {
    Kernel k;
    ASSERT_TRUE(k.bind());
    io::frame_pool().fail_after(0);
    k.binder->watch();
    io::frame_pool().fail_after(~u64{0});
    EXPECT_TRUE(k.capture.has("warning: hot-added devices will not be detected: no coroutine frame left"))
        << k.capture.text;
}

// ---- truncations ----

TEST(BinderLeftOut, SyntheticDevices) {
    Kernel k;
    k.bus.not_listed = 3;
    ASSERT_TRUE(k.bind());
    EXPECT_TRUE(k.capture.has("{\"record\":\"left_out\",\"what\":\"synthetic devices\",\"count\":3,\"disk\":true"));
    EXPECT_EQ(k.verdict().verdict, Verdict::error);
}

TEST(BinderLeftOut, SyntheticDevicesWithoutMemory) {
    Kernel k;
    for (u32 i = 0; i < 9; ++i) {
        k.bus.there.push_back(synthetic("vfb", std::to_string(i), i));
    }
    vector_detail::fail_after(1);
    ASSERT_TRUE(k.executor.run(k.source.enumerate()));
    vector_detail::fail_after(~u64{0});
    k.make().add(k.source);
    ASSERT_TRUE(k.executor.run(k.binder->bind()));
    EXPECT_TRUE(k.capture.has("\"what\":\"synthetic devices\",\"count\":1,\"disk\":true")) << k.capture.text;
}

TEST(BinderLeftOut, CandidatesAndDriversWithoutMemory) {
    Kernel k;
    k.native.devices = {{"i0", "ide", disk_id(4)}, {"i1", "ide", disk_id(5)}};
    k.make().add(k.native);
    vector_detail::fail_after(0);
    ASSERT_TRUE(k.executor.run(k.binder->bind()));
    vector_detail::fail_after(~u64{0});
    EXPECT_TRUE(k.capture.has("\"what\":\"devices\",\"count\":2,\"disk\":true")) << k.capture.text;
    EXPECT_TRUE(k.capture.has("\"what\":\"drivers\",\"count\":2,\"disk\":true"));
    EXPECT_EQ(k.verdict().verdict, Verdict::error);
}

TEST(BinderLeftOut, Sources) {
    Kernel k;
    std::vector<std::unique_ptr<Source>> many;
    for (u32 i = 0; i < boot::Binder::max_sources + 1; ++i) {
        many.push_back(std::make_unique<Source>());
        many.back()->devices = {{"i" + std::to_string(i), "ide", disk_id(drivers::no_twin)}};
        many.back()->drivers = {{"ndisk", "ide"}};
        k.make().add(*many.back());
    }
    ASSERT_TRUE(k.executor.run(k.binder->bind()));
    EXPECT_EQ(k.binder->disks().all().size(), boot::Binder::max_sources);
    EXPECT_TRUE(k.capture.has("\"what\":\"devices of a source\",\"count\":1,\"disk\":true")) << k.capture.text;
    EXPECT_EQ(k.verdict().verdict, Verdict::error);
}

TEST(BinderLeftOut, DriversWithDevices) {
    Kernel k;
    k.native.drivers.clear();
    for (u32 i = 0; i < boot::Binder::max_drivers + 1; ++i) {
        const std::string number = std::to_string(i);
        k.native.drivers.push_back({"d" + number, number});
        k.native.devices.push_back({"a" + number, number, disk_id(drivers::no_twin)});
    }
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(k.binder->disks().all().size(), boot::Binder::max_drivers);
    EXPECT_EQ(k.capture.count("\"state\":\"no room\""), 1u);
    EXPECT_TRUE(k.capture.has("\"what\":\"devices\",\"count\":1,\"disk\":true,\"reason\":\"the binder has no room for "
                              "another driver\""));
    EXPECT_EQ(k.verdict().verdict, Verdict::error);
}

TEST(BinderLeftOut, Disks) {
    Kernel k;
    k.native.drivers[0].behaviour.disks = boot::Disks::capacity + 1;
    k.native.devices = {{"i0", "ide", disk_id(4)}};
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(k.binder->disks().all().size(), boot::Disks::capacity);
    EXPECT_TRUE(k.capture.has("\"state\":\"no room\""));
    EXPECT_EQ(k.verdict().verdict, Verdict::error);
}

TEST(BinderLeftOut, ClaimsWithoutMemory) {
    Kernel k;
    k.native.devices = {{"n0", "nic", network_id(0)}};
    k.make().add(k.native);
    struct Denies final : boot::DriverMachine {
        explicit Denies(Kernel& kernel) : k(kernel) {}
        Kernel& k;
        drivers::Environment environment(boot::DriverSinks& sinks, io::Shutdown& shutdown) override {
            vector_detail::fail_after(0); // from the probe on
            return k.environment(sinks, shutdown);
        }
    } denies(k);
    boot::Binder binder(k.executor, k.plan, denies);
    binder.add(k.native);
    ASSERT_TRUE(k.executor.run(binder.bind()));
    EXPECT_TRUE(k.capture.has("\"state\":\"no room\",\"reason\":\"nnet: no memory for the list of devices that are "
                              "attached\""))
        << k.capture.text;
    EXPECT_EQ(binder.devices().failures(), 1u);
}

TEST(BinderLeftOut, DriversOfThePlan) {
    std::vector<std::string> names;
    for (u32 i = 0; i < drivers::Plan::max_drivers + 2; ++i) {
        names.push_back("d" + std::to_string(i));
    }
    std::vector<drivers::DriverInfo> many;
    for (const std::string& name : names) {
        many.push_back({name, many.empty(), DeviceKind::disk});
    }
    const drivers::Rule rule{std::nullopt, &many.back(), &many.front(), -1, Twin::leave};
    drivers::Table table(many, std::span(&rule, 1));
    Kernel k;
    k.plan = table.plan(hv::VmGuest::xen, std::nullopt);
    EXPECT_EQ(k.plan.driver_count, drivers::Plan::max_drivers);
    EXPECT_EQ(k.plan.drivers_dropped, 2u);
    EXPECT_EQ(k.plan.order[0], "d0") << "a driver without room holds up none";
    k.native.drivers = {{names.back(), "b"}, {"d1", "a"}};
    k.native.devices = {{"x", "b", disk_id(drivers::no_twin)}, {"y", "a", disk_id(drivers::no_twin)}};
    ASSERT_TRUE(k.bind());
    EXPECT_EQ(trace, "d1:y " + names.back() + ":x ") << "they come after all others";
    boot::report_left_out(table, k.plan, k.binder->devices());
    EXPECT_TRUE(k.capture.has("\"what\":\"drivers of the plan\",\"count\":2,\"disk\":false")) << k.capture.text;
    EXPECT_EQ(k.verdict().verdict, Verdict::success) << "no device is lost";
}

TEST(BinderLeftOut, RulesAndMessages) {
    std::vector<std::string> names;
    for (u32 i = 0; i < 18; ++i) {
        names.push_back("d" + std::to_string(i));
    }
    std::vector<drivers::DriverInfo> many;
    for (const std::string& name : names) {
        many.push_back({name, many.size() < 9, DeviceKind::disk});
    }
    drivers::Table table(many, {});
    Kernel k;
    u32 added = 0;
    for (u32 s = 0; s < 9; ++s) {
        for (u32 n = 9; n < 18; ++n) {
            added += table.apply("add xen " + names[n] + " " + names[s] + " 1") == 0 ? 1 : 0;
        }
    }
    EXPECT_EQ(added, drivers::Table::max_rules);
    EXPECT_EQ(table.rules_dropped(), 81 - drivers::Table::max_rules);
    EXPECT_EQ(table.plan(hv::VmGuest::xen, std::nullopt).pair_count, drivers::Table::max_rules);
    boot::report_left_out(table, k.plan, k.make().devices());
    EXPECT_TRUE(k.capture.has("\"what\":\"rules of the driver table\",\"count\":17,\"disk\":false")) << k.capture.text;
    EXPECT_TRUE(k.capture.has("\"what\":\"messages about malformed rules\",\"count\":1,\"disk\":false"));
    boot::Outcome outcome;
    boot::judge(outcome, k.binder->devices(), table.wrong(), false);
    EXPECT_EQ(outcome.verdict, Verdict::error);
}

TEST(BinderLeftOut, BuiltInRulesThatFindNoRoom) {
    std::vector<drivers::Rule> many(drivers::Table::max_rules + 3, binder_test::rules[0]);
    const drivers::Table table(known, many);
    EXPECT_EQ(table.rules_dropped(), 3u);
    Kernel k;
    boot::report_left_out(table, k.plan, k.make().devices());
    EXPECT_TRUE(k.capture.has("\"what\":\"rules of the driver table\",\"count\":3,\"disk\":false"));
}

// ---- verdict ----

TEST(Judge, ASuccessIsOneOnlyWhenNothingIsMissing) {
    Capture capture;
    boot::Devices devices;
    boot::Outcome outcome{Verdict::success, FixedText<240>("done")};
    boot::judge(outcome, devices, 0, false);
    EXPECT_EQ(outcome.verdict, Verdict::success);
    EXPECT_EQ(outcome.reason.view(), "done");

    boot::judge(outcome, devices, 2, false);
    EXPECT_EQ(outcome.verdict, Verdict::error);
    EXPECT_EQ(outcome.reason.view(),
              "2 malformed lines in the map file; the other lines apply, and the job itself succeeded");
    outcome = {Verdict::success, {}};
    boot::judge(outcome, devices, 0, true);
    EXPECT_EQ(outcome.verdict, Verdict::error);
    EXPECT_EQ(
        outcome.reason.view(),
        "0 malformed lines in the map file, which is truncated; the other lines apply, and the job itself succeeded");

    outcome = {Verdict::success, {}};
    devices.left_out("memory ranges", 1, false, "many");
    boot::judge(outcome, devices, 0, false);
    EXPECT_EQ(outcome.verdict, Verdict::success) << "no device among it";
    devices.left_out("PCI functions", 1, true, "no memory");
    boot::judge(outcome, devices, 1, false);
    EXPECT_EQ(outcome.verdict, Verdict::error);
    EXPECT_TRUE(outcome.reason.view().starts_with("something was left out, and a disk may be among it"));

    outcome = {Verdict::success, {}};
    boot::DeviceEntry entry;
    entry.why = Unused::failed;
    devices.add(entry);
    boot::judge(outcome, devices, 1, true);
    EXPECT_EQ(outcome.reason.view(), "1 device could not be used (see the errors above); the job itself succeeded");
}

TEST(Judge, AWorseVerdictStays) {
    Capture capture;
    boot::Devices devices;
    devices.left_out("PCI functions", 1, true, "no memory");
    boot::Outcome outcome{Verdict::failure, FixedText<240>("verify failed")};
    boot::judge(outcome, devices, 1, true);
    EXPECT_EQ(outcome.verdict, Verdict::failure);
    EXPECT_EQ(outcome.reason.view(), "verify failed");
}

} // namespace
