module drivers.claims;
import core.std;
import core.result;
import core.vector;
import drivers.table;

namespace fl::drivers {

bool Claims::offered(std::string_view driver, DeviceId id) const {
    // A driver is not paired with itself, so it is not offered a device that it already holds. Two native drivers have
    // different controllers: a number means their common twin, not the same disk.
    const auto native = [&](std::string_view name) {
        const DriverInfo* const info = plan_->driver(name);
        return info != nullptr && !info->synthetic;
    };
    return std::ranges::none_of(claims_, [&](const Claim& claim) {
        return claim.id == id && !plan_->both(driver, claim.driver) &&
               (driver == claim.driver || !native(driver) || !native(claim.driver));
    });
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
