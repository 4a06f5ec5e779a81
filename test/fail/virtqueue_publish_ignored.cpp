// A virtqueue's publish() returns whether the device must be notified; the result must be used.
// expect: ignoring return value
import core.std;
import core.result;
import io.ring.packed;

namespace {
[[maybe_unused]] void caller(fl::io::PackedQueue<fl::io::MappedMemory>& queue) { queue.publish(); }
} // namespace
