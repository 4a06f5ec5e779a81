// A virtqueue's publish() says whether the device must be notified; nobody may drop that.
// expect: ignoring return value
import core.std;
import core.result;
import io.ring.packed;

namespace {
[[maybe_unused]] void caller(fl::io::PackedQueue<fl::io::MappedMemory>& queue) { queue.publish(); }
} // namespace
