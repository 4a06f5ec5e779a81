// The three rings of a PVSCSI adapter [pvscsi]: requests, completions, messages. What the adapter returns is read once
// and checked against what it can own; what a completion means is up to the queue.
export module drivers.pvscsi.rings;
import core.std;
import core.dma;
import core.result;
import io.ring;
import drivers.pvscsi.protocol;
import drivers.pvscsi.adapter;

export namespace fl::drivers::pvscsi {

/// Reads and writes are kicked when the adapter has at least as many unprocessed ones as it asks for [pvscsi].
struct CallThreshold : io::Never {
    static constexpr bool needs_consumed = true;
    bool enabled = false; // else each turn with commands is kicked
    template <class M, class P, class W>
    bool wanted(M& memory, const io::RingLayout& layout, const P& p, W, W now) const {
        if (!enabled) {
            return true;
        }
        memory.full_barrier(); // our position before the adapter's
        return p.distance(memory.template load_relaxed<W>(layout.consumed), now) >=
               memory.template load_relaxed<W>(RingsState::request_call_threshold);
    }
};

class Rings {
  public:
    /// The adapter has the rings, empty. `threshold`: see CallThreshold.
    Result<void> start(const Memory& memory, bool threshold);

    /// False: the request ring is full.
    inline bool produce(const RequestDescriptor& request) { return requests_->produce(request); }
    /// Requests were produced and not published.
    inline bool unpublished() const { return requests_->unpublished() != 0; }
    /// The adapter sees the requests. True: it wants a kick for them.
    inline bool publish() { return requests_->publish(); }

    /// The next completion, copied. False: there is none. Error{protocol}: more of them than requests.
    inline Result<bool> take(CompletionDescriptor& completion) {
        const auto found = completions_->available(requests_->owed());
        if (!found) [[unlikely]] {
            return found.error();
        }
        if (*found == 0) {
            return false;
        }
        static_cast<void>(completions_->take(completion)); // the only read of it
        static_cast<void>(requests_->retire(1));           // at most `owed`
        return true;
    }
    inline void release() { completions_->release(); }
    /// True: a completion is available.
    inline Result<bool> arm() { return completions_->arm(1, requests_->owed()); }

    /// Calls `f` with each message. Error{protocol}: more than the ring holds.
    template <class F>
    Result<void> take_messages(F&& f) {
        if (auto found = messages_->available(); !found) {
            return found.error();
        }
        for (MessageDescriptor message; messages_->take(message);) {
            f(message);
        }
        messages_->release();
        return {};
    }

  private:
    std::optional<io::Producer<io::MappedMemory, io::FreeRunning<u32>, CallThreshold>> requests_;
    std::optional<io::Consumer<io::MappedMemory, io::FreeRunning<u32>, io::Always>> completions_;
    std::optional<io::Consumer<io::MappedMemory, io::FreeRunning<u32>, io::Never>> messages_;
};

} // namespace fl::drivers::pvscsi
