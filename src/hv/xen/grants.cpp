module hv.xen.grants;
import core.std;
import core.result;
import core.log;
import hv.xen.protocol;

namespace fl::hv::xen {

void Grants::install(std::span<GrantEntry> table, u32 frames, const GrantGrowth& growth) {
    frame_limit_ = std::min(static_cast<u32>(table.size() / grants_per_frame), max_frames);
    table_ = table.first(frame_limit_ * grants_per_frame);
    growth_ = growth;
    usable_ = free_count_ = 0;
    // Entries of the first frame are allocated first.
    frames_ = std::min(frames, frame_limit_);
    for (u32 frame = frames_; frame-- > 0;) {
        add_frame(frame);
    }
    if (growth_.map == nullptr) {
        frame_limit_ = frames_;
    }
}

void Grants::add_frame(u32 frame) {
    const u32 first = std::max(frame * grants_per_frame, grants_reserved);
    for (u32 ref = (frame + 1) * grants_per_frame; ref-- > first;) {
        if (std::atomic_ref<u16>(table_[ref].flags).load(std::memory_order_relaxed) == 0) {
            recycle(ref);
            ++usable_;
        }
    }
}

bool Grants::ensure(u32 count) {
    while (free_count_ < count && frames_ < frame_limit_) {
        if (auto grown = growth_.map(growth_.context, frames_); !grown) {
            log::warning("xen: the grant table cannot grow beyond {} of {} frames: {}", frames_, frame_limit_,
                         grown.error());
            frame_limit_ = frames_;
            break;
        }
        add_frame(frames_++);
    }
    return free_count_ >= count;
}

Result<GrantRef> Grants::take() {
    if (!ensure(1)) {
        return Error{Code::exhausted,
                     "the grant table is full: fewer disks, or a larger gnttab_max_frames for this guest (entries)", 1,
                     0};
    }
    return take_unchecked();
}

void GrantList::sweep() {
    for (u32 left = std::min(quarantined_, 64u); left != 0; --left) {
        next_sweep_ = next_sweep_ + 1 < quarantined_ ? next_sweep_ + 1 : 0;
        u16& place = refs_[room_ - 1 - next_sweep_];
        if (const GrantRef ref = place; end(ref)) {
            place = static_cast<u16>(take_quarantined());
            recycle(ref);
        }
    }
}

bool GrantShare::grow(u32 count) {
    table_ = from_.table_;
    count = std::min(count, capacity);
    if (size_ < count) {
        static_cast<void>(from_.ensure(count - size_));
    }
    for (; size_ < count && from_.available() != 0; ++size_) {
        recycle(from_.take_unchecked());
    }
    return size_ == count;
}

void GrantShare::give_back() {
    while (free_count_ != 0) {
        from_.recycle(take_unchecked());
    }
    while (quarantined_ != 0) {
        from_.quarantine(take_quarantined());
    }
    size_ = 0;
}

} // namespace fl::hv::xen
