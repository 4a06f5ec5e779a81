// A growing array on the heap, for lists whose length the machine decides: devices, disks, units. Running out of memory
// is an answer, not an abort. Not for hot paths and not for interrupt handlers.
export module core.vector;
import core.std;

export namespace fl {

namespace vector_detail {

/// `bytes` of memory that begins with the `used` ones of `old`, which is freed; nullptr: none, and `old` stays.
void* grow(void* old, usize used, usize bytes);
/// For tests: the next `n` growths of all vectors succeed, all later ones fail until lifted with ~0.
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

    /// False: there is no memory, and nothing has changed. A push() ends references to the elements.
    [[nodiscard]] bool push(const T& value) {
        if (size_ == room_ && !grow()) {
            return false;
        }
        new (data_ + size_) T(value);
        ++size_;
        return true;
    }
    /// The elements after it move down by one.
    void remove(usize at) {
        std::copy(data_ + at + 1, data_ + size_, data_ + at);
        --size_;
    }
    /// Gives the memory back, too.
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
