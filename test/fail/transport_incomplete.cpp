// A transport must take completions.
// expect: does not satisfy 'BlockTransport'
// expect: 't.next(completion)' would be invalid
import core.std;
import core.result;
import io.block;
import io.block_queue;
import io.oldest_wait;

namespace {
using namespace fl;
class Disk;
class NoAnswers : public io::TransportDefaults {
  public:
    using Disk = ::Disk;
    using Command = io::Command<NoAnswers>;
    struct Wire {};
    static constexpr std::string_view driver = "none";
    static constexpr u32 max_commands = 4;

    void use(io::CommandTable<NoAnswers>&) {}
    io::Fit prepare(Command&) { return io::Fit::ok; }
    io::SendResult send(Command&, u64) { return io::SendResult::sent; }
    bool finish(Command&, io::Status) { return true; }
    io::Fence fence(Command&) { return io::Fence::done; }
    io::Recovery recover(const Command&, io::OldestWait::Finding, std::string_view) { return {}; }
};
template <io::BlockTransport T>
void use(T&) {}
[[maybe_unused]] void caller(NoAnswers& transport) { use(transport); }
} // namespace
