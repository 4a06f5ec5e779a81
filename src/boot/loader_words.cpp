module boot.loader_words;
import core.std;
import core.text;
import core.cmdline;

namespace fl::boot {

namespace {

// From Linux's parameter list, and the words passed by GRUB, dracut, systemd, cloud-init, Firecracker, Cloud
// Hypervisor, OpenVMM, crosvm, kvmtool, Kata Containers and libvirt's tools. Words with a dot need no entry. None may
// equal a key of this kernel (checked by boot/options_test.cpp).
constexpr std::string_view words =
    "BOOT_IMAGE LANG S TERM acpi acpi_enforce_resources acpi_osi acpi_rsdp acpi_sleep amd_iommu apic apparmor audit "
    "autoinstall biosdevname boot boot_delay bootdev cgroup_disable cgroup_enable cgroup_no_v1 clocksource console "
    "consoleblank crash_kexec_post_notifiers crashkernel cryptomgr debug default_hugepagesz delayacct dis_ucode_ldr "
    "dyndbg earlycon earlyprintk edd efi elevator emergency enforcing fips hpet hugepages hugepagesz idle "
    "ignore_loglevel ima_policy init init_on_alloc init_on_free initcall_debug initrd intel_iommu intel_pstate "
    "iomem iommu ip ipv6 irqaffinity irqpoll isolcpus kaslr keep_bootcon kgdboc l1tf lapic live-media load_ramdisk "
    "lockdown loglevel lpj lsm max_loop maxcpus mce mds mem memmap memory_corruption_check mitigations "
    "module_blacklist netroot nfsroot nmi_watchdog no-kvmclock no_console_suspend no_hash_pointers no_timer_check "
    "noacpi noapic noautogroup nofb nogbpages nohibernate nohz nohz_full noinitrd nointremap noirqdebug nokaslr "
    "nolapic nomce nomodeset nomodule nopat nopcid nopersistence nopti nopv noreplace-paravirt noreplace-smp "
    "noresume nortc nosmap nosmep nosmp nosmt nosoftlockup nospectre_v1 nospectre_v2 nosplash notsc nousb "
    "nowatchdog nox2apic noxsave nr_cpus numa numa_balancing oops page_poison panic panic_on_oops panic_on_warn "
    "panic_print pci pcie_aspm persistent pnpacpi possible_cpus preempt printk profile psi pti quiet raid "
    "ramdisk_size rcu_nocbs rdinit reboot rescue reserve resume retbleed rhgb ro root rootdelay rootflags "
    "rootfstype rootwait rw security selinux single slab_nomerge slub_debug spec_store_bypass_disable spectre_v2 "
    "splash srbds stacktrace swapaccount swiotlb sysrq_always_enabled text threadirqs toram transparent_hugepage "
    "tsc tsx tsx_async_abort unknown_nmi_panic vconsole vdso vga video vmalloc vsyscall watchdog_thresh "
    "xen_emul_unplug xen_nopv xencons";

bool is_name(std::string_view text) {
    return !text.empty() && std::ranges::all_of(text, [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
               c == '.' || c == '/';
    });
}

std::optional<u32> small_number(std::string_view text) {
    const auto n = parse_number(text);
    return n && *n <= ~u32{0} ? std::optional(static_cast<u32>(*n)) : std::nullopt;
}

} // namespace

std::optional<MmioDevice> parse_mmio_device(std::string_view value) {
    const usize at = value.find('@');
    if (at == std::string_view::npos) {
        return std::nullopt;
    }
    TextParts parts(value.substr(at + 1), ':');
    const auto address_text = parts.next();
    const auto interrupt_text = parts.next();
    const auto id_text = parts.next();
    if (!address_text || !interrupt_text || parts.next()) {
        return std::nullopt;
    }
    const auto size = parse_size(value.substr(0, at));
    const auto address = parse_size(*address_text);
    const auto interrupt = small_number(*interrupt_text);
    if (!size || !address || !interrupt || *size == 0 || *size > ~u64{0} - *address) {
        return std::nullopt;
    }
    MmioDevice device{*address, *size, *interrupt, {}};
    if (id_text) {
        device.id = small_number(*id_text);
        if (!device.id) {
            return std::nullopt;
        }
    }
    return device;
}

bool is_loader_word(std::string_view key) {
    const usize dot = key.find('.');
    if (dot != std::string_view::npos) {
        return is_name(key.substr(0, dot)) && is_name(key.substr(dot + 1)) && key.back() != '.';
    }
    TextParts all(words, ' ');
    while (const auto word = all.next()) {
        if (*word == key) {
            return true;
        }
    }
    return false;
}

} // namespace fl::boot
