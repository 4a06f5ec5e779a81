module;
#include <sys/eventfd.h>
#include <unistd.h>
module vmm.synic;
import host.std;
import core.result;
import vmm.kvm;
import vmm.memory;

namespace fl::vmm {
namespace {

constexpr u32 first_gsi = 24; // after the I/O APIC's pins
// above all of those: acknowledgements go to the last route of a SINT
constexpr u32 first_listener = 512;
constexpr u64 page_mask = ~(page_size - 1);

Descriptor event_descriptor() { return Descriptor{eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)}; }

} // namespace

Synic::Synic(Kvm& kvm, const GuestMemory& memory, u32 processors)
    : kvm_(kvm), memory_(memory), acknowledged_(event_descriptor()), processors_(processors) {}

Synic::~Synic() = default;

void Synic::registers(u32 processor, u64 control, u64 event_page, u64 message_page) {
    const std::scoped_lock guard(mutex_);
    Processor& p = processors_[processor];
    p.control = control;
    p.event_page = event_page;
    p.message_page = message_page;
}

/// The lines of a SINT are created at its first delivery: KVM's routes are set as a whole, which is expensive.
Synic::Line* Synic::line(u32 processor, u8 sint) {
    auto& slot = processors_[processor].lines[sint];
    if (!slot) {
        auto made = std::make_unique<Line>();
        const u32 number = static_cast<u32>(routes_.size() / 2);
        made->route = {first_gsi + number, processor, sint};
        made->listener = {first_listener + number, processor, sint};
        made->event = event_descriptor();
        made->unused = event_descriptor();
        routes_.push_back(made->route);
        routes_.push_back(made->listener);
        if (!kvm_.set_routes(routes_) || !kvm_.connect(made->event.number(), made->route.gsi)) {
            return nullptr;
        }
        slot = std::move(made);
    }
    return slot.get();
}

void Synic::raise(Line& line) {
    ++interrupts_;
    const u64 one = 1;
    // KVM raises the interrupt within this write to the eventfd.
    [[maybe_unused]] const auto written = write(line.event.number(), &one, sizeof(one));
}

bool Synic::listen(Line& line) {
    if (!line.listening) {
        line.listening = kvm_.connect(line.unused.number(), line.listener.gsi, acknowledged_.number()).has_value();
    }
    return line.listening;
}

Synic::Posted Synic::post(u32 processor, u8 sint, u32 type, std::span<const std::byte> payload) {
    if (processor >= processors_.size() || sint >= sint_count || payload.size() > message_payload_size) {
        return Posted::refused;
    }
    const std::scoped_lock guard(mutex_);
    const Processor& p = processors_[processor];
    const auto slot = memory_.at((p.message_page & page_mask) + sint * message_slot_size, message_slot_size);
    Line* const target = line(processor, sint);
    if ((p.control & page_enabled) == 0 || (p.message_page & page_enabled) == 0 || slot.empty() || target == nullptr) {
        return Posted::refused;
    }
    auto* const header = reinterpret_cast<MessageHeader*>(slot.data());
    const std::atomic_ref<u32> occupied(header->type);
    // Pairs with the guest's store of 0 after it has copied the message out: a message is not overwritten too early.
    if (occupied.load(std::memory_order_acquire) != 0) {
        // Set pending first, then check once more: the guest frees the slot first and then checks the bit. With a full
        // barrier in between on both sides, at least one sees the other's store: either the guest signals
        // end-of-message, or this finds the slot free.
        listen(*target);
        target->waiting = true;
        const std::atomic_ref<u8> flags(header->flags);
        flags.fetch_or(1, std::memory_order_seq_cst);
        if (occupied.load(std::memory_order_seq_cst) != 0) {
            return Posted::busy;
        }
        target->waiting = false;
    }
    std::memcpy(slot.data() + sizeof(MessageHeader), payload.data(), payload.size());
    header->payload_size = static_cast<u8>(payload.size());
    header->flags = 0;
    header->reserved = 0;
    header->origin = 0;
    // Pairs with the guest's read of the type: a reader that sees the type sees the rest of the message.
    occupied.store(type, std::memory_order_release);
    ++messages_;
    raise(*target);
    return Posted::delivered;
}

Synic::Flagged Synic::set_event(u32 processor, u8 sint, u16 flag, bool always) {
    if (processor >= processors_.size() || sint >= sint_count || flag >= event_flags_size * 8) {
        return Flagged::refused;
    }
    const std::scoped_lock guard(mutex_);
    const Processor& p = processors_[processor];
    const auto words = memory_.at((p.event_page & page_mask) + sint * event_flags_size, event_flags_size);
    Line* const target = line(processor, sint);
    if ((p.control & page_enabled) == 0 || (p.event_page & page_enabled) == 0 || words.empty() || target == nullptr) {
        return Flagged::refused;
    }
    const std::atomic_ref<u32> word(reinterpret_cast<u32*>(words.data())[flag / 32]);
    const u32 bit = u32{1} << (flag % 32);
    // Pairs with the guest's exchange of the word: a guest that clears the flag sees the ring data written before it.
    const bool was_set = (word.fetch_or(bit, std::memory_order_seq_cst) & bit) != 0;
    if (was_set && !always) {
        return Flagged::pending;
    }
    raise(*target);
    return Flagged::raised;
}

void Synic::service(EndOfMessage& listener) {
    u64 count = 0;
    [[maybe_unused]] const auto consumed = read(acknowledged_.number(), &count, sizeof(count));
    std::vector<std::pair<u32, u8>> free;
    {
        const std::scoped_lock guard(mutex_);
        for (u32 i = 0; i < processors_.size(); ++i) {
            for (u8 sint = 0; sint < sint_count; ++sint) {
                Line* const found = processors_[i].lines[sint].get();
                if (found == nullptr || !found->listening) {
                    continue;
                }
                if (found->waiting) {
                    // a sender with another message posts it again, and waits again if the slot is not free
                    found->waiting = false;
                    free.emplace_back(i, sint);
                } else {
                    // No sender waits: from here on acknowledgements need not be signalled.
                    kvm_.disconnect(found->unused.number(), found->listener.gsi);
                    found->listening = false;
                }
            }
        }
    }
    for (const auto& [processor, sint] : free) {
        listener.end_of_message(processor, sint);
    }
}

} // namespace fl::vmm
