// A disk that cannot flush is no disk.
// expect: does not satisfy 'Disk'
// expect: 'disk.flush()' would be invalid
import core.std;
import core.dma;
import io.block;

namespace {
struct NoFlush {
    fl::io::Geometry geometry_;
    fl::io::Counters counters_;
    const fl::io::Geometry& geometry() const { return geometry_; }
    const fl::io::Counters& counters() const { return counters_; }
    void read(fl::u64, fl::DmaSpan) {}
    void write(fl::u64, fl::DmaSpan) {}
};
template <fl::io::Disk D>
void use(D&) {}
[[maybe_unused]] void caller(NoFlush& disk) { use(disk); }
} // namespace
