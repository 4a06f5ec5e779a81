// A network back end for tests, written from the description of the network interface [xen-netif] and of the ring
// [xen-ring], with its own offsets and indices. It plays a back end that copies, and records every rule that the front
// end breaks. Include after the imports and after hv/xen_fake.hpp.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

namespace fake {

/// The back end's features, and its behaviour while connecting.
struct NetOffer {
    std::string mac = "00:16:3e:01:02:03";
    std::optional<u32> mtu;
    bool copies = true;
    bool scatter = true;
    bool no_checksums = false;
    u32 queues = 0; // 0: the key is missing
    // overrides for keys of the back end's directory; "-": the key is missing
    std::map<std::string, std::string> extra;
    bool never_connects = false;
    bool closes_instead = false;
    bool never_closes = false;
};

class Netback {
  public:
    struct Frame {
        std::string bytes;
        u16 flags = 0; // of the first slot
        u32 slots = 0;
        u32 queue = 0;
    };
    /// One slot of the receive ring: a response or an extra info.
    struct Slot {
        std::string data;
        u16 flags = 0;
        u16 offset = 0;
        std::optional<i32> id;                  // instead of the right one
        std::optional<i16> status;              // instead of the length
        std::optional<std::array<u8, 8>> extra; // instead of all of it
    };
    struct Queue {
        std::byte* tx = nullptr;
        std::byte* rx = nullptr;
        u32 port = 0;
        u32 tx_cons = 0, tx_rsp = 0, rx_cons = 0, rx_rsp = 0;
        u32 refs[2] = {0, 0};
        std::vector<std::array<u8, 12>> held;  // transmit requests not answered yet
        std::deque<std::vector<Slot>> waiting; // for buffers
        std::set<u16> tx_ids;                  // in flight
        bool more = false;
        bool told_of_buffers = false; // since the last frame had to wait
    };

    Netback(Xen& x, const NetOffer& o, u32 number = 0, u32 domain = 0) : xen(x), offer(o), domain_(domain) {
        front = "/local/domain/1/device/vif/" + std::to_string(number);
        back = "/local/domain/" + std::to_string(domain) + "/backend/vif/1/" + std::to_string(number);
        appear();
        auto before = xen.on_change;
        xen.on_change = [this, before](const std::string& path) {
            if (before) {
                before(path);
            }
            frontend_changed_ = frontend_changed_ || path == front + "/state";
        };
    }

    /// The toolstack makes the device.
    void appear() {
        present = true;
        put("online", 1);
        put("state", 1);
        offer_features();
        xen.tree[front + "/backend"] = back;
        xen.tree[front + "/backend-id"] = std::to_string(domain_);
        xen.tree[front + "/mac"] = offer.mac;
        if (offer.mtu) {
            xen.tree[front + "/mtu"] = std::to_string(*offer.mtu);
        }
        xen.set(front + "/state", "1");
        wanted_state_ = 2;
    }
    /// As the functions of the block back end.
    void detach() {
        put("online", 0);
        removing = true;
        go(5);
    }
    void vanish() {
        present = removing = false;
        wanted_state_ = 0;
        disconnect();
        xen.remove(front);
        xen.remove(back);
    }
    void die() {
        dead_process = true;
        wanted_state_ = 0;
        disconnect();
    }
    void start_again() {
        dead_process = false;
        frontend_changed_ = false;
        xen.tree.erase(back + "/multi-queue-max-queues");
        offer_features();
        go(2);
    }

    void offer_features() {
        put("feature-rx-copy", offer.copies);
        put("feature-sg", offer.scatter);
        put("feature-no-csum-offload", offer.no_checksums);
        put("feature-split-event-channels", 1);
        put("feature-gso-tcpv4", 1);
        put("feature-multicast-control", 1);
        if (offer.queues != 0) {
            put("multi-queue-max-queues", offer.queues);
        }
        for (const auto& [key, value] : offer.extra) {
            if (value == "-") {
                xen.tree.erase(back + "/" + key);
            } else {
                xen.tree[back + "/" + key] = value;
            }
        }
    }

    void put(const std::string& key, u64 value) { xen.tree[back + "/" + key] = std::to_string(value); }
    u32 state() { return static_cast<u32>(std::stoul(xen.get(back + "/state"))); }
    u32 front_state() { return static_cast<u32>(std::stoul(xen.get(front + "/state"))); }
    void go(u32 s) { xen.set(back + "/state", std::to_string(s)); }
    std::string key(const std::string& name) { return xen.get(front + "/" + name); }
    bool has(const std::string& name) { return xen.tree.contains(front + "/" + name); }
    u32 number(const std::string& name) { return has(name) ? static_cast<u32>(std::stoul(key(name))) : 0; }
    void broken(const std::string& rule) { rules_broken.push_back(rule); }

    /// One round of work; true: there was something to do.
    bool step() {
        if (!present || dead_process) {
            frontend_changed_ = false;
            return false;
        }
        if (removing && state() == 6) {
            vanish();
            return true;
        }
        if (wanted_state_ != 0) {
            go(std::exchange(wanted_state_, 0));
            return true;
        }
        if (std::exchange(frontend_changed_, false)) {
            switch (front_state()) {
            case 4:
                if (offer.closes_instead) {
                    wanted_state_ = 5;
                } else if (!offer.never_connects && queues.empty() && connect()) {
                    wanted_state_ = 4;
                }
                return true;
            case 5: wanted_state_ = offer.never_closes ? 0 : 5; return true;
            case 6:
                disconnect();
                wanted_state_ = offer.never_closes ? 0 : 6;
                return true;
            case 1: wanted_state_ = state() == 6 ? 2 : 0; return true;
            default: return false;
            }
        }
        bool did = false;
        for (u32 i = 0; i < queues.size() && !dead; ++i) {
            did = process(i) || did;
        }
        return did;
    }

    bool connect() {
        if (number("request-rx-copy") != 1) {
            broken("a front end of today asks for copies");
        }
        takes_scatter = number("feature-sg") == 1;
        rx_notify = number("feature-rx-notify") == 1;
        const u32 count = has("multi-queue-num-queues") ? number("multi-queue-num-queues") : 1;
        if (count == 0 || count > std::max(offer.queues, 1u)) {
            broken("multi-queue-num-queues is from 1 to multi-queue-max-queues");
            return false;
        }
        for (u32 i = 0; i < count; ++i) {
            const std::string prefix = count == 1 ? "" : "queue-" + std::to_string(i) + "/";
            if (count > 1 && has("tx-ring-ref")) {
                broken("with several queues there are no ring keys at the top");
            }
            Queue queue;
            queue.refs[0] = number(prefix + "tx-ring-ref");
            queue.refs[1] = number(prefix + "rx-ring-ref");
            queue.port = number(prefix + "event-channel");
            if (!xen.open_ports.contains(queue.port) || xen.port_domains[queue.port] != domain_) {
                broken("the event channel is offered to the back end's domain");
                return false;
            }
            queue.tx = xen.map_grant(queue.refs[0], static_cast<u16>(domain_), true);
            queue.rx = xen.map_grant(queue.refs[1], static_cast<u16>(domain_), true);
            if (queue.tx == nullptr || queue.rx == nullptr) {
                broken("both rings are granted for writing");
                return false;
            }
            queues.push_back(std::move(queue));
        }
        return true;
    }
    void disconnect() {
        for (Queue& queue : queues) {
            xen.unmap_grant(queue.refs[0], true);
            xen.unmap_grant(queue.refs[1], true);
        }
        queues.clear();
    }

    static u32& word(std::byte* ring, u32 offset) { return Xen::field<u32>(reinterpret_cast<u64>(ring), offset); }
    static std::byte* tx_slot(Queue& q, u32 index) { return q.tx + 64 + index % 256 * 12; }
    static std::byte* rx_slot(Queue& q, u32 index) { return q.rx + 64 + index % 256 * 8; }

    bool process(u32 number) {
        Queue& q = queues[number];
        const u64 sends = std::exchange(xen.sends[q.port], 0);
        notified += sends;
        bool did = false;
        if (sends != 0 || q.more) {
            q.more = false;
            did = take(number);
        }
        return receive(q) || did;
    }

    // ---- what the guest sends ----
    bool take(u32 number) {
        Queue& q = queues[number];
        const u32 produced = word(q.tx, 0);
        if (produced - q.tx_cons > 256) {
            broken("more transmit requests than the ring holds");
            return false;
        }
        bool did = false;
        while (q.tx_cons != produced) {
            Frame frame{.queue = number};
            std::vector<std::array<u8, 12>> requests;
            usize total = 0;
            for (bool more = true; more;) {
                if (q.tx_cons == produced) {
                    broken("a frame is published whole");
                    return did;
                }
                std::array<u8, 12> r;
                std::memcpy(r.data(), tx_slot(q, q.tx_cons++), 12);
                const u64 at = reinterpret_cast<u64>(r.data());
                const u32 ref = Xen::field<u32>(at, 0);
                const u16 offset = Xen::field<u16>(at, 4);
                const u16 flags = Xen::field<u16>(at, 6);
                const u16 id = Xen::field<u16>(at, 8);
                const u16 size = Xen::field<u16>(at, 10);
                if (!q.tx_ids.insert(id).second) {
                    broken("a transmit id is in flight twice");
                }
                more = (flags & 4) != 0;
                u32 here = size;
                if (requests.empty()) {
                    frame.flags = flags;
                    total = size;
                    here = more ? std::min<u32>(size, 4096u - offset) : size;
                } else if ((flags & ~4) != 0) {
                    broken("only the first slot of a frame has flags");
                }
                if (more && !offer.scatter) {
                    broken("several slots without feature-sg");
                }
                requests.push_back(r);
                if (offset + here > 4096) {
                    broken("a transmit slot is within its page");
                    return did;
                }
                const std::byte* page = xen.map_grant(ref, static_cast<u16>(domain_), false);
                if (page == nullptr) {
                    broken("a transmit page is granted for reading");
                    return did;
                }
                if (!xen.granted_read_only(ref)) {
                    broken("what is only read is granted for reading");
                }
                frame.bytes.append(reinterpret_cast<const char*>(page) + offset, here);
                xen.unmap_grant(ref, false);
            }
            frame.slots = static_cast<u32>(requests.size());
            if (frame.slots > 18) {
                broken("a frame has at most 18 slots");
            }
            if (frame.bytes.size() != total || total < 14) {
                broken("the first slot has the size of the whole frame, at least a header");
            }
            if ((frame.flags & 8) != 0) {
                broken("an extra info, although nothing needs one");
            }
            sent.push_back(frame);
            did = true;
            q.held.insert(q.held.end(), requests.begin(), requests.end());
            if (echo) {
                queues[number].waiting.push_back(slots_of(frame.bytes, 0));
            }
        }
        word(q.tx, 4) = q.tx_cons + 1; // the final check for requests: request an event for the next one
        q.more = word(q.tx, 0) != q.tx_cons;
        if (!hold) {
            answer(number);
        }
        return did;
    }
    /// Answers the oldest `most` transmit requests.
    void answer(u32 number, usize most = ~usize{0}) {
        Queue& q = queues[number];
        const usize count = std::min(most, q.held.size());
        for (usize i = 0; i < count; ++i) {
            const u16 id = Xen::field<u16>(reinterpret_cast<u64>(q.held[i].data()), 8);
            q.tx_ids.erase(id);
            put_tx(q, id, tx_status);
        }
        q.held.erase(q.held.begin(), q.held.begin() + static_cast<std::ptrdiff_t>(count));
        push_tx(q);
    }
    /// Writes a transmit response, not visible before push_tx().
    void put_tx(Queue& q, u16 id, i16 status) {
        const u64 at = reinterpret_cast<u64>(tx_slot(q, q.tx_rsp++));
        Xen::field<u16>(at, 0) = id;
        Xen::field<i16>(at, 2) = status;
    }
    void push_tx(Queue& q) { push(q, q.tx, q.tx_rsp); }
    void push(Queue& q, std::byte* ring, u32 produced) {
        const u32 old = word(ring, 8);
        word(ring, 8) = produced;
        if (produced - word(ring, 12) < produced - old || always_notify) {
            ++notifications;
            xen.raise(q.port);
        }
    }

    // ---- what the guest receives ----
    static std::vector<Slot> slots_of(const std::string& bytes, u16 flags, usize piece = 4096, u16 offset = 0) {
        std::vector<Slot> slots;
        for (usize at = 0; at == 0 || at < bytes.size(); at += piece) {
            const bool last = at + piece >= bytes.size();
            slots.push_back({.data = bytes.substr(at, piece),
                             .flags = static_cast<u16>((at == 0 ? flags : 0) | (last ? 0 : 4)),
                             .offset = offset});
        }
        return slots;
    }
    void deliver(const std::string& bytes, u16 flags = 0, u32 queue = 0, usize piece = 4096, u16 offset = 0) {
        queues[queue].waiting.push_back(slots_of(bytes, flags, piece, offset));
    }
    void deliver(std::vector<Slot> slots, u32 queue = 0) { queues[queue].waiting.push_back(std::move(slots)); }
    bool receive(Queue& q) {
        bool did = false;
        while (!q.waiting.empty()) {
            const u32 produced = word(q.rx, 0);
            if (produced - q.rx_cons > 256 || produced - q.rx_rsp > 256) {
                broken("more receive requests than the ring holds");
                return did;
            }
            if (produced - q.rx_cons < q.waiting.front().size()) {
                word(q.rx, 4) = produced + 1; // to be told of the next buffer
                if (word(q.rx, 0) == produced) {
                    ++short_of_buffers;
                    return did;
                }
                continue;
            }
            for (const Slot& slot : q.waiting.front()) {
                put_rx(q, slot);
            }
            q.waiting.pop_front();
            push(q, q.rx, q.rx_rsp);
            did = true;
        }
        return did;
    }
    void put_rx(Queue& q, const Slot& slot) {
        const u64 request = reinterpret_cast<u64>(rx_slot(q, q.rx_cons++));
        const u16 id = Xen::field<u16>(request, 0);
        const u32 ref = Xen::field<u32>(request, 4);
        std::byte* page = xen.map_grant(ref, static_cast<u16>(domain_), true);
        if (page == nullptr) {
            broken("a receive buffer is granted for writing");
            return;
        }
        const usize room = slot.offset < 4096 ? 4096u - slot.offset : 0;
        std::memcpy(page + std::min<u16>(slot.offset, 4096), slot.data.data(), std::min(slot.data.size(), room));
        if (scribble) {
            last_page = page; // a back end may write for as long as the page is granted
        }
        xen.unmap_grant(ref, true);
        const u64 at = reinterpret_cast<u64>(rx_slot(q, q.rx_rsp++));
        if (slot.extra) {
            std::memcpy(reinterpret_cast<void*>(at), slot.extra->data(), 8);
            return;
        }
        Xen::field<u16>(at, 0) = static_cast<u16>(slot.id.value_or(id));
        Xen::field<u16>(at, 2) = slot.offset;
        Xen::field<u16>(at, 4) = slot.flags;
        Xen::field<i16>(at, 6) = slot.status.value_or(static_cast<i16>(slot.data.size()));
    }

    Xen& xen;
    NetOffer offer;
    std::string front, back;
    std::vector<Queue> queues;
    std::vector<Frame> sent;
    std::vector<std::string> rules_broken;
    bool takes_scatter = false, rx_notify = false;
    bool present = false, removing = false, dead_process = false;
    bool echo = false, hold = false, dead = false, always_notify = false, scribble = false;
    i16 tx_status = 0;
    std::byte* last_page = nullptr;
    u64 notified = 0, notifications = 0, short_of_buffers = 0;

  private:
    u32 domain_;
    u32 wanted_state_ = 0;
    bool frontend_changed_ = false;
};

struct NetSink final : drivers::NetSink {
    u32 number_of(const io::MacAddress& address) override {
        addresses.push_back(address);
        return twin;
    }
    bool offered(u32 n) override {
        asked.push_back(n);
        return offer;
    }
    FixedText<16> free_name() override { return FixedText<16>("eth0"); }
    Result<void> announce(io::NetDevice& c, u32 n) override {
        if (refuse) {
            return Error{Code::busy, "another driver has it"};
        }
        card = &c;
        number = n;
        return {};
    }
    void unused(const drivers::UnusedUnit& unit) override { left.emplace_back(std::string(unit.address), unit.why); }
    void withdraw(u32 n) override { withdrawn.push_back(n); }
    bool offer = true, refuse = false;
    std::vector<std::pair<std::string, drivers::Unused>> left;
    std::vector<u32> asked, withdrawn;
    io::NetDevice* card = nullptr;
    u32 number = ~u32{0};
    u32 twin = 0; // what number_of() says
    std::vector<io::MacAddress> addresses;
};

struct NoDisks final : drivers::DiskSink {
    bool offered(u32) override { return false; }
    FixedText<16> free_name(std::string_view) override { return {}; }
    Result<void> announce(io::BlockDevice&, u32) override { return Error{Code::busy, "no disks here"}; }
};

/// Keeps what it is given.
struct Receiver final : io::FrameReceiver {
    struct Got {
        std::string bytes;
        io::Checksum checksum;
    };
    void receive(io::NetDevice& lane, std::span<const std::byte> frame, io::Checksum checksum) override {
        got.push_back({std::string(reinterpret_cast<const char*>(frame.data()), frame.size()), checksum});
        if (during) {
            during(lane, frame);
        }
    }
    void link_changed(io::NetDevice& lane) override {
        ++changes;
        open = lane.is_open();
    }
    std::vector<Got> got;
    u32 changes = 0;
    bool open = true;
    std::function<void(io::NetDevice&, std::span<const std::byte>)> during;
};

/// A machine with one card. `processors`: executors, whose turns are taken while the first one idles.
struct NetMachine : Machine {
    explicit NetMachine(const NetOffer& offer, u32 withheld = 0, u32 processors = 1, u32 number = 0, u32 domain = 0)
        : Machine(48u << 20), back(xen, offer, number, domain),
          environment{executor, xen.memory, xen.interrupts, disks, 200'000'000, withheld} {
        executors.push_back(&executor);
        for (u32 i = 1; i < processors; ++i) {
            io::Platform platform = world.platform();
            platform.idle = [](void*, Instant, const std::atomic<bool>&) {};
            others.push_back(std::make_unique<io::Executor>(platform));
            executors.push_back(others.back().get());
        }
        environment.executors = executors;
        environment.nets = &sink;
        world.device = [this] {
            const bool did = back.step();
            for (u32 turn = 0; turn < 4; ++turn) {
                for (auto& other : others) {
                    other->turn();
                }
            }
            return did;
        };
        device.type.write("vif");
        device.address.write(std::to_string(number));
        device.number = number;
        sink.twin = number;
    }
    ~NetMachine() { EXPECT_EQ(back.rules_broken, std::vector<std::string>{}); }
    Result<void> probe() {
        EXPECT_TRUE(install());
        EXPECT_TRUE(start());
        return run(drivers::xen_net::probe(environment, guest, device));
    }
    io::NetDevice& card() { return *sink.card; }
    /// Probes, and receives what arrives on lane 0.
    void open() {
        const auto probed = probe();
        ASSERT_TRUE(probed) << probed.error().message;
        ASSERT_NE(sink.card, nullptr);
        sink.card->set_receiver(&receiver);
    }
    /// Lets the machine run for this time.
    void pass(Nanoseconds time) {
        EXPECT_TRUE(run([](io::Executor& e, Nanoseconds n) -> io::Task<Result<void>> {
            co_await e.sleep(n);
            co_return Result<void>{};
        }(executor, time)));
    }
    Netback back;
    NoDisks disks;
    NetSink sink;
    Receiver receiver;
    std::vector<std::unique_ptr<io::Executor>> others;
    std::vector<io::Executor*> executors;
    drivers::Environment environment;
    hv::SyntheticDevice device;
};

} // namespace fake
