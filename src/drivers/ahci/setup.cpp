module;
#include "core/try.hpp"
module drivers.ahci.setup;
import core.std;
import core.result;
import core.dma;
import core.time;
import io.executor;
import io.task;
import drivers.ahci.recovery;

namespace fl::drivers::ahci {

namespace {
constexpr Nanoseconds poll = 100'000;
constexpr u64 four_gib = u64{1} << 32;
} // namespace

io::Task<Result<void>> Setup::wait(Nanoseconds length, u64 at, u32 bits, bool set) {
    const io::Bound bound(executor_, length);
    while (((abar_.read<u32>(at) & bits) != 0) != set) {
        if (bound.passed()) {
            co_return Error{Code::timed_out, "an AHCI HBA does not answer"};
        }
        co_await executor_.sleep(poll);
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Setup::reset_link(Port& port) {
    port.command(false, false); // power and spin-up
    port.comreset(true);
    co_await executor_.sleep(Recovery::hold);
    port.comreset(false);
    co_return Result<void>{};
}

io::Task<Result<void>> Setup::start(Port& port, DmaBuffer& buffer) {
    CO_CHECK(co_await stop(port, buffer));
    CO_TRY(buffer, dma_.buffer(PortMemory::bytes, wide_ ? ~u64{0} : four_gib));
    const PortMemory memory(buffer.span());
    port.write(command_list_base, static_cast<u32>(memory.list_bus()));
    port.write(command_list_base + 4, static_cast<u32>(memory.list_bus() >> 32));
    port.write(fis_base, static_cast<u32>(memory.fis_bus()));
    port.write(fis_base + 4, static_cast<u32>(memory.fis_bus() >> 32));
    port.clear_errors();
    port.command(false); // lets the HBA store the first FIS of the device
    if (!co_await wait(timeout_, port.at(SataStatus::offset), SataStatus::up, true)) {
        co_return Error{Code::timed_out, "the link to the device does not come up (PxSSTS.DET)",
                        SataStatus::established, port.read<SataStatus>().raw};
    }
    port.write(sata_error, ~u32{0});
    if (!co_await wait(timeout_, port.at(TaskFile::offset), TaskFile::in_progress, false)) {
        co_return Error{Code::timed_out, "the device stays busy after the reset (PxTFD)", 0, port.read<TaskFile>().raw};
    }
    port.command(true);
    co_return Result<void>{};
}

io::Task<Result<void>> Setup::stop(Port& port, DmaBuffer& buffer) {
    auto command = port.read<PortCommand>();
    port.write(command.set(PortCommand::st, false));
    constexpr u32 runs = PortCommand::command_list | PortCommand::fis_receive;
    static_cast<void>(
        co_await wait(Recovery::stop_bound, port.at(PortCommand::offset), PortCommand::command_list, false));
    port.write(command.set(PortCommand::fre, false));
    if (!co_await wait(Recovery::stop_bound, port.at(PortCommand::offset), runs, false)) {
        buffer.abandon(); // the HBA may still write to it
        co_return Error{Code::timed_out, "the HBA does not stop the port (PxCMD.CR, FR)", 0,
                        port.read<PortCommand>().raw};
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Setup::execute(Port& port, const PortMemory& memory, const CommandFis& fis, bool reads) {
    const DmaSpan page = memory.block(0);
    memory.encode(0, 0, fis, false, reads ? std::span(&page, 1) : std::span<const DmaSpan>());
    port.write(PortInterrupts::offset, ~u32{0}); // also of the device's first FIS
    port.write(command_issue, 1);
    const auto ended =
        co_await wait(timeout_, port.at(PortInterrupts::offset), PortInterrupts::fatal | PortInterrupts::ends, true);
    const bool failed = (port.read<PortInterrupts>().raw & PortInterrupts::fatal) != 0;
    if (!ended || (!failed && !co_await wait(timeout_, port.at(command_issue), 1, false))) {
        co_return Error{Code::timed_out, "no answer to IDENTIFY DEVICE or SET FEATURES", 0, port.read<TaskFile>().raw};
    }
    if (failed) {
        co_return Error{Code::io, "the device refuses IDENTIFY DEVICE or SET FEATURES", 0, port.read<TaskFile>().raw};
    }
    if (reads && memory.header(0).transferred != page.size) {
        co_return Error{Code::protocol, "IDENTIFY DEVICE ended before all of its data (PRDBC)", page.size,
                        memory.header(0).transferred};
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Setup::identify(Port& port, const PortMemory& memory, ata::IdentifyData& data) {
    port.clear_errors(); // a change of the link from now on means that it may be another disk
    CO_CHECK(co_await execute(port, memory, plain_fis(Opcode::identify_device), true));
    std::memcpy(data.words.data(), memory.block(0).data, sizeof data);
    co_return Result<void>{};
}

} // namespace fl::drivers::ahci
