module drivers.ahci.sata_disk;
import core.std;
import core.time;
import io.block;
import io.block_queue;

namespace fl::drivers::ahci {

void Disk::open(const Terms& terms, const Identity& identity, Nanoseconds timeout) {
    identity_ = identity;
    set_geometry(geometry_of(terms));
    set_timeout(timeout);
    queue_.add(*this);
    queue_.open(timeout);
    queue_.transport().open(*this, terms);
}

void Disk::close() {
    if (queue_.is_open()) {
        queue_.transport().leave();
        queue_.stop();
        static_cast<void>(queue_.transport().port().stop(100));
    }
}

} // namespace fl::drivers::ahci
