// I/O ports: devices claim ranges; an access is passed to the device that claims its first port. Unclaimed ports read
// as all ones.
export module vmm.ports;
import core.std;
import core.result;

export namespace fl::vmm {

/// A device with I/O ports. `size` is 1, 2 or 4 bytes; an access may extend beyond the claimed range; the device
/// defines the result.
class PortDevice {
  public:
    virtual u32 in(u16 port, unsigned size) = 0;
    virtual void out(u16 port, unsigned size, u32 value) = 0;

  protected:
    ~PortDevice() = default;
};

/// An interrupt line to the interrupt controllers.
class IrqLine {
  public:
    virtual void set(bool level) = 0;

  protected:
    ~IrqLine() = default;
};

class PortBus {
  public:
    static constexpr usize max_ranges = 32;

    /// `device` lives as long as the bus. Error{exhausted}: no free entry. Error{busy}: another device has claimed one
    /// of the ports.
    Result<void> claim(u16 first, u16 count, PortDevice& device, std::string_view name) {
        if (count_ == max_ranges) {
            return Error{Code::exhausted, "no more ranges of I/O ports can be claimed"};
        }
        for (const Range& range : std::span{ranges_}.first(count_)) {
            if (first < range.first + range.count && range.first < first + count) {
                return Error{Code::busy, "a range of I/O ports is claimed twice", range.first, first};
            }
        }
        ranges_[count_++] = {first, count, &device, name};
        return {};
    }
    u32 in(u16 port, unsigned size) {
        Range* const range = find(port);
        if (range == nullptr) {
            ++unclaimed_;
            return ~u32{0} >> (32 - 8 * size);
        }
        ++range->accesses;
        return range->device->in(port, size);
    }
    void out(u16 port, unsigned size, u32 value) {
        Range* const range = find(port);
        if (range == nullptr) {
            ++unclaimed_;
            return;
        }
        ++range->accesses;
        range->device->out(port, size, value);
    }
    /// visit(name, accesses) for each range, and for "unclaimed".
    template <class F>
    void each(F&& visit) const {
        for (const Range& range : std::span{ranges_}.first(count_)) {
            visit(range.name, range.accesses);
        }
        visit(std::string_view{"unclaimed"}, unclaimed_);
    }

  private:
    struct Range {
        u32 first = 0;
        u32 count = 0;
        PortDevice* device = nullptr;
        std::string_view name{};
        u64 accesses = 0;
    };
    Range* find(u16 port) {
        for (Range& range : std::span{ranges_}.first(count_)) {
            if (port >= range.first && port < range.first + range.count) {
                return &range;
            }
        }
        return nullptr;
    }

    std::array<Range, max_ranges> ranges_{};
    usize count_ = 0;
    u64 unclaimed_ = 0;
};

} // namespace fl::vmm
