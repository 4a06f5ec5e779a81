module;
#include "core/try.hpp"
module drivers.pvscsi.rings;
import core.std;
import core.dma;
import core.result;
import io.ring;

namespace fl::drivers::pvscsi {

Result<void> Rings::start(const Memory& memory, bool threshold) {
    const io::MappedMemory rings(memory.rings.data, memory.rings.size);
    const io::FreeRunning<u32> positions(Memory::entries);
    TRY(requests_, decltype(requests_)::value_type::create(rings,
                                                           {.index = RingsState::request_producer,
                                                            .consumed = RingsState::request_consumer,
                                                            .entries = Memory::requests_at,
                                                            .stride = RequestDescriptor::stride},
                                                           positions, {{}, threshold}));
    TRY(completions_, decltype(completions_)::value_type::create(rings,
                                                                 {.index = RingsState::completion_producer,
                                                                  .consumed = RingsState::completion_consumer,
                                                                  .entries = Memory::completions_at,
                                                                  .stride = sizeof(CompletionDescriptor)},
                                                                 positions));
    TRY(messages_, decltype(messages_)::value_type::create(rings,
                                                           {.index = RingsState::message_producer,
                                                            .consumed = RingsState::message_consumer,
                                                            .entries = Memory::messages_at,
                                                            .stride = sizeof(MessageDescriptor)},
                                                           io::FreeRunning<u32>(Memory::message_entries)));
    return {};
}

} // namespace fl::drivers::pvscsi
