module;
#include "core/try.hpp"
module drivers.pci.msi;
import core.std;
import core.interrupt;
import core.mmio;
import core.result;
import core.vector;
import drivers.pci;

namespace fl::drivers::pci {

namespace {

constexpr u32 max_messages_log2 = 5; // for MSI: 32 [PCI-3.0 §6.8.1.3]

constexpr Error too_few(u32 at_least, u32 there) {
    return {Code::exhausted,
            "the device and the machine have fewer interrupt vectors than the driver needs: let it share them, or use "
            "fewer queues",
            at_least, there};
}

u32 messages_of(MsiControl control) { return u32{1} << control.get(MsiControl::multiple_message_capable); }

} // namespace

InterruptOffer interrupts_of(const Device& device) {
    if (const auto msix = device.capability(CapabilityId::msix)) {
        return {InterruptKind::msix, MsixControl::read(device, *msix).get(MsixControl::last_entry) + 1u};
    }
    if (const auto msi = device.capability(CapabilityId::msi)) {
        return {InterruptKind::msi, messages_of(MsiControl::read(device, *msi))};
    }
    return device.interrupt_pin() != 0 ? InterruptOffer{InterruptKind::line, 1} : InterruptOffer{};
}

Result<u32> Interrupts::attach(std::span<const VectorUse> wanted, u32 at_least, InterruptKind best) {
    if (at_least == 0 || wanted.size() < at_least) {
        return Error{Code::bad_argument, "a driver asks for fewer interrupt vectors than it needs at least", at_least,
                     wanted.size()};
    }
    if (kind_ != InterruptKind::none) {
        return Error{Code::busy, "the device's interrupts are attached already"};
    }
    struct Way {
        InterruptKind kind;
        Result<void> (Interrupts::*attach)(std::span<const VectorUse>, u32);
    };
    constexpr std::array<Way, 3> ways{{{InterruptKind::msix, &Interrupts::attach_msix},
                                       {InterruptKind::msi, &Interrupts::attach_msi},
                                       {InterruptKind::line, &Interrupts::attach_line}}};
    std::optional<Error> why;
    for (const Way way : ways) {
        if (way.kind > best) {
            continue;
        }
        const auto done = (this->*way.attach)(wanted, at_least);
        if (done) {
            return count_;
        }
        if (done.error().code != Code::not_found && !why) {
            why = done.error();
        }
    }
    return why.value_or(Error{Code::not_supported,
                              "the device has neither MSI-X nor MSI, nor an interrupt pin that is routed anywhere"});
}

// Attaches one message vector per use, up to the first that the machine cannot provide.
Result<void> Interrupts::attach_messages(std::span<const VectorUse> wanted, u32 at_least) {
    while (count_ < wanted.size()) {
        const VectorUse& use = wanted[count_];
        const auto vector = controller_.attach_message(use.processor, use.handler, use.context);
        if (!vector) {
            if (count_ < at_least) {
                return fail(vector.error());
            }
            break;
        }
        entries_[count_++].vector = *vector;
    }
    return {};
}

// Attaches messages that differ only in the lowest bits of the data, as MSI requires: a power-of-two count, with the
// first aligned to it. The controller hands out single vectors, so these are taken until a suitable run is complete,
// and the others are released. If there is no such run, shorter ones are tried.
Result<void> Interrupts::attach_run(std::span<const VectorUse> wanted, u32 at_least) {
    constexpr u32 max_vectors = 2 << max_messages_log2; // any aligned run of 32 lies within 63 consecutive vectors
    std::array<InterruptVector, max_vectors> unusable;
    std::optional<Error> why;
    for (u32 size = std::bit_floor(static_cast<u32>(wanted.size())); size >= at_least && size != 0; size /= 2) {
        u32 unusable_count = 0;
        InterruptMessage first{};
        const auto give_up_run = [&] {
            for (u32 i = 0; i < count_; ++i) {
                unusable[unusable_count++] = entries_[i].vector;
            }
            count_ = 0;
        };
        while (count_ < size && unusable_count + count_ < 2 * size) {
            const VectorUse& use = wanted[count_];
            const auto vector = controller_.attach_message(wanted[0].processor, use.handler, use.context);
            if (!vector) {
                why = vector.error();
                break;
            }
            const auto message = controller_.message_for(*vector);
            if (!message) {
                controller_.detach_vector(*vector);
                why = message.error();
                break;
            }
            const bool fits = count_ == 0 ? message->data % size == 0
                                          : message->address == first.address && message->data == first.data + count_;
            if (!fits) {
                give_up_run();
                unusable[unusable_count++] = *vector;
                continue;
            }
            if (count_ == 0) {
                first = *message;
            }
            entries_[count_++].vector = *vector;
        }
        const bool found = count_ == size;
        if (!found) {
            give_up_run();
        }
        for (u32 i = 0; i < unusable_count; ++i) {
            controller_.detach_vector(unusable[i]);
        }
        if (found) {
            return {};
        }
    }
    return why.value_or(too_few(at_least, 0));
}

void Interrupts::release_vectors() {
    for (u32 i = 0; i < count_; ++i) {
        controller_.detach_vector(entries_[i].vector);
    }
    count_ = 0;
    entries_.clear();
}

Result<void> Interrupts::make_entries(u32 count) {
    entries_.clear();
    while (entries_.size() < count) {
        if (!entries_.push({})) {
            entries_.clear();
            return Error{Code::exhausted, "no memory for the device's interrupt vectors", count, 0};
        }
    }
    return {};
}

Result<void> Interrupts::fail(Error error) {
    release_vectors();
    return error;
}

// A function must not have both enabled [PCI-3.0 §6.8].
void Interrupts::switch_other_off(CapabilityId id) {
    other_ = 0;
    other_id_ = id;
    const auto at = device_.capability(id);
    if (!at) {
        return;
    }
    if (id == CapabilityId::msi) {
        auto control = MsiControl::read(device_, *at);
        if (control.get(MsiControl::enable)) {
            control.set(MsiControl::enable, false).write(device_, *at);
            other_ = *at;
        }
    } else {
        auto control = MsixControl::read(device_, *at);
        if (control.get(MsixControl::enable)) {
            control.set(MsixControl::enable, false).write(device_, *at);
            other_ = *at;
        }
    }
}

Result<void> Interrupts::attach_msix(std::span<const VectorUse> wanted, u32 at_least) {
    const auto at = device_.capability(CapabilityId::msix);
    if (!at) {
        return Error{Code::not_found, "no MSI-X"};
    }
    auto control = MsixControl::read(device_, *at);
    const u32 size = control.get(MsixControl::last_entry) + 1u;
    const u32 most = static_cast<u32>(std::min<u64>(wanted.size(), size));
    if (most < at_least) {
        return too_few(at_least, size);
    }
    // Both must lie within the BARs that they name; the pending bits are not accessed.
    const auto pending = MsixPending::read(device_, *at);
    TRY(const Bar pending_bar, device_.memory_bar(pending.get(MsixPending::bar)));
    const u64 pending_at = u64{8} * pending.get(MsixPending::qword);
    const u64 pending_size = align_up(size, 64u) / 8;
    if (pending_at > pending_bar.size || pending_size > pending_bar.size - pending_at) {
        return Error{Code::protocol, "the MSI-X pending bits lie outside of their BAR", pending_bar.size,
                     pending_at + pending_size};
    }
    const auto table = MsixTable::read(device_, *at);
    TRY(table_, device_.map_bar(mapper_, table.get(MsixTable::bar), u64{8} * table.get(MsixTable::qword),
                                size * msix_entry_size));

    CHECK(make_entries(most));
    CHECK(attach_messages(wanted.first(most), at_least));
    // Obtained before any device register changes.
    for (u32 i = 0; i < count_; ++i) {
        if (const auto message = controller_.message_for(entries_[i].vector); !message) {
            return fail(message.error());
        }
    }

    capability_ = *at;
    old_control_ = control.raw;
    old_command_ = device_.command();
    switch_other_off(CapabilityId::msi);
    // All are masked until the table is complete; the table is in effect only while MSI-X is enabled.
    control.set(MsixControl::enable, true).set(MsixControl::function_mask, true).write(device_, *at);
    for (u32 i = 0; i < size; ++i) {
        const u64 entry = i * msix_entry_size;
        auto vector = MsixVectorControl::read(table_, entry);
        if (i < count_) {
            entries_[i].old_control = vector.raw;
        }
        // Must precede a change of its address [PCI-3.0 §6.8.3.5].
        vector.set(MsixVectorControl::mask, true).write(table_, entry);
    }
    for (u32 i = 0; i < count_; ++i) {
        const u64 entry = i * msix_entry_size;
        const InterruptMessage message = *controller_.message_for(entries_[i].vector);
        entries_[i].old_address = MsixAddress::read(table_, entry).raw | u64{MsixAddressHigh::read(table_, entry).raw}
                                                                             << 32;
        entries_[i].old_data = MsixData::read(table_, entry).raw;
        MsixAddress::from(static_cast<u32>(message.address)).write(table_, entry);
        MsixAddressHigh::from(static_cast<u32>(message.address >> 32)).write(table_, entry);
        MsixData::from(message.data).write(table_, entry);
        MsixVectorControl::from(entries_[i].old_control).set(MsixVectorControl::mask, false).write(table_, entry);
    }
    device_.change_command(Command::of(Command::interrupt_disable));
    control.set(MsixControl::function_mask, false).write(device_, *at);
    kind_ = InterruptKind::msix;
    return {};
}

Result<void> Interrupts::attach_msi(std::span<const VectorUse> wanted, u32 at_least) {
    const auto at = device_.capability(CapabilityId::msi);
    if (!at) {
        return Error{Code::not_found, "no MSI"};
    }
    auto control = MsiControl::read(device_, *at);
    if (control.get(MsiControl::multiple_message_capable) > max_messages_log2) {
        return Error{Code::protocol, "the MSI capability has a reserved number of messages", max_messages_log2,
                     control.get(MsiControl::multiple_message_capable)};
    }
    const u32 most = static_cast<u32>(std::min<u64>(wanted.size(), messages_of(control)));
    if (std::bit_floor(most) < at_least) {
        return too_few(at_least, std::bit_floor(most));
    }
    CHECK(make_entries(most));
    if (auto found = attach_run(wanted.first(most), at_least); !found) {
        return fail(found.error());
    }
    const auto message = controller_.message_for(entries_[0].vector);
    if (!message) {
        return fail(message.error());
    }
    const bool wide = control.get(MsiControl::address_64);
    if ((message->address >> 32 != 0 && !wide) || message->data > 0xffff) {
        return fail({Code::not_supported,
                     "the message for this processor does not fit into the device's MSI capability",
                     wide ? ~u64{0} : 0xffff'ffffu, message->address});
    }

    capability_ = *at;
    old_control_ = control.raw;
    old_command_ = device_.command();
    switch_other_off(CapabilityId::msix);
    control.set(MsiControl::enable, false)
        .set(MsiControl::multiple_message_enable, static_cast<u16>(std::countr_zero(count_)))
        .write(device_, *at);
    const bool maskable = control.get(MsiControl::per_vector_masking);
    if (maskable) {
        old_mask_ = device_.read<u32>(*at + msi_mask(control));
        device_.write(*at + msi_mask(control), ~u32{0});
    }
    entries_[0].old_address = device_.read<u32>(*at + msi_address);
    device_.write(*at + msi_address, static_cast<u32>(message->address));
    if (wide) {
        entries_[0].old_address |= u64{device_.read<u32>(*at + msi_address_high)} << 32;
        device_.write(*at + msi_address_high, static_cast<u32>(message->address >> 32));
    }
    entries_[0].old_data = device_.read<u16>(*at + msi_data(control));
    device_.write(*at + msi_data(control), static_cast<u16>(message->data));
    device_.change_command(Command::of(Command::interrupt_disable));
    control.set(MsiControl::enable, true).write(device_, *at);
    if (maskable) {
        // Unused messages stay masked.
        device_.write(*at + msi_mask(control), count_ == 32 ? 0 : ~u32{0} << count_);
    }
    kind_ = InterruptKind::msi;
    return {};
}

Result<void> Interrupts::attach_line(std::span<const VectorUse> wanted, u32 at_least) {
    if (device_.interrupt_pin() == 0) {
        return Error{Code::not_found, "no interrupt pin"};
    }
    const u8 line = device_.interrupt_line();
    if (line == 0xff) {
        return Error{Code::not_found, "the pin is not routed"};
    }
    if (at_least > 1) {
        return too_few(at_least, 1);
    }
    line_ = {.gsi = line, .isa = false, .level = true, .active_low = true}; // [PCI-3.0 §2.2.6]
    line_use_ = wanted[0];
    old_command_ = device_.command();
    CHECK(controller_.attach_line(line_, line_use_.handler, line_use_.context, line_use_.processor));
    device_.change_command({}, Command::of(Command::interrupt_disable));
    kind_ = InterruptKind::line;
    count_ = 1;
    return {};
}

void Interrupts::detach() {
    switch (kind_) {
    case InterruptKind::none: return;
    case InterruptKind::line:
        device_.change_command(Command::of(Command::interrupt_disable)); // no interrupt may arrive without a handler
        controller_.detach_line(line_, line_use_.handler, line_use_.context);
        count_ = 0;
        break;
    case InterruptKind::msix:
        MsixControl::change(device_, capability_, [](MsixControl& now) { now.set(MsixControl::function_mask, true); });
        for (u32 i = 0; i < count_; ++i) {
            const u64 entry = i * msix_entry_size;
            const Entry& old = entries_[i];
            MsixVectorControl::from(old.old_control).set(MsixVectorControl::mask, true).write(table_, entry);
            MsixAddress::from(static_cast<u32>(old.old_address)).write(table_, entry);
            MsixAddressHigh::from(static_cast<u32>(old.old_address >> 32)).write(table_, entry);
            MsixData::from(old.old_data).write(table_, entry);
            MsixVectorControl::from(old.old_control).write(table_, entry);
        }
        MsixControl::from(old_control_).write(device_, capability_);
        break;
    case InterruptKind::msi: {
        auto control = MsiControl::read(device_, capability_);
        control.set(MsiControl::enable, false).write(device_, capability_);
        device_.write(capability_ + msi_address, static_cast<u32>(entries_[0].old_address));
        if (control.get(MsiControl::address_64)) {
            device_.write(capability_ + msi_address_high, static_cast<u32>(entries_[0].old_address >> 32));
        }
        device_.write(capability_ + msi_data(control), static_cast<u16>(entries_[0].old_data));
        if (control.get(MsiControl::per_vector_masking)) {
            device_.write(capability_ + msi_mask(control), old_mask_);
        }
        MsiControl::from(old_control_).write(device_, capability_);
        break;
    }
    }
    if (other_ != 0) {
        if (other_id_ == CapabilityId::msi) {
            MsiControl::change(device_, other_, [](MsiControl& now) { now.set(MsiControl::enable, true); });
        } else {
            MsixControl::change(device_, other_, [](MsixControl& now) { now.set(MsixControl::enable, true); });
        }
        other_ = 0;
    }
    const Command mine = Command::of(Command::interrupt_disable);
    device_.change_command(Command::from(old_command_.raw & mine.raw), Command::from(~old_command_.raw & mine.raw));
    kind_ = InterruptKind::none;
    release_vectors(); // the device sends no more messages
}

bool Interrupts::set_mask(u32 index, bool masked) {
    if (index >= count_) {
        return false;
    }
    switch (kind_) {
    case InterruptKind::none: return false;
    case InterruptKind::line:
        device_.change_command(masked ? Command::of(Command::interrupt_disable) : Command{},
                               masked ? Command{} : Command::of(Command::interrupt_disable));
        return true;
    case InterruptKind::msix: {
        const u64 entry = index * msix_entry_size;
        MsixVectorControl::change(table_, entry,
                                  [&](MsixVectorControl& now) { now.set(MsixVectorControl::mask, masked); });
        // flushes the posted write to the device [PCI-3.0 §3.2.5]
        static_cast<void>(MsixVectorControl::read(table_, entry));
        return true;
    }
    case InterruptKind::msi: {
        const auto control = MsiControl::read(device_, capability_);
        if (!control.get(MsiControl::per_vector_masking)) {
            return false;
        }
        const u64 at = capability_ + msi_mask(control);
        const u32 now = device_.read<u32>(at);
        device_.write(at, masked ? now | u32{1} << index : now & ~(u32{1} << index));
        return true;
    }
    }
    return false;
}

} // namespace fl::drivers::pci
