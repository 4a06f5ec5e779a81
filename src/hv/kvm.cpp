module;
#include "core/try.hpp"
module hv.kvm;
import core.std;
import core.result;
import core.log;
import core.dma;
import core.cpuid;
import hv.backend;
import hv.kvm.protocol;

namespace fl::hv {

namespace {

// Takes one consistent reading. The host updates the page before it enters this processor, so the page is valid once
// wrmsr has returned. If it keeps changing for this many attempts, it is not a clock.
constexpr int attempts = 64;

std::optional<kvm::ClockPage> read_clock(std::byte* page) {
    auto word = [&](usize index) -> u32& { return reinterpret_cast<u32*>(page)[index]; };
    for (int attempt = 0; attempt < attempts; ++attempt) {
        kvm::ClockPage copy{};
        // Acquire: pairs with the host's write of an even version after the fields; the fields are read after it.
        const u32 before = std::atomic_ref(word(0)).load(std::memory_order_acquire);
        std::array<u32, sizeof(copy) / 4> words;
        for (usize i = 0; i < words.size(); ++i) {
            words[i] = std::atomic_ref(word(i)).load(std::memory_order_relaxed); // ordered by the two loads of version
        }
        // Orders the loads of the fields before the second load of version; pairs with the host's odd version before it
        // writes.
        std::atomic_thread_fence(std::memory_order_acquire);
        const u32 after = std::atomic_ref(word(0)).load(std::memory_order_relaxed); // ordered by the fence above
        if (before == after && before % 2 == 0 && before != 0) {
            std::memcpy(&copy, words.data(), sizeof(copy));
            return copy;
        }
    }
    return std::nullopt;
}

} // namespace

Result<void> Kvm::install(Environment& environment) {
    const Sighting* sighting = environment.sightings.find(VmGuest::kvm);
    features_ = sighting != nullptr ? sighting->features : 0;
    tsc_hz_ = tsc_hz_by_cpuid(environment.cpuid);
    if (tsc_hz_) {
        clock_name_ = "cpuid";
        return {};
    }
    if (!kvm::has(features_, kvm::Feature::clocksource2)) {
        return {}; // calibrate: TCG, or a KVM configured to hide its clock
    }
    TRY(DmaBuffer page, environment.memory.buffer(page_size));
    environment.cpu.write_msr(kvm::msr_system_time, page.bus() | 1);
    const auto clock = read_clock(page.data());
    environment.cpu.write_msr(kvm::msr_system_time, 0);
    if (!clock) {
        log::warning("kvm: the clock page was not filled in: the time stamp counter will be calibrated");
        return {};
    }
    const u64 hz = kvm::frequency_of(clock->tsc_to_system_mul, clock->tsc_shift);
    if (hz < 1'000'000 || hz > 100'000'000'000) {
        log::warning("kvm: the clock page has an invalid frequency, {} Hz: it will be calibrated", hz);
        return {};
    }
    tsc_hz_ = hz;
    clock_name_ = "kvmclock";
    return {};
}

} // namespace fl::hv
