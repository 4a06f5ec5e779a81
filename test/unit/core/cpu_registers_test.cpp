#include "gtest_macros.hpp"

#include "unit/core/registers_mock.hpp"
import test.gtest;
import host.std;
import core.apic;
import core.cpu_registers;

namespace {
using namespace fl;

// Bits written from [SDM-3 2.5, 11], [SDM-4 2.1] and [SDM-2A CPUID].
TEST(CpuRegisters, BitsAreThoseOfTheManual) {
    EXPECT_EQ(Cr0::of(Cr0::write_protect).raw, 0x10000u);
    EXPECT_EQ(Cr0::of(Cr0::paging, Cr0::protection_enable).raw, 0x80000001u);
    EXPECT_EQ(Cr4::of(Cr4::umip).raw, 0x800u);
    EXPECT_EQ(Cr4::of(Cr4::smep).raw, 0x100000u);
    EXPECT_EQ(Cr4::of(Cr4::smap).raw, 0x200000u);
    EXPECT_EQ(Cr4::of(Cr4::physical_address_extension).raw, 0x20u);
    EXPECT_EQ(Efer::msr, 0xc0000080u);
    EXPECT_EQ(Efer::of(Efer::no_execute_enable).raw, 0x800u);
    EXPECT_TRUE(Efer::from(0x500).has(Efer::long_mode_active, Efer::long_mode_enable));
    EXPECT_EQ(ApicBase::msr, 0x1bu);
    EXPECT_EQ(ApicBase::of(ApicBase::enable).raw, 0x800u);
    EXPECT_EQ(ApicBase::of(ApicBase::x2apic).raw, 0x400u);
    EXPECT_EQ(ApicBase::from(0xfffffffee00d00).address(), 0xffffffee00000u) << "bits 51 to 12";

    EXPECT_TRUE(Cpuid1Ecx::from(0x80000000).get(Cpuid1Ecx::hypervisor));
    EXPECT_TRUE(Cpuid1Ecx::from(0x01000000).get(Cpuid1Ecx::tsc_deadline));
    EXPECT_TRUE(Cpuid1Ecx::from(0x00200000).get(Cpuid1Ecx::x2apic));
    EXPECT_TRUE(Cpuid1Edx::from(0x200).get(Cpuid1Edx::apic));
    EXPECT_TRUE(Cpuid7Ebx::from(0x80).get(Cpuid7Ebx::smep));
    EXPECT_TRUE(Cpuid7Ebx::from(0x100000).get(Cpuid7Ebx::smap));
    EXPECT_TRUE(Cpuid7Ecx::from(4).get(Cpuid7Ecx::umip));
    EXPECT_TRUE(Cpuid80000001Edx::from(0x100000).get(Cpuid80000001Edx::no_execute));
    EXPECT_TRUE(Cpuid80000001Edx::from(0x4000000).get(Cpuid80000001Edx::gigabyte_pages));
    EXPECT_TRUE(Cpuid80000007Edx::from(0x100).get(Cpuid80000007Edx::invariant_tsc));
    EXPECT_EQ(Cpuid80000008Eax::from(0x3034).get(Cpuid80000008Eax::physical_bits), 0x34u);
}

TEST(Apic, BitsAreThoseOfTheManual) {
    using namespace apic;
    EXPECT_EQ(SpuriousVector::of(SpuriousVector::enable).set(SpuriousVector::vector, 0xff).raw, 0x1ffu);
    EXPECT_EQ(LocalVector::of(LocalVector::mask).raw, 0x10000u);
    EXPECT_EQ(LocalVector{}.set(LocalVector::delivery, Delivery::external).raw, 0x700u);
    EXPECT_EQ(LocalVector{}.set(LocalVector::delivery, Delivery::nmi).raw, 0x400u);
    EXPECT_EQ(LocalVector{}.set(LocalVector::timer_mode, LocalVector::TimerMode::tsc_deadline).raw, 0x40000u);
    EXPECT_EQ(
        CommandLow::of(CommandLow::assert).set(CommandLow::delivery, Delivery::startup).set(CommandLow::vector, 8).raw,
        0x4608u);
    EXPECT_TRUE(CommandLow::from(0x1000).get(CommandLow::pending));
    EXPECT_EQ(CommandHigh{}.set(CommandHigh::destination, 3).raw, 0x03000000u);
    EXPECT_EQ(LocalId::from(0x05000000).get(LocalId::id), 5u);
    EXPECT_EQ(IoVersion::from(0x00170020).get(IoVersion::last_entry), 23u);
    EXPECT_EQ(RedirectionLow::of(RedirectionLow::mask).raw, 0x10000u);
    EXPECT_EQ(RedirectionLow::of(RedirectionLow::level_triggered, RedirectionLow::active_low)
                  .set(RedirectionLow::vector, 0x31)
                  .raw,
              0xa031u);
    EXPECT_EQ(
        RedirectionHigh{}.set(RedirectionHigh::destination, 0xfe).set(RedirectionHigh::extended_destination, 0x7f).raw,
        0xfefe0000u);
}

TEST(Apic, AnIoApicIsReachedByIndexAndWindow) {
    using namespace apic;
    register_test::AccessScript script;
    const IndexedAccess io(register_test::ScriptedAccess(script, "ioapic"));
    script.expect_write(0, 4, 1, "ioapic").expect_read(0x10, 4, 0x00170020, "ioapic");
    EXPECT_EQ(IoVersion::read(io).get(IoVersion::last_entry), 23u);
    // Pin 11: the destination first, because the lower half unmasks.
    script.expect_write(0, 4, 0x10 + 2 * 11 + 1, "ioapic").expect_write(0x10, 4, 0x02000000, "ioapic");
    script.expect_write(0, 4, 0x10 + 2 * 11, "ioapic").expect_write(0x10, 4, 0xa031, "ioapic");
    RedirectionHigh{}.set(RedirectionHigh::destination, 2).write(io, 2 * 11);
    RedirectionLow::of(RedirectionLow::level_triggered, RedirectionLow::active_low)
        .set(RedirectionLow::vector, 0x31)
        .write(io, 2 * 11);
}

} // namespace
