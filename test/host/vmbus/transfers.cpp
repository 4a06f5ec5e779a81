module host.transfers;
import host.std;

namespace fl::host {

bool Transfers::writes_before(const Transfer& flush) const {
    return std::ranges::any_of(running_, [&](const Transfer* other) {
        return other->kind == Transfer::Kind::write && other->store == flush.store && other->number < flush.number;
    });
}

void Transfers::start(Transfer& transfer) {
    transfer.number = ++next_;
    transfer.syncing = false;
    const bool flush = transfer.kind == Transfer::Kind::flush;
    if (flush && writes_before(transfer)) {
        ++waited_;
        waiting_.push_back(&transfer);
        return;
    }
    running_.push_back(&transfer);
    medium_.start(transfer, flush, *this);
}

void Transfers::done(Transfer& transfer, bool good) {
    if (transfer.kind == Transfer::Kind::write && transfer.durable && good && !transfer.syncing) {
        transfer.syncing = true;
        medium_.start(transfer, true, *this);
        return;
    }
    const bool write = transfer.kind == Transfer::Kind::write;
    std::erase(running_, &transfer);
    transfer.good = good;
    transfer.ended(transfer);
    while (write) {
        const auto ready = std::ranges::find_if(waiting_, [&](const Transfer* one) { return !writes_before(*one); });
        if (ready == waiting_.end()) {
            break;
        }
        Transfer& flush = **ready;
        waiting_.erase(ready);
        running_.push_back(&flush);
        medium_.start(flush, true, *this);
    }
}

bool Transfers::drain(const std::function<bool(const Transfer&)>& which, u64 limit) {
    const auto wanted = [&](const Transfer* one) { return which(*one); };
    const auto left = [&] { return std::ranges::any_of(running_, wanted) || std::ranges::any_of(waiting_, wanted); };
    if (!left()) {
        return true;
    }
    const u64 end = medium_.now() + limit;
    for (medium_.submit(); left(); medium_.wait(end)) {
        if (medium_.now() >= end) {
            return false;
        }
    }
    return true;
}

} // namespace fl::host
