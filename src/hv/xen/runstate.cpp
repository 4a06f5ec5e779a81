module hv.xen.runstate;
import core.std;
import hv.xen.clock;

namespace fl::hv::xen {

std::optional<u64> stolen_time(const RunstateInfo& info, std::optional<u64> now) {
    std::atomic_ref<u64> entry(const_cast<u64&>(info.state_entry_time));
    for (u32 tries = 0; tries < 16; ++tries) {
        // Acquire, twice: pairs with Xen's order: the flag, the values, without the flag.
        const u64 before = entry.load(std::memory_order_acquire);
        const u32 state = read_once(info.state);
        const u64 runnable = read_once(info.time[runstate_runnable]);
        const u64 offline = read_once(info.time[runstate_offline]);
        std::atomic_thread_fence(std::memory_order_acquire);
        if ((before & runstate_update) != 0 || entry.load(std::memory_order_relaxed) != before) {
            continue;
        }
        const bool counts = state == runstate_runnable || state == runstate_offline;
        return runnable + offline + (counts && now && *now > before ? *now - before : 0);
    }
    return std::nullopt;
}

} // namespace fl::hv::xen
