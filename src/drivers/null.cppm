// A disk without a device: every request is completed at once, and reads leave their buffer unchanged. Like Linux's
// null_blk, it measures the kernel's own cost per I/O; it also shows the minimal driver: a transport, a disk, and
// attaching.
export module drivers.null;
import core.std;
import core.result;
import core.text;
import core.time;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
import drivers.driver;

export namespace fl::drivers::null {

class Disk;

class Transport : public io::TransportDefaults {
  public:
    using Disk = null::Disk;
    using Command = io::Command<Transport>;
    struct Wire {};
    static constexpr std::string_view driver = "null";
    static constexpr u32 max_commands = 256;

    void use(io::CommandTable<Transport>&) {}
    inline io::Fit prepare(Command&) { return io::Fit::ok; }
    inline io::SendResult send(Command&, u64 id) {
        ids_[sent_++ % max_commands] = id;
        return io::SendResult::sent;
    }
    inline io::Next next(io::Completion& completion) {
        if (taken_ == sent_) {
            return io::Next::none;
        }
        completion.id = ids_[taken_++ % max_commands];
        return io::Next::one;
    }
    inline bool finish(Command&, io::Status) { return true; }
    inline io::Fence fence(Command&) { return io::Fence::done; }
    io::Recovery recover(const Command&, io::OldestWait::Finding, std::string_view) { return {}; }

  private:
    std::array<u64, max_commands> ids_{};
    u32 sent_ = 0;
    u32 taken_ = 0;
};

class Disk final : public io::QueueDisk<Transport> {
  public:
    Disk(io::Executor& executor, u32 number, u64 sectors) : QueueDisk(executor, queue_), queue_(executor) {
        print(identity_.name, "null{}", number);
        identity_.driver = "null";
        identity_.kind = io::Kind::synthetic;
        identity_.model = FixedText<48>("no device");
        set_geometry({.sectors = sectors, .flush = true, .discard = true, .write_zeroes = true});
        queue_.add(*this);
        queue_.open(timeout());
    }
    io::BlockQueue<Transport>& queue() { return queue_; }

  private:
    io::BlockQueue<Transport> queue_;
};

/// Creates a 1 GiB disk that lives until machine shutdown, and announces it.
inline Result<void> attach(Environment& environment, u32 number) {
    auto* disk = new (std::nothrow) Disk(environment.executor, number, u64{1} << 21);
    if (disk == nullptr) {
        return Error{Code::exhausted, "no memory for a null disk"};
    }
    auto announced = environment.disks.announce(*disk, DiskSink::no_twin);
    if (!announced) {
        delete disk;
    }
    return announced;
}

} // namespace fl::drivers::null
