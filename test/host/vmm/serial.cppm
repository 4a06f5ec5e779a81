// A 16550A UART whose transmitter is always empty: each byte is output immediately [16550: National PC16550D, §8].
export module vmm.serial;
import core.std;
import vmm.ports;

export namespace fl::vmm {

/// Receives the transmitted bytes.
class SerialSink {
  public:
    virtual void put(char byte) = 0;

  protected:
    ~SerialSink() = default;
};

class Serial final : public PortDevice {
  public:
    static constexpr u16 port_count = 8;

    Serial(u16 base, SerialSink& sink, IrqLine& line) : base_(base), sink_(sink), line_(line) {}

    u32 in(u16 port, unsigned size) override;
    void out(u16 port, unsigned size, u32 value) override;
    /// Adds a received byte. False: the receiver is full (16 bytes); retry later.
    bool receive(char byte);

  private:
    u8 read(unsigned at);
    void write(unsigned at, u8 value);
    u8 identification() const;
    u8 modem_status() const;
    void update();

    u16 base_;
    SerialSink& sink_;
    IrqLine& line_;
    u16 divisor_ = 12;
    u8 enable_ = 0;       // IER: 1 received data, 2 transmitter empty
    u8 line_control_ = 0; // LCR: bit 7 selects the divisor
    u8 modem_control_ = 0;
    u8 scratch_ = 0;
    bool fifo_ = false;
    bool empty_pending_ = false; // "transmitter empty" has not been read from IIR yet
    bool raised_ = false;
    std::array<char, 16> received_{};
    unsigned received_from_ = 0;
    unsigned received_count_ = 0;
};

} // namespace fl::vmm
