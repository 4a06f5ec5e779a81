#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import drivers.table;
import drivers.claims;

namespace {
using namespace fl;
using drivers::Claims;
using drivers::disk_id;
using drivers::ide_id;
using drivers::Plan;
using drivers::Table;
using drivers::Twin;
using hv::VmGuest;

static_assert(ide_id(0, 0) == disk_id(0) && ide_id(0, 1) == disk_id(1) && ide_id(1, 0) == disk_id(2) &&
              ide_id(1, 1) == disk_id(3));

Plan plan(std::string_view rule = "", std::optional<Twin> twin = std::nullopt) {
    Table table;
    if (!rule.empty()) {
        EXPECT_TRUE(table.apply_word(rule));
    }
    return table.plan(VmGuest::xen, twin);
}

TEST(Claims, TheSameDiskNeverAttachesTwice) {
    const Plan p = plan();
    Claims claims(p);
    EXPECT_TRUE(claims.offered("xen_blk", disk_id(0)));
    EXPECT_TRUE(claims.attached("xen_blk", disk_id(0)));
    EXPECT_FALSE(claims.offered("ata", ide_id(0, 0)));
    EXPECT_EQ(claims.holder(disk_id(0)), "xen_blk");
    const auto again = claims.attached("ata", ide_id(0, 0));
    ASSERT_FALSE(again) << "a driver that did not call offered()";
    EXPECT_EQ(again.error().code, Code::busy);
    EXPECT_TRUE(claims.offered("ata", ide_id(0, 1))) << "another disk";
    EXPECT_FALSE(claims.attached("xen_blk", disk_id(0))) << "nor by the same driver";
}

TEST(Claims, TwoNativeDriversHaveDifferentDisks) {
    const Plan p = plan();
    Claims claims(p);
    EXPECT_TRUE(claims.has_twins("ahci"));
    EXPECT_TRUE(claims.attached("ata", disk_id(0)));
    EXPECT_FALSE(claims.offered("ata", disk_id(0)));
    EXPECT_TRUE(claims.attached("ahci", disk_id(0)));
    EXPECT_FALSE(claims.offered("ahci", disk_id(0)));
    EXPECT_FALSE(claims.offered("xen_blk", disk_id(0)));
    EXPECT_TRUE(claims.attached("xen_blk", disk_id(1)));
    EXPECT_FALSE(claims.offered("ahci", disk_id(1)));
}

TEST(Claims, WhatFailsToAttachIsLeftToTheOther) {
    const Plan p = plan();
    Claims claims(p);
    EXPECT_TRUE(claims.offered("xen_blk", disk_id(0))); // the driver checks, tries and fails: it never claims the disk
    EXPECT_TRUE(claims.offered("ata", ide_id(0, 0)));
    EXPECT_TRUE(claims.attached("ata", ide_id(0, 0)));
    EXPECT_FALSE(claims.offered("xen_blk", disk_id(0)));
}

TEST(Claims, TheFirstClaimWins) {
    const Plan p = plan("rank,xen,ata,xen_blk,-1");
    EXPECT_LT(std::ranges::find(p.drivers(), "ata"), std::ranges::find(p.drivers(), "xen_blk"));
    Claims claims(p);
    EXPECT_TRUE(claims.attached("ata", disk_id(0)));
    EXPECT_FALSE(claims.offered("xen_blk", disk_id(0)));
}

TEST(Claims, KeptOnPurpose) {
    for (const Plan& p : {plan("", Twin::keep), plan("rank,xen,ata,xen_blk,0"), plan("add,xen,ata,xen_blk,1,keep")}) {
        Claims claims(p);
        EXPECT_TRUE(claims.attached("xen_blk", disk_id(0)));
        EXPECT_TRUE(claims.attached("ata", disk_id(0)));
        EXPECT_FALSE(claims.offered("ata", disk_id(0))) << "once each";
        EXPECT_EQ(claims.holder(disk_id(0)), "xen_blk");
    }
}

TEST(Claims, WithoutARuleItStillNeverAttachesTwice) {
    const Plan p = plan("remove,xen,ata,xen_blk");
    Claims claims(p);
    EXPECT_TRUE(claims.attached("ata", disk_id(0)));
    EXPECT_FALSE(claims.offered("xen_blk", disk_id(0)));
}

TEST(Claims, GoneMeansFreeAgain) {
    const Plan p = plan();
    Claims claims(p);
    EXPECT_FALSE(claims.release("ata", disk_id(0)));
    EXPECT_TRUE(claims.attached("xen_blk", disk_id(0)));
    EXPECT_TRUE(claims.attached("xen_blk", disk_id(1)));
    EXPECT_FALSE(claims.release("ata", disk_id(0))) << "not its own";
    EXPECT_TRUE(claims.release("xen_blk", disk_id(0)));
    EXPECT_TRUE(claims.offered("ata", disk_id(0)));
    EXPECT_FALSE(claims.offered("ata", disk_id(1)));
    EXPECT_TRUE(claims.offered("ata", {drivers::DeviceKind::network, 1})) << "a device of another class";
}

TEST(Claims, ManyDisks) {
    const Plan p = plan();
    Claims claims(p);
    for (u32 i = 0; i < 1000; ++i) {
        ASSERT_TRUE(claims.attached("xen_blk", disk_id(i)));
    }
    EXPECT_EQ(claims.size(), 1000u);
    EXPECT_FALSE(claims.offered("ata", disk_id(999)));
    EXPECT_TRUE(claims.release("xen_blk", disk_id(500)));
    EXPECT_TRUE(claims.offered("ata", disk_id(500)));
    EXPECT_FALSE(claims.offered("ata", disk_id(501)));
    EXPECT_EQ(claims.size(), 999u);
}
} // namespace
