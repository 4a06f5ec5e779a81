// Reports about devices that could be a disk, a network card, an input device or a display.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.log;
import core.text;
import core.vector;
import hv.backend;
import drivers.driver;
import boot.devices;

#include "unit/drivers/pci_fake.hpp"

namespace {
using namespace fl;
using boot::DeviceClass;
using drivers::Unused;

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
};

pci_test::pci::Device function(u16 vendor, u16 device, u32 class_code) {
    static pci_test::Space space;
    space.functions.clear();
    space.add(0x12, 3, 1, vendor, device, class_code);
    return *pci_test::pci::look_up(space, {0x12, 3, 1});
}

TEST(Devices, WhichPciFunctionsAreListedAndAsWhat) {
    struct Row {
        u16 vendor, device;
        u32 class_code;
        bool listed;
        DeviceClass kind;
        std::string_view what;
    };
    for (const Row& row : {Row{0x1af4, 0x1001, 0x010000, true, DeviceClass::disk, "virtio block device"},
                           Row{0x1af4, 0x1042, 0x018000, true, DeviceClass::disk, "virtio block device"},
                           Row{0x1af4, 0x1048, 0x010000, true, DeviceClass::disk, "virtio SCSI host"},
                           Row{0x1af4, 0x1000, 0x020000, true, DeviceClass::network, "virtio network device"},
                           Row{0x1af4, 0x1052, 0x090000, true, DeviceClass::input, "virtio input device"},
                           Row{0x1af4, 0x1050, 0x038000, true, DeviceClass::display, "virtio GPU"},
                           Row{0x1af4, 0x1005, 0x00ff00, true, DeviceClass::other, "virtio entropy source"},
                           Row{0x1b36, 0x0010, 0x010802, true, DeviceClass::disk, "NVMe controller"},
                           Row{0x8086, 0x2922, 0x010601, true, DeviceClass::disk, "SATA controller (AHCI)"},
                           Row{0x8086, 0x7010, 0x010180, true, DeviceClass::disk, "IDE controller"},
                           Row{0x15ad, 0x07c0, 0x010700, true, DeviceClass::disk, "SAS controller"},
                           Row{0x8086, 0x100e, 0x020000, true, DeviceClass::network, "network controller"},
                           Row{0x1234, 0x1111, 0x030000, true, DeviceClass::display, "display controller"},
                           Row{0x8086, 0x1237, 0x060000, false, DeviceClass::other, ""}, // host bridge
                           Row{0x1b36, 0x000c, 0x060400, false, DeviceClass::other, ""}, // bridge
                           Row{0x8086, 0x7113, 0x068000, false, DeviceClass::other, ""}, // ACPI
                           Row{0x1b36, 0x000d, 0x0c0330, false, DeviceClass::other, ""}, // USB
                           // shared memory, not a virtio type
                           Row{0x1af4, 0x1110, 0x050000, false, DeviceClass::other, ""}}) {
        SCOPED_TRACE(row.device);
        const auto device = function(row.vendor, row.device, row.class_code);
        EXPECT_EQ(boot::is_listed(device), row.listed);
        if (row.listed) {
            const auto entry = boot::describe(device);
            EXPECT_EQ(entry.kind, row.kind);
            EXPECT_EQ(entry.what.view(), row.what);
            EXPECT_EQ(entry.address.view(), "12:03.1");
        }
    }
}

TEST(Devices, SyntheticOnes) {
    hv::SyntheticDevice device;
    device.type.write("vif");
    device.address.write("0");
    auto entry = boot::without_driver(boot::describe(device, "xen"));
    EXPECT_EQ(entry.kind, DeviceClass::network);
    EXPECT_EQ(entry.reason.view(), "no driver for this Xen virtual network interface in this build");
    device.type.clear();
    device.type.write("f8615163-df3e-46c5-913f-f2d2f965ed0e");
    EXPECT_EQ(boot::describe(device, "vmbus").kind, DeviceClass::network);
    device.type.clear();
    device.type.write("strange");
    entry = boot::describe(device, "xen");
    EXPECT_EQ(entry.kind, DeviceClass::other);
    EXPECT_EQ(entry.what.view(), "device of type strange");
}

TEST(Devices, VirtioInMemory) {
    EXPECT_FALSE(boot::describe_virtio_mmio(0xfeb00000, 0x74726976, 1, 0)) << "a place without a device";
    auto entry = boot::describe_virtio_mmio(0xfeb00e00, 0x74726976, 2, 2);
    ASSERT_TRUE(entry);
    EXPECT_EQ(entry->address.view(), "0xfeb00e00");
    EXPECT_EQ(entry->kind, DeviceClass::disk);
    EXPECT_EQ(entry->why, Unused::no_driver);
    entry = boot::describe_virtio_mmio(0xc0001000, ~u32{0}, ~u32{0}, ~u32{0});
    ASSERT_TRUE(entry);
    EXPECT_EQ(entry->why, Unused::failed);
}

TEST(Devices, OneRecordEach) {
    Capture capture;
    boot::Devices devices;
    auto entry = boot::describe(function(0x1af4, 0x1001, 0x010000));
    devices.add(boot::without_driver(entry));
    EXPECT_EQ(capture.text, "") << "not before the list is requested";
    devices.list();
    devices.list();
    EXPECT_EQ(
        capture.count(
            "@{\"record\":\"device\",\"bus\":\"pci\",\"address\":\"12:03.1\",\"id\":\"1af4:1001\",\"class\":\"disk\","
            "\"what\":\"virtio block device\",\"driver\":\"\",\"state\":\"no driver\","
            "\"reason\":\"no driver for this virtio block device in this build\"}\n"),
        1u)
        << capture.text;
    EXPECT_EQ(capture.count("device pci 12:03.1 [1af4:1001], virtio block device: no driver for this virtio block "
                            "device in this build\n"),
              1u)
        << capture.text;
    EXPECT_EQ(devices.failures(), 0u) << "a device without a driver is no failure";
    entry.driver = "ata";
    entry.reason.write("2 disks");
    entry.disks = 2;
    devices.add(entry);
    EXPECT_EQ(capture.count("virtio block device: driven by ata, 2 disks\n"), 1u) << capture.text;
    EXPECT_EQ(capture.count("\"driver\":\"ata\",\"state\":\"in use\""), 1u);
}

TEST(Devices, WhatFailsAndWhatFindsNoRoomCounts) {
    Capture capture;
    boot::Devices devices;
    devices.add(boot::describe(drivers::UnusedUnit{"ide", "hda", "IDE disk", Unused::failed, "it does not answer"}));
    devices.add(
        boot::describe(drivers::UnusedUnit{"scsi", "LUN 9", "SCSI disk", Unused::no_room, "the table is full"}));
    devices.add(boot::describe(drivers::UnusedUnit{"ide", "hdc", "ATAPI device", Unused::not_a_disk, "no driver"}));
    EXPECT_EQ(devices.failures(), 2u);
    devices.list();
    EXPECT_EQ(capture.count("error: device ide hda, IDE disk: it does not answer\n"), 1u) << capture.text;
    EXPECT_FALSE(devices.disk_left_out());
    devices.left_out("memory ranges", 3, false, "too many");
    EXPECT_FALSE(devices.disk_left_out());
    EXPECT_EQ(capture.count("warning: left out: memory ranges (3): too many\n"), 1u) << capture.text;
    devices.left_out("PCI functions", 1, true, "no memory");
    EXPECT_TRUE(devices.disk_left_out());
    EXPECT_EQ(capture.count("error: left out: PCI functions (1): no memory\n"), 1u) << capture.text;
    EXPECT_EQ(
        capture.count(
            "{\"record\":\"left_out\",\"what\":\"PCI functions\",\"count\":1,\"disk\":true,\"reason\":\"no memory\"}"),
        1u)
        << capture.text;
}

TEST(Vector, Grows) {
    Vector<u32> v;
    EXPECT_TRUE(v.empty());
    for (u32 i = 0; i < 1000; ++i) {
        ASSERT_TRUE(v.push(i));
    }
    v.remove(0);
    v.remove(498); // 499
    EXPECT_EQ(v.size(), 998u);
    EXPECT_EQ(v[0], 1u);
    EXPECT_EQ(v[498], 500u);
    EXPECT_EQ(v[997], 999u);
    v.clear();
    EXPECT_TRUE(v.empty());
    ASSERT_TRUE(v.push(7));
    EXPECT_EQ(*v.begin(), 7u);
}

} // namespace
