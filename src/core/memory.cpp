module core.memory;
import core.std;
import core.result;
import core.panic;

namespace fl {

usize FrameAllocator::first_ending_after(u64 address) const {
    const auto* at = std::lower_bound(ranges_.data(), ranges_.data() + count_, address,
                                      [](const Range& r, u64 a) { return r.base + r.size <= a; });
    return static_cast<usize>(at - ranges_.data());
}

bool FrameAllocator::insert(usize at, Range range) {
    if (count_ == capacity) {
        return false;
    }
    for (usize i = count_++; i > at; --i) {
        ranges_[i] = ranges_[i - 1];
    }
    ranges_[at] = range;
    free_bytes_ += range.size;
    return true;
}

void FrameAllocator::remove(usize at) {
    free_bytes_ -= ranges_[at].size;
    --count_;
    for (usize i = at; i < count_; ++i) {
        ranges_[i] = ranges_[i + 1];
    }
}

void FrameAllocator::add(u64 base, u64 size) {
    const u64 last = size > ~u64{0} - base ? ~u64{0} : base + size;
    u64 begin = base < frame_size ? frame_size : base > ~u64{0} - frame_size ? ~u64{0} : align_up(base, frame_size);
    u64 end = align_down(last, frame_size);
    if (begin >= end) {
        return;
    }
    // Absorb the ranges that it touches: adjacent ones are merged, overlaps counted once.
    usize at = first_ending_after(begin - 1);
    while (at < count_ && ranges_[at].base <= end) {
        begin = std::min(begin, ranges_[at].base);
        end = std::max(end, ranges_[at].base + ranges_[at].size);
        remove(at);
    }
    if (!insert(at, {begin, end - begin})) {
        lost_bytes_ += end - begin;
    }
}

void FrameAllocator::reserve(u64 base, u64 size) {
    const u64 begin = align_down(base, frame_size);
    const u64 last = size > ~u64{0} - base ? ~u64{0} : base + size;
    const u64 end = last > ~u64{0} - frame_size ? last : align_up(last, frame_size);
    if (size == 0) {
        return;
    }
    usize at = first_ending_after(begin);
    while (at < count_ && ranges_[at].base < end) {
        const Range old = ranges_[at];
        remove(at);
        if (old.base < begin && !insert(at++, {old.base, begin - old.base})) {
            lost_bytes_ += begin - old.base;
        }
        if (old.base + old.size > end && !insert(at++, {end, old.base + old.size - end})) {
            lost_bytes_ += old.base + old.size - end;
        }
    }
}

Result<u64> FrameAllocator::allocate(const FrameRequest& request) {
    if (request.frames == 0 || request.frames > ~u64{0} / frame_size || !std::has_single_bit(request.alignment)) {
        return Error(Code::bad_argument, "frames: request at least one, aligned to a power of two");
    }
    const u64 size = request.frames * frame_size;
    const u64 alignment = std::max(request.alignment, frame_size);
    for (usize i = count_; i-- > 0;) {
        Range& range = ranges_[i];
        const u64 low = std::max(range.base, request.floor);
        const u64 end = std::min(range.base + range.size, request.limit);
        if (end < low || end - low < size) {
            continue;
        }
        const u64 base = align_down(end - size, alignment);
        if (base < low) {
            continue;
        }
        // Remove [base, base + size) from the middle.
        const u64 before = base - range.base;
        const u64 after = range.base + range.size - base - size;
        if (before != 0 && after != 0) {
            if (!insert(i + 1, {base + size, after})) {
                continue; // no room for another fragment: try a range that can be shortened at an end
            }
            ranges_[i].size = before;
            free_bytes_ -= after + size;
        } else if (before != 0 || after != 0) {
            range = before != 0 ? Range{range.base, before} : Range{base + size, after};
            free_bytes_ -= size;
        } else {
            remove(i);
        }
        return base;
    }
    return Error(Code::exhausted,
                 "physical memory: no free run of frames has the requested size (bytes); give the machine more memory",
                 size, free_bytes_);
}

void FrameAllocator::free(u64 base, u64 frames) {
    const u64 size = frames * frame_size;
    if (base % frame_size != 0 || base == 0 || frames == 0 || frames > (~u64{0} - base) / frame_size) {
        panic("frames: {} at {:#x} cannot be freed", frames, base);
    }
    const usize at = first_ending_after(base);
    if (at < count_ && ranges_[at].base < base + size) {
        panic("frames: {:#x} is freed twice", std::max(base, ranges_[at].base));
    }
    const bool joins_previous = at > 0 && ranges_[at - 1].base + ranges_[at - 1].size == base;
    const bool joins_next = at < count_ && ranges_[at].base == base + size;
    if (joins_previous) {
        ranges_[at - 1].size += size;
        free_bytes_ += size;
        if (joins_next) {
            const u64 after = ranges_[at].size;
            remove(at);
            ranges_[at - 1].size += after;
            free_bytes_ += after;
        }
    } else if (joins_next) {
        ranges_[at] = {base, ranges_[at].size + size};
        free_bytes_ += size;
    } else if (!insert(at, {base, size})) {
        lost_bytes_ += size;
    }
}

Result<u64> allocate_start_frame(FrameAllocator& from) {
    constexpr u64 reserved_begin = 0xa0 * frame_size;
    constexpr u64 reserved_end = 0xc0 * frame_size;
    for (const FrameRequest& place : {FrameRequest{.floor = frame_size, .limit = reserved_begin},
                                      {.floor = reserved_end, .limit = low_memory_end}}) {
        if (auto frame = from.allocate(place)) {
            return frame;
        }
    }
    return Error(Code::exhausted, "no free page below 1 MiB (but for 640 to 768 KiB), where further processors start");
}

} // namespace fl
