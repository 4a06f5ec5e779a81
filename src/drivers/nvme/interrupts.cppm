// A queue pair's interrupt: a message or a line for this queue alone, or for several. The handler accesses the
// controller only to mask a line.
//
//   atomic      ordering   written by         read by    orders
//   count_      relaxed    handler            the turn   nothing: raise() and the next turn order the completions
//   masked_     relaxed    handler, the turn  the turn   nothing: the register access has its own order
export module drivers.nvme.interrupts;
import core.std;
import core.mmio;
import io.executor;
import io.queue_group;
import drivers.nvme.protocol;

export namespace fl::drivers::nvme {

class QueueInterrupts {
  public:
    /// `transport`: of the queue that is to be raised, for as long as it is not quiescent.
    QueueInterrupts(io::Executor& executor, const io::GroupedTransport& transport)
        : executor_(executor), transport_(transport) {}

    /// `line`: the interrupt is a level, masked by INTMS. Before the controller is enabled.
    void use(Mmio registers, bool line) {
        registers_ = registers;
        line_ = line;
    }
    /// `other` is served by this queue's interrupt as well. Before the controller is enabled.
    void share(QueueInterrupts& other) { sharing_ = &other; }

    /// The handler; raises the queue and those that share the interrupt with it.
    static void on_interrupt(void* self) {
        auto& first = *static_cast<QueueInterrupts*>(self);
        if (first.line_ && !first.transport_.quiescent()) {
            // Lowers the line. Whether it was this device is seen in the queues.
            first.registers_.write<u32>(interrupt_mask_set, 1);
            for (QueueInterrupts* each = &first; each != nullptr; each = each->sharing_) {
                each->masked_.store(true, std::memory_order_relaxed);
            }
        }
        for (QueueInterrupts* each = &first; each != nullptr; each = each->sharing_) {
            each->raise();
        }
    }
    inline u32 count() const { return count_.load(std::memory_order_relaxed); }
    /// Lets a masked line interrupt again. Returns the register accesses: one to mask and one to unmask.
    inline u32 unmask() {
        if (!masked_.exchange(false, std::memory_order_relaxed)) [[likely]] {
            return 0;
        }
        registers_.write<u32>(interrupt_mask_clear, 1);
        return 2;
    }

  private:
    void raise() {
        if (!transport_.quiescent()) {
            count_.store(count_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
            executor_.raise(*transport_.queue);
        }
    }

    io::Executor& executor_;
    const io::GroupedTransport& transport_;
    Mmio registers_;
    bool line_ = false;
    QueueInterrupts* sharing_ = nullptr;
    std::atomic<u32> count_{0};
    std::atomic<bool> masked_{false};
};

} // namespace fl::drivers::nvme
