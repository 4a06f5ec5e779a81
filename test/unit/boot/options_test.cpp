#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.text;
import core.cmdline;
import core.log;
import hv.detect;
import io.executor;
import io.net.ipv4;
import io.net.udp;
import drivers.table;
import drivers.driver;
import boot.options;

namespace {
using namespace fl;
using boot::Options;

struct Parsed {
    Options options;
    std::string errors; // one per line
    u32 dropped = 0;
};

Parsed parse(std::string_view text) {
    Parsed p;
    auto errors = std::make_unique<boot::OptionErrors>();
    const bool good = boot::parse_options(text, p.options, *errors);
    EXPECT_EQ(good, errors->empty());
    for (const auto& e : errors->all()) {
        EXPECT_FALSE(e.truncated()) << e.view();
        p.errors += std::string(e.view()) + "\n";
    }
    p.dropped = errors->dropped;
    return p;
}

constexpr std::string_view valid_keys =
    "job, workload, disk, scratch, count, bs, qd, seed, generation, erase, hv, map, emulated, timeout, features, log, "
    "fault, processor, cpus, timer, wait, lanes, marks, net, address, ping, udp\n";

TEST(Options, Defaults) {
    for (std::string_view text : {"", "   ", "firstlight.elf"}) {
        const auto p = parse(text);
        EXPECT_EQ(p.errors, "");
        EXPECT_EQ(p.options.job, boot::Job::boot);
        EXPECT_TRUE(p.options.disk.all);
        EXPECT_TRUE(p.options.disk.chosen("hda"));
        EXPECT_FALSE(p.options.scratch.chosen("hda"));
        EXPECT_EQ(p.options.timeout, 5'000'000'000u);
        EXPECT_EQ(p.options.log, log::Level::info);
        EXPECT_EQ(p.options.generation, 1u);
        EXPECT_FALSE(p.options.hv.guest);
        EXPECT_FALSE(p.options.emulated);
    }
}

TEST(Options, Bench) {
    const auto p = parse("firstlight.elf job=bench workload=randread,bs=4k,qd=32 workload=read,bs=128k disk=xvda,hda "
                         "scratch=xvda emulated=keep "
                         "timeout=250 log=debug map=rank,xen,ata,xen_blk,-1 map=add,kvm,ata,xen_blk,3 "
                         "features=-indirect,-ring-pages hv=late:xen");
    EXPECT_EQ(p.errors, "");
    const Options& o = p.options;
    EXPECT_EQ(o.job, boot::Job::bench);
    ASSERT_EQ(o.workloads.count, 2u);
    EXPECT_EQ(o.workloads.list[0], "randread,bs=4k,qd=32");
    EXPECT_FALSE(o.disk.all);
    EXPECT_TRUE(o.disk.chosen("hda"));
    EXPECT_FALSE(o.disk.chosen("hdb"));
    EXPECT_TRUE(o.scratch.chosen("xvda"));
    EXPECT_FALSE(o.scratch.chosen("hda"));
    EXPECT_EQ(o.emulated, drivers::Twin::keep);
    EXPECT_EQ(o.timeout, 250'000'000u);
    EXPECT_EQ(o.log, log::Level::debug);
    EXPECT_EQ(o.map.count, 2u);
    EXPECT_EQ(o.withheld_features, 2u | 4u);
    EXPECT_EQ(boot::feature_words(o.withheld_features).view(), "-indirect,-ring-pages");
    EXPECT_EQ(o.hv.guest, hv::VmGuest::xen);
    EXPECT_TRUE(o.hv.late);
}

TEST(Options, Verify) {
    const auto p = parse("job=verify scratch=all count=0 bs=64k qd=8 seed=0x2a generation=3");
    EXPECT_EQ(p.errors, "");
    EXPECT_EQ(p.options.count, 0u);
    EXPECT_EQ(p.options.bs, 65536u);
    EXPECT_EQ(p.options.qd, 8u);
    EXPECT_EQ(p.options.seed, 42u);
    EXPECT_EQ(p.options.generation, 3u);
    EXPECT_FALSE(p.options.erase.any());
    EXPECT_TRUE(parse("job=verify erase=discard").options.erase.discard);
    EXPECT_FALSE(parse("job=verify erase=discard").options.erase.zeroes);
    EXPECT_TRUE(parse("job=verify erase=discard,zeroes").options.erase.zeroes);
    EXPECT_FALSE(parse("job=verify erase=discard,zeroes").options.erase.secure_discard);
    const auto secure = parse("job=verify erase=secure-discard").options.erase;
    EXPECT_TRUE(secure.secure_discard && !secure.discard && !secure.zeroes);
    EXPECT_EQ(parse("job=verify erase=zeros").errors,
              "erase=zeros: expected one of discard, zeroes, secure-discard, seen 'zeros': did you mean 'zeroes'?\n");
    EXPECT_TRUE(p.options.scratch.all);
    EXPECT_EQ(parse("job=panic fault=pf").options.fault, boot::Fault::pf);
}

TEST(Options, Processors) {
    EXPECT_EQ(parse("").options.cpus, 64u);
    EXPECT_EQ(parse("").options.lanes, 1u);
    EXPECT_EQ(parse("cpus=1").options.cpus, 1u);
    EXPECT_EQ(parse("cpus=0").errors, "cpus=0: expected a number from 1 to 64, seen '0'\n");
    EXPECT_EQ(parse("job=panic processor=3").options.processor, 3u);
    EXPECT_EQ(parse("job=panic processor=64").errors, "processor=64: expected a number from 0 to 63, seen '64'\n");
    EXPECT_EQ(parse("processor=3").errors, "'processor' is for job=panic, seen job=boot\n");
    EXPECT_EQ(parse("job=bench lanes=4").options.lanes, 4u);
    EXPECT_EQ(parse("").options.timer, boot::TimerChoice::automatic);
    EXPECT_EQ(parse("timer=hypervisor").options.timer, boot::TimerChoice::hypervisor);
    EXPECT_FALSE(parse("timer=pit").errors.empty());
    EXPECT_EQ(parse("").options.wait, std::nullopt) << "sleep is not timed";
    EXPECT_EQ(parse("wait=interrupt").options.wait, io::Wait::interrupt);
    EXPECT_EQ(parse("wait=poll").options.wait, io::Wait::poll);
    EXPECT_EQ(parse("wait=adaptive").options.wait, io::Wait::adaptive);
    EXPECT_FALSE(parse("wait=spin").errors.empty());
    EXPECT_EQ(parse("job=verify lanes=4").errors, "'lanes' is for job=bench, seen job=verify\n");
}

TEST(Options, Marks) {
    EXPECT_EQ(parse("job=bench").options.marks, 0u) << "no port is written without a request";
    EXPECT_EQ(parse("job=bench marks=0x5f0").options.marks, 0x5f0u);
    EXPECT_EQ(parse("job=bench marks=0").errors, "marks=0: expected an I/O port, 1 to 0xfffc, seen '0'\n");
    EXPECT_EQ(parse("job=bench marks=0xfffd").errors,
              "marks=0xfffd: expected an I/O port, 1 to 0xfffc, seen '0xfffd'\n");
    EXPECT_EQ(parse("marks=0x5f0").errors, "'marks' is for job=bench, seen job=boot\n");
}

TEST(Options, Net) {
    const auto defaults = parse("job=net").options;
    EXPECT_EQ(defaults.job, boot::Job::net);
    EXPECT_TRUE(defaults.net.card.empty());
    EXPECT_TRUE(defaults.net.dhcp);
    EXPECT_FALSE(defaults.net.ping);
    EXPECT_EQ(defaults.net.udps, 0u);
    const auto p = parse("job=net net=eth1 address=10.0.2.15/24,gateway=10.0.2.2 ping=10.0.2.3,count=7 "
                         "udp=send,to=10.0.2.2:5000,count=1k,bytes=1472,rate=10");
    EXPECT_EQ(p.errors, "");
    EXPECT_EQ(p.options.net.card, "eth1");
    EXPECT_FALSE(p.options.net.dhcp);
    EXPECT_EQ(p.options.net.subnet, (io::net::Subnet{{{10, 0, 2, 15}}, 24}));
    EXPECT_EQ(p.options.net.gateway, (io::net::Ipv4Address{{10, 0, 2, 2}}));
    EXPECT_EQ(p.options.net.ping->address, (io::net::Ipv4Address{{10, 0, 2, 3}}));
    EXPECT_EQ(p.options.net.ping->count, 7u);
    EXPECT_EQ(p.options.net.udp_list[0].mode, boot::UdpOptions::Mode::send);
    EXPECT_EQ(p.options.net.udp_list[0].to, (io::net::Endpoint{{{10, 0, 2, 2}}, 5000}));
    EXPECT_EQ(p.options.net.udp_list[0].count, 1024u);
    EXPECT_EQ(p.options.net.udp_list[0].bytes, 1472u);
    EXPECT_EQ(p.options.net.udp_list[0].rate, 10u);
    const auto echo = parse("job=net address=dhcp ping=10.0.2.3 udp=echo,port=7,seconds=3").options.net;
    EXPECT_EQ(echo.ping->count, 4u);
    EXPECT_EQ(echo.udp_list[0].mode, boot::UdpOptions::Mode::echo);
    EXPECT_EQ(echo.udp_list[0].port, 7);
    EXPECT_EQ(echo.udp_list[0].seconds, 3u);
    const auto receive = parse("job=net udp=receive,port=65535,count=5,seconds=60").options.net;
    EXPECT_EQ(receive.udp_list[0].mode, boot::UdpOptions::Mode::receive);
    EXPECT_EQ(receive.udp_list[0].port, 65535);
    EXPECT_EQ(receive.udp_list[0].count, 5u);
    EXPECT_EQ(receive.udp_list[0].seconds, 60u);
}

TEST(Options, NetSeveral) {
    std::string words = "job=net";
    for (int i = 1; i <= 4; ++i) {
        words += " udp=echo,port=" + std::to_string(i);
    }
    const auto p = parse(words);
    EXPECT_EQ(p.errors, "");
    ASSERT_EQ(p.options.net.all_udp().size(), 4u);
    EXPECT_EQ(p.options.net.all_udp()[3].port, 4);
    EXPECT_EQ(parse(words + " udp=echo,port=5").errors,
              "udp=echo,port=5: expected at most four of them, seen 'echo,port=5'\n");
}

TEST(Options, NetWrong) {
    EXPECT_EQ(parse("ping=10.0.2.2").errors, "'ping' is for job=net, seen job=boot\n");
    EXPECT_EQ(parse("job=bench udp=echo,port=7").errors, "'udp' is for job=net, seen job=bench\n");
    EXPECT_EQ(parse("job=net net=").errors, "net=: expected the name of a network card, as in eth0, seen ''\n");
    EXPECT_EQ(parse("job=net address=10.0.2.15").errors,
              "address=10.0.2.15: expected dhcp or ADDRESS/PREFIX[,gateway=ADDRESS], as in "
              "10.0.2.15/24,gateway=10.0.2.2, seen '10.0.2.15'\n");
    for (const char* wrong :
         {"", "dhcp,gateway=10.0.2.2", "10.0.2.15/33", "10.0.2.15/0", "10.0.2.0/24", "10.0.2.255/24", "127.0.0.1/8",
          "224.0.0.1/24", "10.0.2.15/24,10.0.2.2", "10.0.2.15/24,gateway=10.0.2.15", "10.0.2.15/24,gateway=0.0.0.0",
          "10.0.2.15/24,gateway=10.0.2.2,x", "10.0.2.15/24,"}) {
        EXPECT_NE(parse(std::string("job=net address=") + wrong).errors, "") << wrong;
    }
    EXPECT_EQ(parse("job=net ping=host").errors,
              "ping=host: expected ADDRESS[,count=1 to 65536], as in 10.0.2.2,count=4, seen 'host'\n");
    for (const char* wrong : {"10.0.2.2,count=0", "10.0.2.2,count=65537", "10.0.2.2,4", "10.0.2.2,bytes=4",
                              "255.255.255.255", "10.0.2.2,"}) {
        EXPECT_NE(parse(std::string("job=net ping=") + wrong).errors, "") << wrong;
    }
    EXPECT_EQ(parse("job=net udp=ehco,port=7").errors,
              "udp=ehco,port=7: expected one of echo, send, receive, seen 'ehco': did you mean 'echo'?\n");
    EXPECT_EQ(parse("job=net udp=echo").errors,
              "udp=echo: expected echo,port=1 to 65535[,seconds=1 to 86400], seen 'echo'\n");
    for (const char* wrong :
         {"", "echo,port=0", "echo,port=65536", "echo,port=7,count=1", "receive,seconds=1", "receive,port=7,count=0",
          "receive,port=7,count=1048577", "send", "send,count=1", "send,to=10.0.2.2,count=1",
          "send,to=10.0.2.2:0,count=1", "send,to=10.0.2.2:65536,count=1", "send,to=10.0.2.2:7",
          "send,to=10.0.2.2:7,count=1,bytes=31", "send,to=10.0.2.2:7,count=1,bytes=65508",
          "send,to=10.0.2.2:7,count=1,port=9", "send,to=x:7,count=1"}) {
        EXPECT_NE(parse(std::string("job=net udp=") + wrong).errors, "") << wrong;
    }
}

TEST(Options, LinuxIpWordIsStillIgnored) {
    const auto p = parse("job=boot ip=dhcp");
    EXPECT_EQ(p.errors, "");
    EXPECT_TRUE(p.options.loader.ignored.has("ip=dhcp"));
}

TEST(Options, UnknownKeys) {
    EXPECT_EQ(parse("wrokload=randread").errors,
              "unknown key 'wrokload': did you mean 'workload'? Valid keys: " + std::string(valid_keys));
    EXPECT_EQ(parse("job=boot bogusness=1").errors, "unknown key 'bogusness'. Valid keys: " + std::string(valid_keys));
    EXPECT_EQ(parse("job=boot disk").errors, "'disk' has no value: write disk=VALUE\n");
    EXPECT_EQ(parse("a b").errors, "unknown key 'b': did you mean 'bs'? Valid keys: " + std::string(valid_keys))
        << "only the first may be a file";
    EXPECT_EQ(parse("=x").errors, "unknown key ''. Valid keys: " + std::string(valid_keys));
    EXPECT_EQ(parse("\x1b[2J=x").errors, "unknown key '?[2J'. Valid keys: " + std::string(valid_keys));
}

TEST(Options, WrongValues) {
    EXPECT_EQ(
        parse("job=bnech workload=read").errors,
        "job=bnech: expected one of boot, bench, verify, panic, idle, net, seen 'bnech': did you mean 'bench'?\n");
    EXPECT_EQ(parse("timeout=0").errors, "timeout=0: expected milliseconds from 1 to 3600000, seen '0'\n");
    EXPECT_EQ(parse("timeout=5s").errors, "timeout=5s: expected milliseconds from 1 to 3600000, seen '5s'\n");
    EXPECT_EQ(parse("timeout=").errors, "timeout=: expected milliseconds from 1 to 3600000, seen ''\n");
    EXPECT_EQ(parse("job=verify bs=1000").errors,
              "bs=1000: expected a number of bytes, a multiple of 512 from 512 to 16m, seen '1000'\n");
    EXPECT_EQ(parse("job=verify qd=0").errors, "qd=0: expected a number from 1 to 1024, seen '0'\n");
    EXPECT_EQ(parse("hv=xne").errors,
              "hv=xne: expected auto, a hypervisor (xen, hyperv, kvm, tcg, vmware, bare), late or late:HYPERVISOR, "
              "seen 'xne': did you mean 'xen'?\n");
    EXPECT_EQ(
        parse("emulated=unplugged").errors,
        "emulated=unplugged: expected one of table, leave, unplug, keep, seen 'unplugged': did you mean 'unplug'?\n");
    EXPECT_EQ(parse("features=-indirect,-persistant").errors,
              "features=-indirect,-persistant: expected one of -persistent, -indirect, -ring-pages, -flush, -barrier, "
              "-event-idx, -packed, -in-order, -discard, -msi, -multi-queue, -shadow-doorbells, -ncq, "
              "-write-zeroes, -config-wce, -scatter-gather, -checksum, -fifo-events, -secure-discard, seen "
              "'-persistant': did you mean '-persistent'?\n");
    EXPECT_EQ(parse("disk=").errors, "disk=: expected all or names of disks with commas between them, seen ''\n");
    EXPECT_EQ(parse("disk=hda,,hdb").errors, "disk=hda,,hdb: expected names of disks with commas between them, or one "
                                             "word for all or none of them, seen 'hda,,hdb'\n");
    EXPECT_EQ(parse("log=info log=debug").errors, "log=debug: 'log' was given before; it may be given once\n");
}

TEST(Options, AValueThatIsWrongLeavesTheDefault) {
    const auto p = parse("timeout=x scratch=a,,b log=loud hv=none emulated=no features=indirect");
    EXPECT_EQ(p.options.timeout, 5'000'000'000u);
    EXPECT_FALSE(p.options.scratch.chosen("a"));
    EXPECT_EQ(p.options.log, log::Level::info);
    EXPECT_EQ(p.options.withheld_features, 0u);
    EXPECT_EQ(std::count(p.errors.begin(), p.errors.end(), '\n'), 6) << "all of them at once:\n" << p.errors;
}

TEST(Options, WhatAJobDoesNotReadIsAnError) {
    EXPECT_EQ(parse("workload=read").errors, "'workload' is for job=bench, seen job=boot\n");
    EXPECT_EQ(parse("job=bench workload=read qd=32").errors,
              "'qd' is for job=verify, seen job=bench: with bench it is part of the workload, as in "
              "workload=randread,bs=4k,qd=32\n");
    EXPECT_EQ(parse("fault=pf").errors, "'fault' is for job=panic, seen job=boot\n");
    EXPECT_EQ(parse("qd=4 job=verify").errors, "") << "in any order";
}

// From the programs' sources and guides.
TEST(Options, WordsThatLoadersAddAreListedAndIgnored) {
    struct Case {
        std::string_view text;
        std::vector<std::string_view> ignored;
    };
    const Case cases[] = {
        // Firecracker without user arguments, and with a root disk and PCI off
        {"reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce pci=off "
         "root=/dev/vda rw job=boot",
         {"reboot=k", "panic=1", "nomodule", "8250.nr_uarts=0", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd",
          "swiotlb=noforce", "pci=off", "root=/dev/vda", "rw"}},
        // Cloud Hypervisor's guide
        {"console=hvc0 root=/dev/vda1 rw job=boot", {"console=hvc0", "root=/dev/vda1", "rw"}},
        // OpenVMM
        {"panic=-1 debug pci=off console=ttyS0 job=boot", {"panic=-1", "debug", "pci=off", "console=ttyS0"}},
        // kvmtool
        {"noapic noacpi pci=conf1 reboot=k panic=1 i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1 earlyprintk=serial "
         "i8042.noaux=1 console=ttyS0 "
         "rootflags=trans=virtio,version=9p2000.L rootfstype=9p init=/virt/init ip=dhcp",
         {"noapic", "noacpi", "pci=conf1", "reboot=k", "panic=1", "i8042.direct=1", "i8042.dumbkbd=1", "i8042.nopnp=1",
          "earlyprintk=serial", "i8042.noaux=1", "console=ttyS0", "rootflags=trans=virtio,version=9p2000.L",
          "rootfstype=9p", "init=/virt/init", "ip=dhcp"}},
        // Kata Containers
        {"tsc=reliable no_timer_check rcupdate.rcu_expedited=1 noreplace-smp cryptomgr.notests net.ifnames=0 nr_cpus=4 "
         "selinux=0 "
         "scsi_mod.scan=none agent.log=debug random.trust_cpu=on",
         {"tsc=reliable", "no_timer_check", "rcupdate.rcu_expedited=1", "noreplace-smp", "cryptomgr.notests",
          "net.ifnames=0", "nr_cpus=4", "selinux=0", "scsi_mod.scan=none", "agent.log=debug", "random.trust_cpu=on"}},
        // GRUB with Debian's and Ubuntu's defaults
        {"BOOT_IMAGE=/vmlinuz root=UUID=12-34 ro quiet splash crashkernel=512M-:192M nomodeset acpi=off vt.handoff=7 "
         "initrd=/initrd.img",
         {"BOOT_IMAGE=/vmlinuz", "root=UUID=12-34", "ro", "quiet", "splash", "crashkernel=512M-:192M", "nomodeset",
          "acpi=off", "vt.handoff=7", "initrd=/initrd.img"}},
        {"job=boot quiet -- single job=bench", {"quiet", "single", "job=bench"}},
        {"job=boot dyndbg=\"file drivers/usb/* +p\" ro", {"dyndbg=\"file drivers/usb/* +p\"", "ro"}},
        {"firstlight.elf debug", {"debug"}},
        {"debug job=boot", {"debug"}},
        {"/boot/firstlight.elf job=boot", {}},
    };
    for (const Case& c : cases) {
        const auto p = parse(c.text);
        EXPECT_EQ(p.errors, "") << c.text;
        EXPECT_EQ(p.options.job, boot::Job::boot) << c.text;
        const auto all = p.options.loader.ignored.all();
        EXPECT_EQ(std::vector<std::string_view>(all.begin(), all.end()), c.ignored) << c.text;
    }
}

TEST(Options, AMisspeltKeyIsNoLoadersWord) {
    for (std::string_view key : {"jbo", "worklaod", "dsik", "hvv", "mpa", "timout", "lgo", "log_level", "cpu", "lane",
                                 "qdd", "sede", "fautl"}) {
        EXPECT_NE(parse("job=boot " + std::string(key) + "=1").errors.find("unknown key"), std::string::npos) << key;
    }
    EXPECT_NE(parse("job=boot bogus").errors.find("unknown key"), std::string::npos);
    EXPECT_NE(parse("job=boot .x=1").errors.find("unknown key"), std::string::npos);
    EXPECT_NE(parse("job=boot x.=1").errors.find("unknown key"), std::string::npos);
    EXPECT_NE(parse("job=boot a b.c=\"d e").errors.find("unknown key 'a'"), std::string::npos)
        << "a quote that never ends";
    std::istringstream all{std::string(valid_keys)};
    for (std::string key; std::getline(all, key, ',');) {
        std::erase_if(key, [](char c) { return c == ' ' || c == '\n'; });
        EXPECT_FALSE(boot::is_loader_word(key)) << key;
    }
}

TEST(Options, VirtioMmioDevices) {
    const auto p = parse("job=boot virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=512@0xfeb00e00:12:3 pci=off");
    EXPECT_EQ(p.errors, "");
    ASSERT_EQ(p.options.loader.device_count, 2u);
    EXPECT_EQ(p.options.loader.devices()[0], (boot::MmioDevice{0xc0001000, 4096, 5, {}}));
    EXPECT_EQ(p.options.loader.devices()[1], (boot::MmioDevice{0xfeb00e00, 512, 12, 3}));
    EXPECT_EQ(p.options.loader.ignored.count, 1u);
    for (std::string_view wrong :
         {"", "4K", "4K@", "4K@0xc0001000", "4K@0xc0001000:", "4K@0xc0001000:x", "0@0xc0001000:5", "@0xc0001000:5",
          "4K@0xfffffffffffff001:5", "4K@0xc0001000:5:", "4K@0xc0001000:5:1:2", "4K@0xc0001000:0x100000000"}) {
        EXPECT_EQ(parse("job=boot virtio_mmio.device=" + std::string(wrong)).errors,
                  "virtio_mmio.device=" + std::string(shown(wrong).view()) +
                      ": expected SIZE@ADDRESS:INTERRUPT[:ID], as in 4K@0xd0000000:5\n");
    }
    std::string many;
    for (int i = 0; i < 70; ++i) {
        many += "virtio_mmio.device=4K@" + std::to_string(0xc0001000 + i * 4096L) + ":5 ";
    }
    EXPECT_EQ(parse(many).options.loader.device_count, boot::LoaderWords::max_devices);
    EXPECT_EQ(parse(many).options.loader.devices_dropped, 70 - boot::LoaderWords::max_devices);
}

TEST(Options, FloodsAreBounded) {
    std::string text;
    for (int i = 0; i < 400; ++i) {
        text += "x" + std::to_string(i) + "=1 ";
    }
    const auto p = parse(text);
    EXPECT_EQ(p.dropped, 400u - boot::OptionErrors::capacity);
    text.clear();
    for (int i = 0; i < 40; ++i) {
        text += "root=/dev/vda ";
    }
    const auto words = parse(text);
    EXPECT_EQ(words.options.loader.ignored.count, boot::TextList::capacity);
    EXPECT_EQ(words.options.loader.ignored_dropped, 8u);
    text.clear();
    for (int i = 0; i < 40; ++i) {
        text += "workload=read ";
    }
    const auto many = parse("job=bench " + text);
    EXPECT_EQ(many.options.workloads.count, boot::TextList::capacity);
    EXPECT_EQ(std::count(many.errors.begin(), many.errors.end(), '\n'), 8);
}
} // namespace
