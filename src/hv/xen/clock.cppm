// Xen's system time, as the vcpu_time_info of a virtual CPU gives it [xen-public xen.h]: nanoseconds since the start of
// the domain, which expiries of timers and the times of run states are told in.
export module hv.xen.clock;
import core.std;
export import hv.xen.protocol;

export namespace fl::hv::xen {

/// Calls read() between two readings of an equal, even version. False: Xen keeps changing the values.
bool read_consistently(const u32& version, auto&& read) {
    std::atomic_ref<u32> counter(const_cast<u32&>(version));
    for (u32 tries = 0; tries < 16; ++tries) {
        const u32 before = counter.load(std::memory_order_acquire); // pairs with Xen's order: version, values, version
        read();
        std::atomic_thread_fence(std::memory_order_acquire);
        if (before % 2 == 0 && counter.load(std::memory_order_relaxed) == before) {
            return true;
        }
    }
    return false;
}
/// A value that Xen may change at any time.
template <class T>
T read_once(const T& value) {
    return *static_cast<const volatile T*>(&value);
}

/// The rate of the time stamp counter in Hz: (10^9 << 32) / mul >> shift. Nothing: it is not plausible.
std::optional<u64> frequency(u32 mul, i8 shift);
/// `cycles` of the time stamp counter in ns: (cycles << shift) * mul >> 32; at most ~0. Nothing: no such scale.
std::optional<u64> scaled(u64 cycles, u32 mul, i8 shift);
/// The scale in `time`; nothing: Xen has not written it yet, or keeps changing it.
std::optional<u64> pvclock_hz(const VcpuTimeInfo& time);
/// The system time now, in ns; `time` is that of the calling virtual CPU. Nothing: likewise.
std::optional<u64> system_time(const VcpuTimeInfo& time);
/// The same at `tsc`. A counter that is behind tsc_timestamp gives the system time of that.
std::optional<u64> system_time(const VcpuTimeInfo& time, u64 tsc);

} // namespace fl::hv::xen
