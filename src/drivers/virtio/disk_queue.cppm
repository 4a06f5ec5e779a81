// What the queues of all virtio disks have in common: the part of a transport [io.block_queue] that does not depend on
// the requests' format. A driver derives its transport from DiskTransport and supplies prepare(), send(), next() and
// recover().
export module drivers.virtio.disk_queue;
import core.std;
import core.dma;
import core.result;
import core.time;
import io.block;
import io.block_queue;
import io.event_pacing;
import io.executor;
import io.task;
export import io.queue_group;
import drivers.virtio.device;
export import drivers.virtio.lane;
export import drivers.virtio.queue;

export namespace fl::drivers::virtio {

/// The queue is not trusted: io.ring.split and io.ring.packed check what the device returns. The first violation closes
/// all disks of the device.
class DiskTransport : public io::GroupedTransport {
  public:
    static constexpr u32 max_commands = 128;
    static constexpr u32 reserved_commands = 1; // the driver's own

    DiskTransport(io::Executor& executor, Shared& shared)
        : GroupedTransport(shared), executor_(executor), shared_(shared) {}

    /// Before open(). Makes queue `number` of the device, and `command_bytes` of memory for its commands. Errors: as
    /// Queue::make().
    Result<void> make(Device& device, u16 number, u64 features, const QueueNeeds& needs, u32 command_bytes,
                      DmaAllocator& dma) {
        indirect_ = (features & feature_indirect) != 0;
        if (auto made = virtqueue_.make(device, number, features, needs, dma); !made) {
            return made;
        }
        auto commands = dma.buffer(command_bytes);
        if (!commands) {
            return commands.error();
        }
        commands_memory_ = std::move(*commands);
        areas_ = commands_memory_.span();
        return {};
    }
    Result<void> enable(Device& device, u16 vector) { return virtqueue_.enable(device, vector); }
    /// In descriptors.
    u32 queue_size() const { return virtqueue_.ring().size(); }
    using GroupedTransport::join; // when the queue opens
    /// The device may still access the queue's memory: it is given up permanently.
    void abandon() {
        virtqueue_.abandon();
        commands_memory_.abandon();
    }
    /// From the interrupt handler. `accesses`: of the device, by the handler.
    inline void on_interrupt(u32 accesses) {
        // Relaxed: only counted; ordered by raise() and the next turn, on the same processor.
        interrupts_.store(interrupts_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        accesses_.store(accesses_.load(std::memory_order_relaxed) + accesses, std::memory_order_relaxed);
        executor_.raise(*queue);
    }

    // io::BlockTransport
    inline Result<void> publish(io::Counters& counters) {
        if (virtqueue_.publish()) {
            ++counters.notifications;
            ++counters.device_accesses;
        }
        return {};
    }
    inline Result<void> release(io::Counters& counters) {
        batch_ = false;
        const u32 accesses = accesses_.load(std::memory_order_relaxed);
        counters.device_accesses += accesses - std::exchange(charged_accesses_, accesses);
        return {};
    }
    inline Result<bool> arm() {
        const u32 outstanding = virtqueue_.ring().outstanding();
        if (outstanding == 0) {
            return false; // a buffer returned now would be a violation, which take() finds
        }
        const Result<bool> found = virtqueue_.ring().arm(pacing_.count(outstanding));
        if (found) {
            pacing_.armed(*found, executor_.turn_time());
        }
        return found;
    }
    inline u32 events() const { return interrupts_.load(std::memory_order_relaxed); }
    template <class Command>
    inline bool finish(Command&, io::Status) {
        return true;
    }
    template <class Command>
    inline io::Fence fence(Command&) {
        return io::Fence::reachable;
    }
    Error fault() const { return fault_.value_or(io::TransportDefaults::fault()); }
    void closed(bool stopped) {
        leave();
        if (!stopped) {
            shared_.changed();
        }
    }

  protected:
    ~DiskTransport() = default;

    /// The memory of the command in `slot`, which the device reads and writes; `bus`: where.
    template <class Area>
    inline Area& area(u16 slot, u64& bus) const {
        const u32 at = slot * static_cast<u32>(sizeof(Area));
        bus = areas_.bus + at;
        return *reinterpret_cast<Area*>(areas_.data + at);
    }
    inline u64 areas_bus() const { return areas_.bus; }
    /// The memory of all commands, as the device leaves it: each value is read once.
    inline io::MappedMemory areas() const { return {areas_.data, areas_.size}; }

    /// Whether a command of `elements` elements fits. A command is a chain of descriptors, or one descriptor of an
    /// indirect table with room for `most_indirect`. A chain costs the device less, as long as there are enough
    /// descriptors for all commands that may still come. `held`: commands in the table, this one included. `own`:
    /// elements of the driver's own command, for which a queue without tables keeps descriptors.
    inline io::Fit fit(u32 elements, u32 most_indirect, usize held, bool& indirect, u32 own = 0) const {
        const u32 free = virtqueue_.ring().free();
        const u32 kept = indirect_ || queue_size() < own + elements ? 0 : own;
        const u32 room = free > kept ? free - kept : 0;
        const u32 to_come = max_commands - static_cast<u32>(held);
        indirect = indirect_ && room < elements + to_come && elements <= most_indirect;
        return room < (indirect ? 1 : elements) ? io::Fit::full : io::Fit::ok;
    }
    /// Whether the driver's own command needs a table.
    inline bool needs_table(u32 elements) const { return indirect_ && virtqueue_.ring().free() < elements; }
    /// Adds the command in `slot`. `table`: memory for an indirect table, at bus address `bus`; empty: a chain.
    /// `first`: it is the first command of its request, or not of a request.
    inline io::SendResult add(u16 slot, std::span<const io::BufferElement> elements, std::span<std::byte> table,
                              u64 bus, bool first) {
        pacing_.sent(first);
        const auto added = table.empty()
                               ? virtqueue_.ring().add(slot, elements)
                               : virtqueue_.ring().add_indirect(slot, elements, {table.data(), table.size()}, bus);
        if (!added) [[unlikely]] {
            if (added.error().code == Code::exhausted) {
                return io::SendResult::full;
            }
            fault_ = added.error();
            return io::SendResult::broken;
        }
        return io::SendResult::sent;
    }
    /// The next answered command: one with the device, returned once only.
    inline io::Next take(u16& slot) {
        const auto used = virtqueue_.ring().take();
        if (!used) [[unlikely]] {
            return broken(used.error());
        }
        if (!*used) {
            return io::Next::none;
        }
        if (!batch_) {
            batch_ = true;
            virtqueue_.ring().disarm(); // polled while there is work
            pacing_.arrived(executor_.turn_time());
        }
        slot = (*used)->slot;
        return io::Next::one;
    }
    io::Next broken(const Error& why) {
        fault_ = why;
        return io::Next::broken;
    }
    Shared& shared() const { return shared_; }

  private:
    io::Executor& executor_;
    Shared& shared_;
    Queue virtqueue_;
    DmaBuffer commands_memory_;
    DmaSpan areas_;         // in it
    bool indirect_ = false; // VIRTIO_F_INDIRECT_DESC was negotiated
    bool batch_ = false;    // answers have been taken since the last release()
    io::EventPacing pacing_;
    std::optional<Error> fault_;
    std::atomic<u32> interrupts_{0};
    std::atomic<u32> accesses_{0}; // by interrupt handlers
    u32 charged_accesses_ = 0;
};

/// A queue with transport T.
template <class T>
class DiskQueue final : public io::GroupedQueue<T> {
  public:
    DiskQueue(io::Executor& executor, Shared& shared) : io::GroupedQueue<T>(executor, shared, executor, shared) {}
    /// On the queue's processor, once the device has accepted it.
    void start(Nanoseconds timeout) {
        this->open(timeout);
        this->transport().join();
    }
};

template <class T>
class DiskLane final : public Lane {
  public:
    DiskLane(io::Executor& executor, Shared& shared) : queue_(executor, shared) {}
    DiskQueue<T>& queue() { return queue_; }

    io::Executor& executor() const override { return queue_.executor(); }
    void on_interrupt(u32 accesses) override { queue_.transport().on_interrupt(accesses); }
    io::Task<Result<void>> start(io::Executor& here, Nanoseconds timeout) override {
        return queue_.start_there(here, timeout, [](io::GroupedQueue<T>& queue, Nanoseconds bound) {
            static_cast<DiskQueue<T>&>(queue).start(bound);
        });
    }
    io::Task<Result<void>> ended(io::Executor& here, io::Bound bound) override { return queue_.ended(here, bound); }
    bool is_open() const override { return queue_.is_open(); }
    void close(io::Status status, const Error& why) override { queue_.close(status, why); }
    void stop() override { queue_.stop(); }
    void reclaim() override { queue_.reclaim(); }
    void abandon() override { queue_.transport().abandon(); }

  private:
    DiskQueue<T> queue_;
};

} // namespace fl::drivers::virtio
