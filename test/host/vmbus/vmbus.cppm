// The VMBus server, which Hyper-V runs in the root partition. Messages arrive by HvPostMessage and are sent through
// SynIC message slots; devices are offered as channels; a channel is opened over a GPADL and then served by its device
// (host.storvsp, host.services).
//
// Threads: on_message(), on_signal() and on_end_of_message() may be called by any thread at any time (a VCPU's exit, an
// eventfd); they write to the inbox only. Everything else runs on one thread: poll() empties the inbox, serves all
// channels until nothing is left to do, and returns. The VMM must arrange a call of poll() after each of the three
// functions.
export module host.vmbus;
import host.std;
export import host.platform;
export import host.faults;
export import host.channel;

export namespace fl::host {

inline constexpr u32 version(u16 major, u16 minor) { return u32{major} << 16 | minor; }

struct ServerConfig {
    u32 processors = 1;
    u32 maximum_version = version(5, 3);
    std::vector<u32> refused_versions;
    u32 message_connection = 4;  // connection in VERSION_RESPONSE from 5.0 on: 1 or 4
    bool monitor_pages = false;  // offers with monitor ids; each poll() checks the pages
    u64 heartbeat = 2000000000;  // nanoseconds between two heartbeats; 0: none
    u64 time_sync = 30000000000; // nanoseconds between two samples of the time; 0: only the first
    FaultSpec fault;
    bool verbose = false; // a line for every message
};

/// Status values returned by the three entry points [hv-tlfs §B].
enum class HvStatus : u16 {
    success = 0,
    invalid_parameter = 5,
    insufficient_buffers = 0x13,
    invalid_connection = 0x12
};

class Server {
  public:
    /// All references outlive the server.
    Server(GuestMemory& memory, Delivery& delivery, Log& log, const ServerConfig& config);
    ~Server();
    Server(const Server&) = delete;

    /// Offers a device, now or when the guest requests the offers; the server owns it. Called on poll()'s thread, or
    /// before the first poll().
    template <std::derived_from<Device> D>
    D& add(std::unique_ptr<D> device) {
        D& result = *device;
        add_device(std::move(device));
        return result;
    }
    /// Removes a device: rescinds its channels, and destroys it when the guest has released them. Called on poll()'s
    /// thread.
    void remove(Device& device);

    // ---- from any thread ----
    /// HvPostMessage. `payload`: at most 240 bytes.
    HvStatus on_message(u32 connection, u32 type, std::span<const std::byte> payload);
    /// HvSignalEvent.
    HvStatus on_signal(u32 connection, u16 flag);
    /// The guest has freed the message slot of `sint` on `vp`, after Delivery::post() returned `busy`.
    void on_end_of_message(u32 vp, u8 sint);

    // ---- from one thread ----
    /// Runs one turn. `now`: nanoseconds since any fixed point, for the services' intervals. True: something was done.
    bool poll(u64 now);
    /// When poll() must be called even without an event, in the same nanoseconds; ~0: not at all.
    u64 deadline() const;
    /// The VM is reset: the connection and all channels are discarded, the devices are kept.
    void reset();

    const Counters& counters() const;
    u32 negotiated_version() const; // 0: not connected
    bool unloaded() const;          // the guest has sent UNLOAD, and no message since
    u32 faults_injected() const;

  private:
    void add_device(std::unique_ptr<Device> device);
    struct State;
    std::unique_ptr<State> state_;
};

} // namespace fl::host
