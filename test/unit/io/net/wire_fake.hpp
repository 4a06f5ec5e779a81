// Network cards on a fake wire that drops, duplicates, reorders, corrupts and delays frames. Include after the imports.
#pragma once

namespace fl::test {

using Bytes = std::vector<std::byte>;

class Wire;

/// A card whose ring has room for `room` frames until the wire takes them.
class Card final : public io::NetDevice {
  public:
    Card(io::Executor& executor, Wire& wire, u8 number, u32 mtu = 1500);
    ~Card() { set_open(false); }
    bool start(const io::OutgoingFrame& frame, io::Checksum checksum) override;
    void arrive(const Bytes& frame, io::Checksum checksum = io::Checksum::unknown) { deliver(frame, checksum); }
    void close() { set_open(false); }
    void link(bool up) { set_link(up); }
    void offload(bool on) { offloads_checksums_ = on; }
    void has_room() { room(); }
    u32 used = 0;
    u32 slots = 64;

  private:
    Wire& wire_;
};

/// Connects all its cards. Frames are delivered in later turns of the executor.
class Wire final : public io::Service {
  public:
    struct Behaviour {
        u32 drop = 0; // percent
        u32 duplicate = 0;
        u32 reorder = 0; // held back until others have passed
        u32 corrupt = 0; // one bit
        Nanoseconds delay = 0;
        bool holds = false; // nothing leaves the rings
    };
    Behaviour behaviour;
    std::vector<Bytes> sent; // everything, in order, before faults
    u64 dropped = 0;
    u64 duplicated = 0;
    u64 reordered = 0;
    u64 corrupted = 0;

    explicit Wire(io::Executor& executor) : executor_(executor) { executor_.add(*this); }
    ~Wire() { executor_.remove(*this); }
    void plug(Card& card) { cards_.push_back(&card); }
    void unplug(Card& card) { std::erase(cards_, &card); }

    void send(Card& from, const Bytes& frame, io::Checksum checksum) {
        sent.push_back(frame);
        executor_.poll(*this);
        under_way_.push_back({&from, frame, checksum, executor_.turn_time() + behaviour.delay});
    }
    /// A frame from nowhere, to all cards.
    void inject(const Bytes& frame) {
        for (Card* card : cards_) {
            card->arrive(frame);
        }
    }
    bool drain() override {
        bool some = false;
        for (usize n = under_way_.size(); n > 0 && !behaviour.holds; --n) {
            if (under_way_.front().due > executor_.now()) {
                break;
            }
            Frame frame = std::move(under_way_.front());
            under_way_.pop_front();
            some = true;
            if (!frame.again) {
                --frame.from->used;
            }
            if (!frame.again && chance(behaviour.reorder)) {
                ++reordered;
                frame.again = true;
                under_way_.push_back(frame);
                continue;
            }
            if (chance(behaviour.drop)) {
                ++dropped;
                continue;
            }
            if (chance(behaviour.corrupt)) {
                ++corrupted;
                const usize bit = random_.below(frame.bytes.size() * 8);
                frame.bytes[bit / 8] ^= static_cast<std::byte>(1u << bit % 8);
                frame.checksum = io::Checksum::unknown;
            }
            const bool twice = chance(behaviour.duplicate);
            duplicated += twice;
            for (u32 i = 0; i < (twice ? 2u : 1u); ++i) {
                for (Card* card : cards_) {
                    if (card != frame.from) {
                        card->arrive(frame.bytes, frame.checksum);
                    }
                }
            }
            frame.from->has_room();
        }
        return some;
    }
    bool arm() override { return !under_way_.empty() && !behaviour.holds && behaviour.delay == 0; }
    bool wants_tick() const override { return !under_way_.empty(); }

  private:
    struct Frame {
        Card* from;
        Bytes bytes;
        io::Checksum checksum;
        Instant due;
        bool again = false;
    };
    bool chance(u32 percent) { return percent != 0 && random_.below(100) < percent; }
    io::Executor& executor_;
    std::vector<Card*> cards_;
    std::deque<Frame> under_way_;
    io::SplitMix64 random_{7};
};

inline Card::Card(io::Executor& executor, Wire& wire, u8 number, u32 mtu) : NetDevice(executor), wire_(wire) {
    identity_.name = FixedText<16>("eth0");
    identity_.driver = "fake";
    identity_.mac = {{0x52, 0x54, 0, 0, 0, number}};
    identity_.mtu = mtu;
    set_open(true);
    wire.plug(*this);
}

inline bool Card::start(const io::OutgoingFrame& frame, io::Checksum checksum) {
    if (used == slots) {
        return false;
    }
    ++used;
    Bytes bytes(frame.head.begin(), frame.head.end());
    bytes.insert(bytes.end(), frame.body.begin(), frame.body.end());
    wire_.send(*this, bytes, checksum == io::Checksum::partial ? io::Checksum::partial : io::Checksum::unknown);
    return true;
}

} // namespace fl::test
