// One IDE channel with up to two disks and its part of the bus-master function; implements what a driver that uses DMA
// needs [ATA-7], [BMIDE]. A transfer is executed within the access that starts it; its interrupt is pending when the
// access returns.
export module vmm.ide;
import core.std;
import vmm.image;
import vmm.memory;
import vmm.ports;

export namespace fl::vmm {

class IdeChannel final : public PortDevice {
  public:
    /// Compatibility mode: 8 command ports, the control port, 8 bus-master ports; claim all three ranges.
    struct Ports {
        u16 command;
        u16 control;
        u16 bus_master;
    };
    static constexpr std::array<Ports, 2> compatible{{{0x1f0, 0x3f6, 0xc000}, {0x170, 0x376, 0xc008}}};
    static constexpr std::array<u32, 2> interrupts{14, 15};

    IdeChannel(const Ports& ports, const GuestMemory& memory, IrqLine& line)
        : ports_(ports), memory_(memory), line_(line) {
        reset();
    }
    /// `unit` 0 or 1. The image outlives the channel.
    void attach(unsigned unit, Image& image) { drives_[unit].image = &image; }

    /// Commands accepted by the disk, and resets of the channel; 0: no driver has used it.
    u64 commands(unsigned unit) const { return drives_[unit].commands; }
    u64 resets() const { return resets_; }

    u32 in(u16 port, unsigned size) override;
    void out(u16 port, unsigned size, u32 value) override;

  private:
    struct Drive {
        Image* image = nullptr;
        u64 commands = 0;
        u64 sectors() const { return image->size() / 512; }
    };
    /// A two-deep register: 48-bit commands write each register twice [ACS §4.1.2].
    struct TwoDeep {
        u8 now = 0;
        u8 before = 0;
        void write(u8 value) { before = std::exchange(now, value); }
    };
    struct Transfer {
        bool active = false;
        bool to_disk = false;
        u64 lba = 0;
        u64 bytes = 0;
    };
    Drive& drive() { return drives_[device_ >> 4 & 1]; }
    u8 read_command(unsigned at);
    void write_command(unsigned at, u8 value);
    void start(u8 command);
    void start_transfer(bool to_disk, bool wide);
    void identify();
    void run_transfer();
    void end(u8 status, u8 error = 0);
    void update_line();
    void reset();
    u8 read_bus_master(unsigned at) const;
    void write_bus_master(unsigned at, u8 value);

    Ports ports_;
    const GuestMemory& memory_;
    IrqLine& line_;
    std::array<Drive, 2> drives_{};
    TwoDeep features_, count_, low_, mid_, high_;
    u8 device_ = 0;
    u8 status_ = 0;
    u8 error_ = 0;
    u8 control_ = 0;
    bool pending_ = false; // the disk's interrupt
    bool raised_ = false;  // the line
    Transfer transfer_;
    std::array<u16, 256> words_{}; // of IDENTIFY, read through the data register
    usize words_left_ = 0;
    u8 bus_command_ = 0;
    u8 bus_status_ = 0;
    u32 table_ = 0;
    u64 resets_ = 0;
};

} // namespace fl::vmm
