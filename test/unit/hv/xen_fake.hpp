// A fake Xen: guest memory, hypercalls, event channels, and a XenStore server with its page. Written from the
// specifications, not from the kernel's structures. Include after the imports.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

#include "unit/core/interrupt_fake.hpp"

namespace fake {
using namespace fl;

/// Guest memory starting at `base`. Pages are allocated only once, unless `reuse` is set; freed pages are counted.
class Memory final : public DmaAllocator, public hv::PhysicalMemory {
  public:
    static constexpr u64 base = 0x10000000;
    explicit Memory(usize bytes) : storage_(bytes) {}
    ~Memory() { clear_quarantine(); } // the next test uses the same addresses
    Result<DmaSpan> allocate(u32 size, u64) override {
        size = (size + 4095) & ~4095u;
        for (DmaSpan& span : freed_) {
            if (reuse && span.size >= size && !refuse) {
                span.size -= size;
                const DmaSpan taken{span.data + span.size, span.bus + span.size, size};
                std::memset(taken.data, 0, size);
                outstanding += size;
                return taken;
            }
        }
        if (used_ + size > storage_.size() || refuse || outstanding + size > most) {
            return Error{Code::exhausted, "test memory is full"};
        }
        DmaSpan span{storage_.data() + used_, base + used_, size};
        std::memset(span.data, 0, size);
        used_ += size;
        outstanding += size;
        return span;
    }
    void free(DmaSpan span) override {
        outstanding -= (span.size + 4095) & ~4095u;
        freed_.push_back({span.data, span.bus, (span.size + 4095) & ~4095u});
        if (on_free) {
            on_free(span);
        }
    }
    Result<std::byte*> map(u64 physical, u64) override { return at(physical); }
    u64 physical_of(const void* address) override {
        return base + static_cast<u64>(static_cast<const std::byte*>(address) - storage_.data());
    }
    std::byte* at(u64 physical) const { return storage_.data() + (physical - base); }
    usize left() const {
        usize bytes = storage_.size() - used_;
        for (const DmaSpan& span : freed_) {
            bytes += reuse ? span.size : 0;
        }
        return bytes;
    }
    bool reuse = false;
    u64 outstanding = 0;
    u64 most = ~u64{0}; // outstanding at once
    bool refuse = false;
    std::function<void(DmaSpan)> on_free;

  private:
    Zeroed storage_;
    std::vector<DmaSpan> freed_;
    usize used_ = 0;
};

class Cpu final : public hv::Privileged {
  public:
    u64 read_msr(u32) override { return 0; }
    void write_msr(u32 msr, u64 value) override { msrs[msr] = value; }
    u8 in8(u16 port) override { return port == 0x12 ? unplug_version : 0xff; }
    u16 in16(u16 port) override { return port == 0x10 ? unplug_magic : 0xffff; }
    u32 in32(u16) override { return ~u32{0}; }
    void out8(u16 port, u8 value) override { writes.push_back({port, value}); }
    void out16(u16 port, u16 value) override { writes.push_back({port, value}); }
    CpuidRegisters cpuid_leaf(u32 leaf) override {
        EXPECT_EQ(leaf, 0x40000004u);
        return vcpu_ids ? CpuidRegisters{1u << 3, vcpu_ids(), 0, 0} : CpuidRegisters{};
    }
    std::function<u32()> vcpu_ids; // of the calling processor; empty: CPUID does not tell
    void out32(u16 port, u32 value) override {
        writes.push_back({port, value});
        if (port == 0x10 && refuse_drivers) {
            unplug_magic = 0xd249;
        }
    }
    std::map<u32, u64> msrs;
    std::vector<std::pair<u16, u32>> writes;
    u8 unplug_version = 1;
    u16 unplug_magic = 0x49d2;
    bool refuse_drivers = false;
};

/// The hypervisor and the store's domain. `step()` runs the other domains; true: something happened.
class Xen {
  public:
    u32 store_port = 1;
    explicit Xen(usize bytes = 48u << 20) : memory(bytes) {
        auto page = memory.allocate(4096, ~u64{0});
        store_page = page->data;
        store_frame = page->bus / 4096;
        memory.outstanding = 0;
        memory.on_free = [this](DmaSpan span) {
            for (const auto& [ref, mapping] : mappings) {
                EXPECT_FALSE(mapping.frame * 4096 < span.bus + span.size && span.bus < (mapping.frame + 1) * 4096)
                    << "a page is given back while grant " << ref << " of it is mapped";
            }
        };
        // The rings have been used before: the positions do not start at 0.
        for (u32 offset : {2048u, 2052u, 2056u, 2060u}) {
            store_word(offset) = 0xfffffff0;
        }
        cpuid.leaves[0] = {0x40000000, 0, {0x40000005, 0x566e6558, 0x65584d4d, 0x4d4d566e}};
        cpuid.leaves[1] = {0x40000002, 0, {1, 0x40000200, 0, 0}};
        cpuid.leaves[2] = {0x40000003, 0, {0, 0, 2'500'000, 0}};
        cpuid.leaf_count = 3;
        sightings.list[0] = {hv::VmGuest::xen, 0x40000000, 0x40000005, FixedText<12>("XenVMMXenVMM"),
                             4u << 16 | 17,    0,          0,          0};
        sightings.count = 1;
        sightings.hypervisor_bit = true;
    }

    hv::xen::Gate gate() {
        return {this,
                [](void* self, u32 n, u64 a, u64 b, u64 c, u64, u64) {
                    return static_cast<Xen*>(self)->hypercall(n, a, b, c);
                },
                nullptr};
    }

    template <class T>
    static T& field(u64 address, usize offset) {
        return *reinterpret_cast<T*>(address + offset);
    }

    i64 hypercall(u32 number, u64 a, u64 b, u64 c) {
        ++calls[number];
        switch (number) {
        case 17: // xen_version
            if (a == 0) {
                return version;
            }
            field<u32>(b, 4) = features;
            return 0;
        case 12: { // memory_op
            if (a != 7) {
                return -38;
            }
            const u32 space = field<u32>(b, 4);
            const u64 index = field<u64>(b, 8);
            std::byte* page = memory.at(field<u64>(b, 16) * 4096);
            std::memset(page, 0, 4096); // Xen's page takes its place
            if (space == 0) {
                shared = page;
                if (on_shared_info) {
                    on_shared_info(page);
                }
                return 0;
            }
            if (space != 1 || index >= std::min(grant_frames_limit, grant_frames_given)) {
                return -22;
            }
            EXPECT_EQ(grant_frames[index], nullptr) << "frame " << index << " is mapped already";
            grant_frames[index] = page;
            return 0;
        }
        case 20: // grant_table_op query_size
            if (a != 6 || c != 1) {
                return -38;
            }
            field<u32>(b, 4) = 1;
            field<u32>(b, 8) = grant_frames_limit;
            field<i16>(b, 12) = 0;
            return 0;
        case 34: // hvm_op
            if (a == 23) {
                if (field<u32>(b, 0) >= event_cpus.size() || refuse_vectors) {
                    return -22;
                }
                event_cpus[field<u32>(b, 0)].vector = field<u8>(b, 4);
                return 0;
            }
            if (a == 0) {
                if (field<u32>(b, 4) == 0) {
                    callback = field<u64>(b, 8);
                }
                return set_param_answer;
            }
            switch (field<u32>(b, 4)) {
            case 1: field<u64>(b, 8) = has_store ? store_frame : 0; return 0;
            case 2: field<u64>(b, 8) = has_store ? store_port : 0; return 0;
            case 17: field<u64>(b, 8) = console_frame; return console_frame != 0 ? 0 : -22;
            case 18: field<u64>(b, 8) = console_port; return 0;
            default: return -22;
            }
        case 29: // sched_op
            if (a == 2) {
                shutdown_reason = field<u32>(b, 0);
                return on_suspend && shutdown_reason == 2 ? on_suspend() : 0;
            } else if (a == 0) {
                ++yields;
                if (on_yield) {
                    on_yield();
                }
            }
            return 0;
        case 18: // console_io
            if (console_answer >= 0) {
                console.append(reinterpret_cast<const char*>(c), b);
            }
            return console_answer;
        case 32: return event_op(a, b);
        case 24: return vcpu_op(a, static_cast<u32>(b), c);
        default: return -38;
        }
    }

    std::byte* info_of(u32 vcpu) {
        return event_cpus[vcpu].info != nullptr ? event_cpus[vcpu].info : shared + vcpu * 64;
    }
    i64 register_info(u32 vcpu, u64 c) {
        if (vcpu >= event_cpus.size()) {
            return -2;
        }
        const bool is_down = vcpu < vcpus.size() && !vcpus[vcpu].up;
        if ((event_cpus[vcpu].processor != this_processor() && !is_down) || event_cpus[vcpu].info != nullptr ||
            field<u32>(c, 8) > 4096 - 64 || field<u32>(c, 8) % 8 != 0) {
            return -22;
        }
        std::byte* info = memory.at(field<u64>(c, 0) * 4096) + field<u32>(c, 8);
        if (vcpu < 32) {
            std::memcpy(info, info_of(vcpu), 64);
        }
        event_cpus[vcpu].info = info;
        // Everything counts as pending, so that nothing gets lost.
        field<u64>(reinterpret_cast<u64>(info), 8) = ~u64{0};
        field<u8>(reinterpret_cast<u64>(info), 0) = 1;
        return 0;
    }

    i64 vcpu_op(u64 op, u32 vcpu, u64 c) {
        if (op == 10) {
            return takes_vcpu_info ? register_info(vcpu, c) : -38;
        }
        if (op ==
            4) { // get_runstate_info: state at 0, state_entry_time at 8, four times from 16 on [xen-public vcpu.h]
            if (!offers_runstate || vcpu >= event_cpus.size()) {
                return offers_runstate ? -2 : -38;
            }
            field<u64>(c, 24) = event_cpus[vcpu].runnable;
            field<u64>(c, 40) = event_cpus[vcpu].offline;
            return 0;
        }
        if (op == 8 || op == 9) { // the single-shot timer
            return timer_op(op, vcpu, c);
        }
        if (vcpus.empty()) { // KVM's emulation
            return -38;
        }
        if (vcpu >= vcpus.size()) {
            return -2;
        }
        switch (op) {
        case 0: { // initialise, in the order of Xen's checks
            if (vcpu >= 32 && (vcpu >= event_cpus.size() || event_cpus[vcpu].info == nullptr)) {
                return -22; // no vcpu_info
            }
            if (vcpus[vcpu].initialised) {
                return -17;
            }
            if (field<u32>(c, 0) != 1) {
                return -22;
            }
            vcpus[vcpu].initialised = true;
            vcpus[vcpu].rip = field<u64>(c, 72);
            vcpus[vcpu].cr3 = field<u64>(c, 96);
            return 0;
        }
        case 1: // up
            if (!vcpus[vcpu].initialised) {
                return -22;
            }
            vcpus[vcpu].up = true;
            return 0;
        case 2: vcpus[vcpu].up = false; return 0;
        case 3: return vcpus[vcpu].up ? 1 : 0;
        default: return -38;
        }
    }
    /// A virtual CPU has been runnable and offline for so long.
    void steal(u32 vcpu, u64 runnable, u64 offline) {
        event_cpus[vcpu].runnable = runnable;
        event_cpus[vcpu].offline = offline;
    }
    /// A guest that arms a virtual CPU's timer does so on it.
    i64 timer_op(u64 op, u32 vcpu, u64 c) {
        if (!offers_timer) {
            return -38;
        }
        if (vcpu >= event_cpus.size()) {
            return -2;
        }
        EventCpu& target = event_cpus[vcpu];
        if (target.processor != this_processor()) {
            return -22;
        }
        target.expiry.reset();
        if (op == 9) {
            return 0;
        }
        expiries.push_back(field<u64>(c, 0));
        EXPECT_EQ(field<u32>(c, 8), 0u) << "VCPU_SSHOTTMR_future: an expiry that has passed would be lost";
        if (timer_refusals != 0) {
            --timer_refusals;
            return timer_error;
        }
        target.expiry = field<u64>(c, 0);
        return 0;
    }
    /// The timer of a virtual CPU expires.
    void expire(u32 vcpu) {
        ASSERT_TRUE(event_cpus[vcpu].expiry);
        event_cpus[vcpu].expiry.reset();
        raise(event_cpus[vcpu].timer_port);
    }
    /// What Xen tells the guest about time: `ns` of system time at `tsc`, which counts at 1 GHz.
    void set_time(u32 vcpu, u64 tsc, u64 ns, u32 mul = 0x80000000, i8 shift = 1) {
        const u64 time = reinterpret_cast<u64>(info_of(vcpu)) + 32;
        field<u64>(time, 8) = tsc;
        field<u64>(time, 16) = ns;
        field<u32>(time, 24) = mul;
        field<i8>(time, 28) = shift;
    }
    struct Vcpu {
        bool initialised = false;
        bool up = false;
        u64 rip = 0, cr3 = 0;
    };
    std::vector<Vcpu> vcpus;

    i64 event_op(u64 op, u64 b) {
        switch (op) {
        case 11: { // init_control: the first one switches to FIFO event channels
            const u32 vcpu = field<u32>(b, 12);
            if (!offers_fifo) {
                return -38;
            }
            if (vcpu >= event_cpus.size()) {
                return -2;
            }
            if (event_cpus[vcpu].control != nullptr || field<u32>(b, 8) > 4096 - 72 || field<u32>(b, 8) % 8 != 0 ||
                refuse_control == vcpu) {
                return -22;
            }
            event_cpus[vcpu].control = memory.at(field<u64>(b, 0) * 4096) + field<u32>(b, 8);
            field<u8>(b, 16) = 17;
            fifo = true;
            return 0;
        }
        case 12: // expand_array
            if (!fifo || refuse_array) {
                return -22;
            }
            words = memory.at(field<u64>(b, 0) * 4096);
            return 0;
        case 13: // set_priority
            if (!fifo || field<u32>(b, 4) >= 16) {
                return fifo ? -22 : -38;
            }
            priorities[field<u32>(b, 0)] = field<u32>(b, 4);
            return 0;
        case 1: { // bind_virq
            const u32 vcpu = field<u32>(b, 4);
            if (field<u32>(b, 0) != 0 || refuse_virqs) {
                return -22;
            }
            if (vcpu >= event_cpus.size()) {
                return -2;
            }
            if (event_cpus[vcpu].timer_port != 0) {
                return -17;
            }
            field<u32>(b, 8) = event_cpus[vcpu].timer_port = next_port;
            open_ports.insert(next_port);
            port_vcpu[next_port] = vcpu;
            return (next_port++, 0);
        }
        case 8: // bind_vcpu
            if (!moves_ports || field<u32>(b, 4) >= event_cpus.size()) {
                return moves_ports ? -2 : -38;
            }
            port_vcpu[field<u32>(b, 0)] = field<u32>(b, 4);
            return 0;
        case 7: // bind_ipi
            if (refuse_ipis || field<u32>(b, 0) >= event_cpus.size()) {
                return -2;
            }
            field<u32>(b, 4) = next_port;
            open_ports.insert(next_port);
            ipi_ports.insert(next_port);
            port_vcpu[next_port] = field<u32>(b, 0);
            return (next_port++, 0);
        case 6: // alloc_unbound
            if (next_port >= last_port || open_ports.size() >= most_ports) {
                return -28;
            }
            field<u32>(b, 4) = next_port;
            open_ports.insert(next_port);
            port_domains[next_port] = field<u16>(b, 2);
            return (next_port++, 0);
        case 4: { // send
            const u32 port = field<u32>(b, 0);
            if (port == store_port) {
                store_event = true;
                return 0;
            }
            if (port == console_port) {
                ++console_events;
                return 0;
            }
            if (!open_ports.contains(port)) {
                return -22;
            }
            ++sends[port];
            if (ipi_ports.contains(port)) {
                raise(port);
            }
            return 0;
        }
        case 5: // status
            field<u32>(b, 8) = field<u32>(b, 4) == console_port ? console_status : 0;
            return status_answer;
        case 3: { // close
            const u32 port = field<u32>(b, 0);
            open_ports.erase(port);
            ipi_ports.erase(port);
            port_vcpu.erase(port);
            for (EventCpu& each : event_cpus) {
                each.timer_port = each.timer_port == port ? 0 : each.timer_port;
            }
            return 0;
        }
        default: return -38;
        }
    }

    // ---- the guest's console: page by offsets ----
    void give_console(u32 position = 0xfffffe00) { // the positions are free-running: soon past 0
        auto page = memory.allocate(4096, ~u64{0});
        console_page = page->data;
        console_frame = page->bus / 4096;
        console_word(3080) = console_word(3084) = position;
    }
    u32& console_word(u32 offset) { return field<u32>(reinterpret_cast<u64>(console_page), offset); }
    /// xenconsoled: consumes up to `most` bytes.
    bool read_console(u32 most = ~0u) {
        u32& consumer = console_word(3080);
        bool did = false;
        for (; consumer != console_word(3084) && most != 0; --most, ++consumer) {
            console_text += static_cast<char>(console_page[1024 + consumer % 2048]);
            did = true;
        }
        return did;
    }

    // ---- events: shared info by offsets ----
    u64& pending(u32 word) { return field<u64>(reinterpret_cast<u64>(shared), 0x800 + word * 8); }
    u64& mask(u32 word) { return field<u64>(reinterpret_cast<u64>(shared), 0xa00 + word * 8); }
    u8& upcall_pending(u32 vcpu = 0) { return field<u8>(reinterpret_cast<u64>(info_of(vcpu)), 0); }
    u64& selector(u32 vcpu = 0) { return field<u64>(reinterpret_cast<u64>(info_of(vcpu)), 8); }
    // ---- FIFO event channels: a word of 32 bits per port, 31: pending, 30: masked, 29: linked, 28: busy, 0 to 16: the
    // ---- next port in its queue
    u32& event_word(u32 port) { return field<u32>(reinterpret_cast<u64>(words), port * 4); }
    u32& head_of(u32 vcpu, u32 queue = 7) {
        return field<u32>(reinterpret_cast<u64>(event_cpus[vcpu].control), 8 + 4 * queue);
    }
    u32& ready_of(u32 vcpu) { return field<u32>(reinterpret_cast<u64>(event_cpus[vcpu].control), 0); }
    void raise_queued(u32 port) {
        u32& word = event_word(port);
        word |= 1u << 31;
        const u32 vcpu = port_vcpu.contains(port) ? port_vcpu[port] : 0;
        EventCpu& target = event_cpus[vcpu];
        if ((word & (3u << 29)) != 0 || target.control == nullptr) { // masked, or in a queue
            return;
        }
        word |= 1u << 29;
        const u32 queue = priorities.contains(port) ? priorities[port] : 7; // the default
        u32& tail = target.tails[queue];
        if (tail == port) { // it has been taken from the queue, which is empty
            tail = 0;
        }
        bool linked = false;
        if (tail != 0 && (event_word(tail) >> 29 & 1) != 0) {
            event_word(tail) |= port;
            linked = true;
        } else {
            head_of(vcpu, queue) = port;
        }
        tail = port;
        if (!linked && (ready_of(vcpu) >> queue & 1) == 0) {
            ready_of(vcpu) |= 1u << queue;
            upcall_pending(vcpu) = 1;
        }
    }
    void raise(u32 port) {
        if (fifo) {
            raise_queued(port);
            return;
        }
        const u64 bit = u64{1} << port % 64;
        if ((pending(port / 64) & bit) != 0) {
            return;
        }
        pending(port / 64) |= bit;
        if ((mask(port / 64) & bit) != 0) {
            return;
        }
        const u32 vcpu = port_vcpu.contains(port) ? port_vcpu[port] : 0;
        selector(vcpu) |= u64{1} << port / 64;
        upcall_pending(vcpu) = 1;
    }
    /// Takes the upcalls that are due, each on its virtual CPU's processor.
    bool deliver() {
        check_mappings();
        bool did = false;
        for (u32 vcpu = 0; vcpu < event_cpus.size(); ++vcpu) {
            if (shared == nullptr || upcall_pending(vcpu) == 0 || interrupts.handler == nullptr) {
                continue;
            }
            ++upcalls;
            ++event_cpus[vcpu].upcalls;
            const u32 before = this_processor();
            set_this_processor(event_cpus[vcpu].processor);
            interrupts.handler(interrupts.context);
            set_this_processor(before);
            did = true;
        }
        return did;
    }

    // ---- grants, checked like the hypervisor does: type, domain, mode; and what it cannot see but the guest must
    // ---- not do ----
    struct Mapping {
        u64 frame = 0;
        u16 domain = 0;
        u32 readers = 0; // read-only mappings
        u32 writers = 0;
    };
    u64 entry_address(u32 ref) { return reinterpret_cast<u64>(grant_frames[ref / 512]) + ref % 512 * 8; }
    bool in_table(u32 ref) { return ref / 512 < grant_frames.size() && grant_frames[ref / 512] != nullptr; }
    u16& grant_flags(u32 ref) { return field<u16>(entry_address(ref), 0); }

    /// GNTTABOP_map_grant_ref; nullptr: rejected by Xen.
    std::byte* map_grant(u32 ref, u16 domain, bool write) {
        check_mappings();
        if (ref < 8 || !in_table(ref)) {
            return (++bad_maps, nullptr);
        }
        const u64 entry = entry_address(ref);
        u16& flags = grant_flags(ref);
        if ((flags & 3) != 1 || field<u16>(entry, 2) != domain || (write && (flags & 4) != 0)) {
            return (++bad_maps, nullptr);
        }
        Mapping& mapping = mappings[ref];
        mapping.frame = field<u32>(entry, 4);
        mapping.domain = domain;
        ++(write ? mapping.writers : mapping.readers);
        flags = static_cast<u16>(flags | (write ? 0x18 : 0x08));
        return memory.at(mapping.frame * 4096);
    }
    void unmap_grant(u32 ref, bool write) {
        check_mappings();
        ASSERT_TRUE(mappings.contains(ref));
        Mapping& mapping = mappings[ref];
        u32& users = write ? mapping.writers : mapping.readers;
        ASSERT_GT(users, 0u);
        --users;
        if (mapping.writers == 0) {
            grant_flags(ref) = static_cast<u16>(grant_flags(ref) & ~0x10);
            if (mapping.readers == 0) {
                grant_flags(ref) = static_cast<u16>(grant_flags(ref) & ~0x08);
                mappings.erase(ref);
            }
        }
    }
    /// Mapped pages must stay granted, the same page to the same domain.
    void check_mappings() {
        for (const auto& [ref, mapping] : mappings) {
            EXPECT_EQ(grant_flags(ref) & 3, 1) << "grant " << ref << " was ended while it was mapped";
            EXPECT_EQ(u64{field<u32>(entry_address(ref), 4)}, mapping.frame)
                << "grant " << ref << " was used again while it was mapped";
            EXPECT_EQ(field<u16>(entry_address(ref), 2), mapping.domain)
                << "grant " << ref << " was used again while it was mapped";
            EXPECT_EQ(grant_flags(ref) >> 3 & 3, mapping.writers != 0 ? 3 : 1)
                << "the bits of grant " << ref << " are Xen's to change";
        }
    }
    bool granted_read_only(u32 ref) { return (grant_flags(ref) & 4) != 0; }
    u32 live_grants() {
        u32 n = 0;
        for (std::byte* frame : grant_frames) {
            for (u32 i = 0; frame != nullptr && i < 512; ++i) {
                n += (field<u16>(reinterpret_cast<u64>(frame), i * 8) & 3) != 0;
            }
        }
        return n;
    }
    u32 frames_of_grants() {
        u32 n = 0;
        for (std::byte* frame : grant_frames) {
            n += frame != nullptr;
        }
        return n;
    }

    // ---- XenStore ----
    u32& store_word(u32 offset) { return field<u32>(reinterpret_cast<u64>(store_page), offset); }
    std::string full(const std::string& path) {
        return !path.empty() && path[0] == '/' ? path : "/local/domain/1/" + path;
    }
    void set(const std::string& path, const std::string& value) {
        tree[full(path)] = value;
        changed(full(path));
    }
    /// Removes the node and everything below it.
    void remove(const std::string& path) {
        const std::string absolute = full(path);
        std::vector<std::string> gone;
        for (const auto& [key, value] : tree) {
            if (key == absolute || key.starts_with(absolute + "/")) {
                gone.push_back(key);
            }
        }
        for (const std::string& key : gone) {
            tree.erase(key);
        }
        for (const std::string& key : gone) {
            changed(key);
        }
    }
    std::string get(const std::string& path) { return tree.contains(full(path)) ? tree[full(path)] : std::string(); }
    void changed(const std::string& path) {
        for (const auto& [watched, token] : watches) {
            const std::string absolute = full(watched);
            if (path == absolute || path.starts_with(absolute + "/")) {
                message(15, 0, 0, watched + '\0' + token + '\0');
            }
        }
        if (on_change) {
            on_change(path);
        }
    }
    void message(u32 type, u32 id, u32 transaction, const std::string& payload) {
        std::array<u32, 4> header{type, id, transaction, static_cast<u32>(payload.size())};
        outgoing.append(reinterpret_cast<const char*>(header.data()), 16);
        outgoing += payload;
    }
    void raw(const std::string& bytes) { outgoing += bytes; }

    void answer(u32 type, u32 id, u32 transaction, const std::string& payload) {
        ++requests[type];
        if (ignore_reset) {
            return;
        }
        const usize nul = payload.find('\0');
        const std::string path = payload.substr(0, nul);
        const std::string rest = nul == std::string::npos ? "" : payload.substr(nul + 1);
        auto& view = transaction != 0 ? transactions[transaction] : tree;
        auto error = [&](const char* name) { message(16, id, transaction, std::string(name) + '\0'); };
        if (refuse_with) {
            return error(refuse_with->c_str());
        }
        auto ok = [&] { message(type, id, transaction, std::string("OK\0", 3)); };
        switch (type) {
        case 2:
            if (!view.contains(full(path))) {
                return error("ENOENT");
            }
            return message(type, id, transaction, view[full(path)]);
        case 1: {
            std::set<std::string> names;
            const std::string prefix = full(path) + "/";
            for (const auto& [key, value] : view) {
                if (key.starts_with(prefix)) {
                    const std::string below = key.substr(prefix.size());
                    names.insert(below.substr(0, below.find('/')));
                }
            }
            if (names.empty() && !view.contains(full(path))) {
                return error("ENOENT");
            }
            std::string list;
            for (auto it = names.rbegin(); it != names.rend(); ++it) { // in no particular order
                list += *it + '\0';
            }
            return message(type, id, transaction, list);
        }
        case 11:
            view[full(path)] = rest;
            ok();
            if (transaction == 0) {
                changed(full(path));
            }
            return;
        case 13: {
            const bool there = view.contains(full(path));
            if (!there) {
                return error("ENOENT");
            }
            ok();
            return remove(path);
        }
        case 4: {
            if (refuse_watches) {
                return error("EACCES");
            }
            const std::string token = rest.substr(0, rest.find('\0'));
            watches.emplace_back(path, token);
            ok();
            return message(15, 0, 0, path + '\0' + token + '\0');
        }
        case 5: std::erase_if(watches, [&](const auto& w) { return w.first == path; }); return ok();
        case 6: {
            const u32 number = next_transaction++;
            transactions[number] = tree;
            return message(type, id, transaction, std::to_string(number) + '\0');
        }
        case 7: {
            auto mine = transactions[transaction];
            transactions.erase(transaction);
            if (path == "T" && conflicts > 0) {
                --conflicts;
                return error("EAGAIN");
            }
            ok();
            if (path == "T") {
                for (const auto& [key, value] : mine) {
                    if (!tree.contains(key) || tree[key] != value) {
                        tree[key] = value;
                        changed(key);
                    }
                }
            }
            return;
        }
        default: return error("ENOSYS");
        }
    }

    bool store_step() {
        bool did = false;
        if (!std::exchange(store_event, false) && outgoing.empty()) {
            return false;
        }
        // The server consumes a little at a time, so that requests and replies arrive in pieces.
        u32& req_cons = store_word(2048);
        const u32 req_prod = store_word(2052);
        while (req_cons != req_prod && !ignore_requests) {
            incoming += static_cast<char>(store_page[req_cons % 1024]);
            ++req_cons;
            did = true;
        }
        while (incoming.size() >= 16) {
            std::array<u32, 4> header;
            std::memcpy(header.data(), incoming.data(), 16);
            if (incoming.size() < 16 + header[3]) {
                break;
            }
            const std::string payload = incoming.substr(16, header[3]);
            incoming.erase(0, 16 + header[3]);
            answer(header[0], header[1], header[2], payload);
        }
        u32& rsp_prod = store_word(2060);
        const u32 rsp_cons = store_word(2056);
        u32 room = 1024 - (rsp_prod - rsp_cons);
        for (u32 n = std::min<u32>({room, static_cast<u32>(outgoing.size()), piece}); n != 0; --n) {
            store_page[1024 + rsp_prod % 1024] = static_cast<std::byte>(outgoing[0]);
            outgoing.erase(0, 1);
            ++rsp_prod;
            did = true;
        }
        if (did) {
            raise(store_port);
        }
        return did;
    }

    Memory memory;
    Cpu cpu;
    test::Interrupts interrupts;
    CpuidSnapshot cpuid;
    hv::Sightings sightings;
    i64 version = 4 << 16 | 17;
    u32 features = 1u << 2 | 1u << 8;
    i64 set_param_answer = 0;
    i64 console_answer = -38;
    bool has_store = true;
    std::byte* console_page = nullptr;
    u64 console_frame = 0;
    u32 console_port = 2;
    u32 console_status = 2; // 0: closed, 1: unbound, 2: bound to the other end
    i64 status_answer = 0;
    u64 console_events = 0;
    std::string console_text;
    u64 yields = 0;
    std::function<void()> on_yield;
    std::string console;
    u64 callback = 0;
    bool refuse_vectors = false;
    /// The virtual CPUs' part of events. A vcpu_info lies in the shared info page until it is registered elsewhere.
    struct EventCpu {
        u32 processor = 0; // the kernel's number of it
        std::byte* info = nullptr;
        u8 vector = 0;
        u64 upcalls = 0;
        std::byte* control = nullptr;
        std::array<u32, 16> tails{}; // of its queues
        u64 runnable = 0;            // ns
        u64 offline = 0;
        u32 timer_port = 0;
        std::optional<u64> expiry; // of its timer
    };
    bool offers_fifo = false;
    bool fifo = false;
    bool refuse_array = false;
    bool offers_timer = true;
    bool offers_runstate = true;
    bool refuse_virqs = false;
    u32 timer_refusals = 0; // so many times the timer is refused, with:
    i64 timer_error = -62;
    std::vector<u64> expiries; // asked for
    u32 refuse_control = ~0u;  // of this virtual CPU
    std::byte* words = nullptr;
    std::vector<EventCpu> event_cpus{1};
    bool takes_vcpu_info = true; // VCPUOP_register_vcpu_info
    bool moves_ports = true;     // EVTCHNOP_bind_vcpu
    bool refuse_ipis = false;    // EVTCHNOP_bind_ipi
    std::set<u32> ipi_ports;
    std::map<u32, u32> port_vcpu;  // by port; 0 if not in it
    std::map<u32, u32> priorities; // by port; 7 if not in it
    u32 shutdown_reason = 99;
    std::function<void(std::byte*)> on_shared_info; // it is mapped, and has to be filled
    std::function<i64()> on_suspend;                // its value is that of the hypercall
    /// What a new domain has: this guest's memory, and nothing else of it.
    void move_to_another_domain() {
        EXPECT_EQ(store_word(2048), store_word(2052)) << "a request to XenStore is under way";
        EXPECT_EQ(store_word(2056), store_word(2060)) << "a reply of XenStore has not been taken";
        mappings.clear();
        grant_frames = {};
        shared = nullptr;
        callback = 0;
        for (EventCpu& each : event_cpus) {
            each = {.processor = each.processor};
        }
        port_vcpu.clear();
        fifo = false;
        words = nullptr;
        open_ports.clear();
        ipi_ports.clear();
        sends.clear();
        watches.clear();
        transactions.clear();
        incoming.clear();
        outgoing.clear();
        store_event = false;
        std::memset(store_page, 0, 4096);
        store_port = 3;
        next_port = 5;
    }
    std::map<u32, u64> calls;
    std::map<u32, u64> sends;
    std::set<u32> open_ports;
    std::map<u32, u16> port_domains; // domains allowed to bind to them
    u32 next_port = 5;
    u32 last_port = 400;
    usize most_ports = ~usize{0}; // open at once
    u64 upcalls = 0;
    std::byte* shared = nullptr;
    u32 grant_frames_limit = 64; // as reported
    u32 grant_frames_given = 64; // as granted
    std::array<std::byte*, 64> grant_frames{};
    std::map<u32, Mapping> mappings;
    u64 bad_maps = 0;
    std::byte* store_page = nullptr;
    u64 store_frame = 0;
    bool store_event = false;
    bool ignore_reset = false;
    bool ignore_requests = false;
    bool refuse_watches = false;
    std::optional<std::string> refuse_with; // the error that answers every request
    u32 piece = 700;
    u32 conflicts = 0;
    u32 next_transaction = 7;
    std::map<u32, u64> requests;
    std::map<std::string, std::string> tree;
    std::map<u32, std::map<std::string, std::string>> transactions;
    std::vector<std::pair<std::string, std::string>> watches;
    std::function<void(const std::string&)> on_change;
    std::string incoming;
    std::string outgoing;
};

/// A clock that jumps, and an idle function that runs the other domains.
class World {
  public:
    explicit World(Xen& x) : xen(x) {}
    io::Platform platform() {
        return {this, [](void* self) { return static_cast<World*>(self)->now; },
                [](void* self, Instant until, const std::atomic<bool>& wake) {
                    static_cast<World*>(self)->idle(until, wake);
                }};
    }
    void idle(Instant until, const std::atomic<bool>& wake) {
        ++idles;
        for (u32 rounds = 0; rounds < 100'000; ++rounds) {
            if (wake.load()) {
                return;
            }
            bool did = xen.store_step();
            if (device) {
                did = device() || did;
            }
            did = xen.deliver() || did;
            if (!did && !wake.load()) { // the others may have posted something
                now = std::max(now + 1, std::min(until, now + 1'000'000'000));
                return;
            }
            now += 1000;
        }
    }
    Xen& xen;
    Instant now = 1000;
    u64 idles = 0;
    std::function<bool()> device;
};

/// Pages that the backend keeps: the shared info page, the vcpu_info of each processor, and the grant table.
inline constexpr u64 backend_pages = 1 + 4 + 64;

/// A backend installed and started on the fake.
struct Machine {
    explicit Machine(usize bytes = 48u << 20) : xen(bytes), world(xen), executor(world.platform()) {
        guest.set_gate(xen.gate());
    }
    Result<void> install() {
        hv::Environment environment{xen.cpuid, xen.sightings, xen.memory, xen.memory, xen.cpu, !withhold_fifo};
        return guest.install(environment);
    }
    Result<void> start() {
        hv::Services services{xen.interrupts, executor};
        auto done = guest.start(services);
        guest.store().set_timeout(1'000'000'000);
        xen.deliver(); // the place of the vcpu_info was marked as pending
        return done;
    }
    template <class T>
    T run(io::Task<T> task) {
        return executor.run(std::move(task));
    }
    bool withhold_fifo = false;
    Xen xen;
    World world;
    io::Executor executor;
    hv::Xen guest;
};

} // namespace fake
