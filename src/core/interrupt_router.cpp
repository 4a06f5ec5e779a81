module core.interrupt_router;
import core.std;
import core.acpi;
import core.apic;
import core.log;
import core.processor;
import core.result;
import core.spinlock;
import core.vector;

namespace fl {

namespace {

using apic::RedirectionHigh;
using apic::RedirectionLow;

// Indices of the registers of a redirection entry [82093AA 3.2.4].
constexpr u32 entry_low(u32 pin) { return static_cast<u32>(RedirectionLow::offset) + 2 * pin; }
constexpr u32 entry_high(u32 pin) { return static_cast<u32>(RedirectionHigh::offset) + 2 * pin; }
constexpr u32 entry_masked = RedirectionLow::of(RedirectionLow::mask).raw;
constexpr u32 entry_destination(u32 apic_id) {
    return RedirectionHigh{}
        .set(RedirectionHigh::destination, apic_id & 0xff)
        .set(RedirectionHigh::extended_destination, apic_id >> 8)
        .raw;
}

} // namespace

// ---- the machine ----

void InterruptRouter::start(const Machine& machine, u32 apic_id) {
    machine_ = machine;
    tables_[0] = &first_table_;
    apic_ids_[0] = apic_id;
}

bool InterruptRouter::add_io_apic(u32 first_gsi, u32 lines) {
    if (io_apic_count_ == io_apics_.size()) {
        return false;
    }
    for (u32 pin = 0; pin < lines; ++pin) {
        hardware_.write_io_apic(io_apic_count_, entry_low(pin), entry_masked);
    }
    io_apics_[io_apic_count_++] = {first_gsi, lines};
    return true;
}

void InterruptRouter::add_override(const acpi::Override& wire) {
    if (override_count_ < overrides_.size()) {
        overrides_[override_count_++] = wire;
    }
}

Result<void> InterruptRouter::join(u32 processor, u32 apic_id) {
    if (processor >= max_processors) {
        return Error(Code::bad_argument, "interrupts: no such processor", max_processors - 1, processor);
    }
    // The number may be that of a processor that failed to start: its table is reused. Only one processor joins at a
    // time under a number.
    VectorTable* table = tables_[processor];
    if (table == nullptr) {
        table = new (std::nothrow) VectorTable{};
        if (table == nullptr) {
            return Error(Code::exhausted, "interrupts: no memory for a processor's table of vectors");
        }
    }
    const Locked locked(lock_);
    for (usize i = 0; i < table->size(); ++i) {
        AttachedHandler* const handler = first_table_[i];
        if (handler != nullptr && handler->processor == InterruptVector::every_processor) {
            store_handler((*table)[i], handler);
        }
    }
    tables_[processor] = table;
    apic_ids_[processor] = apic_id;
    return {};
}

Result<void> InterruptRouter::check_processor(u32 processor) const {
    if (processor >= max_processors || tables_[processor] == nullptr) {
        const auto running = std::ranges::find(tables_, nullptr) - tables_.begin(); // numbers are contiguous
        return Error(Code::bad_argument, "interrupts: no processor with such a number runs (expected: at most)",
                     static_cast<u64>(running - 1), processor);
    }
    return {};
}

// ---- vectors ----

Result<u8> InterruptRouter::free_vector(u32 processor) const {
    if (processor == InterruptVector::every_processor) {
        for (u32 number = last_vector; number >= first_vector; --number) {
            if (std::ranges::none_of(tables_, [&](const VectorTable* t) { return t != nullptr && (*t)[number]; })) {
                return static_cast<u8>(number);
            }
        }
        log::warning("interrupts: a vector for all processors was wanted, and none of the {} is free on all of them",
                     vectors_per_processor);
        return Error(Code::exhausted, "interrupts: no vector is free on all processors");
    }
    const VectorTable& table = *tables_[processor];
    for (u32 number = first_vector; number <= last_vector; ++number) {
        if (table[number] == nullptr) {
            return static_cast<u8>(number);
        }
    }
    log::warning("interrupts: one more vector was wanted on processor {}, and all of its {} are in use", processor,
                 vectors_per_processor);
    return Error(Code::exhausted,
                 "interrupts: every vector of the processor is in use: use fewer queues, or more processors",
                 vectors_per_processor, vectors_per_processor + 1);
}

AttachedHandler* InterruptRouter::create(InterruptHandler handler, void* context) {
    auto* made = new (std::nothrow) AttachedHandler{.call = handler,
                                                    .context = context,
                                                    .next = nullptr,
                                                    .processor = InterruptVector::every_processor,
                                                    .end = InterruptEnd::local_apic,
                                                    .irq = 0,
                                                    .line = false};
    if (made != nullptr) {
        attached_.fetch_add(1, std::memory_order_relaxed);
    }
    return made;
}

void InterruptRouter::destroy(AttachedHandler* handler) {
    if (handler != nullptr) {
        attached_.fetch_sub(1, std::memory_order_relaxed);
        delete handler;
    }
}

void InterruptRouter::enter(u32 processor, u8 vector, AttachedHandler* handler) {
    if (processor != InterruptVector::every_processor) {
        return store_handler((*tables_[processor])[vector], handler);
    }
    for (VectorTable* table : tables_) {
        if (table != nullptr) {
            store_handler((*table)[vector], handler);
        }
    }
}

namespace {
Error no_memory() { return {Code::exhausted, "interrupts: no memory for one more handler"}; }
} // namespace

Result<InterruptVector> InterruptRouter::attach_message(u32 processor, InterruptHandler handler, void* context) {
    AttachedHandler* const made = create(handler, context);
    const auto vector = [&]() -> Result<InterruptVector> {
        const Locked locked(lock_);
        if (made == nullptr) {
            return no_memory();
        }
        if (!machine_.local_apic) {
            return Error(Code::not_supported, "interrupts: messages need a local APIC, and this machine has none");
        }
        if (auto runs = check_processor(processor); !runs) {
            return runs.error();
        }
        if (auto fits = check_destination(apic_ids_[processor], machine_.extended); !fits) {
            return fits.error();
        }
        const auto number = free_vector(processor);
        if (!number) {
            return number.error();
        }
        made->processor = processor;
        enter(processor, *number, made);
        return InterruptVector{*number, apic_ids_[processor], processor};
    }();
    if (!vector) {
        destroy(made);
    }
    return vector;
}

Result<InterruptMessage> InterruptRouter::message_for(InterruptVector vector) const {
    return message_to(vector.apic_id, vector.vector, machine_.extended);
}

Result<InterruptVector> InterruptRouter::attach_vector(InterruptHandler handler, void* context, bool eoi) {
    AttachedHandler* const made = create(handler, context);
    const auto vector = [&]() -> Result<InterruptVector> {
        const Locked locked(lock_);
        if (made == nullptr) {
            return no_memory();
        }
        if (eoi && !machine_.local_apic) {
            return Error(Code::not_supported, "interrupts: messages need a local APIC, and this machine has none");
        }
        const auto number = free_vector(InterruptVector::every_processor);
        if (!number) {
            return number.error();
        }
        made->end = eoi ? InterruptEnd::local_apic : InterruptEnd::none;
        enter(InterruptVector::every_processor, *number, made);
        return InterruptVector{*number, apic_ids_[this_processor()]};
    }();
    if (!vector) {
        destroy(made);
    }
    return vector;
}

void InterruptRouter::detach_vector(InterruptVector vector) {
    AttachedHandler* gone = nullptr;
    {
        const Locked locked(lock_);
        const bool everywhere = vector.processor == InterruptVector::every_processor;
        if (!everywhere && !check_processor(vector.processor)) {
            return;
        }
        gone = (*tables_[everywhere ? 0 : vector.processor])[vector.vector];
        if (gone == nullptr || gone->line || gone->processor != vector.processor) {
            return;
        }
        enter(vector.processor, vector.vector, nullptr);
    }
    hardware_.wait_for_handlers();
    destroy(gone);
}

// ---- lines ----

InterruptRouter::Wire InterruptRouter::wire(InterruptLine line) const {
    if (!has_io_apic()) { // the 8259s have no polarity setting
        return {line.gsi, !line.isa && line.level, false};
    }
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

std::optional<u32> InterruptRouter::io_apic_of(u32 gsi) const {
    for (u32 i = 0; i < io_apic_count_; ++i) {
        if (gsi >= io_apics_[i].first_gsi && gsi - io_apics_[i].first_gsi < io_apics_[i].lines) {
            return i;
        }
    }
    return std::nullopt;
}

InterruptRouter::Line* InterruptRouter::find(u32 gsi) {
    Line* const found = std::ranges::find(lines_, gsi, &Line::gsi);
    return found == lines_.end() ? nullptr : found;
}

// Fixed delivery to one processor by its id. The low word is written last: it unmasks.
void InterruptRouter::program(const Wire& wire, u32 apic_id, u8 vector) {
    const u32 io_apic = *io_apic_of(wire.gsi);
    const u32 pin = wire.gsi - io_apics_[io_apic].first_gsi;
    hardware_.write_io_apic(io_apic, entry_high(pin), entry_destination(apic_id));
    const auto low = RedirectionLow{}
                         .set(RedirectionLow::vector, vector)
                         .set(RedirectionLow::active_low, wire.active_low)
                         .set(RedirectionLow::level_triggered, wire.level);
    hardware_.write_io_apic(io_apic, entry_low(pin), low.raw);
}

// The first handler of a line: allocates a vector and unmasks the line.
Result<void> InterruptRouter::route(const Wire& wire, bool isa, u32 processor, AttachedHandler& handler) {
    if (auto runs = check_processor(processor); !runs) {
        return runs;
    }
    u8 vector = 0;
    if (has_io_apic()) {
        if (!io_apic_of(wire.gsi)) {
            return Error(Code::not_found, "interrupts: no IOAPIC has this line", 0, wire.gsi);
        }
        if (auto fits = check_destination(apic_ids_[processor], machine_.extended); !fits) {
            return fits;
        }
        const auto number = free_vector(processor);
        if (!number) {
            return number.error();
        }
        vector = *number;
    } else {
        if (!machine_.pic || wire.gsi >= 16 || wire.gsi == 2) {
            return Error(Code::not_found,
                         "interrupts: the machine has no IOAPIC, and the 8259s have lines 0, 1, 3 to 15 only", 15,
                         wire.gsi);
        }
        if (processor != 0) {
            return Error(Code::not_supported,
                         "interrupts: the machine has no IOAPIC, and the 8259s interrupt processor 0 alone", 0,
                         processor);
        }
        handler.end = InterruptEnd::pic;
        handler.irq = static_cast<u8>(wire.gsi);
        vector = static_cast<u8>(first_pic_vector + wire.gsi);
    }
    if (!lines_.push({wire.gsi, processor, vector})) {
        return no_memory();
    }
    handler.processor = processor;
    enter(processor, vector, &handler);
    if (has_io_apic()) {
        program(wire, apic_ids_[processor], vector);
    } else {
        if (!isa) {
            hardware_.set_pic_level(handler.irq, wire.level);
        }
        hardware_.mask_pic(handler.irq, false);
    }
    return {};
}

Result<void> InterruptRouter::attach_line(InterruptLine line, InterruptHandler handler, void* context, u32 processor) {
    AttachedHandler* const made = create(handler, context);
    const auto done = [&]() -> Result<void> {
        const Locked locked(lock_);
        if (made == nullptr) {
            return no_memory();
        }
        made->line = true;
        const Wire w = wire(line);
        const Line* const shared = find(w.gsi);
        if (shared == nullptr) {
            return route(w, line.isa, processor, *made);
        }
        AttachedHandler* const first = (*tables_[shared->processor])[shared->vector];
        made->next = first;
        made->processor = first->processor;
        made->end = first->end;
        made->irq = first->irq;
        enter(shared->processor, shared->vector, made);
        return {};
    }();
    if (!done) {
        destroy(made);
    }
    return done;
}

void InterruptRouter::detach_line(InterruptLine line, InterruptHandler handler, void* context) {
    AttachedHandler* gone = nullptr;
    {
        const Locked locked(lock_);
        Line* const at = find(wire(line).gsi);
        if (at == nullptr) {
            return;
        }
        AttachedHandler*& first = (*tables_[at->processor])[at->vector];
        for (AttachedHandler** link = &first; *link != nullptr; link = &(*link)->next) {
            if ((*link)->call == handler && (*link)->context == context) {
                gone = *link;
                store_handler(*link, gone->next);
                break;
            }
        }
        if (gone == nullptr) {
            return;
        }
        if (first == nullptr) {
            if (const auto io_apic = io_apic_of(at->gsi)) {
                hardware_.write_io_apic(*io_apic, entry_low(at->gsi - io_apics_[*io_apic].first_gsi), entry_masked);
            } else {
                hardware_.mask_pic(gone->irq, true);
            }
            lines_.remove(static_cast<usize>(at - lines_.begin()));
        }
    }
    hardware_.wait_for_handlers();
    destroy(gone);
}

} // namespace fl
