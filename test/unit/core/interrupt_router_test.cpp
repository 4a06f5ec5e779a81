// The vector tables and redirection entries, on controllers that only record what is written.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.acpi;
import core.interrupt_router;
import core.processor;
import core.result;

using namespace fl;

namespace {

constexpr u32 every = InterruptVector::every_processor;

class Hardware final : public InterruptHardware {
  public:
    void write_io_apic(u32 io_apic, u32 reg, u32 value) override {
        io_apics[io_apic][reg] = value;
        order.emplace_back(io_apic, reg, value);
    }
    void mask_pic(u8 irq, bool masked) override { pic_masked[irq] = masked; }
    void set_pic_level(u8 irq, bool level) override { pic_level[irq] = level; }
    void wait_for_handlers() override {
        ++waits;
        if (waiting) {
            waiting();
        }
    }
    bool is_real_pic(u8 irq) override { return !withdrawn.contains(irq); }
    void end_pic(u8 irq) override { pic_ends.push_back(irq); }
    bool in_service(u8 vector) override { return serving.contains(vector); }
    void end_local_apic() override { ++ends; }

    std::map<u32, std::map<u32, u32>> io_apics; // index, register, value
    std::vector<std::tuple<u32, u32, u32>> order;
    std::map<u8, bool> pic_masked;
    std::map<u8, bool> pic_level;
    std::set<u8> withdrawn;
    std::set<u8> serving;
    std::vector<u8> pic_ends;
    int ends = 0;
    int waits = 0;
    std::function<void()> waiting;
};

// A device's handler: which processors have called it, and how often.
struct Device {
    int calls = 0;
    u32 on = ~u32{0};
    static void handle(void* context) {
        auto& self = *static_cast<Device*>(context);
        ++self.calls;
        self.on = this_processor();
    }
};

// A router lives as long as the machine, with its tables and handlers: never freed, and reachable, so no leak.
InterruptRouter& reachable(InterruptRouter& router) {
    static std::vector<InterruptRouter*>& all = *new std::vector<InterruptRouter*>;
    all.push_back(&router);
    return router;
}

class Routing : public testing::Test {
  protected:
    Hardware hardware;
    InterruptRouter& router = reachable(*new InterruptRouter(hardware));
    std::array<InterruptCounters, max_processors> counters{};

    // Processor n has APIC id 2n.
    void start(u32 processors, InterruptRouter::Machine machine = {.local_apic = true, .pic = true}) {
        router.start(machine, 0);
        for (u32 n = 1; n < processors; ++n) {
            ASSERT_TRUE(router.join(n, 2 * n));
        }
    }
    void start_with_io_apic(u32 processors) {
        start(processors);
        ASSERT_TRUE(router.add_io_apic(0, 24));
        hardware.order.clear();
    }
    void raise(u32 processor, u32 vector) {
        set_this_processor(processor);
        dispatch_interrupt(router.vectors(processor), counters[processor], hardware, vector);
        set_this_processor(0);
    }
    void TearDown() override { set_this_processor(0); }
};

// ---- messages ----

// [SDM-3 11.11.1, 11.11.2], written by hand from the figures: 0xfee in bits 31 to 20, the destination in 19 to 12, no
// redirection hint, physical mode; the data is fixed (000) and edge-triggered, so it equals the vector.
TEST(InterruptMessages, HaveTheManualsBits) {
    EXPECT_EQ(message_to(0, 0x30, false)->address, 0xfee00000u);
    EXPECT_EQ(message_to(0, 0x30, false)->data, 0x30u);
    EXPECT_EQ(message_to(1, 0xef, false)->address, 0xfee01000u);
    EXPECT_EQ(message_to(0x7f, 0xef, false)->address, 0xfee7f000u);
    EXPECT_EQ(message_to(0xfe, 0xef, false)->address, 0xfeefe000u);
    EXPECT_EQ(message_to(0xfe, 0xef, false)->data, 0xefu);
}

TEST(InterruptMessages, FifteenBitsGoIntoBitsFiveToEleven) {
    EXPECT_EQ(message_to(0x100, 0x41, true)->address, 0xfee00020u);
    EXPECT_EQ(message_to(0x1234, 0x41, true)->address, 0xfee34240u);
    EXPECT_EQ(message_to(0x7fff, 0x41, true)->address, 0xfeefffe0u);
    EXPECT_EQ(message_to(0x34, 0x41, true)->address, message_to(0x34, 0x41, false)->address);
}

TEST(InterruptMessages, WhatCannotBeNamedIsAnError) {
    const auto refused = [](u32 id, bool extended) {
        const auto message = message_to(id, 0x40, extended);
        return !message && message.error().code == Code::not_supported && message.error().seen == id &&
               message.error().expected == (extended ? 0x7fffu : 0xfeu);
    };
    EXPECT_TRUE(refused(0xff, false)) << "every processor";
    EXPECT_TRUE(refused(0x100, false));
    EXPECT_TRUE(refused(0xff, true));
    EXPECT_TRUE(refused(0x8000, true));
    EXPECT_TRUE(refused(~0u, true));
}

// ---- vectors of one processor ----

TEST_F(Routing, ManyDevicesOnManyProcessors) {
    start(max_processors);
    // Three devices with one queue per processor, twice.
    std::vector<std::unique_ptr<Device>> devices;
    std::vector<InterruptVector> vectors;
    for (u32 i = 0; i < 6; ++i) {
        for (u32 p = 0; p < max_processors; ++p) {
            devices.push_back(std::make_unique<Device>());
            const auto vector = router.attach_message(p, Device::handle, devices.back().get());
            ASSERT_TRUE(vector) << vector.error().message;
            EXPECT_EQ(vector->processor, p);
            EXPECT_EQ(vector->apic_id, 2 * p);
            EXPECT_EQ(vector->vector, 0x30 + i) << "other processors use the same numbers";
            EXPECT_EQ(router.message_for(*vector)->address, 0xfee00000u | (2 * p) << 12);
            EXPECT_EQ(router.message_for(*vector)->data, vector->vector);
            vectors.push_back(*vector);
        }
    }
    for (usize i = 0; i < vectors.size(); ++i) {
        raise(vectors[i].processor, vectors[i].vector);
        EXPECT_EQ(devices[i]->calls, 1);
        EXPECT_EQ(devices[i]->on, vectors[i].processor);
    }
    for (const auto& device : devices) {
        EXPECT_EQ(device->calls, 1) << "another processor's or device's handler was called";
    }
    EXPECT_EQ(hardware.ends, 6 * static_cast<int>(max_processors));
    EXPECT_EQ(counters[63].taken, 6u);
    for (const InterruptVector& vector : vectors) {
        router.detach_vector(vector);
    }
    EXPECT_EQ(router.attached(), 0u);
}

TEST_F(Routing, AProcessorThatRunsOutLeavesTheOthersTheirs) {
    start(3);
    Device device;
    std::set<u8> numbers;
    for (u32 i = 0; i < InterruptRouter::vectors_per_processor; ++i) {
        const auto vector = router.attach_message(1, Device::handle, &device);
        ASSERT_TRUE(vector) << i;
        numbers.insert(vector->vector);
    }
    EXPECT_EQ(numbers.size(), 192u);
    EXPECT_EQ(*numbers.begin(), 0x30);
    EXPECT_EQ(*numbers.rbegin(), 0xef);
    const usize before = router.attached();
    const auto refused = router.attach_message(1, Device::handle, &device);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, Code::exhausted);
    EXPECT_EQ(refused.error().expected, 192u);
    EXPECT_EQ(router.attached(), before) << "a handler that was not attached is freed";
    EXPECT_EQ(router.attach_line({.gsi = 1}, Device::handle, &device, 1).error().code, Code::not_supported)
        << "no IOAPIC here";
    EXPECT_EQ(router.attach_vector(Device::handle, &device, true).error().code, Code::exhausted);
    EXPECT_TRUE(router.attach_message(0, Device::handle, &device));
    EXPECT_TRUE(router.attach_message(2, Device::handle, &device));
    router.detach_vector({0x77, 2, 1});
    const auto again = router.attach_message(1, Device::handle, &device);
    ASSERT_TRUE(again);
    EXPECT_EQ(again->vector, 0x77) << "the one that was freed";
}

TEST_F(Routing, OnlyRunningProcessorsAndLocalApicsTakeMessages) {
    start(2);
    Device device;
    for (const u32 processor : {2u, 63u, 64u, every}) {
        const auto refused = router.attach_message(processor, Device::handle, &device);
        ASSERT_FALSE(refused);
        EXPECT_EQ(refused.error().code, Code::bad_argument);
        EXPECT_EQ(refused.error().expected, 1u);
        EXPECT_EQ(refused.error().seen, processor);
    }
    EXPECT_FALSE(router.join(max_processors, 1));
    ASSERT_TRUE(router.join(2, 0x100)); // an APIC id that needs 15 bits
    EXPECT_EQ(router.attach_message(2, Device::handle, &device).error().code, Code::not_supported);
    EXPECT_EQ(router.attached(), 0u);
}

TEST_F(Routing, WithoutALocalApicThereAreNoMessages) {
    start(1, {.local_apic = false, .pic = true});
    Device device;
    EXPECT_EQ(router.attach_message(0, Device::handle, &device).error().code, Code::not_supported);
    EXPECT_EQ(router.attach_vector(Device::handle, &device, true).error().code, Code::not_supported);
    EXPECT_TRUE(router.attach_vector(Device::handle, &device, false)) << "injected by the hypervisor";
}

TEST_F(Routing, FifteenBitDestinations) {
    start(1, {.local_apic = true, .pic = true, .extended = true});
    ASSERT_TRUE(router.add_io_apic(0, 24));
    ASSERT_TRUE(router.join(1, 0x1234));
    Device device;
    const auto vector = router.attach_message(1, Device::handle, &device);
    ASSERT_TRUE(vector);
    EXPECT_EQ(router.message_for(*vector)->address, 0xfee34240u);
    ASSERT_TRUE(router.attach_line({.gsi = 10}, Device::handle, &device, 1));
    EXPECT_EQ(hardware.io_apics[0][0x10 + 2 * 10 + 1], 0x34240000u) << "bits 56 to 63 and 49 to 55 of the entry";
}

// ---- vectors of every processor ----

TEST_F(Routing, ASharedVectorIsValidOnProcessorsThatJoinLater) {
    start(2);
    Device timer, kick, disk;
    const auto first = router.attach_vector(Device::handle, &timer, true);
    const auto second = router.attach_vector(Device::handle, &kick, false);
    ASSERT_TRUE(first && second);
    EXPECT_EQ(first->vector, 0xef) << "above the devices'";
    EXPECT_EQ(second->vector, 0xee);
    EXPECT_EQ(first->processor, every);
    ASSERT_TRUE(router.attach_message(0, Device::handle, &disk));
    ASSERT_TRUE(router.join(2, 4));
    for (const u32 processor : {0u, 1u, 2u}) {
        raise(processor, first->vector);
        EXPECT_EQ(timer.on, processor);
        raise(processor, second->vector);
        EXPECT_EQ(kick.on, processor);
    }
    EXPECT_EQ(timer.calls, 3);
    EXPECT_EQ(kick.calls, 3);
    EXPECT_EQ(hardware.ends, 3) << "only the timer's end at the local APIC";
    raise(2, 0x30);
    EXPECT_EQ(disk.calls, 0) << "a message of processor 0 is nothing on one that joins";
    EXPECT_EQ(counters[2].unexpected, 1u);
    router.detach_vector(*first);
    for (const u32 processor : {0u, 1u, 2u}) {
        raise(processor, first->vector);
    }
    EXPECT_EQ(timer.calls, 3);
    EXPECT_EQ(router.attached(), 2u);
}

TEST_F(Routing, SharedVectorsAndThoseOfOneProcessorDoNotCollide) {
    start(2);
    Device shared, own;
    for (u32 i = 0; i < InterruptRouter::vectors_per_processor - 1; ++i) {
        ASSERT_TRUE(router.attach_message(1, Device::handle, &own)); // all but the highest vector
    }
    const auto vector = router.attach_vector(Device::handle, &shared, true);
    ASSERT_TRUE(vector);
    EXPECT_EQ(vector->vector, 0xef);
    EXPECT_FALSE(router.attach_vector(Device::handle, &shared, true)) << "free on processor 0, and not on 1";
    EXPECT_FALSE(router.attach_message(1, Device::handle, &own));
    for (u32 i = 0; i < InterruptRouter::vectors_per_processor - 1; ++i) {
        const auto there = router.attach_message(0, Device::handle, &own);
        ASSERT_TRUE(there);
        EXPECT_NE(there->vector, vector->vector);
    }
    EXPECT_FALSE(router.attach_message(0, Device::handle, &own));
    raise(1, vector->vector);
    EXPECT_EQ(shared.calls, 1);
    EXPECT_EQ(own.calls, 0);
}

TEST_F(Routing, DetachingWhatIsNotAttachedChangesNothing) {
    start_with_io_apic(2);
    Device device, line;
    const auto vector = router.attach_message(1, Device::handle, &device);
    ASSERT_TRUE(vector);
    ASSERT_TRUE(router.attach_line({.gsi = 10}, Device::handle, &line, 1)); // takes 0x31
    for (const InterruptVector wrong :
         {InterruptVector{vector->vector, 0, 0}, InterruptVector{vector->vector, 2, every}, InterruptVector{0x31, 2, 1},
          InterruptVector{0x30, 0, 9}}) {
        router.detach_vector(wrong);
    }
    router.detach_line({.gsi = 11}, Device::handle, &line);
    router.detach_line({.gsi = 10}, Device::handle, &device);
    EXPECT_EQ(hardware.waits, 0);
    raise(1, vector->vector);
    raise(1, 0x31);
    EXPECT_EQ(device.calls, 1);
    EXPECT_EQ(line.calls, 1);
}

// ---- lines ----

TEST_F(Routing, TheEntryNamesVectorPolarityTriggerAndProcessor) {
    start_with_io_apic(4);
    Device device;
    ASSERT_TRUE(router.attach_line({.gsi = 14}, Device::handle, &device)); // ISA: edge, active high
    EXPECT_EQ(hardware.io_apics[0][0x10 + 28], 0x00000030u);
    EXPECT_EQ(hardware.io_apics[0][0x10 + 29], 0x00000000u);
    ASSERT_TRUE(router.attach_line({.gsi = 17, .isa = false, .level = true, .active_low = true}, Device::handle,
                                   &device, 3)); // PCI
    EXPECT_EQ(hardware.io_apics[0][0x10 + 34], 0x0000a030u);
    EXPECT_EQ(hardware.io_apics[0][0x10 + 35], 0x06000000u);
    ASSERT_TRUE(
        router.attach_line({.gsi = 18, .isa = false, .level = true, .active_low = false}, Device::handle, &device, 3));
    EXPECT_EQ(hardware.io_apics[0][0x10 + 36], 0x00008031u);
    ASSERT_TRUE(
        router.attach_line({.gsi = 19, .isa = false, .level = false, .active_low = true}, Device::handle, &device, 3));
    EXPECT_EQ(hardware.io_apics[0][0x10 + 38], 0x00002032u);
    EXPECT_EQ(hardware.order.back(), std::tuple(0u, 0x10u + 38, 0x2032u)) << "the word that unmasks goes last";
    raise(3, 0x30);
    EXPECT_EQ(device.on, 3u);
    EXPECT_EQ(hardware.ends, 1);
}

TEST_F(Routing, OverridesAndSeveralIoApics) {
    start(1);
    ASSERT_TRUE(router.add_io_apic(0, 24));
    ASSERT_TRUE(router.add_io_apic(24, 8));
    for (u32 pin = 0; pin < 24; ++pin) {
        EXPECT_EQ(hardware.io_apics[0][0x10 + 2 * pin], 0x10000u) << "masked from the start";
    }
    EXPECT_EQ(hardware.io_apics[1].size(), 8u);
    router.add_override({.irq = 0, .gsi = 2, .level = false, .active_low = false});
    router.add_override({.irq = 9, .gsi = 25, .level = true, .active_low = true});
    Device device;
    ASSERT_TRUE(router.attach_line({.gsi = 0}, Device::handle, &device));
    EXPECT_EQ(hardware.io_apics[0][0x10 + 4], 0x30u);
    EXPECT_EQ(hardware.io_apics[0][0x10], 0x10000u);
    ASSERT_TRUE(router.attach_line({.gsi = 9}, Device::handle, &device));
    EXPECT_EQ(hardware.io_apics[1][0x10 + 2], 0xa031u);
    ASSERT_TRUE(router.attach_line({.gsi = 31, .isa = false}, Device::handle, &device));
    const auto beyond = router.attach_line({.gsi = 32, .isa = false}, Device::handle, &device);
    ASSERT_FALSE(beyond);
    EXPECT_EQ(beyond.error().code, Code::not_found);
    EXPECT_EQ(router.attach_line({.gsi = 9, .isa = false}, Device::handle, &device).has_value(), true)
        << "no override for what is not ISA";
}

TEST_F(Routing, AsManyIoApicsAsTheTableLists) {
    start(1);
    for (u32 i = 0; i < acpi::Madt::max_io_apics; ++i) {
        EXPECT_TRUE(router.add_io_apic(24 * i, 24));
    }
    EXPECT_FALSE(router.add_io_apic(24 * acpi::Madt::max_io_apics, 24));
}

TEST_F(Routing, ASharedLineCallsAllAndStaysWhereItIs) {
    start_with_io_apic(3);
    Device a, b, c;
    const InterruptLine line{.gsi = 17, .isa = false, .level = true, .active_low = true};
    ASSERT_TRUE(router.attach_line(line, Device::handle, &a, 2));
    const auto written = hardware.order.size();
    ASSERT_TRUE(router.attach_line(line, Device::handle, &b, 1));
    ASSERT_TRUE(router.attach_line(line, Device::handle, &c));
    EXPECT_EQ(hardware.order.size(), written) << "the entry is left alone";
    raise(2, 0x30);
    EXPECT_EQ(a.calls + b.calls + c.calls, 3);
    EXPECT_EQ(b.on, 2u);
    EXPECT_EQ(hardware.ends, 1) << "one end for all of them";
    EXPECT_EQ(counters[2].taken, 1u);
    router.detach_line(line, Device::handle, &b); // from the middle
    router.detach_line(line, Device::handle, &c); // the first of the list
    EXPECT_EQ(hardware.order.size(), written) << "not masked while it has a handler";
    raise(2, 0x30);
    EXPECT_EQ(a.calls, 2);
    EXPECT_EQ(b.calls, 1);
    EXPECT_EQ(c.calls, 1);
    router.detach_line(line, Device::handle, &a);
    EXPECT_EQ(hardware.io_apics[0][0x10 + 34], 0x10000u);
    EXPECT_EQ(router.attached(), 0u);
    ASSERT_TRUE(router.attach_line(line, Device::handle, &b, 1)) << "a line that is free again chooses again";
    EXPECT_EQ(hardware.io_apics[0][0x10 + 35], 0x02000000u);
    raise(1, 0x30);
    EXPECT_EQ(b.on, 1u);
}

TEST_F(Routing, ALineOnAProcessorWithoutVectors) {
    start_with_io_apic(2);
    Device device;
    for (u32 i = 0; i < InterruptRouter::vectors_per_processor; ++i) {
        ASSERT_TRUE(router.attach_message(1, Device::handle, &device));
    }
    EXPECT_EQ(router.attach_line({.gsi = 10}, Device::handle, &device, 1).error().code, Code::exhausted);
    EXPECT_EQ(router.attach_line({.gsi = 10}, Device::handle, &device, 2).error().code, Code::bad_argument);
    EXPECT_TRUE(hardware.order.empty()) << "nothing was unmasked";
    EXPECT_TRUE(router.attach_line({.gsi = 10}, Device::handle, &device, 0));
}

// ---- the 8259s ----

TEST_F(Routing, LinesOfThe8259s) {
    start(2);
    Device disk, other;
    ASSERT_TRUE(router.attach_line({.gsi = 14}, Device::handle, &disk));
    EXPECT_EQ(hardware.pic_masked, (std::map<u8, bool>{{14, false}}));
    EXPECT_TRUE(hardware.pic_level.empty()) << "an ISA line is left as the firmware has it";
    ASSERT_TRUE(
        router.attach_line({.gsi = 11, .isa = false, .level = true, .active_low = true}, Device::handle, &other));
    EXPECT_EQ(hardware.pic_level, (std::map<u8, bool>{{11, true}}));
    raise(0, 0x2e);
    EXPECT_EQ(disk.calls, 1);
    EXPECT_EQ(hardware.pic_ends, std::vector<u8>{14});
    EXPECT_EQ(hardware.ends, 0);
    for (const u32 none : {2u, 16u, 40u}) {
        EXPECT_EQ(router.attach_line({.gsi = none}, Device::handle, &disk).error().code, Code::not_found);
    }
    EXPECT_EQ(router.attach_line({.gsi = 5}, Device::handle, &disk, 1).error().code, Code::not_supported)
        << "they interrupt the boot processor alone";
    router.detach_line({.gsi = 14}, Device::handle, &disk);
    EXPECT_TRUE(hardware.pic_masked[14]);
    EXPECT_TRUE(hardware.order.empty());
}

TEST_F(Routing, ADetachedLineOfThe8259sCallsNoHandler) {
    start(1);
    Device printer;
    ASSERT_TRUE(router.attach_line({.gsi = 7}, Device::handle, &printer));
    hardware.withdrawn = {7, 15};
    raise(0, 0x27);
    raise(0, 0x2f); // no handler
    EXPECT_EQ(printer.calls, 0);
    EXPECT_EQ(counters[0].spurious, 2u);
    EXPECT_EQ(counters[0].taken + counters[0].unexpected, 0u);
    EXPECT_TRUE(hardware.pic_ends.empty());
    hardware.withdrawn.clear();
    raise(0, 0x27);
    EXPECT_EQ(printer.calls, 1);
    raise(0, 0x2f);
    EXPECT_EQ(counters[0].unexpected, 1u);
    EXPECT_EQ(hardware.pic_ends, (std::vector<u8>{7, 15}));
}

TEST_F(Routing, WithoutControllersThereAreNoLines) {
    start(1, {.local_apic = true, .pic = false});
    Device device;
    EXPECT_EQ(router.attach_line({.gsi = 14}, Device::handle, &device).error().code, Code::not_found);
    EXPECT_EQ(router.attached(), 0u);
}

// ---- unassigned vectors ----

TEST_F(Routing, SpuriousAndUnexpectedVectors) {
    start(1);
    raise(0, 0xff);
    EXPECT_EQ(counters[0].spurious, 1u);
    EXPECT_EQ(hardware.ends, 0) << "a spurious interrupt gets no end [SDM-3 11.9]";
    raise(0, 0x55);
    EXPECT_EQ(counters[0].unexpected, 1u);
    EXPECT_EQ(hardware.ends, 0) << "injected without the local APIC";
    hardware.serving = {0x56};
    raise(0, 0x56);
    EXPECT_EQ(counters[0].unexpected, 2u);
    EXPECT_EQ(hardware.ends, 1) << "else nothing of this priority would come any more";
}

// ---- detaching handlers ----

TEST_F(Routing, HandlersAreFreedAfterEveryProcessorHasLeftThem) {
    start_with_io_apic(2);
    Device device;
    const InterruptLine line{.gsi = 20, .isa = false, .level = true};
    const auto message = router.attach_message(1, Device::handle, &device);
    const auto shared = router.attach_vector(Device::handle, &device, true);
    ASSERT_TRUE(message && shared);
    ASSERT_TRUE(router.attach_line(line, Device::handle, &device));
    usize expected = 3;
    hardware.waiting = [&] {
        EXPECT_EQ(router.attached(), expected) << "freed while another processor may be in it";
        EXPECT_EQ(router.vectors(1)[message->vector], nullptr) << "and it is unlinked before the wait";
    };
    router.detach_vector(*message);
    --expected;
    EXPECT_EQ(router.attached(), expected);
    router.detach_vector(*shared);
    --expected;
    router.detach_line(line, Device::handle, &device);
    EXPECT_EQ(router.attached(), 0u);
    EXPECT_EQ(hardware.waits, 3);
}

// One processor runs a handler of a shared line while another one detaches the line's handlers.
TEST_F(Routing, AHandlerThatRunsKeepsItsPlaceInTheList) {
    start_with_io_apic(2);
    struct Slow {
        std::atomic<bool> inside{false};
        std::atomic<bool> go{false};
        static void handle(void* context) {
            auto& self = *static_cast<Slow*>(context);
            self.inside = true;
            while (!self.go) {
                std::this_thread::yield();
            }
        }
    } slow;
    Device first;
    const InterruptLine line{.gsi = 20, .isa = false, .level = true};
    ASSERT_TRUE(router.attach_line(line, Device::handle, &first, 1)); // called second: new handlers are put first
    ASSERT_TRUE(router.attach_line(line, Slow::handle, &slow, 1));
    std::atomic<bool> left{false};
    std::thread processor([&] {
        set_this_processor(1);
        dispatch_interrupt(router.vectors(1), counters[1], hardware, 0x30);
        left = true;
    });
    while (!slow.inside) {
        std::this_thread::yield();
    }
    hardware.waiting = [&] {
        slow.go = true;
        while (!left) {
            std::this_thread::yield();
        }
    };
    router.detach_line(line, Slow::handle, &slow); // returns when processor 1 has left
    processor.join();
    EXPECT_EQ(first.calls, 1) << "the list went on";
    EXPECT_EQ(router.attached(), 1u);
    raise(1, 0x30);
    EXPECT_EQ(first.calls, 2);
}

} // namespace
