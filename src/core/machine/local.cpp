module core.machine.local;
import core.std;
import core.processor;

namespace fl {

namespace {
constinit std::array<Local, max_processors> locals{};
} // namespace

Local& local_of(u32 number) { return locals[number]; }

} // namespace fl
