// The conformance suite for transports of io.block_queue: the required behaviour at every point of a request's life.
// A driver joins with its rigs:
//
//   CONFORM(Nvme, {Make{"msix", facts, [] { return …; }}});
//
// A rig is a disk on its fake device. The device does nothing by itself: it holds its commands until a case completes
// them. Time passes only in turn() and jump(). Each case runs on the rigs that can express it: its fixture decides by
// their Facts (block_conformance_cases.hpp). Include after the imports, which must include io.block_queue.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

namespace fl::test {
/// Number of calls of operator new in the test program so far [unit/io/bench_test.cpp].
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

/// A call of the transport that can find the device's side of the queue damaged.
enum class Fault : u8 { send, publish, next, release, arm, tick };
constexpr const char* fault_names[] = {"send", "publish", "next", "release", "arm", "tick"};

/// The properties of a transport that the cases depend on.
struct Facts {
    u32 lanes = 1;                  // queues of the disk, each on a processor of its own
    u32 capacity = 1;               // 4 KiB commands that the device can hold at once, for each lane
    u32 part_bytes = 0;             // larger reads and writes are split; 0: never
    u32 discard_bytes = 0;          // larger discards are split; 0: never
    u32 zeroes_bytes = 0;           // larger zeroed ranges are split; 0: never
    bool discards = false;          // discards are supported
    bool zeroes = false;            // write zeroes is supported
    bool secure_discards = false;   // secure discards are supported
    bool holds = true;              // false: the device completes commands at once
    bool gathers = false;           // adjacent requests are merged into one command at the end of the turn
    bool copies = false;            // such buffers are bounced: each command has one request
    bool answers_after_all = false; // a silent device has completed the command, and only the event was lost
    bool drains = false;            // a flush or discard is sent when the device has no other command, and then alone
    bool withdraws = false;         // after an error the device holds no commands: the others are resent
    bool retries = false;           // answer_again() makes the queue resend the command
    bool retries_flush = true;      // a flush as well
    bool resets = false;            // a silent device is reset, after which all commands are sent again
    bool stoppable = true;          // stop() is supported
    bool ids = false;               // completions carry ids, which can be wrong
    bool events = true;             // event() is supported
    bool forwarded = false;         // the lane sends requests to another one's queue
    bool medium = true;             // there is a medium to compare with
    bool elsewhere = false;         // close_elsewhere() is supported
    u32 exchanges = 0;              // commands reserved for exchanges, for each lane; 0: there are no exchanges
    std::vector<Fault> faults;      // that inject() can produce
    Nanoseconds timeout = 0;        // with which the queue was opened
    u32 timeouts = 2;               // number of time-outs after which a silent device has ended all requests
    std::vector<io::Status> answers{io::Status::ok, io::Status::io_error}; // statuses that the protocol can express
};

/// A command that the device holds, in the form the transport sent it.
struct Held {
    io::Op op = io::Op::read;
    u64 lba = 0;   // not of a flush
    u32 bytes = 0; // likewise
    u32 lane = 0;
};

/// How an injected fault must end.
struct Injected {
    std::string text; // part of the line that is logged
    io::Status status = io::Status::protocol_error;
};

class Rig {
  public:
    static constexpr u64 sectors = 8192; // of 512 bytes

    virtual ~Rig() = default;

    virtual io::BlockDevice& disk(u32 lane) = 0;
    /// From here on the calling thread acts as the lane's processor.
    virtual void enter(u32 lane) { static_cast<void>(lane); }
    /// One turn of each executor; without work, time advances by up to one tick for each. Afterwards the thread acts
    /// as the first lane's processor.
    virtual void turn() = 0;
    /// A turn after which a completion has been taken and its waiter has not been resumed.
    virtual void drain() { turn(); }
    virtual Instant now() = 0; // machine time of the first lane
    /// Stops the whole machine for this time.
    virtual void jump(Nanoseconds length) = 0;
    /// Memory that the device can access.
    virtual DmaAllocator& memory() = 0;

    /// Commands received and not completed: lane by lane, in order of arrival. Without exchanges.
    virtual std::vector<Held> held() = 0;
    /// Completes the command at `index` of held(). `ok` transfers the data, as far as the device can access it.
    virtual void answer(usize index, io::Status how) = 0;
    /// Completes it with a status that makes the queue resend it.
    virtual void answer_again(usize index) { answer(index, io::Status::ok); }
    /// Number of resets of the device so far.
    virtual u32 resets() { return 0; }
    /// An invalid completion: an id that was never used (0), one already completed (1), or the oldest command's id
    /// twice (2).
    virtual void answer_wrongly(u32 kind) { static_cast<void>(kind); }
    virtual void event(u32 lane) { static_cast<void>(lane); }
    /// Damages the lane, so that the next such call of the transport finds it.
    virtual Injected inject(u32 lane, Fault fault) {
        static_cast<void>(lane);
        static_cast<void>(fault);
        return {};
    }
    /// Whether the device may access any part of it, now or later.
    virtual bool reachable(DmaSpan span) = 0;
    /// Reads sectors from the medium directly.
    virtual void read_medium(u64 lba, u32 count, std::byte* into) = 0;

    // Exchanges; nullptr and none without Facts::exchanges.
    virtual io::QueueCore* queue(u32 lane) {
        static_cast<void>(lane);
        return nullptr;
    }
    virtual std::unique_ptr<io::Exchange> exchange(u32 lane) {
        static_cast<void>(lane);
        return nullptr;
    }
    /// Exchanges that the lane's device has received and not completed.
    virtual u32 held_exchanges(u32 lane) {
        static_cast<void>(lane);
        return 0;
    }
    /// Completes the oldest one.
    virtual void answer_exchange(u32 lane) { static_cast<void>(lane); }

    // The rest is called on the lane's processor: enter() first.
    virtual void close(u32 lane, io::Status status) = 0;
    /// As another queue of the device, which is none of the rig's lanes, closes the device.
    virtual void close_elsewhere(io::Status status) { static_cast<void>(status); }
    virtual void stop(u32 lane) { static_cast<void>(lane); }
    /// The lane's device forgets everything, and the queue is notified.
    virtual void reclaim(u32 lane) = 0;
    virtual bool is_open(u32 lane) = 0;
    virtual u32 in_flight(u32 lane) = 0;
};

struct Make {
    std::string name;
    Facts facts;
    std::function<std::unique_ptr<Rig>()> make;
    friend void PrintTo(const Make* of, std::ostream* out) { *out << of->name; }
};

/// Registers a driver's rigs: they take part in every case that they can express. Their names get the driver's as a
/// prefix.
class Registration {
  public:
    Registration(const char* driver, std::vector<Make> rigs);
};

/// The same rigs, each with one lane, behind a lane that has no queue of its own [io.shared_lane]: the same behaviour
/// is required of it. Without the cases for what only a queue has: exchanges, and the ways in which the queue itself
/// can be closed.
std::vector<Make> shared(const std::vector<Make>& all);

} // namespace fl::test::conformance

/// Registers a driver's rigs (a std::vector<Make>). In namespace fl::test::conformance.
#define CONFORM(driver, ...) static const Registration registered_##driver(#driver, __VA_ARGS__)
