// How long a slow disk takes for an answer, and the answers that wait for their time.
export module host.latency;
import host.std;

export namespace fl::host {

/// The time from a request to its answer: fixed, or drawn for each request from a generator with a seed, so that a run
/// can be repeated.
class Latency {
  public:
    enum class Shape : u8 { fixed, exponential, uniform };
    /// `100us`, `exp:100us` (the mean), `uniform:50us..150us`; the units are ns, us, ms and s, at most 10 s. Otherwise
    /// `wrong` says what was expected and what was seen.
    static std::optional<Latency> parse(std::string_view text, u64 seed, std::string& wrong);
    /// The next request's, in nanoseconds; an exponential one is at most 20 times the mean.
    u64 draw();
    Shape shape() const { return shape_; }
    u64 first() const { return first_; }
    u64 last() const { return last_; }

  private:
    Latency(Shape shape, u64 first, u64 last, u64 seed) : shape_(shape), first_(first), last_(last), state_(seed) {}
    u64 random();
    Shape shape_;
    u64 first_; // nanoseconds: the value, the mean, the least
    u64 last_;  // the most, of a uniform one
    u64 state_;
};

/// Values with the times at which they are due, earliest first; of equal times the first one that was put in.
template <class T>
class DelayQueue {
  public:
    void push(u64 due, T value) { entries_.emplace(due, std::move(value)); }
    bool empty() const { return entries_.empty(); }
    usize size() const { return entries_.size(); }
    /// When the earliest is due; ~0: there is none.
    u64 next() const { return entries_.empty() ? ~u64{0} : entries_.begin()->first; }
    /// The earliest, if it is due.
    std::optional<T> pop(u64 now) {
        if (entries_.empty() || entries_.begin()->first > now) {
            return std::nullopt;
        }
        return std::move(entries_.extract(entries_.begin()).mapped());
    }
    /// Everything is due at once, in the same order.
    void hasten() {
        std::multimap<u64, T> all;
        for (auto& [due, value] : entries_) {
            all.emplace(0, std::move(value));
        }
        entries_.swap(all);
    }

  private:
    std::multimap<u64, T> entries_;
};

} // namespace fl::host
