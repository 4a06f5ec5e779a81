module drivers.xen_blk.pages;
import core.std;
import core.result;
import core.dma;
import core.dma_mapper;
import hv.xen.grants;
import drivers.xen_blk.protocol;

namespace fl::drivers::xen_blk {

Pages::~Pages() { abandon(); }

void Pages::abandon() {
    pool_.abandon();
    indirect_memory_.abandon();
}

bool Pages::start_pool(hv::xen::Domain domain, DmaAllocator& pool) {
    domain_ = domain;
    // At most an eighth of the remaining grants for each disk: with many disks the pools get smaller, and finally
    // there are none.
    return keep_spare(pool) && grants_.obtainable() / 8 >= pool_chunk && add_pool_pages(pool);
}

bool Pages::start_share() { return first_ || share_.grow(least_share); }

Result<void> Pages::open(const PageTerms& terms, u32 sector_size, u32 requests, DmaAllocator& pool) {
    domain_ = terms.domain;
    persistent_ = terms.persistent;
    indirect_segments_ = std::min(terms.indirect_segments, max_segments);
    unit_shift_ = static_cast<u32>(std::countr_zero(terms.wire_unit));
    misalignment_ = persistent_ ? 0 : sector_size - 1; // bounce pages are aligned
    if (!persistent_) {
        close_pool();
        if (!first_) { // an equal part of what a disk may have, for each queue
            static_cast<void>(share_.grow(
                std::clamp(grants_.obtainable() / 4 / terms.queues, least_share, requests * segments_in_slot)));
        }
    } else if (pool_.size() >= max_segments) {
        // As many pages as the ring can use, or fewer if grants or memory are short.
        share_.give_back();
        const u32 wanted = std::min(
            {requests * segments_in_slot, max_pool_pages / terms.queues, grants_.obtainable() / 8 / terms.queues});
        while (pool_.size() + pool_chunk <= wanted && add_pool_pages(pool)) {
        }
    } else {
        return Error{Code::bad_argument, "persistent grants were negotiated and there are no pages for them",
                     max_segments, pool_.size()};
    }
    if (indirect_segments_ > segments_in_slot) {
        open_indirect(requests, terms.queues, pool);
    }
    spare_memory_.reset();
    return {};
}

bool Pages::keep_spare(DmaAllocator& pool) {
    if (!spare_memory_) {
        if (auto memory = pool.buffer(spare_bytes)) {
            spare_memory_ = std::move(*memory);
        }
    }
    return static_cast<bool>(spare_memory_);
}

// Adds one chunk of permanently granted pages, or nothing. Granted for reading and writing, because later requests
// may use them in either direction [xen-blkif note 8].
bool Pages::add_pool_pages(DmaAllocator& pool) {
    if (!grants_.ensure(pool_chunk + spare_grants)) {
        return false;
    }
    auto pages = pool.buffer(pool_.chunk_bytes);
    if (!pages) {
        return false;
    }
    u32 page = pool_.size();
    pool_.add(std::move(*pages));
    for (; page < pool_.size(); ++page) {
        const Grant grant = grants_.take_unchecked();
        grants_.grant(grant, domain_, pool_.span(page).bus / page_size, false);
        pool_grants_[page] = grant;
    }
    return true;
}

// Only before the back end has seen these grants.
void Pages::close_pool() {
    for (u32 page = pool_.size(); page-- != 0;) {
        static_cast<void>(grants_.release(pool_grants_[page]));
    }
    pool_.clear();
}

void Pages::open_indirect(u32 requests, u32 queues, DmaAllocator& pool) {
    const u32 wanted = std::min({requests, max_indirect_pages / queues, grants_.obtainable() / 32 / queues});
    if (!keep_spare(pool) || wanted == 0 || !grants_.ensure(wanted + spare_grants)) {
        return; // without indirect pages a command has 11 segments
    }
    auto memory = pool.buffer(wanted * static_cast<u32>(page_size));
    if (!memory) {
        return;
    }
    indirect_memory_ = std::move(*memory);
    indirect_data_ = indirect_memory_.data();
    for (; indirect_size_ < wanted; ++indirect_size_) {
        const Grant grant = grants_.take_unchecked();
        // The back end only reads them, but with persistent grants it maps every page writable, including these.
        grants_.grant(grant, domain_, indirect_memory_.bus() / page_size + indirect_size_, !persistent_);
        indirect_grants_[indirect_size_] = grant;
        indirect_free_[indirect_free_count_++] = static_cast<u16>(indirect_size_);
    }
}

bool Pages::end_access(const CommandPages& pages) {
    bool safe = true;
    for (u32 i = 0; i < pages.segments; ++i) {
        safe = list_.end(pages.refs[i]) && safe;
    }
    return safe;
}

void Pages::tick(bool waiting) {
    list_.sweep();
    if (first_ && waiting && !persistent_) { // a pool has its own entries
        static_cast<void>(grants_.ensure(spare_grants));
    }
}

void Pages::reclaim() {
    bool safe = true;
    for (u32 page = 0; page < pool_.size(); ++page) {
        safe = grants_.release(pool_grants_[page]) && safe;
    }
    for (u32 i = 0; i < indirect_size_; ++i) {
        safe = grants_.release(indirect_grants_[i]) && safe;
    }
    if (safe) {
        pool_.clear();
        indirect_memory_.reset();
    } else {
        abandon();
    }
    indirect_size_ = indirect_free_count_ = 0;
    share_.give_back();
    spare_memory_.reset();
}

} // namespace fl::drivers::xen_blk
