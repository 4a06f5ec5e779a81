// What reads and writes the images for a host that answers later (--io): one transfer after the other by preadv and
// pwritev, or many at once by io_uring. Both are used by the I/O thread only.
module;
#include <linux/io_uring.h>
#include <sys/uio.h>
export module vmm.media;
import host.std;
import core.result;
import host.transfers;
import vmm.kvm;

export namespace fl::vmm {

/// Each transfer is done within start().
class BlockingMedium final : public host::Medium {
  public:
    u64 now() override;
    void start(host::Transfer& transfer, bool sync, host::MediumEvents& events) override;
};

/// io_uring by its system calls: the library is not needed for three operations.
class UringMedium final : public host::Medium {
  public:
    /// Error{not_supported}: this system has no io_uring, or forbids it; Error{io}: it failed; the value is errno.
    static Result<std::unique_ptr<UringMedium>> create();
    ~UringMedium() override;
    u64 now() override;
    void start(host::Transfer& transfer, bool sync, host::MediumEvents& events) override;
    void submit() override;
    void wait(u64 deadline) override;
    /// Readable when something has ended.
    int descriptor() const { return ring_.number(); }

  private:
    struct Operation {
        host::Transfer* transfer = nullptr;
        host::MediumEvents* events = nullptr;
        bool sync = false;
        usize done = 0; // bytes
        std::vector<iovec> vectors;
    };
    /// A mapped part of the ring.
    struct Mapping {
        std::byte* data = nullptr;
        usize size = 0;
    };
    UringMedium() = default;
    void queue(Operation& operation);
    void enter(unsigned wanted, u64 nanoseconds);
    bool reap();
    u32& word(u32 offset) const { return *reinterpret_cast<u32*>(rings_.data + offset); }

    Descriptor ring_;
    io_uring_params parameters_{};
    Mapping rings_;
    Mapping entries_;
    u32 unsubmitted_ = 0;
    u32 with_system_ = 0;                         // submitted and not reaped
    std::deque<Operation*> overflow_;             // wait for an entry
    std::vector<std::unique_ptr<Operation>> all_; // owns them
    std::vector<Operation*> spare_;
};

} // namespace fl::vmm
