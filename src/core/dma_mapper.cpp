module core.dma_mapper;
import core.std;
import core.dma;
import core.panic;
import core.result;

namespace fl {

/// Builds the segments of a mapping.
class SegmentList {
  public:
    SegmentList(DmaMapping& mapping, const DmaLimits& limits)
        : mapping_(mapping), boundary_(limits.boundary),
          max_segments_(static_cast<u32>(std::min<usize>(limits.max_segments, mapping.room_.size()))),
          // keeps the segment that follows a full one aligned
          max_segment_(limits.max_segment - limits.max_segment % limits.alignment) {}

    /// Appends as many bytes of the range as fit; returns their number.
    u32 add(u64 bus, u32 size) {
        size = std::min(size, ~u32{0} - mapping_.bytes_);
        u32 taken = 0;
        while (taken != size) {
            const u64 at = bus + taken;
            DmaSegment* last = mapping_.count_ == 0 ? nullptr : &mapping_.room_[mapping_.count_ - 1];
            if (last != nullptr && (last->bus + last->size != at || last->size == max_segment_ ||
                                    (boundary_ != 0 && at % boundary_ == 0))) {
                last = nullptr;
            }
            if (last == nullptr && mapping_.count_ == max_segments_) {
                break;
            }
            u64 space = last == nullptr ? max_segment_ : max_segment_ - last->size;
            if (boundary_ != 0) {
                space = std::min(space, boundary_ - at % boundary_);
            }
            const u32 piece = static_cast<u32>(std::min<u64>(size - taken, space));
            if (last != nullptr) {
                last->size += piece;
            } else {
                mapping_.room_[mapping_.count_++] = {at, piece};
            }
            taken += piece;
        }
        mapping_.bytes_ += taken;
        return taken;
    }

    void cut(u32 bytes) {
        while (mapping_.bytes_ > bytes) {
            DmaSegment& last = mapping_.room_[mapping_.count_ - 1];
            const u32 less = std::min(last.size, mapping_.bytes_ - bytes);
            last.size -= less;
            mapping_.bytes_ -= less;
            mapping_.count_ -= last.size == 0 ? 1 : 0;
        }
    }

  private:
    DmaMapping& mapping_;
    u64 boundary_;
    u32 max_segments_;
    u32 max_segment_;
};

namespace {

bool are_sound(const DmaLimits& limits) {
    return std::has_single_bit(limits.alignment) && limits.alignment <= page_size &&
           limits.alignment <= limits.max_segment && limits.granule != 0 &&
           (limits.boundary == 0 || (std::has_single_bit(limits.boundary) && limits.alignment <= limits.boundary));
}
Error invalid_limits() {
    return {Code::bad_argument, "DMA mapping: the device's limits contradict each other (its driver is wrong)"};
}
Error no_segments(const DmaLimits& limits, u32 wanted) {
    return {Code::bad_argument,
            "DMA mapping: one sector does not fit into the segments that the device takes: use a buffer in one piece",
            limits.max_segments, wanted};
}

void begin(bool active) {
    if (active) {
        panic("a DMA mapping is begun while it is active");
    }
}
void end(bool active) {
    if (!active) {
        panic("a DMA mapping is ended twice");
    }
}

} // namespace

// ---- identity ----

Result<u32> IdentityMapper::map(std::span<const DmaSpan> spans, DmaDirection direction, const DmaLimits& limits,
                                DmaMapping& mapping) {
    begin(mapping.active_);
    if (!are_sound(limits)) {
        return invalid_limits();
    }
    mapping.count_ = mapping.bytes_ = 0;
    mapping.direction_ = direction;
    SegmentList list(mapping, limits);
    u64 wanted = 0;
    for (const DmaSpan& span : spans) {
        if (!limits.admits(span)) {
            return Error(Code::not_supported,
                         "DMA mapping: the device cannot address this memory, and bouncing is not enabled",
                         limits.highest, span.bus);
        }
        wanted += span.size;
        if (list.add(span.bus, span.size) != span.size) {
            break;
        }
    }
    if (mapping.bytes_ < wanted) {
        list.cut(mapping.bytes_ - mapping.bytes_ % limits.granule);
        if (mapping.bytes_ == 0) {
            return no_segments(limits, limits.granule);
        }
    }
    mapping.active_ = true;
    return mapping.bytes_;
}

void IdentityMapper::unmap(DmaMapping& mapping, std::span<const DmaSpan>) {
    end(mapping.active_);
    mapping.active_ = false;
}

void IdentityMapper::abandon(DmaMapping& mapping) { unmap(mapping, {}); } // the owner of the buffer quarantines it

// ---- bounce ----

BounceMapper::~BounceMapper() {
    if (in_use_ != 0) { // mappings that were never ended
        for (u32 i = 0; i < pool_.size(); ++i) {
            quarantine(pool_.span(i), this);
        }
    }
    keep_quarantine(this);
}

// Makes at least one page available.
Result<void> BounceMapper::make_room(const DmaLimits& limits) {
    if (held_ != DmaMapping::no_page) {
        u16 page = std::exchange(held_, DmaMapping::no_page);
        while (page != DmaMapping::no_page) {
            const u16 next = uses_[page].next;
            free_page(page);
            page = next;
        }
    }
    if (pool_.available() != 0) {
        return {};
    }
    if (pool_.size() + chunk_pages <= max_pages_) {
        // A chunk ends at or before the last address that the device can reach.
        auto memory = from_.buffer(pool_.chunk_bytes, limits.highest == ~u64{0} ? limits.highest : limits.highest + 1);
        if (memory) {
            pool_.add(std::move(*memory));
            return {};
        }
        if (pool_.size() == 0) {
            return memory.error();
        }
    }
    if (pool_.size() == 0) {
        return Error(Code::exhausted, "DMA mapping: the pool is smaller than 64 KiB");
    }
    return Error(Code::busy, "DMA mapping: all bounce pages are in use", pool_.size(), 0);
}

// Takes a page from a mapping or from the quarantine list, and puts it into the pool or (back) into that list.
void BounceMapper::free_page(u16 page) {
    if (is_quarantined(pool_.span(page))) {
        uses_[page].next = held_;
        held_ = page;
    } else {
        pool_.recycle(page);
    }
}

Result<u32> BounceMapper::map(std::span<const DmaSpan> spans, DmaDirection direction, const DmaLimits& limits,
                              DmaMapping& mapping) {
    begin(mapping.active_);
    if (!are_sound(limits)) {
        return invalid_limits();
    }
    mapping.count_ = mapping.bytes_ = 0;
    mapping.first_page_ = mapping.last_page_ = DmaMapping::no_page;
    mapping.direction_ = direction;
    SegmentList list(mapping, limits);
    std::optional<Error> why;
    const auto add = [&](DmaSpan span) {
        if (limits.admits(span)) {
            return list.add(span.bus, span.size) == span.size;
        }
        for (u32 done = 0; done != span.size;) {
            if (pool_.available() == 0) {
                if (auto room = make_room(limits); !room) {
                    why = room.error();
                    return false;
                }
            }
            const u16 page = pool_.take();
            const u32 size = std::min(span.size - done, static_cast<u32>(page_size));
            const u32 offset = mapping.bytes_;
            const u32 added = list.add(pool_.span(page).bus, size);
            if (added == 0) {
                pool_.recycle(page);
                return false;
            }
            uses_[page] = {offset, added, DmaMapping::no_page};
            if (mapping.bounced()) {
                uses_[mapping.last_page_].next = page;
            } else {
                mapping.first_page_ = page;
            }
            mapping.last_page_ = page;
            ++in_use_;
            if (direction != DmaDirection::from_device) {
                std::memcpy(pool_.data(page), span.data + done, added);
            }
            done += added;
            if (added != size) {
                return false;
            }
        }
        return true;
    };
    mapping.active_ = true;
    for (const DmaSpan& span : spans) {
        if (!add(span)) {
            list.cut(mapping.bytes_ - mapping.bytes_ % limits.granule);
            if (mapping.bytes_ == 0) {
                unmap(mapping, {});
                return why ? *why : no_segments(limits, limits.granule);
            }
            break;
        }
    }
    return mapping.bytes_;
}

void BounceMapper::unmap(DmaMapping& mapping, std::span<const DmaSpan> spans) {
    end(mapping.active_);
    mapping.active_ = false;
    u32 begin = 0; // offset of `spans`' front in the mapped bytes
    for (u16 page = std::exchange(mapping.first_page_, DmaMapping::no_page); page != DmaMapping::no_page;) {
        const Use use = uses_[page];
        while (!spans.empty() && use.offset >= begin + spans.front().size) {
            begin += spans.front().size;
            spans = spans.subspan(1);
        }
        // Bytes past the end of a shortened mapping are not copied.
        const u32 size = use.offset >= mapping.bytes_ ? 0 : std::min(use.size, mapping.bytes_ - use.offset);
        if (!spans.empty() && size != 0 && mapping.direction_ != DmaDirection::to_device) {
            std::memcpy(spans.front().data + (use.offset - begin), pool_.data(page), size);
        }
        --in_use_;
        free_page(page);
        page = use.next;
    }
}

void BounceMapper::abandon(DmaMapping& mapping) {
    for (u16 page = mapping.first_page_; page != DmaMapping::no_page; page = uses_[page].next) {
        quarantine(pool_.span(page), this);
    }
    unmap(mapping, {});
}

void BounceMapper::reclaim() { release_quarantine(this); } // make_room() collects the pages when they are needed

} // namespace fl
