module;
#include "core/try.hpp"
module drivers.xen_blk.lane;
import core.std;
import core.result;
import core.text;
import core.dma;
import io.block;
import io.block_queue;

namespace fl::drivers::xen_blk {

Result<void> Lane::open(const Terms& terms, const io::BlockDevice::Identity& identity, DmaAllocator& pool,
                        void (*notify)(void*), void* context) {
    disk_.identify(identity);
    disk_.set_terms(terms);
    CHECK(queue_.transport().open(terms, pool, notify, context));
    if (!std::exchange(known_, true)) {
        queue_.add(disk_);
    }
    queue_.stop(); // of a disk that was closed before
    disk_.set_removed(false);
    queue_.open(disk_.timeout());
    return {};
}

void Lane::unpause() {
    queue_.transport().unpause();
    queue_.send_again();
}

void Lane::take_back() {
    queue_.take_back();
    queue_.transport().pages().reclaim();
}

Result<void> Lane::resume(const Terms& terms, const FixedText<96>& features, DmaAllocator& pool, void (*notify)(void*),
                          void* context) {
    CHECK(queue_.transport().open(terms, pool, notify, context));
    disk_.set_features(features);
    disk_.set_terms(terms);
    queue_.send_again();
    return {};
}

void Lane::reclaim() {
    queue_.reclaim();
    if (!queue_.is_open()) {
        queue_.transport().pages().reclaim();
    }
}

} // namespace fl::drivers::xen_blk
