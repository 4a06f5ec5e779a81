module;
#include "core/try.hpp"
module drivers.xen_blk.lane;
import core.std;
import core.result;
import core.text;
import core.dma;
import io.block;
import io.executor;
import io.task;

namespace fl::drivers::xen_blk {

Result<void> Lane::prepare(u32 order, bool persistent, hv::xen::Domain domain, DmaAllocator& dma) {
    Pages& pages = queue_.transport().pages();
    CHECK(connection_.make(order, domain, dma));
    CHECK(queue_.transport().ring().lay_out(connection_.ring()));
    has_pool_ = persistent && pages.start_pool(domain, dma);
    if (!pages.start_share()) {
        return Error{Code::exhausted, "not enough grants for a queue of a virtual block device"};
    }
    return {};
}

Result<void> Lane::set_up(const Terms& terms, DmaAllocator& dma, void (*notify)(void*), void* context) {
    terms_ = terms;
    terms_.port = connection_.port();
    notify_ = notify;
    notify_context_ = context;
    return queue_.transport().pages().open(terms, terms.geometry.sector_size, queue_.transport().ring().capacity(),
                                           dma);
}

io::Task<Result<void>> Lane::start() {
    Transport& transport = queue_.transport();
    if (transport.group().closed()) {
        co_return Error{Code::device_gone, "the disk was closed, as said above"};
    }
    const bool resumes = queue_.is_open();
    disk_.set_terms(terms_);
    transport.start(terms_, notify_, notify_context_);
    if (!std::exchange(linked_, true)) {
        disk_.link(executor()); // this is its executor
    }
    if (resumes) {
        queue_.send_again();
    } else {
        queue_.stop(); // of a disk that was closed before
        transport.join();
        queue_.open(disk_.timeout());
    }
    co_return Result<void>{};
}

// The port is masked until the queue first sleeps.
Result<void> Lane::listen() {
    CHECK(events_.bind(connection_.port(), on_event, this, executor().processor()));
    return {};
}

io::Task<Result<u32>> Lane::in_flight() { co_return commands(); }

io::Task<Result<void>> Lane::pause() {
    queue_.transport().pause();
    co_return Result<void>{};
}

io::Task<Result<void>> Lane::unpause() {
    if (queue_.is_open() && !is_held()) {
        queue_.transport().unpause();
        queue_.send_again();
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Lane::hold() {
    queue_.transport().lose();
    co_return Result<void>{};
}

io::Task<Result<void>> Lane::take_back() {
    if (queue_.is_open()) {
        queue_.take_back();
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Lane::stop() {
    queue_.stop();
    co_return Result<void>{};
}

void Lane::reclaim() {
    queue_.reclaim(); // no effect while it is held
    queue_.transport().pages().reclaim();
    has_pool_ = false;
    connection_.free();
}

} // namespace fl::drivers::xen_blk
