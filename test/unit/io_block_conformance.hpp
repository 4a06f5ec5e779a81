// The conformance suite of io.block_queue's transports: what each of them must do at every point of a request's life.
// The cases are in io_block_conformance_test.cpp; a driver joins them with a Rig of its own:
//
//   INSTANTIATE_TEST_SUITE_P(Nvme, BlockConformance, testing::Values(Make{"nvme", [] { return …; }}), name_of);
//
// A rig is a disk on its fake device. The device does nothing by itself: it holds what it was given until a case
// answers it. Time passes only in turn() and jump(). Include after the imports.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

namespace fl::test {
/// Calls of operator new in the test program so far [io_bench_test.cpp].
u64 all_allocations();
} // namespace fl::test

namespace fl::test::conformance {

/// Allocations in a fake are not the kernel's: those within such a scope are not counted.
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

/// What a case must know of a transport.
struct Facts {
    u32 capacity = 1;               // commands of 4 KiB that the device has at once
    u32 part_bytes = 0;             // a larger request becomes several commands; 0: never
    bool holds = true;              // false: the device answers at once
    bool gathers = false;           // neighbours become one command, at the end of the turn
    bool copies = false;            // and these buffers are copied: each command has one request
    bool answers_after_all = false; // a silent device has answered, and only the event was lost
    bool retries = false;           // answer_again() has the command sent again
    bool stoppable = true;          // stop() is there
    bool ids = false;               // answers carry ids, which can be wrong
    bool events = true;             // event() is there
    bool medium = true;             // there is one
    Nanoseconds timeout = 0;        // that the queue was opened with
    u32 timeouts = 2;               // after so many of them a device that is silent has ended everything
    std::vector<io::Status> answers{io::Status::ok, io::Status::io_error}; // that the wire has
};

/// A command, or what a transport makes of it, that the device has.
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
    /// The calling thread is the lane's processor from here on.
    virtual void enter(u32 lane) { static_cast<void>(lane); }
    /// One turn of each executor; without work time passes up to a tick.
    virtual void turn() = 0;
    virtual Instant now() = 0; // machine time
    /// The machine stands still for so long.
    virtual void jump(Nanoseconds length) = 0;
    /// Memory that the device can reach.
    virtual DmaAllocator& memory() = 0;

    /// What the device has been told of and has not answered, in order of arrival.
    virtual std::vector<Held> held() = 0;
    /// Ends the command at `index` of held(). `ok` moves the data, as far as the device can reach it.
    virtual void answer(usize index, io::Status how) = 0;
    /// Answers it so that it is sent again.
    virtual void answer_again(usize index) { answer(index, io::Status::ok); }
    /// An answer that breaks a rule: an id that was never given (0), one that was answered before (1), and the id of
    /// the command at the head, twice (2).
    virtual void answer_wrongly(u32 kind) { static_cast<void>(kind); }
    virtual void event() {}
    /// Whether the device may access some of it, now or later.
    virtual bool reachable(DmaSpan span) = 0;
    /// Sectors as they are on the medium.
    virtual void read_medium(u64 lba, u32 count, std::byte* into) = 0;

    virtual void close(io::Status status) = 0;
    virtual void stop() {}
    /// The device forgets everything, and the queue is told so.
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
