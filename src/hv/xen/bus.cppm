// XenBus: devices are XenStore directories with a front end (this guest) and a back end in another domain, which
// connect by a handshake of states [xen-blkif, "State diagrams"]. Independent of device types.
export module hv.xen.bus;
import core.std;
import core.result;
import core.text;
import core.time;
import io.executor;
import io.task;
import hv.backend;
export import hv.xen.store;

export namespace fl::hv::xen {

/// Lists all devices below "device": types in the store's order, devices of a type sorted by number. `scratch`: buffer
/// for directory listings.
io::Task<Result<void>> enumerate(Store& store, DeviceList& into, std::span<char> scratch);

/// The front end of a device, with a watch on its back end. Owned by its driver; must not move while open.
class Frontend {
  public:
    Frontend(Store& store, io::Executor& executor);
    Frontend(const Frontend&) = delete;
    Frontend& operator=(const Frontend&) = delete;

    /// Finds the back end and watches its state. `device`: "device/vbd/51712".
    io::Task<Result<void>> open(std::string_view device);
    std::string_view path() const { return path_; }
    std::string_view backend() const { return backend_; }
    Domain domain() const { return domain_; }

    /// The back end's state; BusState::unknown if its node is gone.
    io::Task<Result<BusState>> state();
    /// Writes this front end's state.
    io::Task<Result<void>> set_state(BusState state);
    /// Before a connection: a predecessor (firmware, or a replaced kernel) may have left the device half connected, and
    /// is disconnected first. `timeout`: of each wait, in nanoseconds.
    io::Task<Result<void>> restart(Nanoseconds timeout);
    /// Ends the connection. True: the back end has released everything; false: it did not say so within `timeout`
    /// nanoseconds. Error: its or our state cannot be accessed.
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
