module;
#include "core/try.hpp"
module drivers.claims;
import core.std;
import core.result;
import core.text;
import core.log;
import io.block;
import drivers.driver;
import drivers.table;

namespace fl::drivers {

bool Claims::offered(std::string_view driver, Slot slot) const {
    for (usize i = 0; i < count_; ++i) {
        const Claim& claim = claims_[i];
        if (claim.slot == slot && (claim.driver == driver || !plan_->both(driver, claim.driver))) {
            return false;
        }
    }
    return true;
}

Result<void> Claims::attached(std::string_view driver, Slot slot) {
    if (!offered(driver, slot)) {
        return Error{Code::busy, "this device is attached already: a driver must ask offered() before it touches one"};
    }
    if (count_ == capacity) {
        return Error{Code::exhausted, "more devices than there are slots for: attach fewer, or raise Claims::capacity", capacity, count_ + 1};
    }
    claims_[count_++] = {slot, driver};
    return {};
}

bool Claims::released(std::string_view driver, Slot slot) {
    for (usize i = 0; i < count_; ++i) {
        if (claims_[i].slot == slot && claims_[i].driver == driver) {
            std::copy(claims_.begin() + i + 1, claims_.begin() + count_, claims_.begin() + i);
            --count_;
            return true;
        }
    }
    return false;
}

std::string_view Claims::holder(Slot slot) const {
    for (usize i = 0; i < count_; ++i) {
        if (claims_[i].slot == slot) {
            return claims_[i].driver;
        }
    }
    return {};
}

bool DriverDisks::offered(u32 disk_number) {
    if (disk_number == no_twin || claims_.offered(driver_, disk_slot(disk_number))) {
        return true;
    }
    ++withheld_;
    log::info("{}: disk {} is withheld: {} has it", driver_, disk_number, claims_.holder(disk_slot(disk_number)));
    return false;
}

Result<void> DriverDisks::announce(io::BlockDevice& disk, u32 disk_number) {
    if (disks_.count == AttachedDisks::capacity) {
        return Error{Code::exhausted, "more disks than there is room for: attach fewer", AttachedDisks::capacity, disks_.count + 1};
    }
    if (disk_number != no_twin) {
        CHECK(claims_.attached(driver_, disk_slot(disk_number)));
    }
    disks_.list[disks_.count++] = &disk;
    return {};
}

} // namespace fl::drivers
