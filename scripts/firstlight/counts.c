// A plugin for QEMU's TCG [QEMU's docs/devel/tcg-plugins.rst] in the emulated machine of scripts/cost: counts the
// executed instructions by who executes them, and those of the kernel under test by address. Each execution of the
// instruction at a `mark` ends a section of the counts and begins the next one.
//
//     -plugin counts.so,out=FILE,first=ADDRESS,last=ADDRESS,mark=ADDRESS[,mark=ADDRESS…]
//
// `first` to `last` (exclusive) is the kernel's image: at most image_most bytes at addresses that the Linux below it
// does not use. FILE, for each section: a line "section", then lines "NAME COUNT" of the parties below and
// "ADDRESS COUNT" of the kernel's instructions, with addresses in hexadecimal from 0x on. Exact for one virtual
// processor: all threads of a virtual machine below then share it.
//
// What runs between a VMRUN instruction and the instruction after it, where the host continues after #VMEXIT
// [amd64-apm2 §15.5], is counted for the guest. Addresses alone could not separate a Linux guest from the host's Linux:
// both use the same ones.
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The part of qemu-plugin.h, which the distributions do not package, that is used here: version 2 of the interface,
// QEMU 9.0.
typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_scoreboard;
typedef struct {
    struct qemu_plugin_scoreboard* score;
    size_t offset;
} qemu_plugin_u64;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
                                           void (*translated)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*ended)(qemu_plugin_id_t, void*), void* data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* tb);
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn* insn, void* bytes, size_t size);
void* qemu_plugin_insn_haddr(const struct qemu_plugin_insn* insn);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb* tb, size_t index);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn* insn);
struct qemu_plugin_scoreboard* qemu_plugin_scoreboard_new(size_t bytes);
void* qemu_plugin_scoreboard_find(struct qemu_plugin_scoreboard* score, unsigned vcpu);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn* insn, void (*executed)(unsigned, void*),
                                            enum qemu_plugin_cb_flags flags, void* data);
void qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(struct qemu_plugin_insn* insn, enum qemu_plugin_op op,
                                                         qemu_plugin_u64 entry, uint64_t value);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 2;
EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t* info, int argc, char** argv);

// By address [Linux's Documentation/arch/x86/x86_64/mm.rst]. In the lab's Linux the only modules at work during an I/O
// are KVM's, and the only program is the virtual machine monitor.
enum { vmm, host_kernel, kvm, parties };
static const char* const names[parties] = {"vmm", "kernel", "kvm"};
static const uint64_t upper_half = UINT64_C(0xffff800000000000);
static const uint64_t modules = UINT64_C(0xffffffffc0000000);
static const uint64_t image_most = 16 << 20;

static uint64_t first, last;
enum { marks_most = 4 };
static uint64_t marks[marks_most];
static size_t mark_count;
static FILE* out;
static struct qemu_plugin_scoreboard* counts; // of the parties, then of each byte of the image

// The VMRUN instructions that were translated, by address and by where their bytes are: the guest may have code at the
// same address.
enum { vmruns_most = 4 };
static struct {
    uint64_t address;
    const uint8_t* bytes;
} vmruns[vmruns_most];
static size_t vmrun_count;
static const uint8_t vmrun_bytes[] = {0x0f, 0x01, 0xd8}; // VMRUN

static bool in_guest;
static uint64_t at_entry[parties]; // the parties' counts at the last VMRUN
static uint64_t guests[parties];   // of the counts in this section, those of the guest outside of the image

static size_t counter_of(uint64_t address) {
    if (address >= first && address < last) {
        return parties + (size_t)(address - first);
    }
    return address < upper_half ? vmm : address < modules ? host_kernel : kvm;
}

static uint64_t* all_counts(void) { return qemu_plugin_scoreboard_find(counts, 0); }

static void enter_guest(unsigned vcpu, void* data) {
    (void)vcpu;
    (void)data;
    in_guest = true;
    memcpy(at_entry, all_counts(), sizeof at_entry);
}

static void leave_guest(void) {
    if (in_guest) {
        for (size_t i = 0; i < parties; ++i) {
            guests[i] += all_counts()[i] - at_entry[i];
        }
    }
    in_guest = false;
}

static void left_guest(unsigned vcpu, void* data) {
    (void)vcpu;
    (void)data;
    leave_guest();
}

static void end_section(void) {
    const bool inside = in_guest;
    leave_guest();
    uint64_t* const count = all_counts();
    uint64_t guest = 0;
    fprintf(out, "section\n");
    for (size_t i = 0; i < parties; ++i) {
        fprintf(out, "%s %" PRIu64 "\n", names[i], count[i] - guests[i]);
        guest += guests[i];
    }
    fprintf(out, "guest %" PRIu64 "\n", guest);
    for (uint64_t address = first; address < last; ++address) {
        const uint64_t executed = count[counter_of(address)];
        if (executed != 0) {
            fprintf(out, "%#" PRIx64 " %" PRIu64 "\n", address, executed);
        }
    }
    memset(count, 0, (parties + (size_t)(last - first)) * sizeof *count);
    memset(guests, 0, sizeof guests);
    if (inside) {
        enter_guest(0, NULL);
    }
}

static void marked(unsigned vcpu, void* data) {
    (void)vcpu;
    (void)data;
    end_section();
}

static void ended(qemu_plugin_id_t id, void* data) {
    (void)id;
    (void)data;
    end_section();
    if (ferror(out) || fclose(out) != 0) {
        fprintf(stderr, "counts: the counts could not be written\n");
    }
}

static bool is_mark(uint64_t address) {
    for (size_t i = 0; i < mark_count; ++i) {
        if (marks[i] == address) {
            return true;
        }
    }
    return false;
}

// The instruction is a VMRUN: remembered.
static bool is_vmrun(const struct qemu_plugin_insn* insn) {
    uint8_t bytes[sizeof vmrun_bytes];
    if (qemu_plugin_insn_data(insn, bytes, sizeof bytes) != sizeof bytes ||
        memcmp(bytes, vmrun_bytes, sizeof bytes) != 0) {
        return false;
    }
    const uint64_t address = qemu_plugin_insn_vaddr(insn);
    for (size_t i = 0; i < vmrun_count; ++i) {
        if (vmruns[i].address == address) {
            return true;
        }
    }
    if (vmrun_count == vmruns_most) {
        fprintf(stderr, "counts: more than %d VMRUN instructions were executed\n", vmruns_most);
        return false;
    }
    vmruns[vmrun_count].address = address;
    vmruns[vmrun_count++].bytes = qemu_plugin_insn_haddr(insn);
    return true;
}

// Both are in one page: in Linux's KVM the function that contains them is smaller, and aligned.
static bool follows_vmrun(const struct qemu_plugin_insn* insn, uint64_t address) {
    for (size_t i = 0; i < vmrun_count; ++i) {
        if (vmruns[i].address + sizeof vmrun_bytes == address &&
            vmruns[i].bytes + sizeof vmrun_bytes == (const uint8_t*)qemu_plugin_insn_haddr(insn)) {
            return true;
        }
    }
    return false;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb* tb) {
    (void)id;
    const size_t size = qemu_plugin_tb_n_insns(tb);
    for (size_t i = 0; i < size; ++i) {
        struct qemu_plugin_insn* const insn = qemu_plugin_tb_get_insn(tb, i);
        const uint64_t address = qemu_plugin_insn_vaddr(insn);
        if (is_mark(address)) { // before it is counted: it belongs to the section that it begins
            qemu_plugin_register_vcpu_insn_exec_cb(insn, marked, QEMU_PLUGIN_CB_NO_REGS, NULL);
        }
        if (follows_vmrun(insn, address)) {
            qemu_plugin_register_vcpu_insn_exec_cb(insn, left_guest, QEMU_PLUGIN_CB_NO_REGS, NULL);
        }
        const qemu_plugin_u64 counter = {counts, counter_of(address) * sizeof(uint64_t)};
        qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(insn, QEMU_PLUGIN_INLINE_ADD_U64, counter, 1);
        if (is_vmrun(insn)) {
            qemu_plugin_register_vcpu_insn_exec_cb(insn, enter_guest, QEMU_PLUGIN_CB_NO_REGS, NULL);
        }
    }
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t* info, int argc, char** argv) {
    (void)info;
    const struct {
        const char* name;
        uint64_t* value;
    } addresses[] = {{"first=", &first}, {"last=", &last}};
    for (int i = 0; i < argc; ++i) {
        if (strncmp(argv[i], "out=", 4) == 0) {
            out = fopen(argv[i] + 4, "w");
        } else if (strncmp(argv[i], "mark=", 5) == 0 && mark_count < marks_most) {
            marks[mark_count++] = strtoull(argv[i] + 5, NULL, 16);
        }
        for (size_t j = 0; j < sizeof addresses / sizeof *addresses; ++j) {
            const size_t length = strlen(addresses[j].name);
            if (strncmp(argv[i], addresses[j].name, length) == 0) {
                *addresses[j].value = strtoull(argv[i] + length, NULL, 16);
            }
        }
    }
    if (out == NULL || first < upper_half || last <= first || last - first > image_most || mark_count == 0) {
        fprintf(stderr, "counts: expected out= (a file), first= and last= (the image) and mark=\n");
        return -1;
    }
    counts = qemu_plugin_scoreboard_new((parties + (size_t)(last - first)) * sizeof(uint64_t));
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
