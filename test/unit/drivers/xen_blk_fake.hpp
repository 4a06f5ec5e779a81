// A block back end for tests, written from the descriptions of the block interface [xen-blkif] and of the ring
// [xen-ring], with its own offsets and indices. Include after the imports and after hv/xen_fake.hpp.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

namespace fake {

/// The back end's features, and the faults to inject.
struct Offer {
    u64 sectors = 4096; // of 512 bytes
    u32 sector_size = 512;
    bool flush = true;
    bool barrier = false;
    bool discard = false;
    bool persistent = false;
    bool read_only = false;
    u32 indirect = 0;
    std::optional<u32> ring_order;
    std::optional<u32> ring_pages; // the deprecated key
    std::string max_queues;        // text of the key; empty: no such key
    std::string device_type = "disk";
    // overrides for keys of the back end's directory; "-": the key is missing
    std::map<std::string, std::string> extra;
    u32 slow_states = 0; // idle rounds before each change of state
    bool never_connects = false;
    bool closes_instead = false;
};

class Blkback {
  public:
    enum class Violation {
        none,
        unknown_id,
        repeated_id,
        far_ahead,
        behind,
        wrong_operation,
        bad_status,
        unasked,
    };

    Blkback(Xen& x, const Offer& o, u32 number = 51712, u32 domain = 0)
        : xen(x), offer(o), disk(o.sectors * 512), domain_(domain) {
        front = "/local/domain/1/device/vbd/" + std::to_string(number);
        back = "/local/domain/" + std::to_string(domain) + "/backend/vbd/1/" + std::to_string(number);
        number_ = number;
        appear();
        auto before = xen.on_change;
        xen.on_change = [this, before](const std::string& path) {
            if (before) {
                before(path);
            }
            if (path == front + "/state") {
                frontend_changed_ = true;
            }
        };
    }

    /// The toolstack makes the device.
    void appear() {
        present = true;
        xen.tree[back + "/online"] = "1";
        xen.tree[back + "/state"] = "1";
        if (offer.ring_order) {
            put("max-ring-page-order", *offer.ring_order);
        }
        if (offer.ring_pages) {
            put("max-ring-pages", *offer.ring_pages);
        }
        offer_queues();
        xen.tree[front + "/backend"] = back;
        xen.tree[front + "/backend-id"] = std::to_string(domain_);
        xen.tree[front + "/device-type"] = offer.device_type;
        xen.tree[front + "/virtual-device"] = std::to_string(number_);
        xen.set(front + "/state", "1");
        xen.changed(back + "/state");
        wanted_state_ = 2;
    }
    void offer_queues() {
        xen.tree.erase(back + "/multi-queue-max-queues");
        if (!offer.max_queues.empty()) {
            xen.tree[back + "/multi-queue-max-queues"] = offer.max_queues;
        }
    }
    /// The toolstack asks both ends to close, and removes the device once they have.
    void detach() {
        put("online", 0);
        removing = true;
        go(5);
    }
    /// The toolstack removes the device at once, and with it the back end.
    void vanish() {
        present = removing = false;
        wanted_state_ = 0;
        forget();
        xen.remove(front);
        xen.remove(back);
    }
    /// The back end's process ends, with everything that it has mapped. XenStore still shows it as it was.
    void die() {
        dead_process = true;
        wanted_state_ = 0;
        forget();
    }
    /// A new process for the same device.
    void start_again() {
        dead_process = false;
        for (const auto& [key, value] : std::map(xen.tree)) {
            if (key.starts_with(back + "/feature-") || key == back + "/max-ring-page-order") {
                xen.tree.erase(key);
            }
        }
        if (offer.ring_order) {
            put("max-ring-page-order", *offer.ring_order);
        }
        offer_queues();
        EXPECT_LE(offer.sectors * 512, disk.size());
        go(2);
        frontend_changed_ = front_state() == 3; // it looks at the front end when it starts
    }

    void put(const std::string& key, u64 value) { xen.tree[back + "/" + key] = std::to_string(value); }
    u32 state() { return static_cast<u32>(std::stoul(xen.get(back + "/state"))); }
    u32 front_state() { return static_cast<u32>(std::stoul(xen.get(front + "/state"))); }
    void go(u32 s) { xen.set(back + "/state", std::to_string(s)); }
    bool has_front(const std::string& key) { return xen.tree.contains(front + "/" + key); }
    u64 front_number(const std::string& key) { return std::stoull(xen.get(front + "/" + key)); }

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
            if (waited_++ < offer.slow_states) {
                return xen.store_event || !xen.outgoing.empty() ? false : tick_only();
            }
            waited_ = 0;
            go(std::exchange(wanted_state_, 0));
            return true;
        }
        if (late_closing_) { // it has seen that the front end was closing, and follows when that one has gone on
            frontend_changed_ = false;
            if (front_state() != 1) {
                return false;
            }
            late_closing_ = false;
            go(5);
            return true;
        }
        if (std::exchange(frontend_changed_, false)) {
            switch (front_state()) {
            case 3:
                if (offer.closes_instead) {
                    wanted_state_ = 5;
                } else if (!offer.never_connects && connect()) {
                    wanted_state_ = 4;
                }
                return true;
            case 5:
                if (std::exchange(misses_closed, false)) {
                    late_closing_ = true;
                } else {
                    wanted_state_ = 5;
                }
                return true;
            case 6:
                ring = nullptr;
                further.clear();
                unmap_ring();
                wanted_state_ = offer.never_connects && never_closes ? 0 : 6;
                return true;
            case 1: wanted_state_ = state() == 6 ? 2 : 0; return true;
            default: return false;
            }
        }
        return process();
    }
    bool tick_only() { return true; }

    /// The state of a queue that is not the current one.
    struct Queue {
        std::byte* ring = nullptr;
        std::vector<u32> refs;
        u32 pages = 0, slots = 0, port = 0;
        u32 req_cons = 0, rsp_prod = 0;
        bool more_work = false;
        u64 taken = 0;
    };
    void exchange(Queue& other) {
        std::swap(other.ring, ring);
        std::swap(other.refs, refs);
        std::swap(other.pages, pages);
        std::swap(other.slots, slots);
        std::swap(other.port, port);
        std::swap(other.req_cons, req_cons);
        std::swap(other.rsp_prod, rsp_prod);
        std::swap(other.more_work, more_work);
        std::swap(other.taken, requests_taken);
    }
    /// `what` with queue number `index` as the current one.
    template <class F>
    void with_queue(u32 index, F&& what) {
        if (index == 0) {
            return what();
        }
        exchange(further[index - 1]);
        current_ = index;
        what();
        current_ = 0;
        exchange(further[index - 1]);
    }

    bool connect() {
        const u64 queues = has_front("multi-queue-num-queues") ? front_number("multi-queue-num-queues") : 1;
        EXPECT_GE(queues, 1u);
        if (queues > 1) {
            EXPECT_LE(queues, std::stoull(offer.max_queues));
        }
        further.clear();
        for (u64 i = 1; i < queues; ++i) {
            if (!connect_queue("queue-" + std::to_string(i) + "/")) {
                return false;
            }
            exchange(further.emplace_back());
        }
        return connect_queue(queues == 1 ? "" : "queue-0/");
    }
    bool connect_queue(const std::string& prefix) {
        pages = 1;
        refs.clear();
        if (has_front("ring-page-order")) {
            pages = 1u << front_number("ring-page-order");
            for (u32 i = 0; i < pages; ++i) {
                refs.push_back(static_cast<u32>(front_number(prefix + "ring-ref" + std::to_string(i))));
            }
        } else {
            refs.push_back(static_cast<u32>(front_number(prefix + "ring-ref")));
        }
        std::byte* first = nullptr;
        for (u32 i = 0; i < pages; ++i) {
            std::byte* page = xen.map_grant(refs[i], static_cast<u16>(domain_), true);
            if (page == nullptr || (first != nullptr && page != first + i * 4096)) {
                return false;
            }
            first = first == nullptr ? page : first;
            kept[refs[i]] = true;
        }
        EXPECT_EQ(xen.get(front + "/protocol"), "x86_64-abi");
        port = static_cast<u32>(front_number(prefix + "event-channel"));
        EXPECT_TRUE(xen.open_ports.contains(port));
        EXPECT_EQ(xen.port_domains[port], domain_);
        slots = 1;
        while (slots * 2 <= (pages * 4096 - 64) / 112) {
            slots *= 2;
        }
        ring = first;
        req_cons = rsp_prod = 0;
        put("sectors", offer.sectors);
        put("sector-size", offer.sector_size);
        put("info", offer.read_only ? 4 : 0);
        put("feature-flush-cache", offer.flush);
        put("feature-barrier", offer.barrier);
        if (offer.discard) {
            put("feature-discard", 1);
        }
        put("feature-persistent", offer.persistent);
        if (offer.indirect != 0) {
            put("feature-max-indirect-segments", offer.indirect);
        }
        for (const auto& [key, value] : offer.extra) {
            if (value == "-") {
                xen.tree.erase(back + "/" + key);
            } else {
                xen.tree[back + "/" + key] = value;
            }
        }
        keeps_mapped = offer.persistent && has_front("feature-persistent") && front_number("feature-persistent") == 1;
        return true;
    }
    void unmap_ring() {
        for (const auto& [ref, write] : kept) {
            if (!never_unmapped.contains(ref)) {
                xen.unmap_grant(ref, write);
            }
        }
        kept.clear();
        refs.clear();
    }
    /// Maps a page of a request, like blkback: with persistent grants always writable and permanently; otherwise for
    /// the duration of the request, and with no more access than needed.
    std::byte* map(u32 ref, bool write) {
        write = write || keeps_mapped;
        if (const auto had = std::ranges::find(premapped_, std::pair{ref, write}); had != premapped_.end()) {
            grants_used.push_back(*had);
            premapped_.erase(had);
            return xen.memory.at(xen.mappings[ref].frame * 4096);
        }
        if (keeps_mapped && kept.contains(ref)) {
            return xen.memory.at(xen.mappings[ref].frame * 4096);
        }
        std::byte* page = xen.map_grant(ref, static_cast<u16>(domain_), write);
        if (page == nullptr) {
            return nullptr;
        }
        if (!keeps_mapped && !write) {
            EXPECT_TRUE(xen.granted_read_only(ref)) << "grant " << ref << ": what is only read is granted for reading";
        }
        if (keeps_mapped || hold_grants) {
            EXPECT_FALSE(kept.contains(ref)) << "grant " << ref << " is in use twice";
            kept[ref] = write;
        } else {
            grants_used.emplace_back(ref, write);
        }
        return page;
    }
    void unmap_grants() {
        for (const auto& [ref, write] : grants_used) {
            xen.unmap_grant(ref, write);
        }
        grants_used.clear();
    }

    u32& word(u32 offset) { return Xen::field<u32>(reinterpret_cast<u64>(ring), offset); }
    std::byte* slot(u32 index) { return ring + 64 + (index % slots) * 112; }

    bool process() {
        bool did = false;
        for (u32 i = 0; i <= further.size(); ++i) {
            with_queue(i, [&] { did = process_one() || did; });
        }
        return did;
    }
    bool process_one() {
        if (ring == nullptr) {
            return false;
        }
        const u64 sends = std::exchange(xen.sends[port], 0);
        notified += sends;
        if (dead || (sends == 0 && !more_work)) {
            return false;
        }
        more_work = false;
        bool did = false;
        u32 taken = 0;
        while (req_cons != word(0) && taken < at_once && !violating) {
            std::array<std::byte, 112> copy;
            std::memcpy(copy.data(), slot(req_cons), 112);
            ++req_cons;
            ++taken;
            ++requests_taken;
            did = true;
            EXPECT_TRUE(violating || req_cons - rsp_prod <= slots);
            if (hold) {
                take(copy);
            } else {
                serve(copy.data());
            }
        }
        if (rsp_prod == req_cons || !lazy) {
            word(4) = req_cons + 1; // the final check for requests: request an event for the next one
        }
        more_work = req_cons != word(0);
        return did;
    }

    /// A request held for answer().
    struct Held {
        std::array<std::byte, 112> slot;
        std::vector<u32> refs;                    // of its data pages
        std::vector<std::pair<u32, bool>> mapped; // with hold_mapped; true: writable
        u8 op = 0;                                // for an indirect request: that of its data
        u64 sector = 0;
        u32 sectors = 0; // of 512 bytes
        u32 queue = 0;
    };
    void take(const std::array<std::byte, 112>& slot) {
        Held held{slot, {}, {}};
        held.queue = current_;
        const u64 at = reinterpret_cast<u64>(slot.data());
        const bool indirect = Xen::field<u8>(at, 0) == 6;
        held.op = Xen::field<u8>(at, indirect ? 1 : 0);
        held.sector = Xen::field<u64>(at, 16);
        const u32 n = indirect ? Xen::field<u16>(at, 2) : Xen::field<u8>(at, 1);
        held.sectors = held.op == 5 ? static_cast<u32>(Xen::field<u64>(at, 24)) : 0;
        u64 first = at + 24;
        if (indirect) {
            std::byte* page = xen.memory.at(u64{Xen::field<u32>(xen.entry_address(Xen::field<u32>(at, 28)), 4)} * 4096);
            first = reinterpret_cast<u64>(page);
        }
        for (u32 i = 0; i < n; ++i) {
            const u32 ref = Xen::field<u32>(first + i * 8, 0);
            held.refs.push_back(ref);
            held.sectors += Xen::field<u8>(first + i * 8, 5) - Xen::field<u8>(first + i * 8, 4) + 1u;
            if (hold_mapped && !keeps_mapped && xen.map_grant(ref, static_cast<u16>(domain_), held.op == 0)) {
                held.mapped.emplace_back(ref, held.op == 0);
            }
        }
        held_.push_back(std::move(held));
    }
    /// Completes the held request at `index`: executes it and reports the result, or reports `status` without executing
    /// it.
    void answer(usize index, i16 status) {
        with_queue(held_[index].queue, [&] { answer_here(index, status); });
    }
    void answer_here(usize index, i16 status) {
        Held held = std::move(held_[index]);
        held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(index));
        for (const auto& [ref, write] : held.mapped) {
            if (status != 0) {
                xen.unmap_grant(ref, write);
            }
        }
        if (status != 0) {
            respond(Xen::field<u64>(reinterpret_cast<u64>(held.slot.data()), 8), held.op, status);
            return;
        }
        premapped_ = std::move(held.mapped);
        serve(held.slot.data());
    }
    /// Forgets all requests and unmaps every page.
    void forget() {
        for (const Held& held : held_) {
            for (const auto& [ref, write] : held.mapped) {
                xen.unmap_grant(ref, write);
            }
        }
        held_.clear();
        ring = nullptr;
        further.clear();
        unmap_ring();
    }
    const std::vector<Held>& held() const { return held_; }

    void serve(std::byte* r) {
        const u64 at = reinterpret_cast<u64>(r);
        u8 op = Xen::field<u8>(at, 0);
        const u64 id = Xen::field<u64>(at, 8);
        const u64 sector = Xen::field<u64>(at, 16);
        ++served[op];
        i16 status = 0;
        u8 answer_op = op;
        std::vector<std::array<u32, 3>> segments; // ref, first, last
        if (op == 0 || op == 1) {
            const u32 n = Xen::field<u8>(at, 1);
            EXPECT_GE(n, 1u);
            EXPECT_LE(n, 11u);
            for (u32 i = 0; i < n; ++i) {
                segments.push_back(
                    {Xen::field<u32>(at, 24 + i * 8), Xen::field<u8>(at, 28 + i * 8), Xen::field<u8>(at, 29 + i * 8)});
            }
        } else if (op == 6) {
            answer_op = op = Xen::field<u8>(at, 1);
            const u32 n = Xen::field<u16>(at, 2);
            EXPECT_LE(n, offer.indirect);
            const std::byte* page = map(Xen::field<u32>(at, 28), false);
            if (page == nullptr) {
                ++bad_grants;
                status = -1;
            }
            for (u32 i = 0; page != nullptr && i < n; ++i) {
                const u64 s = reinterpret_cast<u64>(page) + i * 8;
                segments.push_back({Xen::field<u32>(s, 0), Xen::field<u8>(s, 4), Xen::field<u8>(s, 5)});
            }
            indirect_served += 1;
        } else if (op == 2 || op == 3) {
            EXPECT_EQ(Xen::field<u8>(at, 1), 0) << "an empty flush";
            status = (op == 3 ? offer.flush : offer.barrier) && !refuse_flush ? i16{0} : i16{-2};
        } else if (op == 5) {
            const u64 n = Xen::field<u64>(at, 24);
            const u8 flags = Xen::field<u8>(at, 1); // 1: securely
            EXPECT_LE(flags, 1);
            secure_served += flags;
            if (offer.discard &&
                sector + n <= offer.sectors) { // like Linux, which ignores a flag that it did not offer
                std::memset(disk.data() + sector * 512, 0, n * 512);
            } else {
                status = -1;
            }
        } else {
            ADD_FAILURE() << "operation " << int{op};
            status = -2;
        }
        u64 byte = sector * 512;
        for (const auto& [ref, first, last] : segments) {
            EXPECT_LE(first, last);
            EXPECT_LT(last, 8u);
            EXPECT_EQ(first * 512 % offer.sector_size, 0u) << "aligned to the sector size";
            EXPECT_EQ((last + 1) * 512 % offer.sector_size, 0u);
            const u32 bytes = (last - first + 1) * 512;
            std::byte* page = map(ref, op == 0);
            if (page == nullptr || byte + bytes > disk.size()) {
                ++bad_grants;
                status = -1;
                break;
            }
            all_refs.insert(ref);
            ++segment_count;
            if (op == 0) {
                std::memcpy(page + first * 512, disk.data() + byte, bytes);
            } else {
                std::memcpy(disk.data() + byte, page + first * 512, bytes);
            }
            byte += bytes;
        }
        unmap_grants();
        if (fail_sector && sector <= *fail_sector && *fail_sector < std::max(byte / 512, sector + 1)) {
            status = -1;
        }
        if (silent_for != 0) {
            --silent_for;
            withheld.push_back({id, answer_op});
            return;
        }
        respond(id, answer_op, status);
    }

    void respond(u64 id, u8 op, i16 status) {
        violating = after_good <= 0 && violation != Violation::none;
        switch (after_good-- > 0 ? Violation::none : violation) {
        case Violation::none: break;
        case Violation::unknown_id: id = 0x123456789; break;
        case Violation::repeated_id: id = last_id ? *last_id : id; break;
        case Violation::wrong_operation: op = op == 0 ? 1 : 0; break;
        case Violation::bad_status: status = 17; break;
        case Violation::far_ahead: rsp_prod += slots * 3; break;
        case Violation::behind: rsp_prod -= 40; break;
        case Violation::unasked: push(id, op, status); break;
        }
        last_id = id;
        push(id, op, status);
    }
    void push(u64 id, u8 op, i16 status) {
        const u64 at = reinterpret_cast<u64>(slot(rsp_prod));
        Xen::field<u64>(at, 0) = id;
        Xen::field<u8>(at, 8) = op;
        Xen::field<i16>(at, 10) = status;
        const u32 old = word(8);
        ++rsp_prod;
        word(8) = rsp_prod;
        if (violating || rsp_prod - word(12) < rsp_prod - old) {
            ++notifications;
            xen.raise(port);
        }
    }

    Xen& xen;
    Offer offer;
    std::string front, back;
    Zeroed disk;
    std::byte* ring = nullptr;
    std::vector<u32> refs;
    u32 pages = 0, slots = 0, port = 0;
    u32 req_cons = 0, rsp_prod = 0;
    u64 requests_taken = 0;
    std::vector<Queue> further; // queues 1 to n - 1
    u32 at_once = ~0u;
    bool misses_closed = false; // once, after it has seen that the front end is closing
    bool keeps_mapped = false, hold_grants = false, dead = false, refuse_flush = false, never_closes = false;
    bool more_work = false, violating = false;
    bool present = false, removing = false, dead_process = false;
    bool hold = false;        // requests are taken and held for answer()
    bool hold_mapped = false; // with their pages mapped
    // requests an event only when nothing is in flight (QEMU), instead of after every look at the ring (Linux)
    bool lazy = false;
    std::map<u32, bool> kept;                      // mapped until the back end disconnects; true: writable
    std::set<u32> never_unmapped;                  // of these, mapped even after that
    std::vector<std::pair<u32, bool>> grants_used; // mapped for the current request
    std::set<u32> all_refs;
    std::map<u8, u64> served;
    u64 indirect_served = 0, secure_served = 0, segment_count = 0, notified = 0, notifications = 0, bad_grants = 0;
    std::optional<u64> fail_sector, last_id;
    Violation violation = Violation::none;
    int after_good = 0;
    u32 silent_for = 0;
    std::vector<std::pair<u64, u8>> withheld;

  private:
    u32 domain_;
    u32 number_ = 0;
    u32 wanted_state_ = 0;
    u32 waited_ = 0;
    bool frontend_changed_ = false, late_closing_ = false;
    u32 current_ = 0; // queue
    std::vector<Held> held_;
    std::vector<std::pair<u32, bool>> premapped_; // pages of the current request
};

struct Sink final : drivers::DiskSink {
    bool offered(u32 number) override {
        asked.push_back(number);
        return offer;
    }
    FixedText<16> free_name(std::string_view prefix) override { return drivers::disk_name(prefix, 0); }
    Result<void> announce(io::BlockDevice& d, u32 number) override {
        if (refuse) {
            return Error{Code::busy, "another driver has it"};
        }
        disk = &d;
        slot = number;
        return {};
    }
    void unused(const drivers::UnusedUnit& unit) override { left.emplace_back(std::string(unit.address), unit.why); }
    bool offer = true, refuse = false;
    std::vector<std::pair<std::string, drivers::Unused>> left; // units that it does not drive, and why
    std::vector<u32> asked;
    io::BlockDevice* disk = nullptr;
    u32 slot = 0;
};

/// A machine with one disk.
struct DiskMachine : Machine {
    explicit DiskMachine(const Offer& offer, u32 withheld = 0, u32 number = 51712, u32 domain = 0)
        : Machine(48u << 20), back(xen, offer, number, domain),
          environment{executor, xen.memory, xen.interrupts, sink, 200'000'000, withheld} {
        world.device = [this] { return back.step(); };
        device.type.write("vbd");
        device.address.write(std::to_string(number));
        device.number = number;
    }
    Result<void> probe() {
        EXPECT_TRUE(install());
        EXPECT_TRUE(start());
        return run(drivers::xen_blk::probe(environment, guest, device));
    }
    io::BlockDevice& disk() { return *sink.disk; }
    DmaSpan buffer(u32 bytes) { return *xen.memory.allocate(bytes, ~u64{0}); }
    Blkback back;
    Sink sink;
    drivers::Environment environment;
    hv::SyntheticDevice device;
};

/// The same with several processors, each with an executor; processor i is virtual CPU i.
struct LanesMachine : DiskMachine {
    LanesMachine(const Offer& offer, u32 processors, u32 withheld = 0) : DiskMachine(offer, withheld) {
        all.push_back(&executor);
        for (u32 i = 1; i < processors; ++i) {
            io::Platform platform = world.platform();
            platform.idle = [](void*, Instant, const std::atomic<bool>&) {};
            all.push_back(&others.emplace_back(platform, i));
        }
        xen.event_cpus.resize(processors);
        for (u32 i = 0; i < processors; ++i) {
            xen.event_cpus[i].processor = i;
        }
        environment.executors = all;
        world.device = [this] {
            bool did = false;
            for (u32 quiet = 0; quiet < 3;) {
                const bool more = back.step();
                xen.deliver();
                turns();
                did = did || more;
                quiet = more ? 0 : quiet + 1;
            }
            return did;
        };
    }
    Result<void> probe() {
        EXPECT_TRUE(install());
        EXPECT_TRUE(start());
        for (u32 i = 1; i < all.size(); ++i) {
            set_this_processor(i);
            EXPECT_TRUE(guest.join(i, *all[i]));
            set_this_processor(0);
        }
        return run(drivers::xen_blk::probe(environment, guest, device));
    }
    /// Of each further processor.
    void turns() {
        for (u32 round = 0; round < 4; ++round) {
            for (io::Executor& each : others) {
                set_this_processor(each.processor());
                each.turn();
            }
        }
        set_this_processor(0);
    }
    std::deque<io::Executor> others;
    std::vector<io::Executor*> all;
};

inline io::Task<Result<void>> read(io::BlockDevice& d, u64 lba, DmaSpan b) { co_return co_await d.read(lba, b); }
inline io::Task<Result<void>> write(io::BlockDevice& d, u64 lba, DmaSpan b) { co_return co_await d.write(lba, b); }
inline io::Task<Result<void>> flush(io::BlockDevice& d) { co_return co_await d.flush(); }
inline io::Task<Result<void>> discard(io::BlockDevice& d, u64 lba, DmaSpan b) {
    co_return co_await io::BlockDevice::Transfer(d, io::Op::discard, lba, b);
}
inline io::Task<Result<void>> secure_discard(io::BlockDevice& d, u64 lba, u32 bytes) {
    co_return co_await d.secure_discard(lba, bytes);
}
inline io::Task<Result<void>> sleep(io::Executor& e, Nanoseconds n) {
    co_await e.sleep(n);
    co_return Result<void>{};
}

} // namespace fake
