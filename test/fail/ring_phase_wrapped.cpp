// A phase flips on each lap, and wrapped positions do not distinguish laps: the combination is invalid.
// expect: constraints not satisfied
// expect: does not satisfy 'LapPositions'
import core.std;
import core.result;
import io.ring;

namespace {
using namespace fl;
[[maybe_unused]] void caller(io::FlatMemory memory) {
    // Positive control: the same with positions that count laps.
    static_cast<void>(io::Consumer<io::FlatMemory, io::FreeRunning<u32>, io::Always, io::ByPhase>::create(
        memory, {.entries = 0, .stride = 16}, io::FreeRunning<u32>(8), {}, io::ByPhase{14}));
    static_cast<void>(io::Consumer<io::FlatMemory, io::Wrapped<u32>, io::Always, io::ByPhase>::create(
        memory, {.entries = 0, .stride = 16}, io::Wrapped<u32>(8), {}, io::ByPhase{14}));
}
} // namespace
