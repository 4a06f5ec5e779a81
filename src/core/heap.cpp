module core.heap;
import core.std;
import core.panic;

namespace fl {

void Heap::add(std::span<std::byte> memory) {
    const usize begin = align_up(reinterpret_cast<usize>(memory.data()), granule);
    const usize end = align_down(reinterpret_cast<usize>(memory.data()) + memory.size(), granule);
    if (end > begin) {
        free_run(reinterpret_cast<std::byte*>(begin), end - begin);
    }
}

std::byte* Heap::allocate_run(usize size) {
    for (Run** at = &runs_; *at != nullptr; at = &(*at)->next) {
        Run* run = *at;
        if (run->size < size) {
            continue;
        }
        if (run->size == size) {
            *at = run->next;
        } else {
            *at = new (reinterpret_cast<std::byte*>(run) + size) Run{run->size - size, run->next};
        }
        return reinterpret_cast<std::byte*>(run);
    }
    return nullptr;
}

void Heap::free_run(std::byte* memory, usize size) {
    Run* before = nullptr;
    Run* after = runs_;
    while (after != nullptr && reinterpret_cast<std::byte*>(after) < memory) {
        before = after;
        after = after->next;
    }
    Run* run = new (memory) Run{size, after};
    if (before == nullptr) {
        runs_ = run;
    } else if (reinterpret_cast<std::byte*>(before) + before->size == memory) {
        before->size += size;
        run = before;
    } else {
        before->next = run;
    }
    if (after != nullptr && reinterpret_cast<std::byte*>(run) + run->size == reinterpret_cast<std::byte*>(after)) {
        run->size += after->size;
        run->next = after->next;
    } else {
        run->next = after;
    }
}

std::byte* Heap::allocate_class(usize index) {
    if (free_[index] == nullptr) {
        std::byte* fresh = allocate_run(slab);
        if (fresh == nullptr) {
            return nullptr;
        }
        usize at = 0;
        for (; at + classes[index] <= slab; at += classes[index]) {
            free_[index] = new (fresh + at) Free{free_[index]};
        }
        if (at < slab) {
            free_run(fresh + at, slab - at);
        }
    }
    Free* block = std::exchange(free_[index], free_[index]->next);
    return reinterpret_cast<std::byte*>(block);
}

void* Heap::allocate(usize size, usize alignment) {
    if (size > (~usize{0} >> 2) || alignment > (usize{1} << 19) || !std::has_single_bit(alignment)) {
        return nullptr;
    }
    alignment = std::max(alignment, granule);
    const usize need = align_up(granule + (alignment - granule) + size, granule);
    usize index = 0;
    while (index < classes.size() && classes[index] < need) {
        ++index;
    }
    const bool small = index < classes.size();
    std::byte* memory = small ? allocate_class(index) : allocate_run(need);
    if (memory == nullptr) {
        return nullptr;
    }
    const usize block = align_up(reinterpret_cast<usize>(memory) + granule, alignment);
    std::byte* header = reinterpret_cast<std::byte*>(block) - granule;
    new (header) Header{alive, small ? static_cast<u16>(index) : large,
                        static_cast<u16>(static_cast<usize>(header - memory) / granule), small ? classes[index] : need};
    ++allocations_;
    ++in_use_;
    return reinterpret_cast<void*>(block);
}

void Heap::free(void* block) {
    if (block == nullptr) {
        return;
    }
    std::byte* at = static_cast<std::byte*>(block) - granule;
    Header* header = reinterpret_cast<Header*>(at);
    if (header->magic != alive) {
        panic("heap: {:#x} is {}", reinterpret_cast<u64>(block),
              header->magic == dead ? "freed twice" : "not one of its blocks, or its header is overwritten");
    }
    const Header copy = *header;
    header->magic = dead;
    std::byte* memory = at - usize{copy.back} * granule;
    if (copy.size_class == large) {
        free_run(memory, copy.size);
    } else {
        free_[copy.size_class] = new (memory) Free{free_[copy.size_class]};
    }
    --in_use_;
}

usize Heap::free_bytes() const {
    usize sum = 0;
    for (const Run* run = runs_; run != nullptr; run = run->next) {
        sum += run->size;
    }
    return sum;
}

} // namespace fl
