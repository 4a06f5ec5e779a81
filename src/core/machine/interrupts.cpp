module core.machine.interrupts;
import core.std;
import core.acpi;
import core.interrupt;
import core.result;
import core.text;
import core.machine.cpu;
import core.machine.lapic;
import core.machine.memory;
import core.machine.pic;
import core.machine.traps;

namespace fl {

namespace {

constexpr u8 first_pic_vector = 0x20;
constexpr u8 first_vector = 0x30; // to be given out
constexpr u8 last_vector = 0xef;
constexpr u8 spurious_vector = 0xff;

struct Handler {
    InterruptHandler call;
    void* context;
    Handler* next;
};

enum class End : u8 { none, local_apic, pic };

struct Vector {
    Handler* first = nullptr;
    End end = End::none;
    u8 irq = 0; // of the 8259s
    bool has_line = false;
    u32 gsi = 0;
};

struct IoApicState {
    volatile u32* registers; // select at byte 0, window at byte 16 [82093AA 3.1]
    u32 first_gsi;
    u32 count;

    u32 read(u32 index) const {
        registers[0] = index;
        return registers[4];
    }
    void write(u32 index, u32 value) const {
        registers[0] = index;
        registers[4] = value;
    }
};

class Controller final : public InterruptController {
  public:
    void start(const acpi::Tables* tables, bool x2apic);
    Result<void> attach_line(InterruptLine line, InterruptHandler handler, void* context) override;
    void detach_line(InterruptLine line, InterruptHandler handler, void* context) override;
    Result<InterruptVector> attach_vector(InterruptHandler handler, void* context, bool eoi) override;
    void detach_vector(InterruptVector vector) override;
    void dispatch(u32 number);

    InterruptCounters counters;
    FixedText<32> names;
    bool io_apic() const { return io_apic_count_ != 0; }

  private:
    // A line after the overrides: which global interrupt, and how it is wired.
    struct Wire {
        u32 gsi;
        bool level;
        bool active_low;
    };
    Wire wire(InterruptLine line) const;
    const IoApicState* io_apic_of(u32 gsi) const;
    Vector* vector_of(u32 gsi);
    Result<u8> free_vector() const;
    Result<Handler*> take(InterruptHandler handler, void* context, Handler* next);
    void remove(Vector& vector, InterruptHandler handler, void* context);

    std::array<Vector, 256> vectors_{};
    std::array<Handler, 96> handlers_{};
    std::array<IoApicState, acpi::Madt::max_io_apics> io_apics_{};
    std::array<acpi::Override, acpi::Madt::max_overrides> overrides_{};
    u32 io_apic_count_ = 0;
    u32 override_count_ = 0;
    bool pic_ = false;
};

constinit Controller controller;

// Handlers' lists are read by dispatch(), on the same processor: changes are made with interrupts off.
class InterruptsOff {
  public:
    InterruptsOff() : were_on_(cpu::interrupts_are_on()) { cpu::interrupts_off(); }
    ~InterruptsOff() {
        if (were_on_) {
            cpu::interrupts_on();
        }
    }
    InterruptsOff(const InterruptsOff&) = delete;
    InterruptsOff& operator=(const InterruptsOff&) = delete;

  private:
    bool were_on_;
};

void Controller::start(const acpi::Tables* tables, bool x2apic) {
    // Always moved away from the exceptions' vectors and masked, whoever handles the lines in the end.
    pic_ = pic::start(first_pic_vector);
    const bool has_apics = tables != nullptr && tables->madt && tables->madt->io_apic_count != 0;
    const auto mode = lapic::start(spurious_vector, !has_apics, x2apic);
    if (has_apics && mode != lapic::Mode::none) {
        for (const acpi::IoApic& found : tables->madt->all_io_apics()) {
            const auto mapped = map_mmio(found.address, 32);
            if (!mapped) {
                continue;
            }
            IoApicState io{reinterpret_cast<volatile u32*>(*mapped), found.first_gsi, 0};
            const u32 version = io.read(1);
            if (version == ~0u) {
                continue; // nobody there
            }
            io.count = (version >> 16 & 0xff) + 1;
            for (u32 i = 0; i < io.count; ++i) {
                constexpr u32 masked = 1 << 16;
                io.write(0x10 + 2 * i, masked);
            }
            io_apics_[io_apic_count_++] = io;
        }
        for (const acpi::Override& o : tables->madt->all_overrides()) {
            overrides_[override_count_++] = o;
        }
    }
    names.write(name(mode));
    names.write(io_apic() ? ", IOAPIC" : pic_ ? ", 8259" : ", no lines");
    set_interrupt_entry([](u32 number) { controller.dispatch(number); });
}

Controller::Wire Controller::wire(InterruptLine line) const {
    if (!line.isa) {
        return {line.gsi, line.level, line.active_low};
    }
    for (u32 i = 0; i < override_count_; ++i) {
        if (overrides_[i].irq == line.gsi) {
            return {overrides_[i].gsi, overrides_[i].level, overrides_[i].active_low};
        }
    }
    return {line.gsi, false, false};
}

const IoApicState* Controller::io_apic_of(u32 gsi) const {
    for (u32 i = 0; i < io_apic_count_; ++i) {
        if (gsi >= io_apics_[i].first_gsi && gsi - io_apics_[i].first_gsi < io_apics_[i].count) {
            return &io_apics_[i];
        }
    }
    return nullptr;
}

Vector* Controller::vector_of(u32 gsi) {
    for (Vector& vector : vectors_) {
        if (vector.has_line && vector.gsi == gsi) {
            return &vector;
        }
    }
    return nullptr;
}

Result<u8> Controller::free_vector() const {
    for (u32 i = first_vector; i <= last_vector; ++i) {
        if (vectors_[i].first == nullptr) {
            return static_cast<u8>(i);
        }
    }
    return Error(Code::exhausted, "interrupts: every vector is in use");
}

Result<Handler*> Controller::take(InterruptHandler handler, void* context, Handler* next) {
    for (Handler& slot : handlers_) {
        if (slot.call == nullptr) {
            slot = {handler, context, next};
            return &slot;
        }
    }
    return Error(Code::exhausted, "interrupts: 96 handlers are attached already");
}

void Controller::remove(Vector& vector, InterruptHandler handler, void* context) {
    for (Handler** at = &vector.first; *at != nullptr; at = &(*at)->next) {
        if ((*at)->call == handler && (*at)->context == context) {
            Handler* gone = *at;
            *at = gone->next;
            *gone = {};
            return;
        }
    }
}

Result<void> Controller::attach_line(InterruptLine line, InterruptHandler handler, void* context) {
    const InterruptsOff quiet;
    const Wire w = io_apic() ? wire(line) : Wire{line.gsi, !line.isa && line.level, false};
    if (Vector* shared = vector_of(w.gsi)) {
        auto slot = take(handler, context, shared->first);
        if (!slot) {
            return slot.error();
        }
        shared->first = *slot;
        return {};
    }
    if (!io_apic()) {
        if (!pic_ || w.gsi >= 16 || w.gsi == 2) {
            return Error(Code::not_found, "interrupts: the machine has no IOAPIC, and the 8259s have lines 0, 1, 3 to 15 only", 15, w.gsi);
        }
        const u8 irq = static_cast<u8>(w.gsi);
        auto slot = take(handler, context, nullptr);
        if (!slot) {
            return slot.error();
        }
        vectors_[first_pic_vector + irq] = {*slot, End::pic, irq, true, w.gsi};
        if (!line.isa) {
            pic::set_level(irq, w.level);
        }
        pic::unmask(irq);
        return {};
    }
    const IoApicState* io = io_apic_of(w.gsi);
    if (io == nullptr) {
        return Error(Code::not_found, "interrupts: no IOAPIC has this line", 0, w.gsi);
    }
    const auto number = free_vector();
    if (!number) {
        return number.error();
    }
    auto slot = take(handler, context, nullptr);
    if (!slot) {
        return slot.error();
    }
    vectors_[*number] = {*slot, End::local_apic, 0, true, w.gsi};
    // Fixed delivery to this processor by its id [82093AA 3.2.4]. The low word unmasks: it goes last.
    const u32 pin = w.gsi - io->first_gsi;
    io->write(0x10 + 2 * pin + 1, lapic::id() << 24);
    io->write(0x10 + 2 * pin, *number | (w.active_low ? 1u << 13 : 0) | (w.level ? 1u << 15 : 0));
    return {};
}

void Controller::detach_line(InterruptLine line, InterruptHandler handler, void* context) {
    const InterruptsOff quiet;
    const u32 gsi = io_apic() ? wire(line).gsi : line.gsi;
    Vector* vector = vector_of(gsi);
    if (vector == nullptr) {
        return;
    }
    remove(*vector, handler, context);
    if (vector->first != nullptr) {
        return;
    }
    if (vector->end == End::pic) {
        pic::mask(vector->irq);
    } else if (const IoApicState* io = io_apic_of(gsi)) {
        constexpr u32 masked = 1 << 16;
        io->write(0x10 + 2 * (gsi - io->first_gsi), masked);
    }
    *vector = {};
}

Result<InterruptVector> Controller::attach_vector(InterruptHandler handler, void* context, bool eoi) {
    const InterruptsOff quiet;
    if (eoi && lapic::mode() == lapic::Mode::none) {
        return Error(Code::not_supported, "interrupts: messages need a local APIC, and this processor has none");
    }
    const auto number = free_vector();
    if (!number) {
        return number.error();
    }
    auto slot = take(handler, context, nullptr);
    if (!slot) {
        return slot.error();
    }
    vectors_[*number] = {*slot, eoi ? End::local_apic : End::none, 0, false, 0};
    return InterruptVector{*number, lapic::id()};
}

void Controller::detach_vector(InterruptVector vector) {
    const InterruptsOff quiet;
    Vector& v = vectors_[vector.vector];
    if (v.first != nullptr) {
        remove(v, v.first->call, v.first->context);
    }
    v = {};
}

void Controller::dispatch(u32 number) {
    const Vector& vector = vectors_[number];
    const bool from_pic = number >= first_pic_vector && number < first_pic_vector + 16u;
    if (from_pic && !pic::is_real(static_cast<u8>(number - first_pic_vector))) {
        ++counters.spurious;
        return;
    }
    if (vector.first == nullptr) {
        if (number == spurious_vector) {
            ++counters.spurious;
            return; // gets no end [SDM-3 11.9]
        }
        ++counters.unexpected;
        if (from_pic) {
            pic::end_of_interrupt(static_cast<u8>(number - first_pic_vector));
        } else if (lapic::mode() != lapic::Mode::none && lapic::in_service(static_cast<u8>(number))) {
            lapic::end_of_interrupt();
        }
        return;
    }
    ++counters.taken;
    const End end = vector.end;
    for (const Handler* handler = vector.first; handler != nullptr; handler = handler->next) {
        handler->call(handler->context);
    }
    if (end == End::local_apic) {
        lapic::end_of_interrupt();
    } else if (end == End::pic) {
        pic::end_of_interrupt(vector.irq);
    }
}

} // namespace

void start_interrupts(const acpi::Tables* tables, bool x2apic) { controller.start(tables, x2apic); }
InterruptController& interrupts() { return controller; }
InterruptCounters interrupt_counters() { return controller.counters; }
std::string_view interrupt_controllers() { return controller.names; }
bool has_io_apic() { return controller.io_apic(); }

} // namespace fl
