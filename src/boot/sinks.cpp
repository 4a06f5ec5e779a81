module;
#include "core/try.hpp"
module boot.sinks;
import core.std;
import core.result;
import core.text;
import io.block;
import drivers.claims;
import drivers.driver;
import boot.devices;
import boot.disks;

namespace fl::boot {

bool ClaimSink::offered(drivers::DeviceId id) {
    return id.number == drivers::no_twin || attached_.claims.offered(driver_, id);
}

Result<void> ClaimSink::claim(drivers::DeviceId id) {
    if (id.number != drivers::no_twin) {
        CHECK(attached_.claims.attached(driver_, id));
    }
    ++count_;
    return {};
}

void ClaimSink::unused(const drivers::UnusedUnit& unit) {
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

void ClaimSink::gone(drivers::DeviceId id) {
    if (id.number != drivers::no_twin) {
        attached_.claims.released(driver_, id);
    }
}

Result<void> DiskPort::announce(io::BlockDevice& disk, u32 disk_number) {
    CHECK(disks_.takes(disk.identity().name.view()));
    CHECK(claims_.claim(drivers::disk_id(disk_number)));
    disks_.add(disk);
    return {};
}

} // namespace fl::boot
