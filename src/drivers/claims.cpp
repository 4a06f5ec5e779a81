module drivers.claims;
import core.std;
import core.result;
import core.text;
import drivers.table;

namespace fl::drivers {

bool Claims::offered(std::string_view driver, Slot slot) const {
    // No driver is paired with itself: what it holds already is not offered to it again.
    for (usize i = 0; i < count_; ++i) {
        const Claim& claim = claims_[i];
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

} // namespace fl::drivers
