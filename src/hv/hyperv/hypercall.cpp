module hv.hyperv.hypercall;
import core.std;
import core.result;
import core.dma;
import hv.hyperv.protocol;

namespace fl::hv::hyperv {

#if __STDC_HOSTED__
Gate native_gate() { return {}; }
#endif

Result<void> Hypercalls::install(const Gate& gate, DmaAllocator& memory) {
    if (!input_) {
        auto page = memory.buffer(page_size);
        if (!page) {
            return page.error();
        }
        input_ = std::move(*page);
    }
    gate_ = gate;
    return {};
}

Status Hypercalls::post_message(u32 connection, u32 type, std::span<const std::byte> payload) {
    if (payload.size() > message_payload) {
        return Status::invalid_parameter;
    }
    // In one page and aligned, as required for hypercall parameters [hv-tlfs §3.5].
    PostMessageInput input{connection, 0, type, static_cast<u32>(payload.size()), {}};
    std::copy_n(payload.data(), payload.size(), input.payload.data());
    std::memcpy(input_.data(), &input, sizeof(input));
    return call(to_underlying(Call::post_message), input_.bus(), 0);
}

} // namespace fl::hv::hyperv
