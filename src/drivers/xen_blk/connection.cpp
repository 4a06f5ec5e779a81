module;
#include "core/try.hpp"
module drivers.xen_blk.connection;
import core.std;
import core.result;
import core.dma;
import hv.xen.events;
import hv.xen.grants;
import drivers.xen_blk.pages;

namespace fl::drivers::xen_blk {

Result<void> Connection::make(u32 order, hv::xen::Domain domain, DmaAllocator& dma) {
    while (order != 0 && !grants_.ensure((1u << order) + Pages::spare_grants)) {
        --order;
    }
    auto memory = dma.buffer(static_cast<u32>(page_size) << order);
    while (!memory && order != 0) {
        memory = dma.buffer(static_cast<u32>(page_size) << --order);
    }
    if (!memory) {
        return memory.error();
    }
    ring_ = std::move(*memory);
    for (; pages_ < 1u << order; ++pages_) {
        TRY(refs_[pages_], grants_.take());
        grants_.grant(refs_[pages_], domain, ring_.bus() / page_size + pages_, false);
    }
    TRY(port_, events_.allocate_unbound(domain));
    return {};
}

void Connection::free() {
    close_port();
    bool safe = true;
    for (; pages_ != 0; --pages_) {
        safe = grants_.release(refs_[pages_ - 1]) && safe;
    }
    if (safe) {
        ring_.reset();
    } else {
        ring_.abandon();
    }
}

void Connection::abandon() {
    close_port();
    pages_ = 0;
    ring_.abandon();
}

} // namespace fl::drivers::xen_blk
