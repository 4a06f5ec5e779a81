#include <gtest/gtest.h>
#include <memory>
#include <string>
import core.std;
import core.text;
import core.log;
import hv.detect;
import drivers.table;
import drivers.driver;
import boot.options;

namespace {
using namespace fl;
using boot::Options;

struct Parsed {
    Options options;
    std::string errors; // one a line
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
    "job, workload, disk, scratch, count, bs, qd, seed, generation, hv, map, emulated, timeout, features, log, fault, "
    "processor, cpus, timer, lanes, marks\n";

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
    const auto p =
        parse("firstlight.elf job=bench workload=randread,bs=4k,qd=32 workload=read,bs=128k disk=xvda,hda scratch=xvda emulated=keep "
              "timeout=250 log=debug map=rank,xen,ata,xen_blk,-1 map=add,kvm,ata,xen_blk,3 features=-indirect,-ring-pages hv=late:xen");
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
    EXPECT_EQ(parse("job=verify lanes=4").errors, "'lanes' is for job=bench, seen job=verify\n");
}

TEST(Options, Marks) {
    EXPECT_EQ(parse("job=bench").options.marks, 0u) << "nobody's port is written unasked";
    EXPECT_EQ(parse("job=bench marks=0x5f0").options.marks, 0x5f0u);
    EXPECT_EQ(parse("job=bench marks=0").errors, "marks=0: expected an I/O port, 1 to 0xfffc, seen '0'\n");
    EXPECT_EQ(parse("job=bench marks=0xfffd").errors, "marks=0xfffd: expected an I/O port, 1 to 0xfffc, seen '0xfffd'\n");
    EXPECT_EQ(parse("marks=0x5f0").errors, "'marks' is for job=bench, seen job=boot\n");
}

TEST(Options, UnknownKeys) {
    EXPECT_EQ(parse("wrokload=randread").errors, "unknown key 'wrokload': did you mean 'workload'? Valid keys: " + std::string(valid_keys));
    EXPECT_EQ(parse("job=boot bogusness=1").errors, "unknown key 'bogusness'. Valid keys: " + std::string(valid_keys));
    EXPECT_EQ(parse("job=boot disk").errors, "'disk' has no value: write disk=VALUE\n");
    EXPECT_EQ(parse("a b").errors, "unknown key 'b': did you mean 'bs'? Valid keys: " + std::string(valid_keys))
        << "only the first may be a file";
    EXPECT_EQ(parse("=x").errors, "unknown key ''. Valid keys: " + std::string(valid_keys));
    EXPECT_EQ(parse("\x1b[2J=x").errors, "unknown key '?[2J'. Valid keys: " + std::string(valid_keys));
}

TEST(Options, WrongValues) {
    EXPECT_EQ(parse("job=bnech workload=read").errors,
              "job=bnech: expected one of boot, bench, verify, panic, idle, seen 'bnech': did you mean 'bench'?\n");
    EXPECT_EQ(parse("timeout=0").errors, "timeout=0: expected milliseconds from 1 to 3600000, seen '0'\n");
    EXPECT_EQ(parse("timeout=5s").errors, "timeout=5s: expected milliseconds from 1 to 3600000, seen '5s'\n");
    EXPECT_EQ(parse("timeout=").errors, "timeout=: expected milliseconds from 1 to 3600000, seen ''\n");
    EXPECT_EQ(parse("job=verify bs=1000").errors, "bs=1000: expected a number of bytes, a multiple of 512 from 512 to 16m, seen '1000'\n");
    EXPECT_EQ(parse("job=verify qd=0").errors, "qd=0: expected a number from 1 to 1024, seen '0'\n");
    EXPECT_EQ(parse("hv=xne").errors, "hv=xne: expected auto, a hypervisor (xen, hyperv, kvm, tcg, vmware, bare), late or late:HYPERVISOR, "
                                      "seen 'xne': did you mean 'xen'?\n");
    EXPECT_EQ(parse("emulated=unplugged").errors,
              "emulated=unplugged: expected one of table, leave, unplug, keep, seen 'unplugged': did you mean 'unplug'?\n");
    EXPECT_EQ(parse("features=-indirect,-persistant").errors,
              "features=-indirect,-persistant: expected one of -persistent, -indirect, -ring-pages, -flush, -barrier, seen '-persistant': did "
              "you mean '-persistent'?\n");
    EXPECT_EQ(parse("disk=").errors, "disk=: expected all or names of disks with commas between them, seen ''\n");
    EXPECT_EQ(parse("disk=hda,,hdb").errors,
              "disk=hda,,hdb: expected names of disks with commas between them, or one word for all or none of them, seen 'hda,,hdb'\n");
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
              "'qd' is for job=verify, seen job=bench: with bench it is part of the workload, as in workload=randread,bs=4k,qd=32\n");
    EXPECT_EQ(parse("fault=pf").errors, "'fault' is for job=panic, seen job=boot\n");
    EXPECT_EQ(parse("qd=4 job=verify").errors, "") << "in any order";
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
        text += "workload=read ";
    }
    const auto many = parse("job=bench " + text);
    EXPECT_EQ(many.options.workloads.count, boot::TextList::capacity);
    EXPECT_EQ(std::count(many.errors.begin(), many.errors.end(), '\n'), 8);
}
} // namespace
