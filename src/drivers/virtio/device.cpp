module;
#include "core/try.hpp"
module drivers.virtio.device;
import core.std;
import core.log;
import core.result;
import core.text;
import core.time;
import io.executor;
import io.task;

namespace fl::drivers::virtio {

FixedText<240> names_of(u64 features, std::span<const FeatureName> names) {
    FixedText<240> text;
    for (u32 bit = 0; bit < 64; ++bit) {
        if ((features & feature(bit)) == 0) {
            continue;
        }
        const auto has_bit = [&](const FeatureName& f) { return f.bit == bit; };
        const auto own = std::ranges::find_if(names, has_bit);
        const auto common = std::ranges::find_if(common_features, has_bit);
        text.write(text.view().empty() ? "" : ", ");
        if (own != names.end()) {
            text.write(own->name);
        } else if (common != common_features.end()) {
            text.write(common->name);
        } else {
            print(text, "bit {}", bit);
        }
    }
    return text;
}

io::Task<Result<void>> Device::reset(io::Executor& executor, Nanoseconds timeout) {
    status_ = 0;
    write_status(0);
    const io::Bound bound(executor, timeout);
    for (Nanoseconds pause = 1'000; read_status() != 0; pause = std::min<Nanoseconds>(2 * pause, 10'000'000)) {
        if (bound.passed()) {
            co_return Error{Code::timed_out,
                            "the device does not finish its reset (device status, 0 was expected): it cannot be used "
                            "again until the machine restarts",
                            0, read_status()};
        }
        co_await executor.sleep(pause);
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Device::start(io::Executor& executor, Nanoseconds timeout) {
    if (read_status() != 0) {
        CO_CHECK(co_await reset(executor, timeout));
    }
    set_status(status_acknowledge);
    set_status(status_acknowledge | status_driver);
    co_return Result<void>{};
}

Result<u64> Device::negotiate(u64 supported, u64 required, u64 withheld, std::span<const FeatureName> names) {
    const u64 offered = read_features(0) | (legacy() ? 0 : u64{read_features(1)} << 32);
    if ((offered & required) != required) {
        log::warning("{}: features that the driver needs are not offered: {}", name(),
                     names_of(required & ~offered, names));
        return Error{Code::not_supported, "the device does not offer features that the driver needs (feature bits)",
                     required, offered};
    }
    const u64 accepted = offered & supported;
    if (withheld != 0) {
        const auto list = [&](u64 features) {
            return features == 0 ? FixedText<240>("none") : names_of(features, names);
        };
        log::info("{}: features= withholds {}; without effect, because the device does not offer them: {}", name(),
                  list(withheld & offered), list(withheld & ~offered));
    }
    log::debug("{}: features {}", name(), names_of(accepted, names));
    if (const u64 unused = offered & ~supported & ~withheld; unused != 0) {
        log::info("{}: offered, and not used by this driver: {}", name(), names_of(unused, names));
    }
    write_features(0, static_cast<u32>(accepted));
    if (legacy()) {
        return accepted;
    }
    write_features(1, static_cast<u32>(accepted >> 32));
    set_status(static_cast<u8>(status_ | status_features_ok));
    if (const u8 seen = read_status(); (seen & status_features_ok) == 0) {
        return Error{Code::not_supported, "the device refuses the chosen features (device status)", status_, seen};
    }
    return accepted;
}

} // namespace fl::drivers::virtio
