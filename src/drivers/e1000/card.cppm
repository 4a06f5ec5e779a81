// A network card: its two rings and registers as an io::NetDevice, and the service that its processor's executor
// visits. Independent of PCI.
//
// Interrupts. The handler masks all causes; they stay masked until the processor is about to sleep, so a busy card
// takes no interrupts. TXDW is only unmasked while someone waits for room: a sender that never fills its ring takes no
// interrupts for what it sends.
//
// Silence. A card with a link that has written back no transmit descriptor for a whole time-out is reset, and so is one
// that violates the interface; what was in its rings is lost and counted. The driver does that (drivers.e1000), woken
// by the card. A card that needs a fourth reset without having sent or received anything in between is closed.
export module drivers.e1000.card;
import core.std;
import core.dma;
import core.result;
import core.time;
import io.executor;
import io.net;
import io.task;
export import drivers.e1000.adapter;
export import drivers.e1000.queue;

export namespace fl::drivers::e1000 {

class Card final : public io::NetDevice, public io::Service {
  public:
    static constexpr u32 max_resets = 3; // in a row, without a frame in between
    static constexpr u32 ring_memory_bytes = static_cast<u32>(page_size);
    static_assert(2 * ring_bytes <= ring_memory_bytes);

    /// The card's memory, owned by the driver.
    struct Memory {
        DmaSpan rings;    // ring_memory_bytes
        DmaSpan receive;  // buffers_bytes
        DmaSpan transmit; // buffers_bytes
    };

    explicit Card(io::Executor& executor) : NetDevice(executor) {}
    ~Card() { leave(); }

    Adapter& adapter() { return adapter_; }
    /// Before start(). `wake`: called on the card's processor when the card is to be reset (wants_reset()) or was
    /// closed.
    void prepare(const Identity& identity, const Memory& memory, Nanoseconds timeout, void (*wake)(void* context),
                 void* context);
    /// The adapter was just reset: starts it, at first or again.
    void start();
    /// Ends serving. Afterwards only the adapter may access the rings, until it has been reset.
    void leave();
    bool wants_reset() const { return reset_wanted_; }
    /// Closes the card, with a line that says why.
    void fail(const Error& why);

    /// The handler of the interrupt; runs on the card's processor.
    static void on_interrupt(void* self) { static_cast<Card*>(self)->on_interrupt(); }

    // io::Service
    void flush() override;
    bool drain() override;
    bool arm() override;
    void tick(Instant now) override;
    bool wants_tick() const override { return running_ && (transmitter_.in_flight() != 0 || waits_for_room()); }
    bool awaits_answer() const override { return running_ && (has_receiver() || transmitter_.in_flight() != 0); }

  private:
    bool start(const io::OutgoingFrame& frame, io::Checksum checksum) override;
    void on_interrupt();
    Result<bool> receive();
    bool reap();
    void progress();
    void read_link(bool first);
    void request_reset(const Error& why);

    Adapter adapter_;
    Transmitter transmitter_;
    Receiver receiver_;
    Nanoseconds timeout_ = 0;
    void (*wake_)(void* context) = nullptr;
    void* context_ = nullptr;
    std::optional<io::Bound> silence_; // for the oldest frame in the ring
    u32 published_ = 0;                // the transmit tail that the card knows
    u32 resets_ = 0;                   // in a row
    bool offered_ = true;              // the card knows all receive buffers
    bool running_ = false;
    bool reset_wanted_ = false;
    bool added_ = false;            // to the executor
    bool room_interrupt_ = false;   // TXDW is unmasked, as far as the card is not masked altogether
    std::atomic<bool> live_{false}; // the handler may access registers; relaxed, as below
    // Written by the handler, which runs on the card's processor, and by arm(). Relaxed: raise() and the next turn
    // order what the card has written.
    std::atomic<bool> masked_{true};
    std::atomic<u32> interrupts_{0};
};

} // namespace fl::drivers::e1000
