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

void Grants::quarantine(GrantRef ref) {
    quarantine_[ref / 64] |= u64{1} << ref % 64;
    ++quarantined_;
}

void Grants::sweep() {
    if (quarantined_ == 0) [[likely]] {
        return;
    }
    for (u32 words = 0; words < 8; ++words) {
        const u32 word = next_sweep_;
        next_sweep_ = (next_sweep_ + 1) % (frames_ * (grants_per_frame / 64));
        for (u64 bits = quarantine_[word]; bits != 0; bits &= bits - 1) {
            const GrantRef ref = word * 64 + static_cast<u32>(std::countr_zero(bits));
            if (end(ref)) {
                quarantine_[word] &= ~(u64{1} << ref % 64);
                --quarantined_;
                recycle(ref);
            }
        }
    }
}

} // namespace fl::hv::xen
