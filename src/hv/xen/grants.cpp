module hv.xen.grants;
import core.std;
import core.result;
import hv.xen.protocol;

namespace fl::hv::xen {

void Grants::install(std::span<GrantEntry> table) {
    table_ = table.first(std::min<usize>(table.size(), capacity));
    free_count_ = 0;
    for (u32 ref = static_cast<u32>(table_.size()); ref-- > grants_reserved;) {
        if (std::atomic_ref<u16>(table_[ref].flags).load(std::memory_order_relaxed) == 0) {
            free_[free_count_++] = ref;
        }
    }
}

Result<GrantRef> Grants::take() {
    if (free_count_ == 0) {
        return Error{Code::exhausted, "the grant table is full: fewer disks, or a larger gnttab_max_frames for this guest"};
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
        next_sweep_ = (next_sweep_ + 1) % static_cast<u32>(quarantine_.size());
        for (u64 bits = quarantine_[word]; bits != 0; bits &= bits - 1) {
            const GrantRef ref = word * 64 + static_cast<u32>(std::countr_zero(bits));
            if (end(ref)) {
                quarantine_[word] &= ~(u64{1} << ref % 64);
                --quarantined_;
                give(ref);
            }
        }
    }
}

} // namespace fl::hv::xen
