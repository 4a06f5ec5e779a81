module drivers.e1000.queue;
import core.std;
import core.result;
import io.net;

namespace fl::drivers::e1000 {

// ---- sending ----

u32 Transmitter::reset() {
    for (u32 i = 0; i < ring_entries; ++i) {
        ring_.store(i, 0);
    }
    tail_ = 0;
    return std::exchange(in_flight_, 0);
}

void Transmitter::send(const io::OutgoingFrame& frame) {
    std::byte* const to = ring_.buffer(tail_);
    std::memcpy(to, frame.head.data(), frame.head.size());
    if (!frame.body.empty()) {
        std::memcpy(to + frame.head.size(), frame.body.data(), frame.body.size());
    }
    ring_.store(tail_, frame.size() | tx_end_of_packet | tx_insert_crc | tx_report_status);
    tail_ = (tail_ + 1) % ring_entries;
    ++in_flight_;
}

u32 Transmitter::reap(u64& errors) {
    u32 count = 0;
    for (; in_flight_ != 0; ++count) {
        const u64 word = ring_.load(head());
        if ((word & tx_done) == 0) {
            break;
        }
        errors += (word & tx_errors) != 0 ? 1 : 0;
        --in_flight_;
    }
    return count;
}

// ---- receiving ----

void Receiver::reset() {
    for (u32 i = 0; i < ring_entries; ++i) {
        ring_.store(i, 0);
    }
    next_ = 0;
    part_ = false;
}

Result<Receiver::Got> Receiver::take() {
    const u64 word = ring_.load(next_); // the only read of it
    if ((word & rx_done) == 0) {
        return Got::none;
    }
    const u32 length = rx_length(word);
    if (length > buffer_bytes) [[unlikely]] {
        return Error{Code::protocol, "a receive descriptor has more bytes than its buffer", buffer_bytes, length};
    }
    const bool first = !part_;
    part_ = (word & rx_end_of_packet) == 0;
    Got got = Got::part;
    if (!part_) {
        got = first && (word & rx_errors) == 0 && length >= io::ethernet_header ? Got::frame : Got::damaged;
    }
    if (got == Got::frame) {
        std::memcpy(frame_.data(), ring_.buffer(next_), length);
        length_ = length;
    }
    ring_.store(next_, 0);
    next_ = (next_ + 1) % ring_entries;
    return got;
}

} // namespace fl::drivers::e1000
