// publish() returns whether the other side must be notified; the result must be used.
// expect: ignoring return value
import core.std;
import core.result;
import io.ring;

namespace {
using Ring = fl::io::Producer<fl::io::FlatMemory, fl::io::FreeRunning<fl::u32>, fl::io::ReachedEvent>;
[[maybe_unused]] void caller(Ring& ring) { ring.publish(); }
} // namespace
