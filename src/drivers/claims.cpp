module drivers.claims;
import core.std;
import core.result;
import core.text;
import core.vector;
import drivers.table;

namespace fl::drivers {

bool Claims::offered(std::string_view driver, Slot slot) const {
    // No driver is paired with itself: what it holds already is not offered to it again.
    for (const Claim& claim : claims_) {
        if (claim.slot == slot && !plan_->both(driver, claim.driver)) {
            return false;
        }
    }
    return true;
}

Result<void> Claims::attached(std::string_view driver, Slot slot) {
    if (!offered(driver, slot)) {
        return Error{Code::busy, "this device is attached already: a driver must ask offered() before it touches one"};
    }
    if (!claims_.push({slot, driver})) {
        return Error{Code::exhausted, "no memory for a list of disks"};
    }
    return {};
}

bool Claims::released(std::string_view driver, Slot slot) {
    for (usize i = 0; i < claims_.size(); ++i) {
        if (claims_[i].slot == slot && claims_[i].driver == driver) {
            claims_.remove(i);
            return true;
        }
    }
    return false;
}

std::string_view Claims::holder(Slot slot) const {
    for (const Claim& claim : claims_) {
        if (claim.slot == slot) {
            return claim.driver;
        }
    }
    return {};
}

} // namespace fl::drivers
