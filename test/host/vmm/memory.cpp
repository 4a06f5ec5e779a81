module;
#include <cerrno>
#include <sys/mman.h>
module vmm.memory;
import core.std;
import core.result;

namespace fl::vmm {

Result<GuestMemory> GuestMemory::create(u64 size) {
    if (size % page_size != 0 || size < (u64{1} << 20) || size > max_size) {
        return Error{Code::bad_argument, "guest memory of 1 MiB to 3 GiB in whole pages was expected", max_size, size};
    }
    void* const found = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) {
        return Error{Code::exhausted, "mmap of the guest's memory failed; the values are its size and errno", size,
                     static_cast<u64>(errno)};
    }
    GuestMemory memory;
    memory.bytes_ = {static_cast<std::byte*>(found), size};
    return memory;
}

GuestMemory::~GuestMemory() {
    if (!bytes_.empty()) {
        munmap(bytes_.data(), bytes_.size());
    }
}

} // namespace fl::vmm
