module boot.backend;
import core.std;
import core.processor;
import core.result;
import io.executor;
import io.task;
import hv.backend;

namespace fl::boot {

io::Task<Result<void>> Backend::enumerate(hv::DeviceList& into) {
    static_cast<void>(into);
    co_return Result<void>{};
}

Result<void> Backend::unplug(hv::EmulatedClasses classes) {
    static_cast<void>(classes);
    return Error{Code::not_supported, "this hypervisor cannot unplug emulated devices"};
}

Result<void> Backend::start_processor(u32 index, const ProcessorStart& state) {
    static_cast<void>(index);
    static_cast<void>(state);
    return Error{Code::not_supported, "this hypervisor starts no processors by hypercall"};
}

Result<void> Backend::join(u32 processor, io::Executor& executor) {
    static_cast<void>(processor);
    static_cast<void>(executor);
    return {};
}

} // namespace fl::boot
