// A queue pair's interrupt: a message or a line for this queue alone, or for several. The handler accesses the
// controller only to mask a line; messages are masked by the turn of a processor that polls. Queues that share an
// interrupt are on one processor: each is raised by it, and then is visited in every turn until its arm(), which
// unmasks the interrupt. So a masked interrupt keeps no answer of any of them back.
//
//   interrupt  masked and unmasked by
//   MSI-X      the mask bit of the vector in the table [PCI-3.0 §6.8.2.9]
//   MSI, line  INTMS, INTMC: one bit per message; bit 0 for the line [nvme-1.4 §3.1.3]
//
// All of them signal on being unmasked what has arrived before [PCI-3.0 §6.8.3.4], [nvme-1.4 §7.5.1].
//
//   atomic      ordering   written by         read by    orders
//   count_      relaxed    handler            the turn   nothing: raise() and the next turn order the completions
//   masked_     relaxed    handler, the turn  the turn   nothing: the register access has its own order
export module drivers.nvme.interrupts;
import core.std;
import core.mmio;
import io.executor;
import io.queue_group;
import drivers.pci.msi;
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
    /// `vector`: this queue's, among `vectors`. Before the controller is enabled; without, messages are never masked.
    void use_vector(pci::Interrupts& vectors, u32 vector) {
        vectors_ = &vectors;
        vector_ = vector;
    }
    /// `other` is served by this queue's interrupt as well. Before the controller is enabled.
    void share(QueueInterrupts& other) {
        sharing_ = &other;
        other.first_ = this;
    }

    /// The handler; raises the queue and those that share the interrupt with it.
    static void on_interrupt(void* self) {
        auto& first = *static_cast<QueueInterrupts*>(self);
        if (first.line_ && !first.transport_.quiescent()) {
            // Lowers the line. Whether it was this device is seen in the queues.
            first.registers_.write<u32>(interrupt_mask_set, 1);
            first.set_masked();
        }
        for (QueueInterrupts* each = &first; each != nullptr; each = each->sharing_) {
            each->raise();
        }
    }
    inline u32 count() const { return count_.load(std::memory_order_relaxed); }
    /// In a turn: masks a message [io.block_queue silence]. A line was masked by the handler. Returns the register
    /// accesses.
    u32 silence() {
        if (line_ || vectors_ == nullptr) {
            return 0;
        }
        first_->set_masked();
        if (by_table()) {
            static_cast<void>(vectors_->mask(vector_));
            return table_accesses;
        }
        registers_.write<u32>(interrupt_mask_set, u32{1} << vector_);
        return 1;
    }
    /// Lets what is masked interrupt again. Returns the register accesses; for a line those of the handler too.
    inline u32 unmask() {
        if (!masked_.exchange(false, std::memory_order_relaxed)) [[likely]] {
            return 0;
        }
        if (by_table()) {
            static_cast<void>(vectors_->unmask(vector_));
            return table_accesses;
        }
        registers_.write<u32>(interrupt_mask_clear, u32{1} << vector_);
        return line_ ? 2 : 1;
    }

  private:
    static constexpr u32 table_accesses = 3; // of pci::Interrupts::mask: a change, and a read that flushes it

    bool by_table() const { return vectors_ != nullptr && vectors_->kind() == pci::InterruptKind::msix; }
    void set_masked() {
        for (QueueInterrupts* each = this; each != nullptr; each = each->sharing_) {
            each->masked_.store(true, std::memory_order_relaxed);
        }
    }
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
    pci::Interrupts* vectors_ = nullptr;
    u32 vector_ = 0;
    QueueInterrupts* sharing_ = nullptr;
    QueueInterrupts* first_ = this; // of those that share it
    std::atomic<u32> count_{0};
    std::atomic<bool> masked_{false};
};

} // namespace fl::drivers::nvme
