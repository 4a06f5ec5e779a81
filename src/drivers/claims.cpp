module drivers.claims;
import core.std;
import core.result;
import core.vector;
import drivers.table;

namespace fl::drivers {

bool Claims::offered(std::string_view driver, DeviceId id) const {
    // A driver is not paired with itself, so it is not offered a device that it already holds.
    for (const Claim& claim : claims_) {
        if (claim.id == id && !plan_->both(driver, claim.driver)) {
            return false;
        }
    }
    return true;
}

Result<void> Claims::attached(std::string_view driver, DeviceId id) {
    if (!offered(driver, id)) {
        return Error{Code::busy, "this device is attached already: a driver must ask offered() before it touches one"};
    }
    if (!claims_.push({id, driver})) {
        return Error{Code::exhausted, "no memory for the list of devices that are attached"};
    }
    return {};
}

bool Claims::release(std::string_view driver, DeviceId id) {
    for (usize i = 0; i < claims_.size(); ++i) {
        if (claims_[i].id == id && claims_[i].driver == driver) {
            claims_.remove(i);
            return true;
        }
    }
    return false;
}

std::string_view Claims::holder(DeviceId id) const {
    for (const Claim& claim : claims_) {
        if (claim.id == id) {
            return claim.driver;
        }
    }
    return {};
}

} // namespace fl::drivers
