// A fake Hyper-V: registers, hypercalls, a SynIC and the host's end of a VMBus. Written from the specifications, not
// from the kernel's structures: numbers and field offsets are literals. Include after the imports; guest memory is the
// program's own (HeapDma of unit/io/support.hpp).
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

#include "unit/core/interrupt_fake.hpp"

namespace hyperv_fake {
using namespace fl;
using Bytes = std::vector<u8>;

inline void put32(Bytes& bytes, usize at, u32 value) {
    bytes.resize(std::max(bytes.size(), at + 4));
    std::memcpy(bytes.data() + at, &value, 4);
}
inline u32 get32(const Bytes& bytes, usize at) {
    u32 value = 0;
    std::memcpy(&value, bytes.data() + at, 4);
    return value;
}
inline u16 get16(const Bytes& bytes, usize at) {
    u16 value = 0;
    std::memcpy(&value, bytes.data() + at, 2);
    return value;
}
inline u64 get64(const Bytes& bytes, usize at) {
    u64 value = 0;
    std::memcpy(&value, bytes.data() + at, 8);
    return value;
}
/// Converts "0e 00 00 00" to bytes.
inline Bytes hex(std::string_view text) {
    Bytes bytes;
    for (usize i = 0; i + 1 < text.size(); ++i) {
        if (text[i] != ' ' && text[i] != '\n') {
            bytes.push_back(static_cast<u8>(std::stoi(std::string(text.substr(i, 2)), nullptr, 16)));
            ++i;
        }
    }
    return bytes;
}

/// An offer from the host.
struct HostOffer {
    u32 relid = 1;
    std::string type = "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f";
    u8 instance = 1; // the first byte of the instance's GUID in memory; the others are 0
    u16 sub_channel = 0;
    bool dedicated = true;
    int monitor = -1;
    u32 connection = 0x10000;
};

class Host final : public hv::Privileged, public hv::PhysicalMemory {
  public:
    struct Posted {
        u32 connection;
        u32 type;
        Bytes bytes;
    };
    // Properties of the host.
    u32 newest = 0x00050003;
    bool listens_at_4 = true; // otherwise HvPostMessage returns invalid connection id
    bool listens_at_1 = true;
    bool silent = false;        // accepts messages but does not reply
    u8 refuse_state = 0;        // connection state reported for an accepted version
    u32 message_connection = 1; // reported from version 5.0 on
    u32 busy_posts = 0;         // number of posts that fail for lack of buffers
    u32 busy_status = 0x13;     // the status they get: insufficient buffers
    u32 gpadl_status = 0;
    u32 open_status = 0;
    bool answers_gpadl = true;
    bool answers_open = true;
    bool answers_teardown = true;
    bool answers_modify = true;
    bool answers_unload = true;
    bool interrupts_on = true;
    std::vector<HostOffer> offers{HostOffer{}};
    std::function<void(const Bytes&)> before_answer; // called with each message before the host replies

    // Observations.
    std::vector<Posted> posted;
    std::vector<u64> signals; // inputs of HvSignalEvent
    std::map<u32, u64> msrs;
    std::vector<std::pair<u32, u64>> writes;
    test::Interrupts interrupts{0x41};
    u64 eoms = 0;
    u32 version = 0;
    u64 interrupt_page = 0;
    u64 monitor_page_to_host = 0;
    std::map<u32, std::vector<u64>> gpadls; // page numbers seen so far
    std::map<u32, u32> gpadl_pages;         // announced page counts
    std::map<u32, Bytes> opened;            // relid → the OPENCHANNEL message
    std::vector<u32> released;
    std::deque<Bytes> outgoing;

    u64 read_msr(u32 number) override {
        if (number == 0x40000020) {
            return reference += 10;
        }
        return msrs[number];
    }
    void write_msr(u32 number, u64 value) override {
        writes.emplace_back(number, value);
        if (number == 0x40000084) {
            ++eoms;
            fill_slot();
            if (interrupts_at_once) {
                interrupt();
            }
            return;
        }
        if (number == 0x40000001 && (msrs[0x40000000] == 0 || !hypercalls)) {
            return; // no guest identity, so no hypercalls
        }
        msrs[number] = value;
        if (number == 0x40000021 && (value & 1) != 0) {
            const u64 at = value & ~u64{0xfff};
            std::memcpy(reinterpret_cast<void*>(at), &tsc_sequence, 4);
            std::memcpy(reinterpret_cast<void*>(at + 8), &tsc_scale, 8);
            std::memcpy(reinterpret_cast<void*>(at + 16), &tsc_offset, 8);
        }
    }
    bool hypercalls = true; // false: the hypercall page cannot be enabled
    u64 reference = 1000;
    u32 tsc_sequence = 1;
    u64 tsc_scale = 0x0147ae147ae147ae; // 2 GHz
    u64 tsc_offset = 0;
    u8 in8(u16) override { return 0; }
    u16 in16(u16) override { return 0; }
    u32 in32(u16) override { return 0; }
    void out8(u16, u8) override {}
    void out16(u16, u16) override {}
    CpuidRegisters cpuid_leaf(u32) override { return {}; }
    void out32(u16, u32) override {}
    Result<std::byte*> map(u64 physical, u64) override { return reinterpret_cast<std::byte*>(physical); }
    u64 physical_of(const void* address) override { return reinterpret_cast<u64>(address); }

    hv::hyperv::Gate gate() {
        return {this, [](void* c, u64 control, u64 input, u64) { return static_cast<Host*>(c)->call(control, input); },
                page};
    }
    alignas(4096) static constexpr u8 page[4096]{};

    u64 call(u64 control, u64 input) {
        if (control == 0x1005d) {
            signals.push_back(input);
            return 0;
        }
        if (control != 0x5c) {
            return 2;
        }
        EXPECT_EQ(input % 8, 0u);
        Bytes all(256);
        std::memcpy(all.data(), reinterpret_cast<const void*>(input), 256);
        const u32 connection = get32(all, 0);
        if (busy_posts != 0) {
            --busy_posts;
            return busy_status;
        }
        if ((connection == 4 && !listens_at_4) || (connection == 1 && !listens_at_1)) {
            return 0x12;
        }
        const u32 size = get32(all, 12);
        Bytes bytes(all.begin() + 16, all.begin() + 16 + size);
        posted.push_back({connection, get32(all, 8), bytes});
        if (!silent) {
            if (before_answer) {
                before_answer(bytes);
            }
            serve(bytes);
        }
        return 0;
    }

    // The host's messages reach the guest one at a time, with an interrupt each.
    void send(const Bytes& bytes) {
        outgoing.push_back(bytes);
        fill_slot();
    }
    u8* slot() {
        const u64 simp = msrs[0x40000083];
        return (simp & 1) != 0 ? reinterpret_cast<u8*>(simp & ~u64{0xfff}) + 2 * 256 : nullptr;
    }
    void fill_slot() {
        u8* at = slot();
        if (at == nullptr || outgoing.empty()) {
            return;
        }
        u32 type;
        std::memcpy(&type, at, 4);
        if (type != 0) {
            at[5] |= 1; // another message is pending
            return;
        }
        const Bytes bytes = outgoing.front();
        outgoing.pop_front();
        std::memset(at, 0, 256);
        at[4] = static_cast<u8>(bytes.size());
        std::memcpy(at + 16, bytes.data(), bytes.size());
        at[5] = outgoing.empty() ? 0 : 1;
        type = 1;
        std::memcpy(at, &type, 4);
        pending_interrupt = true;
    }
    bool pending_interrupt = false;
    bool interrupts_at_once = false; // a message that follows an end-of-message interrupts right there
    /// Delivers interrupts, as the processor would between two instructions.
    void interrupt() {
        for (u32 i = 0; i < 64 && interrupts_on && std::exchange(pending_interrupt, false); ++i) {
            interrupts.handler(interrupts.context);
        }
    }
    void raise(u32 flag) {
        u8* flags = reinterpret_cast<u8*>(msrs[0x40000082] & ~u64{0xfff}) + 2 * 256;
        if (version < 0x00020004) {
            reinterpret_cast<u8*>(interrupt_page)[flag / 8] |= static_cast<u8>(1 << flag % 8);
            flag = 0;
        }
        flags[flag / 8] |= static_cast<u8>(1 << flag % 8);
        pending_interrupt = true;
        interrupt();
    }

    static Bytes offer_message(const HostOffer& offer) {
        Bytes m(196);
        put32(m, 0, 1);
        const auto type = hv::hyperv::Guid::parse(offer.type);
        std::memcpy(m.data() + 8, type->bytes.data(), 16);
        m[24] = offer.instance;
        m[180] = static_cast<u8>(offer.sub_channel);
        put32(m, 184, offer.relid);
        if (offer.monitor >= 0) {
            m[188] = static_cast<u8>(offer.monitor);
            m[189] = 1;
        }
        m[190] = offer.dedicated ? 1 : 0;
        put32(m, 192, offer.connection);
        return m;
    }
    static Bytes message(u32 type, std::initializer_list<u32> words) {
        Bytes m(8);
        put32(m, 0, type);
        for (const u32 word : words) {
            put32(m, m.size(), word);
        }
        return m;
    }
    void rescind(u32 relid) { send(message(2, {relid})); }

    void serve(const Bytes& m) {
        switch (get32(m, 0)) {
        case 14: {
            const u32 wanted = get32(m, 8);
            const bool known = wanted <= newest;
            version = known ? wanted : 0;
            if (known && wanted < 0x00050000) {
                interrupt_page = get64(m, 16);
            }
            monitor_page_to_host = get64(m, 32);
            Bytes answer(16);
            put32(answer, 0, 15);
            answer[8] = known ? 1 : 0;
            answer[9] = known ? refuse_state : 0;
            put32(answer, 12, message_connection);
            send(answer);
            break;
        }
        case 3:
            for (const HostOffer& offer : offers) {
                send(offer_message(offer));
            }
            send(message(4, {}));
            break;
        case 8: {
            const u32 handle = get32(m, 12);
            EXPECT_EQ(get16(m, 18), 1) << "one range";
            gpadl_pages[handle] = (get16(m, 16) - 8u) / 8;
            EXPECT_EQ(get32(m, 20), gpadl_pages[handle] * 4096) << "bytes of the range";
            EXPECT_EQ(get32(m, 24), 0u);
            take_pages(m, handle, 28, get32(m, 8));
            break;
        }
        case 9: take_pages(m, get32(m, 12), 16, gpadl_channel[get32(m, 12)]); break;
        case 11:
            if (answers_teardown) {
                send(message(12, {get32(m, 12)}));
            }
            gpadls.erase(get32(m, 12));
            break;
        case 5:
            if (answers_open) {
                opened[get32(m, 8)] = m;
                send(message(6, {get32(m, 8), get32(m, 12), open_status}));
            }
            break;
        case 7: opened.erase(get32(m, 8)); break;
        case 13: released.push_back(get32(m, 8)); break;
        case 16:
            if (answers_unload) {
                send(message(17, {}));
            }
            break;
        case 22:
            if (answers_modify && version >= 0x00050003) {
                send(message(24, {get32(m, 8), 0}));
            }
            break;
        default: break;
        }
    }
    std::map<u32, u32> gpadl_channel;
    void take_pages(const Bytes& m, u32 handle, usize from, u32 channel) {
        gpadl_channel[handle] = channel;
        for (usize at = from; at + 8 <= m.size(); at += 8) {
            gpadls[handle].push_back(get64(m, at));
        }
        if (gpadls[handle].size() == gpadl_pages[handle] && answers_gpadl) {
            send(message(10, {channel, handle, gpadl_status}));
            if (gpadl_status != 0) {
                gpadls.erase(handle);
            }
        }
    }
    /// Messages of that type posted by the guest.
    std::vector<Bytes> of(u32 type) const {
        std::vector<Bytes> found;
        for (const Posted& p : posted) {
            if (get32(p.bytes, 0) == type) {
                found.push_back(p.bytes);
            }
        }
        return found;
    }
};

/// The whole guest side on such a host.
struct Machine {
    Host host;
    test::FakeMachine clock;
    test::HeapDma memory;
    io::Executor executor{clock.platform()};
    CpuidSnapshot cpuid;
    hv::Sightings sightings;
    hv::HyperV guest;

    // The privileges of a Hyper-V with a VMBus.
    explicit Machine(u32 base = 0x40000000, u32 low = 0xe7f, u32 recommended = 0) {
        const auto leaf = [&](u32 number, CpuidRegisters r) {
            cpuid.leaves[cpuid.leaf_count++] = {base + number, 0, r};
        };
        leaf(3, {low, 0x30, 0, 1u << 8 | 1u << 10 | 1u << 19});
        leaf(4, {recommended, 0, 0, 0});
        hv::Sighting kvm;
        kvm.guest = hv::VmGuest::kvm;
        kvm.base = base == 0x40000000 ? 0x40000100 : 0x40000000;
        sightings.list[sightings.count++] = kvm;
        hv::Sighting s;
        s.guest = hv::VmGuest::hyperv;
        s.base = base;
        s.max_leaf = base + 5;
        s.version = 10 << 16;
        s.features = low;
        s.features_high = 0x30;
        sightings.list[sightings.count++] = s;
        host.msrs[0x40000002] = 7; // VP index
        guest.set_gate(host.gate());
        clock.on_idle = [](void* c) { static_cast<Machine*>(c)->host.interrupt(); };
        clock.on_idle_context = this;
    }
    Result<void> install() {
        hv::Environment environment{cpuid, sightings, memory, host, host};
        return guest.install(environment);
    }
    Result<void> start(Nanoseconds timeout = 50'000'000) {
        if (auto installed = install(); !installed) {
            return installed;
        }
        hv::Services services{host.interrupts, executor, timeout};
        return guest.start(services);
    }
    /// Nothing to list if no bus started.
    Result<void> enumerate(hv::DeviceList& into) {
        return guest.bus() != nullptr ? executor.run(guest.bus()->enumerate(into)) : Result<void>{};
    }
    /// Starts, connects and lists the offers.
    bool up() {
        hv::DeviceList list;
        return start() && enumerate(list) && guest.bus() != nullptr && bus().connected();
    }
    hv::hyperv::Vmbus& bus() { return guest.bus()->vmbus(); }
    /// Lets messages in transit arrive.
    void settle() {
        for (u32 i = 0; i < 20; ++i) {
            host.interrupt();
            executor.turn();
        }
    }
};

} // namespace hyperv_fake
