module io.net;
import core.std;
import core.result;
import core.time;
import io.executor;

namespace fl::io {

Error to_error(SendStatus status) {
    switch (status) {
    case SendStatus::too_long: return {Code::bad_argument, "the frame is longer than the device's MTU permits"};
    case SendStatus::too_short: return {Code::bad_argument, "the frame has no whole Ethernet header"};
    case SendStatus::timed_out: return {Code::timed_out, "the network device took no frame within the bound"};
    case SendStatus::device_gone: return {Code::device_gone, "the network device is closed"};
    default: return {Code::bad_argument, "the frame was not sent"};
    }
}

NetDevice::~NetDevice() {
    receiver_ = nullptr; // it may be gone, and this is no whole device any more
    set_open(false);
}

SendStatus NetDevice::try_send(const OutgoingFrame& frame, Checksum checksum) {
    if (!open_) {
        return SendStatus::device_gone;
    }
    if (frame.head.size() < ethernet_header) {
        return SendStatus::too_short;
    }
    if (frame.size() > max_frame()) {
        return SendStatus::too_long;
    }
    if (!start(frame, checksum)) {
        return SendStatus::timed_out;
    }
    ++counters_.sent;
    counters_.sent_octets += frame.size();
    return SendStatus::sent;
}

SendStatus NetDevice::send_now(const OutgoingFrame& frame, Checksum checksum) {
    return first_ != nullptr ? SendStatus::timed_out : try_send(frame, checksum);
}

void NetDevice::room() {
    while (first_ != nullptr) {
        Send& send = *first_;
        const SendStatus status = try_send(send.frame_, send.checksum_);
        if (status == SendStatus::timed_out) {
            return;
        }
        send.withdraw();
        send.status_ = status;
        executor_.make_ready(send);
    }
}

void NetDevice::deliver(std::span<const std::byte> frame, Checksum checksum) {
    ++counters_.received;
    counters_.received_octets += frame.size();
    if (receiver_ != nullptr) {
        receiver_->receive(*this, frame, checksum);
    }
}

void NetDevice::set_link(bool up) {
    if (std::exchange(link_up_, up) != up && receiver_ != nullptr) {
        receiver_->link_changed(*this);
    }
}

void NetDevice::set_open(bool open) {
    if (std::exchange(open_, open) == open || open) {
        return;
    }
    room(); // ends all as device_gone
    if (receiver_ != nullptr) {
        receiver_->link_changed(*this);
    }
}

bool NetDevice::Send::await_ready() {
    status_ = device_.send_now(frame_, checksum_);
    return status_ != SendStatus::timed_out;
}

void NetDevice::Send::await_suspend(std::coroutine_handle<> h) {
    waiter = h;
    status_ = SendStatus::not_sent;
    queued_ = true;
    (device_.last_ != nullptr ? device_.last_->next_ : device_.first_) = this;
    device_.last_ = this;
    Bound(device_.executor_, bound_).apply_to(*this);
    device_.executor_.start(*this);
}

SendStatus NetDevice::Send::await_resume() {
    if (status_ == SendStatus::not_sent) { // resumed by the timer
        status_ = SendStatus::timed_out;
    }
    withdraw();
    return status_;
}

void NetDevice::Send::withdraw() {
    device_.executor_.cancel(*this);
    if (!std::exchange(queued_, false)) {
        return;
    }
    Send* before = nullptr;
    for (Send** at = &device_.first_; *at != nullptr; before = *at, at = &(*at)->next_) {
        if (*at == this) {
            *at = next_;
            if (device_.last_ == this) {
                device_.last_ = before;
            }
            return;
        }
    }
}

} // namespace fl::io
