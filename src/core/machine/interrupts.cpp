module core.machine.interrupts;
import core.std;
import core.acpi;
import core.interrupt;
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

constexpr u8 first_pic_vector = 0x20;
constexpr u8 first_vector = 0x30; // to be given out
constexpr u8 last_vector = 0xef;
constexpr u8 spurious_vector = 0xff;

// Handlers' lists are read by dispatch() on every processor while another one changes them under the lock: a link is
// stored last (release), read once (acquire), and what has been unlinked is used again only when every processor has
// passed a point outside its handlers.
struct Handler {
    InterruptHandler call;
    void* context;
    Handler* next;
};
Handler* load(Handler*& link) { return std::atomic_ref(link).load(std::memory_order_acquire); }
void store(Handler*& link, Handler* to) { std::atomic_ref(link).store(to, std::memory_order_release); }

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

    FixedText<32> names;
    SpinLock lock; // of all but dispatch(); taken with interrupts off
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
    Handler* remove(Vector& vector, InterruptHandler handler, void* context);
    void set(u8 number, Handler* first, End end, u8 irq, bool has_line, u32 gsi);
    void release(Handler* handler);

    std::array<Vector, 256> vectors_{};
    std::array<Handler, 96> handlers_{};
    std::array<IoApicState, acpi::Madt::max_io_apics> io_apics_{};
    std::array<acpi::Override, acpi::Madt::max_overrides> overrides_{};
    u32 io_apic_count_ = 0;
    u32 override_count_ = 0;
    bool pic_ = false;
};

constinit Controller controller;
constinit std::atomic<u32> running_processors{1}; // release, acquire: with it, what they need to be kicked
constinit u8 kick_vector = 0;

// The lock, and no handler on this processor meanwhile.
class Quiet {
  public:
    explicit Quiet(SpinLock& lock) : were_on_(cpu::interrupts_are_on()), lock_(lock) {
        cpu::interrupts_off();
        lock_.lock();
    }
    ~Quiet() {
        lock_.unlock();
        if (were_on_) {
            cpu::interrupts_on();
        }
    }
    Quiet(const Quiet&) = delete;
    Quiet& operator=(const Quiet&) = delete;

  private:
    bool were_on_;
    SpinLock& lock_;
};

// Returns when every other processor has taken an interrupt, and so has left the handlers it was in. Bounded; nobody
// keeps interrupts off for so long.
void pass_everywhere() {
    const u32 count = running_processors.load(std::memory_order_acquire);
    const u32 me = this_processor();
    for (u32 i = 0; i < count; ++i) {
        if (i == me) {
            continue;
        }
        Local& other = local_of(i);
        const u64 before = other.kicked.load(std::memory_order_acquire);
        kick_processor(other.apic_id);
        constexpr u32 most_looks = 100'000'000;
        u32 looks = 0;
        while (other.kicked.load(std::memory_order_acquire) == before) { // partner: the release in on_kick()
            if (++looks == most_looks) {
                panic("processor {} does not take interrupts", i);
            }
            spin_pause();
        }
    }
}

void on_kick(void*) {
    std::atomic<u64>& kicked = local().kicked; // written here alone
    kicked.store(kicked.load(std::memory_order_relaxed) + 1, std::memory_order_release);
}

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

// Unlinks it; the caller gives it to release() when it has let go of the lock.
Handler* Controller::remove(Vector& vector, InterruptHandler handler, void* context) {
    for (Handler** at = &vector.first; *at != nullptr; at = &(*at)->next) {
        if ((*at)->call == handler && (*at)->context == context) {
            Handler* gone = *at;
            store(*at, gone->next);
            return gone;
        }
    }
    return nullptr;
}

void Controller::release(Handler* handler) {
    if (handler != nullptr) {
        pass_everywhere();
        const Quiet quiet(lock);
        *handler = {};
    }
}

void Controller::set(u8 number, Handler* first, End end, u8 irq, bool has_line, u32 gsi) {
    Vector& vector = vectors_[number];
    vector.end = end;
    vector.irq = irq;
    vector.has_line = has_line;
    vector.gsi = gsi;
    store(vector.first, first);
}

Result<void> Controller::attach_line(InterruptLine line, InterruptHandler handler, void* context) {
    const Quiet quiet(lock);
    const Wire w = io_apic() ? wire(line) : Wire{line.gsi, !line.isa && line.level, false};
    if (Vector* shared = vector_of(w.gsi)) {
        auto slot = take(handler, context, shared->first);
        if (!slot) {
            return slot.error();
        }
        store(shared->first, *slot);
        return {};
    }
    if (!io_apic()) {
        if (!pic_ || w.gsi >= 16 || w.gsi == 2) {
            return Error(Code::not_found,
                         "interrupts: the machine has no IOAPIC, and the 8259s have lines 0, 1, 3 to 15 only", 15,
                         w.gsi);
        }
        const u8 irq = static_cast<u8>(w.gsi);
        auto slot = take(handler, context, nullptr);
        if (!slot) {
            return slot.error();
        }
        set(static_cast<u8>(first_pic_vector + irq), *slot, End::pic, irq, true, w.gsi);
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
    set(*number, *slot, End::local_apic, 0, true, w.gsi);
    // Fixed delivery to this processor by its id [82093AA 3.2.4]. The low word unmasks: it goes last.
    const u32 pin = w.gsi - io->first_gsi;
    io->write(0x10 + 2 * pin + 1, lapic::id() << 24);
    io->write(0x10 + 2 * pin, *number | (w.active_low ? 1u << 13 : 0) | (w.level ? 1u << 15 : 0));
    return {};
}

void Controller::detach_line(InterruptLine line, InterruptHandler handler, void* context) {
    Handler* gone = nullptr;
    {
        const Quiet quiet(lock);
        const u32 gsi = io_apic() ? wire(line).gsi : line.gsi;
        Vector* vector = vector_of(gsi);
        if (vector == nullptr) {
            return;
        }
        gone = remove(*vector, handler, context);
        if (vector->first == nullptr) {
            if (vector->end == End::pic) {
                pic::mask(vector->irq);
            } else if (const IoApicState* io = io_apic_of(gsi)) {
                constexpr u32 masked = 1 << 16;
                io->write(0x10 + 2 * (gsi - io->first_gsi), masked);
            }
            vector->has_line = false;
        }
    }
    release(gone);
}

Result<InterruptVector> Controller::attach_vector(InterruptHandler handler, void* context, bool eoi) {
    const Quiet quiet(lock);
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
    set(*number, *slot, eoi ? End::local_apic : End::none, 0, false, 0);
    return InterruptVector{*number, lapic::id()};
}

void Controller::detach_vector(InterruptVector vector) {
    Handler* gone = nullptr;
    {
        const Quiet quiet(lock);
        Vector& v = vectors_[vector.vector];
        if (v.first != nullptr) {
            gone = remove(v, v.first->call, v.first->context);
        }
    }
    release(gone);
}

void Controller::dispatch(u32 number) {
    Vector& vector = vectors_[number];
    Local& own = local();
    const bool from_pic = number >= first_pic_vector && number < first_pic_vector + 16u;
    if (from_pic && !pic::is_real(static_cast<u8>(number - first_pic_vector))) {
        ++own.interrupts_spurious;
        return;
    }
    Handler* const first = load(vector.first);
    if (first == nullptr) {
        if (number == spurious_vector) {
            ++own.interrupts_spurious;
            return; // gets no end [SDM-3 11.9]
        }
        ++own.interrupts_unexpected;
        if (from_pic) {
            pic::end_of_interrupt(static_cast<u8>(number - first_pic_vector));
        } else if (lapic::mode() != lapic::Mode::none && lapic::in_service(static_cast<u8>(number))) {
            lapic::end_of_interrupt();
        }
        return;
    }
    ++own.interrupts_taken;
    const End end = vector.end;
    const u8 irq = vector.irq;
    for (Handler* handler = first; handler != nullptr; handler = load(handler->next)) {
        handler->call(handler->context);
    }
    if (end == End::local_apic) {
        lapic::end_of_interrupt();
    } else if (end == End::pic) {
        pic::end_of_interrupt(irq);
    }
}

} // namespace

void start_interrupts(const acpi::Tables* tables, bool x2apic) { controller.start(tables, x2apic); }
InterruptController& interrupts() { return controller; }
InterruptCounters interrupt_counters() {
    const Local& own = local();
    return {own.interrupts_taken, own.interrupts_spurious, own.interrupts_unexpected};
}

Result<void> join_interrupts() {
    if (!lapic::join(spurious_vector)) {
        return Error(Code::not_supported, "its local APIC is not of the kind that the first processor has");
    }
    return {};
}
Result<void> start_kicks() {
    auto vector = controller.attach_vector(on_kick, nullptr, true);
    if (!vector) {
        return vector.error();
    }
    kick_vector = vector->vector;
    return {};
}
void kick_processor(u32 apic_id) { static_cast<void>(lapic::send(apic_id, lapic::Delivery::fixed, kick_vector)); }
void set_running_processors(u32 count) { running_processors.store(count, std::memory_order_release); }
std::string_view interrupt_controllers() { return controller.names; }
bool has_io_apic() { return controller.io_apic(); }

} // namespace fl
