module core.machine.interrupts;
import core.std;
import core.acpi;
import core.apic;
import core.interrupt_router;
import core.mmio;
import core.panic;
import core.processor;
import core.result;
import core.spinlock;
import core.text;
import core.machine.cpu;
import core.machine.lapic;
import core.machine.local;
import core.machine.memory;
import core.machine.pic;
import core.machine.traps;

namespace fl {

namespace {

using IoApicRegisters = apic::IndexedAccess<Mmio>;

void synchronize_processors();

class Hardware final : public InterruptHardware {
  public:
    void write_io_apic(u32 io_apic, u32 reg, u32 value) override { io_apics[io_apic].write<u32>(reg, value); }
    void mask_pic(u8 irq, bool masked) override { masked ? pic::mask(irq) : pic::unmask(irq); }
    void set_pic_level(u8 irq, bool level) override { pic::set_level(irq, level); }
    void wait_for_handlers() override { synchronize_processors(); }
    bool is_real_pic(u8 irq) override { return pic::is_real(irq); }
    void end_pic(u8 irq) override { pic::end_of_interrupt(irq); }
    bool in_service(u8 vector) override { return lapic::mode() != lapic::Mode::none && lapic::in_service(vector); }
    void end_local_apic() override { lapic::end_of_interrupt(); }

    std::array<IoApicRegisters, acpi::Madt::max_io_apics> io_apics{};
    u32 io_apic_count = 0;
};

constinit Hardware hardware;
constinit InterruptRouter router(hardware);
constinit FixedText<32> names;
constinit std::atomic<u32> running_processors{1}; // release, acquire: publishes what is needed to kick them
constinit u8 kick_vector = 0;
constinit KickSender kick_sender;

// Returns when every other processor has taken an interrupt, and so has left the handlers that it was running. Bounded;
// interrupts are never off for that long.
void synchronize_processors() {
    const u32 count = running_processors.load(std::memory_order_acquire);
    const u32 me = this_processor();
    for (u32 i = 0; i < count; ++i) {
        if (i == me) {
            continue;
        }
        Local& other = local_of(i);
        const u64 before = other.kicked.load(std::memory_order_acquire);
        kick_processor(i);
        constexpr u32 max_polls = 100'000'000;
        u32 polls = 0;
        while (other.kicked.load(std::memory_order_acquire) == before) { // pairs with the release in take_kick()
            if (++polls == max_polls) {
                panic("processor {} does not take interrupts", i);
            }
            spin_pause();
        }
    }
}

void add_io_apic(const acpi::IoApic& found) {
    const auto mapped = map_mmio(found.address, IoApicRegisters::size);
    if (!mapped) {
        return;
    }
    const IoApicRegisters registers(Mmio(*mapped, IoApicRegisters::size));
    const auto version = apic::IoVersion::read(registers);
    if (version.raw == ~0u) {
        return; // no IOAPIC
    }
    hardware.io_apics[hardware.io_apic_count] = registers;
    if (router.add_io_apic(found.first_gsi, version.get(apic::IoVersion::last_entry) + 1)) {
        ++hardware.io_apic_count;
    }
}

} // namespace

void start_interrupts(const acpi::Tables* tables, const InterruptOptions& options) {
    // Always remapped away from the exception vectors and masked, even if the IOAPICs are used.
    const bool pic = pic::start(InterruptRouter::first_pic_vector);
    const bool has_apics = tables != nullptr && tables->madt && tables->madt->io_apic_count != 0;
    const auto mode = lapic::start(InterruptRouter::spurious_vector, !has_apics, options.x2apic);
    router.start({.local_apic = mode != lapic::Mode::none, .pic = pic, .extended = options.extended_destinations},
                 lapic::id());
    local().vectors = &router.vectors(0);
    if (has_apics && mode != lapic::Mode::none) {
        for (const acpi::IoApic& found : tables->madt->all_io_apics()) {
            add_io_apic(found);
        }
        for (const acpi::Override& o : tables->madt->all_overrides()) {
            router.add_override(o);
        }
    }
    names.write(name(mode));
    names.write(router.has_io_apic() ? ", IOAPIC" : pic ? ", 8259" : ", no lines");
    set_interrupt_entry([](u32 number) {
        Local& own = local();
        dispatch_interrupt(*own.vectors, own.interrupts, hardware, number);
    });
}
InterruptController& interrupts() { return router; }
InterruptCounters interrupt_counters() { return local().interrupts; }

Result<void> join_interrupts() {
    if (!lapic::join(InterruptRouter::spurious_vector)) {
        return Error(Code::not_supported, "its local APIC is not of the kind that the first processor has");
    }
    const u32 number = this_processor();
    if (auto joined = router.join(number, lapic::id()); !joined) {
        return joined;
    }
    local().vectors = &router.vectors(number);
    return {};
}
void take_kick(void*) {
    std::atomic<u64>& kicked = local().kicked; // written only here
    kicked.store(kicked.load(std::memory_order_relaxed) + 1, std::memory_order_release);
}
void use_kicks(KickSender sender) { kick_sender = sender; }
Result<void> start_kicks() {
    auto vector = router.attach_vector(take_kick, nullptr, true);
    if (!vector) {
        return vector.error();
    }
    kick_vector = vector->vector;
    return {};
}
void kick_processor(u32 number) {
    if (kick_sender.send == nullptr || !kick_sender.send(kick_sender.context, number)) {
        static_cast<void>(lapic::send(local_of(number).apic_id, lapic::Delivery::fixed, kick_vector));
    }
}
void set_running_processors(u32 count) { running_processors.store(count, std::memory_order_release); }
std::string_view interrupt_controllers() { return names; }
bool has_io_apic() { return router.has_io_apic(); }

} // namespace fl
