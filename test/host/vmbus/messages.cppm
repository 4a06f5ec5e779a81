// Channel messages as bytes: written and read field by field, in the protocol's order [vmbus "struct vmbus_channel_*"].
// Defined independently of the guest's structures, so that a mistake in those is detected.
export module host.messages;
import host.std;

export namespace fl::host {

enum class MessageType : u32 {
    offer_channel = 1,
    rescind_channel_offer = 2,
    request_offers = 3,
    all_offers_delivered = 4,
    open_channel = 5,
    open_channel_result = 6,
    close_channel = 7,
    gpadl_header = 8,
    gpadl_body = 9,
    gpadl_created = 10,
    gpadl_teardown = 11,
    gpadl_torndown = 12,
    relid_released = 13,
    initiate_contact = 14,
    version_response = 15,
    unload = 16,
    unload_response = 17,
    modify_channel = 22,
    modify_channel_response = 24,
};
constexpr const char* name(MessageType type) {
    using enum MessageType;
    switch (type) {
    case offer_channel: return "OFFER_CHANNEL";
    case rescind_channel_offer: return "RESCIND_CHANNEL_OFFER";
    case request_offers: return "REQUEST_OFFERS";
    case all_offers_delivered: return "ALL_OFFERS_DELIVERED";
    case open_channel: return "OPEN_CHANNEL";
    case open_channel_result: return "OPEN_CHANNEL_RESULT";
    case close_channel: return "CLOSE_CHANNEL";
    case gpadl_header: return "GPADL_HEADER";
    case gpadl_body: return "GPADL_BODY";
    case gpadl_created: return "GPADL_CREATED";
    case gpadl_teardown: return "GPADL_TEARDOWN";
    case gpadl_torndown: return "GPADL_TORNDOWN";
    case relid_released: return "RELID_RELEASED";
    case initiate_contact: return "INITIATE_CONTACT";
    case version_response: return "VERSION_RESPONSE";
    case unload: return "UNLOAD";
    case unload_response: return "UNLOAD_RESPONSE";
    case modify_channel: return "MODIFY_CHANNEL";
    case modify_channel_response: return "MODIFY_CHANNEL_RESPONSE";
    }
    return "unknown message";
}

inline constexpr usize message_bytes = 240; // HV_MESSAGE_PAYLOAD_BYTE_COUNT
inline constexpr u32 hv_message_vmbus = 1;  // the SynIC message's type

/// A message to the guest.
class OutMessage {
  public:
    explicit OutMessage(MessageType type) { add(static_cast<u32>(type)).add(u32{0}); }
    template <std::unsigned_integral T>
    OutMessage& add(T value) {
        for (usize i = 0; i < sizeof(T); ++i) {
            bytes_[size_++] = static_cast<std::byte>(value >> (8 * i));
        }
        return *this;
    }
    OutMessage& add(std::span<const u8> bytes) {
        std::memcpy(bytes_.data() + size_, bytes.data(), bytes.size());
        size_ += bytes.size();
        return *this;
    }
    OutMessage& truncate(usize size) {
        size_ = std::min(size_, size);
        return *this;
    }
    std::span<const std::byte> bytes() const { return std::span(bytes_).first(size_); }

  private:
    std::array<std::byte, message_bytes> bytes_{};
    usize size_ = 0;
};

/// A message from the guest: a private copy, read from the front. Reading beyond its end returns zeros and sets
/// too_short().
class InMessage {
  public:
    InMessage() = default;
    explicit InMessage(std::span<const std::byte> payload) : size_(std::min(payload.size(), message_bytes)) {
        std::memcpy(bytes_.data(), payload.data(), size_);
    }
    template <std::unsigned_integral T>
    T take() {
        if (left() < sizeof(T)) {
            short_ = true;
            at_ = size_;
            return 0;
        }
        T value = 0;
        for (usize i = 0; i < sizeof(T); ++i) {
            value = static_cast<T>(value | static_cast<T>(static_cast<T>(bytes_[at_++]) << (8 * i)));
        }
        return value;
    }
    void skip(usize count) {
        short_ = short_ || left() < count;
        at_ += std::min(count, left());
    }
    usize size() const { return size_; }
    usize left() const { return size_ - at_; }
    bool too_short() const { return short_; }

  private:
    std::array<std::byte, message_bytes> bytes_{};
    usize size_ = 0;
    usize at_ = 0;
    bool short_ = false;
};

} // namespace fl::host
