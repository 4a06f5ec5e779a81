// The guest's half of the dynamic memory protocol: what to say, and which pages are away. Knows no channel, so that it
// is tested and fuzzed alone. Order: begin() → take() of every message that comes → report() about every second.
//
// Pages go in runs as large as can be had, at most `capacity` of them, and never the last `reserve` of what is free. A
// page is with the host from the moment at which it stands in a response until the host gives it back; it is not
// touched in between.
export module drivers.hv_balloon.balloon;
import core.std;
import core.result;
import core.dma;
export import drivers.hv_balloon.protocol;

export namespace fl::drivers::hv_balloon {

/// How messages leave. `message` is copied before send() returns.
class Link {
  public:
    virtual Result<void> send(std::span<const std::byte> message, u32 transaction) = 0;

  protected:
    ~Link() = default;
};

/// Where pages come from. total() and free(): of the machine, in pages.
struct Memory {
    DmaAllocator& pages;
    u64 (*total)();
    u64 (*free)();
};

class Balloon {
  public:
    static constexpr u32 capacity = ranges_in_message; // runs that are away at once: those of one response
    static constexpr u64 max_run = 1u << 15;           // pages: 128 MiB
    static constexpr u64 reserve = 8192;               // pages that stay: 32 MiB

    enum class State : u8 { closed, asking_version, asking_capabilities, running, refused };

    Balloon(Link& link, const Memory& memory) : link_(link), memory_(memory) {}
    ~Balloon();
    Balloon(const Balloon&) = delete;
    Balloon& operator=(const Balloon&) = delete;

    /// Asks for the newest version.
    Result<void> begin();
    /// One message of the host, whole, in a private copy. Error{protocol}: it breaks the protocol, and nothing further
    /// is to be believed; Error{not_supported}: the host refuses every version, or our capabilities.
    Result<void> take(std::span<const std::byte> message);
    /// Says how much memory there is, if the host wants to know.
    Result<void> report();

    State state() const { return state_; }
    Version version() const { return versions[attempt_]; }
    bool reports_wanted() const { return state_ == State::running && reports_wanted_; }
    /// Pages that are with the host.
    u64 away() const { return away_; }

  private:
    struct Run {
        std::byte* data;
        u64 first; // page number
        u64 pages;
    };

    Result<void> ask_version();
    Result<void> version_answered(std::span<const std::byte> message, const Header& header);
    Result<void> capabilities_answered(std::span<const std::byte> message, const Header& header);
    Result<void> inflate(std::span<const std::byte> message, const Header& header);
    Result<void> deflate(std::span<const std::byte> message, const Header& header);
    Result<void> take_back(PageRange range);
    template <class T>
    Result<void> send(T& message, u32 transaction);

    Link& link_;
    Memory memory_;
    State state_ = State::closed;
    u32 attempt_ = 0;
    u32 transaction_ = 0; // of our own last question
    bool reports_wanted_ = true;
    std::array<Run, capacity> runs_{};
    u32 run_count_ = 0;
    u64 away_ = 0;
    std::array<std::byte, max_message> response_{};
};

} // namespace fl::drivers::hv_balloon
