// The driver for Intel's 8254x network cards, the 82540EM and the 82545EM, which hypervisors emulate [8254x]: matching,
// set-up, announcing, and the reset of a card that is silent. The rings are in drivers.e1000.queue, the registers in
// drivers.e1000.adapter, the card is drivers.e1000.card.
//
// Set-up: the hardware address is read, by which a card is known to be the twin of a synthetic one → reset → rings and
// addresses → interrupts.
export module drivers.e1000;
import core.std;
import core.dma;
import core.result;
import io.executor;
import io.latch;
import io.net;
import io.task;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;
export import drivers.e1000.card;

export namespace fl::drivers::e1000 {

inline constexpr std::string_view driver_name = "e1000";
inline constexpr pci::Match ids[] = {{.vendor = 0x8086, .device = 0x100e}, {.vendor = 0x8086, .device = 0x100f}};

/// One card. Lives until machine shutdown once it has been announced. Runs on the boot processor.
class Controller {
  public:
    Controller(Environment& environment, const pci::Device& device);
    ~Controller();
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;

    /// Maps the registers and reads the hardware address. The card is left as it is.
    io::Task<Result<void>> identify();
    /// Resets the card and starts it.
    io::Task<Result<void>> connect();
    /// Starts the task that resets the card, or ends it.
    Result<void> keep() { return tasks_.spawn(watch()); }
    /// Ends everything. Afterwards the card accesses no memory.
    void disconnect();

    Card& card() { return card_; }
    /// Of the card among the machine's: see NetSink.
    u32 number() const { return number_; }

  private:
    io::Task<Result<void>> watch();

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    pci::Device device_;
    DmaBuffer rings_;
    DmaBuffer receive_;
    DmaBuffer transmit_;
    io::MacAddress address_;
    u32 number_ = no_twin;
    bool opened_ = false; // the card may access memory
    Card card_;
    pci::Interrupts interrupts_;
    io::Latch trouble_;
    io::TaskGroup tasks_;
    friend io::Task<Result<void>> probe(Environment&, pci::Device, u32);
    Controller* next_ = nullptr; // list of attached cards
};

/// Sets up one card and announces it. Success: attached, or left alone (another driver has the card).
io::Task<Result<void>> probe(Environment& environment, pci::Device device, u32 index);

} // namespace fl::drivers::e1000
