module;
#include <cerrno>
#include <ctime>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
module vmm.media;
import host.std;
import core.result;
import host.transfers;
import vmm.bus;
import vmm.kvm;

namespace fl::vmm {
namespace {

constexpr usize vectors_at_once = 1024; // IOV_MAX
constexpr u32 ring_entries = 256;
constexpr int again = 16; // EINTR and EAGAIN in a row, for one call

u64 clock_now() {
    timespec time{};
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<u64>(time.tv_sec) * 1'000'000'000 + static_cast<u64>(time.tv_nsec);
}

int file_of(const host::Transfer& transfer) { return static_cast<ImageStore&>(*transfer.store).file(); }

/// The transfer's pieces from byte `skip` on, as many as one call may have.
void vectors_of(const host::Transfer& transfer, usize skip, std::vector<iovec>& into) {
    into.clear();
    for (const auto& piece : transfer.pieces) {
        if (skip >= piece.size()) {
            skip -= piece.size();
            continue;
        }
        if (into.size() == vectors_at_once) {
            break;
        }
        into.push_back({piece.data() + skip, piece.size() - skip});
        skip = 0;
    }
}

usize bytes_of(const host::Transfer& transfer) {
    usize bytes = 0;
    for (const auto& piece : transfer.pieces) {
        bytes += piece.size();
    }
    return bytes;
}

/// A system call's result in either way of reporting it: how to go on.
enum class Next : u8 { over, failed, more, repeat };
Next after(long result, bool sync, usize& done, usize bytes) {
    if (result == -EINTR || result == -EAGAIN) {
        return Next::repeat;
    }
    if (result < 0 || (!sync && result == 0)) {
        return Next::failed;
    }
    done += sync ? 0 : static_cast<usize>(result);
    return sync || done >= bytes ? Next::over : Next::more;
}

} // namespace

u64 BlockingMedium::now() { return clock_now(); }

void BlockingMedium::start(host::Transfer& transfer, bool sync, host::MediumEvents& events) {
    static thread_local std::vector<iovec> vectors;
    const int file = file_of(transfer);
    const usize bytes = sync ? 0 : bytes_of(transfer);
    usize done = 0;
    for (int repeats = 0; repeats < again;) {
        long result = 0;
        if (sync) {
            result = fdatasync(file);
        } else {
            vectors_of(transfer, done, vectors);
            const auto count = static_cast<int>(vectors.size());
            const auto at = static_cast<off_t>(transfer.offset + done);
            result = transfer.kind == host::Transfer::Kind::write ? pwritev(file, vectors.data(), count, at)
                                                                  : preadv(file, vectors.data(), count, at);
        }
        switch (after(result < 0 ? -errno : result, sync, done, bytes)) {
        case Next::over: events.done(transfer, true); return;
        case Next::failed: events.done(transfer, false); return;
        case Next::more: repeats = 0; break;
        case Next::repeat: ++repeats; break;
        }
    }
    events.done(transfer, false);
}

// ---- io_uring ----

Result<std::unique_ptr<UringMedium>> UringMedium::create() {
    std::unique_ptr<UringMedium> medium{new UringMedium};
    io_uring_params& parameters = medium->parameters_;
    medium->ring_ = Descriptor{static_cast<int>(syscall(SYS_io_uring_setup, ring_entries, &parameters))};
    if (medium->ring_.number() < 0) {
        const bool absent = errno == ENOSYS || errno == EPERM; // not in this kernel, or kernel.io_uring_disabled
        return Error{absent ? Code::not_supported : Code::io,
                     "io_uring is not available here: io_uring_setup failed; the value is errno", 0,
                     static_cast<u64>(errno)};
    }
    constexpr u32 features = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;
    if ((parameters.features & features) != features) {
        return Error{Code::not_supported, "io_uring is too old here: Linux 5.11 was expected; the values are features",
                     features, parameters.features};
    }
    const auto map = [&](Mapping& into, usize size, off_t offset) {
        void* const at =
            mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, medium->ring_.number(), offset);
        if (at == MAP_FAILED) {
            return false;
        }
        into = {static_cast<std::byte*>(at), size};
        return true;
    };
    const usize sq_size = parameters.sq_off.array + parameters.sq_entries * sizeof(u32);
    const usize cq_size = parameters.cq_off.cqes + parameters.cq_entries * sizeof(io_uring_cqe);
    if (!map(medium->rings_, std::max(sq_size, cq_size), IORING_OFF_SQ_RING) ||
        !map(medium->entries_, parameters.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES)) {
        return Error{Code::exhausted, "io_uring's ring could not be mapped; the value is errno", 0,
                     static_cast<u64>(errno)};
    }
    for (u32 i = 0; i < parameters.sq_entries; ++i) {
        medium->word(parameters.sq_off.array + i * 4) = i; // entry n is always in place n
    }
    return medium;
}

UringMedium::~UringMedium() {
    for (const Mapping& mapping : {rings_, entries_}) {
        if (mapping.data != nullptr) {
            munmap(mapping.data, mapping.size);
        }
    }
}

u64 UringMedium::now() { return clock_now(); }

void UringMedium::start(host::Transfer& transfer, bool sync, host::MediumEvents& events) {
    if (spare_.empty()) {
        spare_.push_back(all_.emplace_back(std::make_unique<Operation>()).get());
    }
    Operation& operation = *spare_.back();
    spare_.pop_back();
    operation.transfer = &transfer;
    operation.events = &events;
    operation.sync = sync;
    operation.done = 0;
    queue(operation);
}

/// Puts the operation into the submission queue, or, if there is no entry, into the overflow; the system has never more
/// than the completion queue has room for.
void UringMedium::queue(Operation& operation) {
    if (unsubmitted_ == parameters_.sq_entries || with_system_ + unsubmitted_ >= parameters_.cq_entries) {
        overflow_.push_back(&operation);
        return;
    }
    u32& tail = word(parameters_.sq_off.tail); // only this thread writes it
    auto& entry = reinterpret_cast<io_uring_sqe*>(entries_.data)[tail % parameters_.sq_entries];
    entry = {};
    entry.fd = file_of(*operation.transfer);
    entry.user_data = reinterpret_cast<u64>(&operation);
    if (operation.sync) {
        entry.opcode = IORING_OP_FSYNC;
        entry.fsync_flags = IORING_FSYNC_DATASYNC;
    } else {
        const bool write = operation.transfer->kind == host::Transfer::Kind::write;
        vectors_of(*operation.transfer, operation.done, operation.vectors);
        entry.opcode = write ? IORING_OP_WRITEV : IORING_OP_READV;
        entry.off = operation.transfer->offset + operation.done;
        entry.addr = reinterpret_cast<u64>(operation.vectors.data());
        entry.len = static_cast<u32>(operation.vectors.size());
    }
    // Release: pairs with the kernel's acquire of the tail, after which it reads the entry.
    std::atomic_ref<u32>(tail).store(tail + 1, std::memory_order_release);
    ++unsubmitted_;
}

/// Passes entries to the system, and waits for `wanted` completions, at most so long.
void UringMedium::enter(unsigned wanted, u64 nanoseconds) {
    __kernel_timespec time{static_cast<long long>(nanoseconds / 1'000'000'000),
                           static_cast<long long>(nanoseconds % 1'000'000'000)};
    io_uring_getevents_arg argument{};
    argument.ts = reinterpret_cast<u64>(&time);
    const u32 flags = IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG;
    const long taken =
        syscall(SYS_io_uring_enter, ring_.number(), unsubmitted_, wanted, flags, &argument, sizeof(argument));
    if (taken > 0) {
        unsubmitted_ -= static_cast<u32>(taken);
        with_system_ += static_cast<u32>(taken);
    }
}

/// Reports what has ended. False: nothing has.
bool UringMedium::reap() {
    bool any = false;
    u32& head_word = word(parameters_.cq_off.head); // only this thread writes it
    for (;;) {
        // Acquire: pairs with the kernel's release of the tail; the entry and the data were written before it.
        const u32 tail = std::atomic_ref<u32>(word(parameters_.cq_off.tail)).load(std::memory_order_acquire);
        if (head_word == tail) {
            return any;
        }
        any = true;
        const auto* const entries = reinterpret_cast<const io_uring_cqe*>(rings_.data + parameters_.cq_off.cqes);
        const io_uring_cqe entry = entries[head_word % parameters_.cq_entries];
        // Release: the entry has been read. Pairs with the kernel's acquire before it writes there again.
        std::atomic_ref<u32>(head_word).store(head_word + 1, std::memory_order_release);
        --with_system_;
        Operation& operation = *reinterpret_cast<Operation*>(entry.user_data);
        const usize bytes = operation.sync ? 0 : bytes_of(*operation.transfer);
        const Next next = after(entry.res, operation.sync, operation.done, bytes);
        if (next == Next::more || next == Next::repeat) {
            queue(operation);
        } else {
            host::Transfer& transfer = *operation.transfer;
            spare_.push_back(&operation);
            operation.events->done(transfer, next == Next::over);
        }
        while (!overflow_.empty() && unsubmitted_ < parameters_.sq_entries &&
               with_system_ + unsubmitted_ < parameters_.cq_entries) {
            queue(*std::exchange(overflow_.front(), nullptr));
            overflow_.pop_front();
        }
    }
}

void UringMedium::submit() {
    // What is reaped may start more: a flush after its writes, the rest of a transfer. Each turn ends something.
    do {
        if (unsubmitted_ != 0) {
            enter(0, 0);
        }
    } while (reap() && unsubmitted_ != 0);
}

void UringMedium::wait(u64 deadline) {
    const u64 begin = clock_now();
    if (!reap() && deadline > begin && with_system_ + unsubmitted_ != 0) {
        enter(1, deadline - begin);
    }
    submit();
}

} // namespace fl::vmm
