module;
#include "core/try.hpp"
module drivers.pvscsi.adapter;
import core.std;
import core.dma;
import core.mmio;
import core.result;
import io.ring;

namespace fl::drivers::pvscsi {

Result<void> Adapter::send(AdapterCommand which, std::span<const u32> words) {
    write(command_register, to_underlying(which));
    for (const u32 word : words) {
        write(command_data_register, word);
    }
    if (const u32 seen = status(); seen == status_failed || seen == status_not_enough_data) {
        return Error{Code::not_supported, "the PVSCSI adapter refuses a command (its number, COMMAND_STATUS)",
                     to_underlying(which), seen};
    }
    return {};
}

namespace {
void number_pages(std::span<u64> into, u64 bus, u32 pages) {
    for (u32 i = 0; i < pages; ++i) {
        into[i] = bus / page_size + i;
    }
}
} // namespace

Result<void> Adapter::set_up(const Memory& memory) {
    SetupRings rings{.request_pages = Memory::request_pages,
                     .completion_pages = Memory::completion_pages,
                     .state_page = memory.rings.bus / page_size};
    number_pages(rings.request_page, memory.rings.bus + Memory::requests_at, Memory::request_pages);
    number_pages(rings.completion_page, memory.rings.bus + Memory::completions_at, Memory::completion_pages);
    CHECK(command(AdapterCommand::setup_rings, rings));
    const io::MappedMemory state(memory.rings.data, memory.rings.size);
    const u32 expected = static_cast<u32>(std::countr_zero(Memory::entries));
    for (const usize at : {RingsState::request_log2, RingsState::completion_log2}) {
        if (const u32 seen = state.load_acquire<u32>(at); seen != expected) {
            return Error{Code::protocol, "the PVSCSI adapter's rings are not of the size that was set up (log2)",
                         expected, seen};
        }
    }
    for (const usize at : {RingsState::request_producer, RingsState::request_consumer, RingsState::completion_producer,
                           RingsState::completion_consumer}) {
        if (const u32 seen = state.load_acquire<u32>(at); seen != 0) {
            return Error{Code::protocol, "the PVSCSI adapter's new rings are not empty", 0, seen};
        }
    }
    return {};
}

bool Adapter::set_up_messages(const Memory& memory) {
    if (!knows(AdapterCommand::setup_msg_ring)) {
        return false;
    }
    SetupMessageRing ring{.pages = Memory::message_pages};
    number_pages(ring.page, memory.rings.bus + Memory::messages_at, Memory::message_pages);
    const io::MappedMemory state(memory.rings.data, memory.rings.size);
    return command(AdapterCommand::setup_msg_ring, ring) &&
           state.load_acquire<u32>(RingsState::message_log2) ==
               static_cast<u32>(std::countr_zero(Memory::message_entries)) &&
           state.load_acquire<u32>(RingsState::message_producer) == 0;
}

bool Adapter::set_up_threshold() {
    if (!knows(AdapterCommand::setup_reqcallthreshold)) {
        return false;
    }
    write(command_data_register, 1); // enable
    const u32 enabled = status();    // 0: not configured for this adapter [pvscsi]
    return enabled != 0 && enabled != status_failed && enabled != status_not_enough_data;
}

u32 Adapter::read_targets(DmaSpan page) {
    std::memset(page.data, 0, page_size);
    page.data[config_host_status_at] = static_cast<std::byte>(HostStatus::invalid_parameter); // until it answers
    page.data[config_scsi_status_at] = static_cast<std::byte>(scsi::status_check_condition);
    if (!command(AdapterCommand::config, Config{.completion_address = page.bus,
                                                .page_address = config_controller_address,
                                                .page_number = config_page_controller})) {
        return default_targets;
    }
    std::array<std::byte, config_bytes> copy;
    io::MappedMemory(page.data, page.size).copy_out(0, copy.data(), copy.size());
    return targets_of(copy);
}

} // namespace fl::drivers::pvscsi
