// Shared memory with a misbehaving peer, for tests and fuzzers of ring readers. Not used by the running kernel.
export module io.ring.hostile;
import core.std;
import io.ring.memory;

export namespace fl::io {

/// FlatMemory that calls a hook before each read, so that the "host" can change a value between two reads of it;
/// `reads` counts the reads.
class HostileMemory {
  public:
    struct State {
        std::span<std::byte> storage;
        void (*before_read)(void* context, State& state, usize offset, usize count) = nullptr;
        void* context = nullptr;
        u64 reads = 0;

        template <class T>
        void poke(usize offset, T value) {
            std::memcpy(storage.data() + offset, &value, sizeof(T));
        }
    };

    HostileMemory() = default;
    explicit HostileMemory(State& state) : state_(&state), flat_(state.storage) {}

    usize size() const { return flat_.size(); }
    template <class W>
    W load_relaxed(usize offset) const {
        tamper(offset, sizeof(W));
        return flat_.template load_relaxed<W>(offset);
    }
    template <class W>
    W load_acquire(usize offset) const {
        tamper(offset, sizeof(W));
        return flat_.template load_acquire<W>(offset);
    }
    template <class W>
    void store_relaxed(usize offset, W value) {
        flat_.template store_relaxed<W>(offset, value);
    }
    template <class W>
    void store_release(usize offset, W value) {
        flat_.template store_release<W>(offset, value);
    }
    void full_barrier() const { flat_.full_barrier(); }
    void copy_out(usize offset, std::byte* into, usize count) const {
        tamper(offset, count);
        flat_.copy_out(offset, into, count);
    }
    void copy_in(usize offset, const std::byte* from, usize count) { flat_.copy_in(offset, from, count); }

  private:
    void tamper(usize offset, usize count) const {
        ++state_->reads;
        if (state_->before_read != nullptr) {
            state_->before_read(state_->context, *state_, offset, count);
        }
    }
    State* state_ = nullptr;
    FlatMemory flat_;
};
static_assert(RingMemory<HostileMemory>);

} // namespace fl::io
