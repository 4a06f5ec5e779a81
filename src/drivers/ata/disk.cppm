// A disk of an IDE channel: a block device whose requests wait in two lists until the channel's queue takes them.
export module drivers.ata.disk;
import core.std;
import core.result;
import core.text;
import io.executor;
import io.block;
import drivers.ata.protocol;

export namespace fl::drivers::ata {

class Disk;

/// Who carries a disk's requests out: the channel's queue.
class Carrier {
  public:
    virtual void submit(Disk& disk, io::Request& request) = 0;
    /// A request that the device has not seen is taken out and completed with cancelled: true.
    virtual bool cancel(Disk& disk, io::Request& request) = 0;
    /// Whatever the device does with it: its buffer is touched no more when this returns.
    virtual void forget(Disk& disk, io::Request& request) = 0;

  protected:
    ~Carrier() = default;
};

class Disk final : public io::BlockDevice {
  public:
    Disk(io::Executor& executor, Carrier& carrier, u8 unit) : BlockDevice(executor), carrier_(carrier), unit_(unit) {}

    /// Takes over what IDENTIFY said; before the disk is announced. `name`: "hda". `flushes`: use FLUSH CACHE if there
    /// is a cache. `words`: shown among the features.
    void configure(const DriveInfo& info, std::string_view name, bool flushes, bool words);
    u8 unit() const { return unit_; }
    const DriveInfo& info() const { return info_; }
    std::string_view name() const { return identity_.name; }

    // For the carrier.
    void end(io::Request& request, io::Status status) { complete(request, status); }
    io::Counters& count() { return counters_; }
    /// Takes a request out of either list.
    bool remove(io::Request& request) { return pending.remove(request) || again.remove(request); }
    /// Ends all requests that the device has not seen.
    void end_waiting(io::Status status);

    io::RequestQueue pending; // the device has not seen them
    io::RequestQueue again;   // to be issued alone: the rest of a long request, or one that is tried again. Goes first.

  protected:
    void start(io::Request& request) override { carrier_.submit(*this, request); }
    bool cancel_now(io::Request& request) override { return carrier_.cancel(*this, request); }
    void forget(io::Request& request) override { carrier_.forget(*this, request); }

  private:
    Carrier& carrier_;
    u8 unit_;
    DriveInfo info_;
};

} // namespace fl::drivers::ata
