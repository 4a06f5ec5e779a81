// Connects the machine with the VMBus server: passes hypercalls in, messages and event flags out, and images as disks.
export module vmm.bus;
import host.std;
import core.result;
import host.platform;
import host.services;
import host.storvsp;
import host.vmbus;
import vmm.counters;
import vmm.image;
import vmm.kvm;
import vmm.machine;
import vmm.synic;

export namespace fl::vmm {

/// An image as a disk of the VMBus server.
class ImageStore final : public host::BlockStore {
  public:
    /// The image outlives this. `read_only`: the disk is read-only even if the image is writable.
    ImageStore(Image& image, bool read_only) : image_(image), read_only_(read_only || image.read_only()) {}
    u64 size() const override { return image_.size(); }
    bool read_only() const override { return read_only_; }
    std::span<std::byte> mapped() override { return image_.bytes(); }
    bool read(u64 offset, std::span<std::byte> into) override;
    bool write(u64 offset, std::span<const std::byte> from) override;
    bool flush() override { return image_.flush(); }
    bool unmap(u64 offset, u64 length) override;
    int file() const { return image_.file(); }

  private:
    Image& image_;
    bool read_only_;
};

/// A SCSI disk that is hot-added or removed while the guest runs, alone or with its controller.
struct HotplugDisk {
    host::StorageDevice* controller = nullptr; // nullptr: not added yet
    host::LunConfig lun;
    host::StorageConfig config; // of the controller; `luns`: its disks
    std::vector<host::LunConfig> luns;
};

class Bus final : private Partition, private EndOfMessage, private host::Delivery, private host::Log {
  public:
    /// Who serves the channels, and how their signals get there.
    enum class Serving : u8 {
        exits,         // the signalling processor, within its exit; the I/O thread only what is left
        exits_eventfd, // messages likewise; signals the I/O thread, by KVM's eventfds
        thread,        // the I/O thread alone
    };
    /// `line` receives log lines.
    Bus(Machine& machine, const host::ServerConfig& config, std::function<void(std::string_view)> line,
        Serving serving);
    ~Bus();

    /// Starts receiving hypercalls. All initial devices must have been added.
    void connect();
    host::Server& server() { return server_; }
    template <std::derived_from<host::Device> D>
    D& add(std::unique_ptr<D> device) {
        return server_.add(std::move(device));
    }
    /// Runs `work` with exclusive access to server and devices, then serves.
    void with_server(const std::function<void()>& work);
    /// Serves all channels until nothing is left to do. Any thread; if another thread is serving, that one continues
    /// with the new work, and this call returns.
    void serve(u64 now);

    // For the I/O thread.
    int acknowledged() const { return machine_.synic().acknowledged(); }
    void on_acknowledged();
    /// Readable when a processor has left work (Serving::thread).
    int woken() const { return wake_.number(); }
    void on_woken();
    /// Whether end() has been called. The thread then calls ended() when its work is done, and none of the others.
    bool ending() const { return ending_.load(std::memory_order_acquire); }
    void ended() { ended_.store(true, std::memory_order_release); }
    /// With eventfds: an epoll descriptor, readable when a channel has been signalled.
    int signals() const { return signals_.number(); }
    void on_signals();
    u64 deadline();

    /// Serving::thread, from another thread: the I/O thread is to end its work. False: it has not within `seconds`.
    bool end(u32 seconds);

  private:
    void leave_to_thread();
    static void add_counters(void* context, Snapshot& into);
    u16 post_message(u32 connection, u32 type, std::span<const std::byte> payload) override;
    u16 signal_event(u32 connection, u16 flag) override;
    void end_of_message(u32 processor, u8 sint) override { server_.on_end_of_message(processor, sint); }
    Message post(u32 vp, u8 sint, u32 type, std::span<const std::byte> payload) override;
    Event set_event(u32 vp, u8 sint, u16 flag, bool always) override;
    void connection(u32 id, bool exists) override;
    void line(std::string_view text) override { line_(text); }

    struct Signal {
        u32 connection;
        Descriptor event;
    };

    Machine& machine_;
    std::function<void(std::string_view)> line_;
    Serving kind_;
    Descriptor wake_;
    std::atomic<bool> ending_ = false; // release in end(), acquire in ending(): nothing else is passed
    std::atomic<bool> ended_ = false;  // release in ended(), acquire in end(): what the thread has done is visible
    Descriptor signals_;
    std::vector<std::unique_ptr<Signal>> connections_;
    host::GuestMemory memory_;
    // work_: there is work to serve. A thread sets it before it tries to lock the mutex, and the holder checks it after
    // unlocking, so at least one of the two sees the work.
    std::atomic<bool> work_ = false;
    std::mutex serving_;
    host::Server server_;
};

} // namespace fl::vmm
