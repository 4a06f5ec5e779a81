// Internal state of the server, for its implementation units: messages, offers and GPADLs (state.cpp, gpadls.cpp), and
// the turns (turns.cpp).
export module host.state;
import host.std;
import host.channel;
import host.messages;
import host.vmbus;

export namespace fl::host {

inline constexpr u32 relids = 2048; // the number of event flags; 0 is not used
inline constexpr u8 vmbus_sint = 2;
inline constexpr u32 status_success = 0; // of GPADL_CREATED, OPEN_CHANNEL_RESULT, MODIFY_CHANNEL_RESPONSE
inline constexpr u32 status_unsuccessful = 0x8000ffff;
// for signals of guests before version 1.1, and of channels without a connection of their own
inline constexpr u32 event_connection = 2;

/// A device added to the server.
struct Attached {
    std::unique_ptr<Device> device;
    DeviceOffer offer;
    bool leaving = false; // to be rescinded, then destroyed
};

/// A channel offered to the guest, now or when it requests the offers.
struct Offer {
    Attached* owner = nullptr;
    u32 relid = 0;
    u16 index = 0;
    bool rescinded = false;
    std::optional<Channel> channel; // while open
    u32 ring_gpadl = 0;
    u64 due = ~u64{0}; // the device's next tick
    bool kicked = false;
    bool timed = false;
};

struct Gpadl {
    u32 relid = 0;
    std::vector<std::byte*> pages; // host addresses
    usize expected = 0;            // number of pages announced
    bool complete() const { return pages.size() == expected; }
};

struct Posted {
    u32 connection;
    u32 type;
    InMessage message;
};

class ServerState : public Bus {
  public:
    ServerState(GuestMemory& memory, Delivery& delivery, Log& log, const ServerConfig& config);

    // ---- Bus ----
    GuestMemory& memory() override { return memory_; }
    Judge& judge() override { return judge_; }
    Counters& counters() override { return counters_; }
    FaultPlan& faults() override { return faults_; }
    u64 now() const override { return now_; }
    u64 heartbeat_interval() const override { return config_.heartbeat; }
    u64 time_sync_interval() const override { return config_.time_sync; }
    void interrupt(Channel& channel, bool always) override;
    void offer_sub_channels(Device& device, u16 count) override;
    void rescind(Device& device) override;
    void kick(Device& device) override;
    void kick(Channel& channel) override { by_relid_[channel.relid()]->kicked = true; }

    // ---- messages ----
    void handle(const Posted& posted);
    void send(OutMessage message);
    void flush();
    void disconnect();
    void offer_device(Attached& attached);
    void rescind_now(Attached& attached);
    void sweep(); // destroys removed devices whose relids the guest has released

    // ---- turns ----
    bool serve(Offer& offer);
    bool poll(u64 now);
    u64 deadline() const;

    GuestMemory& memory_;
    Delivery& delivery_;
    ServerConfig config_;
    Counters counters_;
    Judge judge_;
    FaultPlan faults_;
    u64 now_ = 0;

    // The inbox, written by any thread.
    std::atomic_flag lock_;
    std::vector<Posted> posted_;
    std::array<std::atomic<u64>, relids / 64> signalled_{};
    std::array<std::atomic<u64>, relids / 64> live_{}; // relids whose connection exists
    std::atomic<u32> signalled_words_ = 0;             // bit n: signalled_[n] is not 0
    std::atomic<bool> shared_signal_ = false;
    std::atomic<bool> freed_ = false; // a message slot was freed
    std::atomic<u64> messages_in_ = 0;
    std::atomic<u64> signals_in_ = 0;

    // State of the connection with the guest.
    std::vector<std::unique_ptr<Attached>> devices_;
    std::map<u32, Offer> offers_; // by relid
    std::array<Offer*, relids> by_relid_{};
    std::map<u32, Gpadl> gpadls_;
    std::deque<OutMessage> queue_;
    bool slot_busy_ = false;
    u32 version_ = 0;
    u32 target_vp_ = 0;
    bool offers_requested_ = false;
    bool unloaded_ = false;
    u64 interrupt_page_ = 0; // before 2.4
    u64 monitor_page_ = 0;   // guest to host

  private:
    void contact(InMessage& message, u32 connection);
    void request_offers();
    void open(InMessage& message);
    void close(InMessage& message);
    void gpadl_header(InMessage& message);
    void gpadl_body(InMessage& message);
    void gpadl_pages(u32 id, Gpadl& gpadl, InMessage& message);
    void gpadl_teardown(InMessage& message);
    void relid_released(InMessage& message);
    void modify(InMessage& message);
    Offer* known(u32 relid, const char* what);
    Offer* new_offer(Attached& attached, u16 index);
    void send_offer(const Offer& offer);
    void close_channel(Offer& offer);
    void forget(Offer& offer);
    bool take_messages();
    bool take_signals();
    bool take_shared_bits(u64 page, usize offset, usize stride, usize words);
    bool signalled(u32 relid);
};

} // namespace fl::host
