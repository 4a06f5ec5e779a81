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

void Request::withdraw() {
    check(this_processor() == device_->executor_.processor(), "a request is destroyed on its lane's processor");
    device_->forget(*this);
    if (pending_) { // not ended by forget()
        ++device_->counters_.completed;
        ++device_->counters_.errors;
    }
}

void BlockDevice::submitted_elsewhere() const {
    panic("io::BlockDevice: {}: submitted on processor {}; this lane belongs to processor {}", identity_.name.view(),
          this_processor(), executor_.processor());
}

void BlockDevice::resize(u64 sectors) {
    check(this_processor() == executor_.processor(), "a disk is resized on its own processor");
    if (sectors == geometry_.sectors) {
        return;
    }
    log::warning("{}: resized from {} to {} sectors of {} bytes", identity_.name.view(), geometry_.sectors, sectors,
                 geometry_.sector_size);
    Geometry geometry = geometry_;
    geometry.sectors = sectors;
    renew(geometry);
}

void BlockDevice::renew(const Geometry& geometry) {
    geometry_ = geometry;
    for (u32 i = 1; i < lanes(); ++i) {
        lane(i).learn(geometry);
    }
}

namespace {
// A geometry without its size, in one word: sector sizes are at most 65536.
u64 packed(const Geometry& g) {
    return u64{g.sector_size} << 32 | u64{g.physical_sector_size} << 8 | u64{g.read_only} | u64{g.flush} << 1 |
           u64{g.discard} << 2 | u64{g.write_zeroes} << 3 | u64{g.secure_discard} << 4;
}
Geometry unpacked(u64 word) {
    return {.sectors = 0,
            .sector_size = static_cast<u32>(word >> 32),
            .physical_sector_size = static_cast<u32>(word >> 8 & 0xffffff),
            .read_only = (word & 1) != 0,
            .flush = (word & 2) != 0,
            .discard = (word & 4) != 0,
            .write_zeroes = (word & 8) != 0,
            .secure_discard = (word & 16) != 0};
}
} // namespace

// A post in progress is not posted again. Its handler clears `posted` before it reads the values, and both exchanges
// are acquire and release: either the handler sees the new values, or this sees that a new post is needed.
void BlockDevice::learn(const Geometry& geometry) {
    renewal_.sectors.store(geometry.sectors, std::memory_order_relaxed);
    renewal_.rest.store(packed(geometry), std::memory_order_relaxed);
    if (renewal_.posted.exchange(true, std::memory_order_acq_rel)) {
        return;
    }
    renewal_.lane = this;
    renewal_.run = [](Post& post) {
        auto& self = static_cast<Renewal&>(post);
        self.posted.exchange(false, std::memory_order_acq_rel);
        Geometry fresh = unpacked(self.rest.load(std::memory_order_relaxed));
        fresh.sectors = self.sectors.load(std::memory_order_relaxed);
        self.lane->geometry_ = fresh;
    };
    static_cast<void>(executor_.post(renewal_)); // refused: that processor has stopped, and its lane too
}

std::optional<Status> BlockDevice::refusal_of_change(const Request& request) const {
    if (geometry_.read_only) {
        return Status::read_only;
    }
    if ((request.op == Op::discard && !geometry_.discard) ||
        (request.op == Op::write_zeroes && !geometry_.write_zeroes) ||
        (request.op == Op::secure_discard && !geometry_.secure_discard)) {
        return Status::not_supported;
    }
    return std::nullopt;
}

void BlockDevice::submit_forwarded(BlockDevice& to, Request& request) { to.accept(request); }

} // namespace fl::io
