module core.mmio;
import core.std;
import core.result;

namespace fl {

namespace {
class NoMmio final : public MmioMapper {
  public:
    Result<Mmio> map(u64, u64) override {
        return Error(Code::not_supported, "nothing maps device registers here: give the environment an MmioMapper");
    }
};
constinit NoMmio nothing{};
} // namespace

MmioMapper& no_mmio() { return nothing; }

} // namespace fl
