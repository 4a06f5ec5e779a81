module;
#include "core/try.hpp"
module drivers.nvme.registers;
import core.std;
import core.mmio;
import core.result;
import core.time;
import io.executor;
import io.task;

namespace fl::drivers::nvme {

namespace {
constexpr Nanoseconds ready_unit = 500'000'000; // of CAP.TO
}

Result<void> Registers::open(Mmio bar) {
    bar_ = bar;
    if (bar_.size() < doorbells + 16) {
        return Error{Code::protocol, "the NVMe controller's BAR 0 has no room for its registers and doorbells",
                     doorbells + 16, bar_.size()};
    }
    const auto capabilities = Capabilities::read(bar_);
    if (capabilities.raw == ~u64{0}) {
        gone_ = true;
        return Error{Code::device_gone, "the controller does not answer: its registers read as all ones"};
    }
    if (capabilities.get(Capabilities::mpsmin) != 0) {
        return Error{Code::not_supported, "the controller needs pages larger than 4096 bytes (CAP.MPSMIN)", 0,
                     capabilities.get(Capabilities::mpsmin)};
    }
    if ((capabilities.get(Capabilities::css) & 1) == 0) {
        return Error{Code::not_supported, "the controller has no NVM command set (CAP.CSS)", 1,
                     capabilities.get(Capabilities::css)};
    }
    largest_queue_ = static_cast<u32>(capabilities.get(Capabilities::mqes)) + 1;
    if (largest_queue_ < 2) {
        return Error{Code::protocol, "the controller's queues have fewer than two entries (CAP.MQES)", 1, 0};
    }
    stride_ = static_cast<u8>(capabilities.get(Capabilities::dstrd));
    version_ = Version::read(bar_).raw;
    command_sets_ = (capabilities.get(Capabilities::css) >> 6 & 1) != 0; // [nvme-base-2.0 §3.1.3.1, CAP.CSS]
    ready_bound_ = std::max<u64>(capabilities.get(Capabilities::to), 1) * ready_unit; // at most 127.5 s
    return {};
}

io::Task<Result<void>> Registers::wait_ready(bool ready) {
    const io::Bound bound(executor_, ready_bound_);
    for (;;) {
        const auto status = ControllerStatus::read(bar_);
        if (status.absent()) {
            gone_ = true;
            co_return Error{Code::device_gone, "the controller was removed: its registers read as all ones"};
        }
        if (ready && status.get(ControllerStatus::cfs)) {
            co_return Error{Code::io, "the controller reports a fatal error (CSTS.CFS) when it is enabled", 0,
                            status.raw};
        }
        if (status.get(ControllerStatus::rdy) == ready) {
            co_return Result<void>{};
        }
        if (bound.passed()) {
            co_return Error{Code::timed_out,
                            ready ? "the controller does not become ready within its own bound (CAP.TO)"
                                  : "the controller does not stop within its own bound (CAP.TO): reset the machine",
                            ready ? 1u : 0u, status.raw};
        }
        co_await executor_.sleep(1'000'000);
    }
}

io::Task<Result<void>> Registers::disable() {
    auto configuration = Configuration::read(bar_);
    if (configuration.get(Configuration::en)) {
        configuration.set(Configuration::en, false).write(bar_);
    }
    CO_CHECK(co_await wait_ready(false));
    enabled_ = false;
    co_return Result<void>{};
}

io::Task<Result<void>> Registers::enable(u64 submissions, u64 completions, u32 entries) {
    bar_.write<u32>(admin_queue_attributes, (entries - 1) << 16 | (entries - 1));
    bar_.write<u64>(admin_submission_base, submissions);
    bar_.write<u64>(admin_completion_base, completions);
    enabled_ = true;
    Configuration{}
        .set(Configuration::iosqes, 6)
        .set(Configuration::iocqes, 4)
        .set(Configuration::en, true)
        .write(bar_);
    co_return co_await wait_ready(true);
}

} // namespace fl::drivers::nvme
