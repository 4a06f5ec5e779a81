// Positive control: correct code for everything that the other files get wrong. It compiles.
import core.std;
import core.result;
import core.text;
import core.dma;
import io.task;
import io.block_queue;
import drivers.null;
import io.ring;

namespace {
using namespace fl;

Result<u32> answer() { return 42u; }

io::Task<Result<u32>> later() { co_return answer(); }

io::Task<Result<u32>> twice() {
    const Result<u32> first = co_await later();
    co_return first;
}

u32 use() {
    const Result<u32> result = answer();
    FixedText<32> text;
    print(text, "{} of {}", result.value_or(0), 7);
    static_cast<void>(twice());
    return result.value_or(0);
}
static_assert(io::BlockTransport<drivers::null::Transport>);
static_assert(io::RingMemory<io::FlatMemory>);
[[maybe_unused]] constexpr auto keep = &use;
} // namespace
