// A machine with a fake IDE controller and an attached driver. Include after unit/drivers/pci_fake.hpp and
// unit/drivers/ata_fake.hpp.
#pragma once
import host.std;

namespace ata_test {
namespace pci = fl::drivers::pci;

/// IDENTIFY DEVICE data of a late parallel ATA disk, written from [ACS §7.12]: LBA, DMA, 48-bit addresses, cache on,
/// flush, udma5 selected.
inline ata::IdentifyData identify_words(u64 sectors, u32 sector_size = 512) {
    ata::IdentifyData id;
    auto& w = id.words;
    w[0] = 0x0040;
    const std::string model = "FAKE DISK 9000                          "; // 40 characters
    for (int i = 0; i < 20; ++i) {
        w[27 + i] = static_cast<u16>(static_cast<u8>(model[2 * i]) << 8 | static_cast<u8>(model[2 * i + 1]));
    }
    w[49] = 0x0300;
    w[53] = 0x0006;
    const u32 small = static_cast<u32>(std::min<u64>(sectors, 0x0fffffff));
    w[60] = static_cast<u16>(small);
    w[61] = static_cast<u16>(small >> 16);
    w[63] = 0x0007;
    w[82] = 0x4020;
    w[83] = 0x7400;
    w[84] = 0x4000;
    w[85] = 0x4020;
    w[86] = 0x3400;
    w[87] = 0x4000;
    w[88] = 0x203f;
    for (int i = 0; i < 4; ++i) {
        w[100 + i] = static_cast<u16>(sectors >> (16 * i));
    }
    if (sector_size != 512) {
        w[106] = 0x5000;
        w[117] = static_cast<u16>(sector_size / 2);
    }
    return id;
}

struct Machine {
    Clock clock;
    Memory memory;
    test::Interrupts interrupts;
    Sink sink;
    io::Executor executor{clock.platform()};
    drivers::Environment environment;
    Channel primary{clock, memory, interrupts};
    Channel secondary{clock, memory, interrupts};
    std::vector<Channel*> all{&primary, &secondary};
    pci_test::Space space;
    pci_test::Function& function = space.add(0, 1, 1, 0x8086, 0x7010, 0x010180);
    ata::Controller<Ports> controller{environment, Ports{&all}};

    explicit Machine(Nanoseconds timeout = 100'000'000) : environment{executor, memory, interrupts, sink, timeout, 0} {
        secondary.command = 0x170;
        secondary.control = 0x376;
        secondary.bus_master = 0xc048;
        secondary.gsi = 15;
        secondary.floating = true;
        function.set32(0x20, 0xc041);
        function.bar_mask[4] = 0xfff0;
    }
    /// Native mode: ports and interrupt from PCI, with one level-triggered line for both channels.
    void set_native() {
        function.bytes[9] = 0x85;
        const std::array<u32, 4> bases{0xd000, 0xd010, 0xd020, 0xd030};
        for (u32 i = 0; i < 4; ++i) {
            function.set32(0x10 + 4 * i, bases[i] | 1);
            function.bar_mask[i] = i % 2 == 0 ? 0xfff8 : 0xfffc;
        }
        function.bytes[0x3c] = 11;
        function.bytes[0x3d] = 1;
        for (Channel* c : all) {
            c->command = c == &primary ? 0xd000 : 0xd020;
            c->control = c == &primary ? 0xd012 : 0xd032;
            c->gsi = 11;
            c->level = true;
        }
    }
    Drive& add(Channel& channel, int unit, u64 sectors = 1 << 20, u32 sector_size = 512) {
        channel.floating = false;
        Drive& d = channel.drives[unit].emplace();
        d.sectors = sectors;
        d.sector_size = sector_size;
        d.id = identify_words(sectors, sector_size);
        return d;
    }
    Result<void> attach() { return executor.run(controller.attach(*pci::look_up(space, {0, 1, 1}))); }
    io::BlockDevice& disk(u32 n) { return *sink.disks.at(n); }
    ata::ChannelQueue<Ports>& queue(u8 c = 0) { return *controller.queue(c); }
    /// Runs turns until the condition holds; false if it does not within `bound` of virtual time.
    template <class F>
    bool turns_until(F&& f, Nanoseconds bound = 10'000'000'000) {
        const Instant end = clock.time + bound;
        while (!f()) {
            if (clock.time > end) {
                return false;
            }
            executor.turn();
        }
        return true;
    }
    static io::Task<Result<void>> do_read(io::BlockDevice& d, u64 lba, DmaSpan into) {
        co_return co_await d.read(lba, into);
    }
    static io::Task<Result<void>> do_write(io::BlockDevice& d, u64 lba, DmaSpan from) {
        co_return co_await d.write(lba, from);
    }
    static io::Task<Result<void>> do_flush(io::BlockDevice& d) { co_return co_await d.flush(); }
    Result<void> read(io::BlockDevice& d, u64 lba, DmaSpan into) { return executor.run(do_read(d, lba, into)); }
    Result<void> write(io::BlockDevice& d, u64 lba, DmaSpan from) { return executor.run(do_write(d, lba, from)); }
    Result<void> flush(io::BlockDevice& d) { return executor.run(do_flush(d)); }
};

/// Whether a buffer holds the contents of sectors that were never written.
inline bool is_pattern(DmaSpan span, u64 lba, u32 sector_size = 512) {
    for (u32 i = 0; i < span.size; i += 8) {
        u64 v = 0;
        std::memcpy(&v, span.data + i, 8);
        if (v != lba + i / sector_size) {
            return false;
        }
    }
    return true;
}

} // namespace ata_test
