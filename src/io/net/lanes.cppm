// Takes the frames of another lane of a device to the processor of an interface: copied into slots, of which a post on
// that processor takes all that are filled. For devices with several queues: the host chooses the lane of a frame.
export module io.net.lanes;
import core.std;
import io.executor;
import io.net;

export namespace fl::io::net {

class LaneForwarder final : public FrameReceiver {
  public:
    /// Memory for the frames of a lane: 64 of 1514 bytes, at least one of any length.
    static constexpr usize bytes = 128 * 1024;

    /// Frames go to home.receive() on the processor of `executor`. nullptr: no memory.
    static std::unique_ptr<LaneForwarder> create(FrameReceiver& home, Executor& executor, NetDevice& lane) {
        return std::unique_ptr<LaneForwarder>(new (std::nothrow) LaneForwarder(home, executor, lane));
    }

    /// On the lane's processor.
    void receive(NetDevice&, std::span<const std::byte> frame, Checksum checksum) override {
        const u32 tail = tail_.load(std::memory_order_relaxed); // written only here
        // Acquire: pairs with the release in fetch(), so that a slot is not overwritten while it is read.
        if (tail - head_.load(std::memory_order_acquire) == slots_ || frame.size() > slot_bytes_) {
            dropped_.fetch_add(1, std::memory_order_relaxed); // a statistic
            return;
        }
        const u32 slot = tail % slots_;
        std::ranges::copy(frame, memory_.data() + usize{slot} * slot_bytes_);
        frames_[slot] = {static_cast<u32>(frame.size()), checksum};
        tail_.store(tail + 1, std::memory_order_release); // pairs with the acquire in fetch(): the slot is filled
        // An exchange with acquire and release: it reads the latest exchange in fetch(), whose load of tail_ comes
        // after, or finds the post under way, whose load of tail_ then sees the store above.
        if (!posted_.exchange(true, std::memory_order_acq_rel)) {
            static_cast<void>(executor_.post(step_)); // false: nobody receives any more
        }
    }
    /// On the interface's processor: frames that are still to come are dropped. The forwarder lives on for ever,
    /// because the lane's processor may be writing to it.
    static void give_up(std::unique_ptr<LaneForwarder> forwarder) {
        forwarder->home_ = nullptr;
        LaneForwarder* const given_up = forwarder.release();
        given_up->next_given_up_ = given_up_.load(std::memory_order_relaxed); // read only by leak checkers
        while (!given_up_.compare_exchange_weak(given_up->next_given_up_, given_up, std::memory_order_relaxed)) {
        }
    }
    /// On the interface's processor, when the lane has another receiver: nothing of this is under way any more.
    void withdraw() { static_cast<void>(executor_.withdraw(step_)); }
    u64 dropped() const { return dropped_.load(std::memory_order_relaxed); }

  private:
    static constexpr u32 max_slots = 64;
    struct Step : Post {
        LaneForwarder* forwarder = nullptr;
    };
    struct Frame {
        u32 size = 0;
        Checksum checksum = Checksum::unknown;
    };
    LaneForwarder(FrameReceiver& home, Executor& executor, NetDevice& lane)
        : home_(&home), executor_(executor), lane_(lane), slot_bytes_(std::min<u32>(lane.max_frame(), bytes)),
          slots_(static_cast<u32>(std::bit_floor(std::min<usize>(bytes / slot_bytes_, max_slots)))) {
        step_.forwarder = this;
        step_.run = [](Post& post) { static_cast<Step&>(post).forwarder->fetch(); };
    }
    void fetch() {
        posted_.exchange(false, std::memory_order_acq_rel); // before tail_ is read: a later frame posts again
        const u32 tail = tail_.load(std::memory_order_acquire);
        for (u32 head = head_.load(std::memory_order_relaxed); head != tail; ++head) {
            const u32 slot = head % slots_;
            if (home_ != nullptr) {
                home_->receive(lane_, {memory_.data() + usize{slot} * slot_bytes_, frames_[slot].size},
                               frames_[slot].checksum);
            }
            head_.store(head + 1, std::memory_order_release); // pairs with the acquire in receive()
        }
    }

    static constinit inline std::atomic<LaneForwarder*> given_up_{nullptr};
    LaneForwarder* next_given_up_ = nullptr;
    FrameReceiver* home_; // read and written on the interface's processor
    Executor& executor_;
    NetDevice& lane_;
    Step step_;
    const u32 slot_bytes_;
    const u32 slots_; // a power of two
    std::array<Frame, max_slots> frames_{};
    std::array<std::byte, bytes> memory_; // slots_ times slot_bytes_
    std::atomic<u32> head_{0};            // frames taken, modulo 2^32
    std::atomic<u32> tail_{0};            // frames filled
    std::atomic<bool> posted_{false};
    std::atomic<u64> dropped_{0};
};

} // namespace fl::io::net
