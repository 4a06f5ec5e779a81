module core.machine.exit;
import core.std;
import core.log;
import core.verdict;
import core.machine.cpu;

namespace fl {

namespace {
constinit EndMachine hook = nullptr;
constinit u32 next_step = 0; // each step is tried once, even if it faults and this code is entered again
} // namespace

void set_end_machine(EndMachine to) { hook = to; }

[[noreturn]] void end_vm(Verdict verdict, std::string_view reason) {
    cpu::interrupts_off();
    for (;;) {
        switch (next_step++) {
        case 0: log::flush(); break; // a console that waits for its reader then has room
        case 1: log::Record("verdict").text("verdict", name(verdict)).text("reason", reason); break;
        case 2: log::flush(); break;
        default:
            if (hook != nullptr) {
                hook(verdict, reason);
            }
            cpu::halt();
            break;
        }
    }
}

} // namespace fl
