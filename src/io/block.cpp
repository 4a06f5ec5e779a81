module io.block;
import core.std;
import core.check;
import core.log;
import core.result;
import core.time;
import core.dma;
import core.panic;
import core.processor;
import io.executor;

namespace fl::io {

Error to_error(Status status) {
    switch (status) {
    case Status::ok: break;
    case Status::io_error: return {Code::io, "the disk reports an error for this transfer"};
    case Status::not_supported: return {Code::not_supported, "the disk does not offer this operation"};
    case Status::timed_out:
        return {Code::timed_out, "the disk did not answer within the time-out (timeout=MILLISECONDS changes it)"};
    case Status::cancelled: return {Code::cancelled, "the transfer was cancelled"};
    case Status::device_gone: return {Code::device_gone, "the disk was closed while the transfer was in flight"};
    case Status::protocol_error: return {Code::protocol, "the disk's host broke its protocol; the disk was closed"};
    case Status::misaligned:
        return {Code::bad_argument,
                "buffer address and length must be multiples of the disk's sector size, and not empty"};
    case Status::out_of_range: return {Code::bad_argument, "the transfer ends beyond the last sector of the disk"};
    case Status::read_only: return {Code::bad_argument, "the disk is read-only"};
    case Status::not_written: break;
    }
    return {Code::protocol, "the request ended without a status"};
}

Request::~Request() {
    if (pending_) {
        check(this_processor() == device_->executor_.processor(), "a request is destroyed on its lane's processor");
        device_->forget(*this);
        if (pending_) { // not ended by forget()
            ++device_->counters_.completed;
            ++device_->counters_.errors;
        }
    }
}

void BlockDevice::submit(Request& request) {
    if (this_processor() != executor_.processor()) [[unlikely]] {
        panic("io::BlockDevice: {}: submitted on processor {}; this lane belongs to processor {}",
              identity_.name.view(), this_processor(), executor_.processor());
    }
    if (held_ && request.op != Op::flush) [[unlikely]] {
        return;
    }
    accept(request);
}

void BlockDevice::resize(u64 sectors) {
    check(this_processor() == executor_.processor(), "a disk is resized on its own processor");
    if (sectors == geometry_.sectors) {
        return;
    }
    log::warning("{}: resized from {} to {} sectors of {} bytes", identity_.name.view(), geometry_.sectors, sectors,
                 geometry_.sector_size);
    geometry_.sectors = sectors;
    for (u32 i = 1; i < lanes(); ++i) {
        lane(i).learn_size(sectors);
    }
}

// A post in progress is not posted again. Its handler clears `posted` before it reads the size, and both exchanges are
// acquire and release: either the handler sees the new size, or this sees that a new post is needed.
void BlockDevice::learn_size(u64 sectors) {
    resize_.sectors.store(sectors, std::memory_order_relaxed);
    if (resize_.posted.exchange(true, std::memory_order_acq_rel)) {
        return;
    }
    resize_.lane = this;
    resize_.run = [](Post& post) {
        auto& self = static_cast<Resize&>(post);
        self.posted.exchange(false, std::memory_order_acq_rel);
        self.lane->geometry_.sectors = self.sectors.load(std::memory_order_relaxed);
    };
    static_cast<void>(executor_.post(resize_)); // refused: that processor has stopped, and its lane too
}

void BlockDevice::submit_forwarded(BlockDevice& to, Request& request) { to.accept(request); }

inline void BlockDevice::accept(Request& request) {
    ++counters_.submitted;
    request.status = Status::not_written;
    request.issued = 0;
    request.parts = 0;
    request.part_status = Status::ok;
    request.resends = 0;
    request.resend = false;
    request.pending_ = true;
    if (request.op != Op::flush) {
        const u32 sector = geometry_.sector_size;
        const u64 sectors = request.buffer.size / sector;
        if ((request.buffer.data == nullptr && has_data(request.op)) || request.buffer.size == 0 ||
            request.buffer.size % sector != 0 || request.buffer.bus % sector != 0) {
            return complete(request, Status::misaligned);
        }
        if (request.lba >= geometry_.sectors || sectors > geometry_.sectors - request.lba) {
            return complete(request, Status::out_of_range);
        }
        if (request.op != Op::read && geometry_.read_only) {
            return complete(request, Status::read_only);
        }
        if ((request.op == Op::discard && !geometry_.discard) ||
            (request.op == Op::write_zeroes && !geometry_.write_zeroes)) {
            return complete(request, Status::not_supported);
        }
    } else if (!geometry_.flush) {
        return complete(request, Status::ok);
    }
    start(request);
}

void BlockDevice::complete(Request& request, Status status) {
    request.pending_ = false;
    request.status = status;
    ++counters_.completed;
    counters_.errors += status != Status::ok ? 1 : 0;
    if (request.waiter) { // a request without a waiter is polled by its owner: pending() becomes false
        executor_.make_ready(request);
    }
}

} // namespace fl::io
