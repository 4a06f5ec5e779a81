// The storage provider: a SCSI controller (class ba6163d9-…) or an IDE accelerator channel (class 32412632-…) and its
// disks.
export module host.storvsp;
import host.std;
export import host.platform;
export import host.channel;
export import host.latency;
export import host.scsi;

export namespace fl::host {

inline constexpr u16 storage_version(u8 major, u8 minor) { return static_cast<u16>(major << 8 | minor); }

struct StorageConfig {
    u32 number = 0;                                                       // of the controller; part of its instance id
    std::vector<u16> versions = {0x0602, 0x0600, 0x0501, 0x0402, 0x0200}; // accepted; OpenVMM does not accept 6.2
    u16 sub_channels = 0;                                                 // maximum, besides the primary channel
    u32 maximum_transfer = 256 * 1024;                                    // bytes, a multiple of 4096
    Transfers* transfers =
        nullptr;                // reads, writes and flushes end later, by these; nullptr: in the turn that takes them
    Latency* latency = nullptr; // with `transfers`: the time from a request to its answer, at least
};

/// One controller and its disks, to be passed to Server::add(). All functions are called on poll()'s thread.
class StorageDevice final : public Device {
  public:
    /// Target 0 of bus 0, any LUN below 64.
    static std::unique_ptr<StorageDevice> scsi(const StorageConfig& config, std::vector<LunConfig> luns);
    /// The accelerator of a generation-1 machine's IDE disk: `path` is the channel (0, 1), `target` 0 for master, 1 for
    /// slave.
    static std::unique_ptr<StorageDevice> ide(u8 path, u8 target, const StorageConfig& config, const LunConfig& disk);
    ~StorageDevice() override;

    /// Hot-adds or removes a LUN; the guest is sent ENUMERATE_BUS. False: the LUN is in use, or does not exist.
    bool add_lun(const LunConfig& lun);
    bool remove_lun(u8 lun);
    /// Sends REMOVE_DEVICE, which requests that the guest release the controller; Server::remove() may follow.
    void announce_removal();
    /// 0: not negotiated.
    u16 negotiated_version() const;

    DeviceOffer offer() const override;
    std::string_view name() const override;
    void attached(Bus& bus) override;
    void opened(Channel& channel) override;
    void closed(Channel& channel) override;
    bool serve(Channel& channel) override;
    bool timed() const override;
    u64 tick(Channel& channel, u64 now) override;

  private:
    struct State;
    explicit StorageDevice(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

} // namespace fl::host
