// Integration services, host side: shutdown, heartbeat, time synchronisation. Each is a channel in message mode that
// begins with a negotiation of framework and message versions [hv-ic].
export module host.services;
import host.std;
export import host.platform;
export import host.channel;

export namespace fl::host {

enum class ShutdownState : u8 { idle, requested, accepted, refused };

/// Negotiated versions, major << 16 | minor; 0: not negotiated yet.
struct ServiceVersions {
    u32 framework = 0;
    u32 message = 0;
};

/// Common part of the three: the pipe's header, the negotiation, one request at a time.
class Service : public Device {
  public:
    ServiceVersions versions() const { return versions_; }
    void attached(Bus& bus) override { bus_ = &bus; }
    void opened(Channel& channel) override;
    void closed(Channel& channel) override;
    bool serve(Channel& channel) override;
    bool timed() const final { return true; }
    u64 tick(Channel& channel, u64 now) final;

  protected:
    explicit Service(std::vector<u32> message_versions) : offered_(std::move(message_versions)) {}
    /// Writes a request of type `type`. False: no room in the ring.
    bool request(Channel& channel, u16 type, std::span<const std::byte> body);
    virtual u64 ready(Channel& channel, u64 now) = 0; // negotiated and no request outstanding: may call request()
    virtual void answered(u16 type, u32 status, std::span<const std::byte> body) = 0;
    Bus* bus_ = nullptr;
    ServiceVersions versions_;

  private:
    std::vector<u32> offered_;
    Channel* channel_ = nullptr;
    bool outstanding_ = false; // a negotiation or request is outstanding
    u16 request_type_ = 0;
    void take(Channel& channel, const Packet& packet);
    void negotiated(Channel& channel, std::span<const std::byte> body);
    bool write(Channel& channel, u16 type, std::span<const std::byte> body);
};

class ShutdownService final : public Service {
  public:
    ShutdownService();
    DeviceOffer offer() const override;
    std::string_view name() const override { return "shutdown"; }
    /// Requests an orderly shutdown of the guest, after the negotiation if that is not complete. Called on poll()'s
    /// thread; poll() must follow soon.
    void request_shutdown(bool restart = false);
    ShutdownState state() const { return shutdown_; }

  private:
    u64 ready(Channel& channel, u64 now) override;
    void answered(u16 type, u32 status, std::span<const std::byte> body) override;
    ShutdownState shutdown_ = ShutdownState::idle;
    bool wanted_ = false;
    bool restart_ = false;
};

class HeartbeatService final : public Service {
  public:
    HeartbeatService();
    DeviceOffer offer() const override;
    std::string_view name() const override { return "heartbeat"; }
    u64 sent() const { return sent_; }
    u64 answers() const { return answers_; }

  private:
    u64 ready(Channel& channel, u64 now) override;
    void answered(u16 type, u32 status, std::span<const std::byte> body) override;
    u64 sent_ = 0;
    u64 answers_ = 0;
    u64 next_ = 0;
    u64 sequence_ = 0;
};

class TimeSyncService final : public Service {
  public:
    /// `wall_clock`: 100 ns units since 1601-01-01; `reference`: the partition's reference counter, 100 ns units.
    TimeSyncService(std::function<u64()> wall_clock, std::function<u64()> reference);
    DeviceOffer offer() const override;
    std::string_view name() const override { return "time sync"; }
    u64 answers() const { return answers_; }

  private:
    u64 ready(Channel& channel, u64 now) override;
    void answered(u16 type, u32 status, std::span<const std::byte> body) override;
    std::function<u64()> wall_clock_;
    std::function<u64()> reference_;
    u64 next_ = 0;
    u64 answers_ = 0;
    bool first_ = true;
};

} // namespace fl::host
