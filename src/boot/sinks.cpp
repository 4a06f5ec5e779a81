module;
#include "core/try.hpp"
module boot.sinks;
import core.std;
import core.result;
import core.text;
import core.log;
import core.vector;
import io.executor;
import io.block;
import io.net;
import io.shared_lane;
import drivers.claims;
import drivers.driver;
import boot.devices;
import boot.disks;
import boot.nets;

namespace fl::boot {

Attached::~Attached() {
    for (io::SharedLanes* lanes : shared_lanes) {
        delete lanes;
    }
}

bool DriverDeviceSink::offered(drivers::DeviceId id) {
    return id.number == drivers::no_twin || attached_.claims.offered(driver_, id);
}

Result<void> DriverDeviceSink::claim(drivers::DeviceId id) {
    if (id.number != drivers::no_twin) {
        CHECK(attached_.claims.attached(driver_, id));
    }
    ++count_;
    return {};
}

void DriverDeviceSink::unused(const drivers::UnusedUnit& unit) {
    reported_ = reported_ || unit.address == expected_.view();
    if (attached_.devices == nullptr) {
        return;
    }
    DeviceEntry entry = describe(unit);
    if (unit.why == drivers::Unused::taken && unit.reason.empty()) {
        print(entry.reason, "left to {}, which has the same {}", attached_.claims.holder({unit.kind, unit.number}),
              name(unit.kind));
    }
    attached_.devices->add(entry);
}

void DriverDeviceSink::withdraw(drivers::DeviceId id) {
    if (id.number != drivers::no_twin) {
        attached_.claims.release(driver_, id);
    }
}

FixedText<16> DriverDiskSink::free_name(std::string_view prefix) {
    for (u32 number = 0;; ++number) { // ends: there are finitely many disks
        const FixedText<16> name = drivers::disk_name(prefix, number);
        if (attached_.disks.find(name.view()) == nullptr) {
            return name;
        }
    }
}

Result<void> DriverDiskSink::announce(io::BlockDevice& disk, u32 disk_number) {
    CHECK(attached_.disks.takes(disk));
    CHECK(claims_.claim(drivers::disk_id(disk_number)));
    if (attached_.executors.size() > disk.lanes()) { // unless it has been announced before
        share_queues(disk);
    }
    attached_.disks.add(disk);
    return {};
}

// The disk works without these lanes.
void DriverDiskSink::share_queues(io::BlockDevice& disk) {
    auto* const lanes = new (std::nothrow) io::SharedLanes;
    Result<void> shared = Error{Code::exhausted, "no memory for lanes that share a queue"};
    if (lanes != nullptr && attached_.shared_lanes.push(lanes)) {
        shared = lanes->add_to(disk, attached_.executors);
    } else {
        delete lanes;
    }
    if (!shared) {
        log::warning("{}: lanes for {} of {} processors: {}", disk.identity().name.view(), disk.lanes(),
                     attached_.executors.size(), shared.error());
    }
}

u32 DriverNetSink::number_of(const io::MacAddress& address) {
    if (!attached_.claims.pairs(driver_)) {
        return drivers::no_twin;
    }
    for (usize i = 0; i < attached_.addresses.size(); ++i) {
        if (attached_.addresses[i] == address) {
            return static_cast<u32>(i);
        }
    }
    if (!attached_.addresses.push(address)) {
        log::warning("no memory for the address of a network card: it may be attached twice");
        return drivers::no_twin;
    }
    return static_cast<u32>(attached_.addresses.size() - 1);
}

Result<void> DriverNetSink::announce(io::NetDevice& card, u32 number) {
    CHECK(attached_.nets.takes(card));
    CHECK(claims_.claim(id(number)));
    attached_.nets.add(card);
    return {};
}

} // namespace fl::boot
