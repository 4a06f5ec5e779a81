// A growing array on the heap, for lists whose length depends on the machine: devices, disks, units. Running out of
// memory is reported, not fatal. Not for hot paths or interrupt handlers.
export module core.vector;
import core.std;

export namespace fl {

namespace vector_detail {

/// Returns `bytes` of memory with the first `used` bytes of `old` copied, and frees `old`. nullptr: out of memory,
/// `old` is kept.
void* grow(void* old, usize used, usize bytes);
/// For tests: the next `n` growths of all vectors succeed, all later ones fail; ~0 removes the limit.
void fail_after(u64 n);

} // namespace vector_detail

template <class T>
    requires(std::is_trivially_copyable_v<T> && alignof(T) <= 16)
class Vector {
  public:
    constexpr Vector() = default;
    Vector(const Vector&) = delete;
    Vector& operator=(const Vector&) = delete;
    constexpr ~Vector() { clear(); }

    /// False: out of memory, nothing has changed. A push() invalidates references to the elements.
    [[nodiscard]] bool push(const T& value) {
        if (size_ == room_ && !grow()) {
            return false;
        }
        new (data_ + size_) T(value);
        ++size_;
        return true;
    }
    /// Moves the following elements down by one.
    void remove(usize at) {
        std::copy(data_ + at + 1, data_ + size_, data_ + at);
        --size_;
    }
    /// Also frees the memory.
    constexpr void clear() {
        release(data_);
        data_ = nullptr;
        size_ = room_ = 0;
    }

    constexpr usize size() const { return size_; }
    constexpr bool empty() const { return size_ == 0; }
    T& operator[](usize at) { return data_[at]; }
    const T& operator[](usize at) const { return data_[at]; }
    T* begin() { return data_; }
    T* end() { return data_ + size_; }
    const T* begin() const { return data_; }
    const T* end() const { return data_ + size_; }

  private:
    bool grow() {
        const usize room = room_ == 0 ? 8 : 2 * room_;
        void* const bytes =
            room > ~usize{0} / sizeof(T) ? nullptr : vector_detail::grow(data_, size_ * sizeof(T), room * sizeof(T));
        if (bytes == nullptr) {
            return false;
        }
        data_ = static_cast<T*>(bytes);
        room_ = room;
        return true;
    }
    static constexpr void release(T* data) {
        if (data != nullptr) {
            ::operator delete(data);
        }
    }

    T* data_ = nullptr;
    usize size_ = 0;
    usize room_ = 0;
};

} // namespace fl
