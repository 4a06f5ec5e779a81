// XenBus: devices are XenStore directories with a front end (this guest) and a back end in another domain, which
// connect by a handshake of states [xen-blkif, "State diagrams"]. Independent of device types.
export module hv.xen.bus;
import core.std;
import core.result;
import core.text;
import core.time;
import core.vector;
import io.executor;
import io.task;
import hv.backend;
export import hv.xen.store;

export namespace fl::hv::xen {

/// Lists all devices below "device": types in the store's order, devices of a type sorted by number. `scratch`: buffer
/// for directory listings.
io::Task<Result<void>> enumerate(Store& store, DeviceList& into, std::span<char> scratch);

/// Finds the devices that the toolstack adds while the guest runs, by a watch on "device". A listing is compared with
/// what is known; nothing is allocated unless there is a new device.
///
/// A device is found again when its directory has been gone, or when its driver has ended() it and the toolstack has
/// made it anew: the front end's state, which a driver leaves as closed, is initialising then.
class DeviceWatch {
  public:
    /// Found and not yet taken; further ones are dropped.
    static constexpr u32 max_pending = 32;

    /// `scratch`: buffer for directory listings, for this object only while it is watching.
    DeviceWatch(Store& store, io::Executor& executor, std::span<char> scratch);
    DeviceWatch(const DeviceWatch&) = delete;
    DeviceWatch& operator=(const DeviceWatch&) = delete;

    /// The devices that enumerate() has listed. Before start().
    void know(std::span<const SyntheticDevice> devices);
    /// Begins to watch, once: a device that has been added since enumerate() is found, too.
    void start();
    /// Resumes when the first listing after start() is done, or failed: later ones use memory that it has allocated, so
    /// that none is allocated while a job is measured.
    auto await_first(const io::Bound& bound) { return listed_.wait(bound); }
    /// LateDevices [hv.backend].
    std::optional<SyntheticDevice> next();
    u32 new_dropped() { return std::exchange(dropped_, 0); }
    Latch& changes() { return changes_; }
    /// The driver does not use the device any more, and has left its front end's state as closed.
    void ended(std::string_view type, u32 number);

  private:
    struct Known {
        SyntheticDevice device;
        u32 seen = 0; // the last listing that had it
        bool ended = false;
        bool pending = false;
    };
    io::Task<Result<void>> watch();
    io::Task<Result<void>> list();
    io::Task<Result<void>> list_kind(std::string_view kind);
    io::Task<Result<void>> look_at(std::string_view kind, std::string_view name);
    Known* find(std::string_view kind, std::string_view name);
    void offer(const SyntheticDevice& device);
    void take_pending(u32 at);
    void forget_missing();

    Store& store_;
    std::span<char> scratch_;
    Latch wake_;
    Latch changes_;
    Latch listed_;
    Watch watch_;
    Vector<Known> known_;
    std::array<SyntheticDevice, max_pending> pending_{}; // oldest first
    u32 pending_count_ = 0;
    u32 dropped_ = 0;
    u32 listing_ = 0;
    bool started_ = false;
    io::TaskGroup tasks_; // destroyed before what it uses
};

/// A device with its driver, in the backend's list of them for as long as the machine: its driver finds it again when
/// the toolstack adds the same device again.
class BusDevice {
  public:
    BusDevice(std::string_view type, u32 number) : type_(type), number_(number) {}
    BusDevice(const BusDevice&) = delete;
    BusDevice& operator=(const BusDevice&) = delete;
    /// As SyntheticDevice has them; `type`: static storage.
    std::string_view type() const { return type_; }
    u32 number() const { return number_; }

    /// Whether a back end may have access to pages of this device, now or for ever.
    virtual bool holds_grants() const = 0;

    // A suspension of the machine [hv.xen suspend()], in this order:
    /// Sends nothing more to the back end, and waits a bounded time until it has answered what it has.
    virtual io::Task<Result<void>> pause() = 0;
    /// Only in another domain, while nothing else runs: there is no back end any more, and no event channel or grant is
    /// valid. Must not wait.
    virtual void lost() = 0;
    /// After both: `moved`: in another domain, so that the device has to be connected again; or still in the same one.
    virtual void resumed(bool moved) = 0;

  protected:
    ~BusDevice() = default;

  private:
    friend class BusDevices;
    std::string_view type_;
    u32 number_;
    BusDevice* next_ = nullptr;
};

class BusDevices {
  public:
    /// The device must live as long as the machine, or until remove().
    void add(BusDevice& device) { device.next_ = std::exchange(first_, &device); }
    void remove(BusDevice& device) {
        for (BusDevice** at = &first_; *at != nullptr; at = &(*at)->next_) {
            if (*at == &device) {
                *at = device.next_;
                return;
            }
        }
    }
    /// The list, newest first; it may change whenever a coroutine waits.
    BusDevice* first() const { return first_; }
    static BusDevice* after(const BusDevice& device) { return device.next_; }
    BusDevice* find(std::string_view type, u32 number) const {
        BusDevice* at = first_;
        while (at != nullptr && (at->type_ != type || at->number_ != number)) {
            at = at->next_;
        }
        return at;
    }

  private:
    BusDevice* first_ = nullptr;
};

/// The front end of a device, with a watch on its back end. Owned by its driver; must not move while open.
class Frontend {
  public:
    Frontend(Store& store, io::Executor& executor);
    Frontend(const Frontend&) = delete;
    Frontend& operator=(const Frontend&) = delete;

    /// Finds the back end and watches its state. `device`: "device/vbd/51712". Again after close().
    io::Task<Result<void>> open(std::string_view device);
    std::string_view path() const { return path_; }
    std::string_view backend() const { return backend_; }
    Domain domain() const { return domain_; }

    /// The back end's state; BusState::unknown if its node is gone.
    io::Task<Result<BusState>> state();
    /// For a connected device whose back end has changed its state: whether it has left the connection and may return,
    /// and not the toolstack removed the device or put another one in its place. A toolstack that removes it first
    /// clears "online", and one that makes it anew resets the front end's state.
    io::Task<Result<bool>> may_return(BusState back_state);
    /// After an attempt to connect again that has failed because of `why`, with a pause. False: another one is useless,
    /// or too late.
    io::Task<Result<bool>> may_try_again(Error why, io::Bound bound);
    /// Writes this front end's state.
    io::Task<Result<void>> set_state(BusState state);
    /// This front end's state; BusState::unknown if its node is gone.
    io::Task<Result<BusState>> own_state();
    /// Whether the toolstack wants the back end to be there ("online"); false without that node.
    io::Task<Result<bool>> online();
    /// Before a connection: a predecessor (firmware, or a replaced kernel) may have left the device half connected, and
    /// is disconnected first. `timeout`: of each wait, in nanoseconds.
    io::Task<Result<void>> restart(Nanoseconds timeout);
    /// Ends the connection. True: the back end has released everything, or the toolstack has removed the device by
    /// force; false: it did not say so within `timeout` nanoseconds. Error: its or our state cannot be accessed.
    io::Task<Result<bool>> disconnect(Nanoseconds timeout);
    /// Waits until the back end's state is one of `wanted`, and returns it. Error{device_gone}: it is closing or gone;
    /// Error{timed_out}.
    io::Task<Result<BusState>> await_state(std::span<const BusState> wanted, io::Bound bound);
    /// Waits until the back end may have changed. False: the bound was reached first.
    auto changed(const io::Bound& bound) { return changed_.wait(bound); }
    auto changed() { return changed_.wait(); }
    /// Ends a wait in changed(), so that the owner can notify its own coroutine.
    void notify() { changed_.open(); }
    /// Stops watching.
    io::Task<Result<void>> close();

  private:
    Store& store_;
    io::Executor& executor_;
    StorePath path_;
    StorePath backend_;
    Domain domain_ = 0;
    Latch changed_;
    Watch watch_;
    BusState written_ = BusState::unknown; // the last state written since open()
    bool watching_ = false;
};

/// The disk that a virtual-device number denotes [xen-vbd]. disk: from 0; partition 0: the whole disk.
struct VirtualDisk {
    enum class Kind : u8 { xvd, ide, scsi } kind = Kind::xvd;
    u32 disk = 0;
    u32 partition = 0;
};
/// Nothing for a number that the specification does not define.
constexpr std::optional<VirtualDisk> virtual_disk(u64 number) {
    using Kind = VirtualDisk::Kind;
    if (number >> 28 == 1) {
        return VirtualDisk{Kind::xvd, static_cast<u32>(number >> 8 & 0xfffff), static_cast<u32>(number & 0xff)};
    }
    switch (number >> 8) {
    case 202: return VirtualDisk{Kind::xvd, static_cast<u32>(number >> 4 & 0xf), static_cast<u32>(number & 0xf)};
    case 8: return VirtualDisk{Kind::scsi, static_cast<u32>(number >> 4 & 0xf), static_cast<u32>(number & 0xf)};
    case 3:
    case 22:
        if ((number >> 6 & 3) > 1) {
            return std::nullopt;
        }
        return VirtualDisk{Kind::ide, static_cast<u32>((number >> 6 & 1) + (number >> 8 == 22 ? 2 : 0)),
                           static_cast<u32>(number & 0x3f)};
    default: return std::nullopt;
    }
}
/// xvda, xvdb … xvdz, xvdaa …; followed by the partition number, if any.
constexpr FixedText<16> disk_name(const VirtualDisk& disk) {
    std::array<char, 8> letters{};
    usize at = letters.size();
    for (u64 n = u64{disk.disk} + 1; n != 0 && at > 0; n = (n - 1) / 26) {
        letters[--at] = static_cast<char>('a' + (n - 1) % 26);
    }
    FixedText<16> name("xvd");
    name.write({letters.data() + at, letters.size() - at});
    if (disk.partition != 0) {
        std::array<char, 4> digits{};
        usize d = digits.size();
        for (u32 n = disk.partition; n != 0; n /= 10) {
            digits[--d] = static_cast<char>('0' + n % 10);
        }
        name.write({digits.data() + d, digits.size() - d});
    }
    return name;
}

} // namespace fl::hv::xen
