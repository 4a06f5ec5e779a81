// The conformance suite for transports of io.block_queue: the required behaviour at every point of a request's life.
// The cases are in io_block_conformance_test.cpp; a driver joins with a Rig:
//
//   INSTANTIATE_TEST_SUITE_P(Nvme, BlockConformance, testing::Values(Make{"nvme", [] { return …; }}), name_of);
//
// A rig is a disk on its fake device. The device does nothing by itself: it holds its commands until a case completes
// them. Time passes only in turn() and jump(). Include after the imports.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

namespace fl::test {
/// Number of calls of operator new in the test program so far [io_bench_test.cpp].
u64 all_allocations();
} // namespace fl::test

namespace fl::test::conformance {

/// Allocations within such a scope belong to a fake and are not counted as the kernel's.
inline u64 fake_allocations = 0;
class InFake {
  public:
    InFake() = default;
    ~InFake() { fake_allocations += all_allocations() - before_; }
    InFake(const InFake&) = delete;
    InFake& operator=(const InFake&) = delete;

  private:
    u64 before_ = all_allocations();
};
inline u64 allocations() { return all_allocations() - fake_allocations; }

/// The properties of a transport that the cases depend on.
struct Facts {
    u32 capacity = 1;               // 4 KiB commands that the device can hold at once
    u32 part_bytes = 0;             // larger requests are split; 0: never
    bool holds = true;              // false: the device completes commands at once
    bool gathers = false;           // adjacent requests are merged into one command at the end of the turn
    bool copies = false;            // such buffers are bounced: each command has one request
    bool answers_after_all = false; // a silent device has completed the command, and only the event was lost
    bool retries = false;           // answer_again() makes the queue resend the command
    bool stoppable = true;          // stop() is supported
    bool ids = false;               // completions carry ids, which can be wrong
    bool events = true;             // event() is supported
    bool forwarded = false;         // the lane sends requests to another one's queue
    bool medium = true;             // there is a medium to compare with
    Nanoseconds timeout = 0;        // with which the queue was opened
    u32 timeouts = 2;               // number of time-outs after which a silent device has ended all requests
    std::vector<io::Status> answers{io::Status::ok, io::Status::io_error}; // statuses that the protocol can express
};

/// A command that the device holds, in the form the transport sent it.
struct Held {
    io::Op op = io::Op::read;
    u64 lba = 0;
    u32 bytes = 0;
};

class Rig {
  public:
    static constexpr u64 sectors = 8192; // of 512 bytes

    virtual ~Rig() = default;
    Facts facts;

    virtual u32 lanes() { return 1; }
    virtual io::BlockDevice& disk(u32 lane) = 0;
    /// From here on the calling thread acts as the lane's processor.
    virtual void enter(u32 lane) { static_cast<void>(lane); }
    /// One turn of each executor; without work, time advances by up to one tick.
    virtual void turn() = 0;
    /// A turn after which a completion has been taken and its waiter has not been resumed.
    virtual void drain() { turn(); }
    virtual Instant now() = 0; // machine time
    /// Stops the whole machine for this time.
    virtual void jump(Nanoseconds length) = 0;
    /// Memory that the device can access.
    virtual DmaAllocator& memory() = 0;

    /// Commands received and not completed, in order of arrival.
    virtual std::vector<Held> held() = 0;
    /// Completes the command at `index` of held(). `ok` transfers the data, as far as the device can access it.
    virtual void answer(usize index, io::Status how) = 0;
    /// Completes it with a status that makes the queue resend it.
    virtual void answer_again(usize index) { answer(index, io::Status::ok); }
    /// An invalid completion: an id that was never used (0), one already completed (1), or the oldest command's id
    /// twice (2).
    virtual void answer_wrongly(u32 kind) { static_cast<void>(kind); }
    virtual void event() {}
    /// Whether the device may access any part of it, now or later.
    virtual bool reachable(DmaSpan span) = 0;
    /// Reads sectors from the medium directly.
    virtual void read_medium(u64 lba, u32 count, std::byte* into) = 0;

    virtual void close(io::Status status) = 0;
    virtual void stop() {}
    /// The device forgets everything, and the queue is notified.
    virtual void reclaim() = 0;
    virtual bool is_open() = 0;
    virtual u32 under_way() = 0;
};

struct Make {
    std::string name;
    std::function<std::unique_ptr<Rig>()> make;
    friend void PrintTo(const Make& of, std::ostream* out) { *out << of.name; }
};
inline std::string name_of(const testing::TestParamInfo<Make>& info) { return info.param.name; }

class BlockConformance : public testing::TestWithParam<Make> {};

} // namespace fl::test::conformance
