// The guest side of the dynamic memory protocol: messages, and which pages the host holds. Independent of the
// channel, so that it can be tested and fuzzed separately. Order: begin() → take() for every message → report() about
// every second.
//
// Pages are given in the largest available runs, at most `capacity` of them, and never the last `reserve` free pages.
// The host holds a page from its listing in a response until it returns the page; the guest must not access it in
// between.
export module drivers.hv_balloon.balloon;
import core.std;
import core.result;
import core.dma;
export import drivers.hv_balloon.protocol;

export namespace fl::drivers::hv_balloon {

/// Sends messages. `message` is copied before send() returns.
class Link {
  public:
    virtual Result<void> send(std::span<const std::byte> message, u32 transaction) = 0;

  protected:
    ~Link() = default;
};

/// Source of pages. total() and free(): of the machine, in pages.
struct Memory {
    DmaAllocator& pages;
    u64 (*total)();
    u64 (*free)();
};

class Balloon {
  public:
    static constexpr u32 capacity = ranges_in_message; // maximum number of runs held by the host: those of one response
    static constexpr u64 max_run = 1u << 15;           // pages: 128 MiB
    static constexpr u64 reserve = 8192;               // pages kept: 32 MiB

    enum class State : u8 { closed, version_requested, capabilities_requested, running, refused };

    Balloon(Link& link, const Memory& memory) : link_(link), memory_(memory) {}
    ~Balloon();
    Balloon(const Balloon&) = delete;
    Balloon& operator=(const Balloon&) = delete;

    /// Requests the newest version.
    Result<void> begin();
    /// Handles one complete host message, in a private copy. Error{protocol}: a protocol violation, and later
    /// messages must not be trusted; Error{not_supported}: the host rejects every version, or our capabilities.
    Result<void> take(std::span<const std::byte> message);
    /// Sends a memory status report, if the host wants reports.
    Result<void> report();

    State state() const { return state_; }
    Version version() const { return versions[attempt_]; }
    bool reports_wanted() const { return state_ == State::running && reports_wanted_; }
    /// Pages held by the host.
    u64 ballooned() const { return ballooned_; }

  private:
    struct Run {
        std::byte* data;
        u64 first; // page number
        u64 pages;
    };

    Result<void> request_version();
    Result<void> version_answered(std::span<const std::byte> message, const Header& header);
    Result<void> capabilities_answered(std::span<const std::byte> message, const Header& header);
    Result<void> inflate(std::span<const std::byte> message, const Header& header);
    Result<void> deflate(std::span<const std::byte> message, const Header& header);
    Result<void> reclaim(PageRange range);
    template <class T>
    Result<void> send(T& message, u32 transaction);

    Link& link_;
    Memory memory_;
    State state_ = State::closed;
    u32 attempt_ = 0;
    u32 transaction_ = 0; // of our last request
    bool reports_wanted_ = true;
    std::array<Run, capacity> runs_{};
    u32 run_count_ = 0;
    u64 ballooned_ = 0;
    std::array<std::byte, max_message> response_{};
};

} // namespace fl::drivers::hv_balloon
