module drivers.xen_net.pages;
import core.std;
import core.result;
import core.dma;
import hv.xen.grants;

namespace fl::drivers::xen_net {

Pages::~Pages() { abandon(); }

void Pages::abandon() {
    for (DmaBuffer& chunk : chunks_) {
        chunk.abandon();
    }
    size_ = 0;
}

Result<void> Pages::open(u32 wanted, u32 least, hv::xen::Domain domain, bool read_only, DmaAllocator& dma) {
    for (; wanted >= least; wanted /= 2) {
        if (!grants_.ensure(wanted)) {
            continue;
        }
        const u32 count = std::max(wanted / chunk_pages, 1u);
        const u32 pages = std::min(wanted, chunk_pages);
        u32 done = 0;
        while (done < count) {
            auto memory = dma.buffer(pages * static_cast<u32>(page_size));
            if (!memory) {
                break;
            }
            chunks_[done++] = std::move(*memory);
        }
        if (done == count) {
            for (; size_ < wanted; ++size_) {
                refs_[size_] = grants_.take_unchecked();
                grants_.grant(refs_[size_], domain, span(size_).bus / page_size, read_only);
            }
            return {};
        }
        for (DmaBuffer& chunk : chunks_) {
            chunk.reset();
        }
    }
    return Error{Code::exhausted, "a network card needs more memory or grant entries than there are (pages)", least, 0};
}

void Pages::reclaim() {
    bool safe = true;
    for (u32 page = 0; page < size_; ++page) {
        safe = grants_.release(refs_[page]) && safe;
    }
    if (!safe) {
        abandon();
    }
    for (DmaBuffer& chunk : chunks_) {
        chunk.reset();
    }
    size_ = 0;
}

} // namespace fl::drivers::xen_net
