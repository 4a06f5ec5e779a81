module;
#include "core/try.hpp"
module hv.hyperv.clock;
import core.std;
import core.result;
import core.cpuid;
import core.dma;
import hv.backend;
import hv.hyperv.protocol;

namespace fl::hv::hyperv {

std::optional<u64> frequency_of_scale(u64 scale) {
    // scale = 10^7 * 2^64 / hz: for 20 MHz (scale 2^63) to 100 GHz.
    constexpr u64 highest = u64{1} << 63;
    constexpr u64 lowest = (highest / 100'000'000'000) * 2 * reference_hz;
    if (scale > highest || scale < lowest) {
        return std::nullopt;
    }
    // 10^7 * 2^64 / scale by long division: a freestanding build has no 128-bit division.
    u64 rest = reference_hz; // < scale
    u64 hz = 0;
    for (int bit = 0; bit < 64; ++bit) {
        rest <<= 1;
        hz <<= 1;
        if (rest >= scale) {
            rest -= scale;
            hz |= 1;
        }
    }
    return hz;
}

Result<void> ReferenceClock::install(Privileged& cpu, DmaAllocator& memory, const CpuidRegisters& leaf) {
    cpu_ = &cpu;
    counter_offered_ = (leaf.eax & privileges::reference_counter) != 0;
    if ((leaf.eax & privileges::frequencies) != 0 && (leaf.edx & features::frequency_registers) != 0) {
        // an implausible value is ignored: the page may give the frequency
        if (const u64 hz = cpu.read_msr(msr::tsc_frequency); hz >= 1'000'000 && hz <= 100'000'000'000) {
            tsc_hz_ = hz;
            name_ = "Hyper-V frequency register";
        }
    }
    if ((leaf.eax & privileges::reference_tsc) != 0) {
        TRY(memory_, memory.buffer(page_size));
        page_ = reinterpret_cast<const ReferenceTscPage*>(memory_.data());
        register_before_ = cpu.read_msr(msr::reference_tsc);
        cpu.write_msr(msr::reference_tsc, memory_.bus() | (register_before_ & page_register_reserved) | page_enable);
    }
    if (!tsc_hz_) {
        if (const auto scale = read_page()) {
            tsc_hz_ = frequency_of_scale(scale->scale);
            name_ = tsc_hz_ ? "Hyper-V reference TSC" : name_;
        }
    }
    return {};
}

void ReferenceClock::uninstall() {
    if (page_ != nullptr) {
        page_ = nullptr;
        cpu_->write_msr(msr::reference_tsc, register_before_ & page_register_reserved);
    }
}

std::optional<ReferenceClock::Scale> ReferenceClock::read_page() const {
    if (page_ == nullptr) {
        return std::nullopt;
    }
    for (u32 tries = 0; tries < 16; ++tries) {
        // Acquire, twice: reads the values between two equal sequences. Pairs with the hypervisor's order: it
        // invalidates the sequence, writes the values, then the next sequence [hv-tlfs §12.7.3].
        const u32 before = std::atomic_ref(const_cast<u32&>(page_->sequence)).load(std::memory_order_acquire);
        const u64 scale = *static_cast<const volatile u64*>(&page_->scale);
        const i64 offset = *static_cast<const volatile i64*>(&page_->offset);
        std::atomic_thread_fence(std::memory_order_acquire);
        const u32 now = std::atomic_ref(const_cast<u32&>(page_->sequence)).load(std::memory_order_relaxed);
        if (before == reference_tsc_invalid) {
            return std::nullopt;
        }
        if (before == now) {
            return Scale{scale, offset};
        }
    }
    return std::nullopt;
}

bool ReferenceClock::page_valid() const { return read_page().has_value(); }

std::optional<u64> ReferenceClock::counter() const {
    if (!counter_offered_) {
        return std::nullopt;
    }
    return cpu_->read_msr(msr::reference_counter);
}

std::optional<u64> ReferenceClock::now(u64 tsc) const {
    if (const auto page = read_page()) {
        const u64 scaled = static_cast<u64>((static_cast<unsigned __int128>(tsc) * page->scale) >> 64);
        return scaled + static_cast<u64>(page->offset);
    }
    return counter();
}

} // namespace fl::hv::hyperv
