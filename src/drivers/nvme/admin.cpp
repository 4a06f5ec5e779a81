module;
#include "core/try.hpp"
module drivers.nvme.admin;
import core.std;
import core.dma;
import core.log;
import core.result;
import core.text;
import core.time;
import io.block;
import io.executor;
import io.task;
import drivers.driver;

namespace fl::drivers::nvme {

Result<void> Admin::open(Queue& queue) {
    queue_ = &queue;
    TRY(scratch_, environment_.dma.buffer(identify_bytes));
    return {};
}

io::Task<Result<u32>> Admin::command(Submission command, std::string_view what, bool optional) {
    Exchange exchange(environment_.executor);
    exchange.command = command;
    const io::Bound bound(environment_.executor, environment_.timeout);
    for (;;) {
        const auto sent = queue_->send(exchange);
        if (sent) {
            break;
        }
        if (sent.error().code != Code::exhausted || bound.passed()) {
            co_return sent.error();
        }
        co_await environment_.executor.sleep(1'000'000);
    }
    if (!co_await exchange.done.wait({environment_.executor, environment_.timeout})) {
        queue_->abandon(exchange);
        const Error why{Code::timed_out, "the controller did not answer an admin command"};
        log::error("nvme{}: no answer to {}", index_, what);
        if (recovery_ != nullptr) {
            recovery_->request_reset(Recovery::Cause::admin);
        } else {
            queue_->shut(io::Status::timed_out, why);
        }
        co_return why;
    }
    if (!exchange.answered) {
        co_return Error{Code::device_gone, "the controller was closed or reset during an admin command"};
    }
    if (const u16 status = status_code(exchange.completion.status); status != 0) {
        if (!optional) {
            log::warning("nvme{}: {} failed: status code type {:#x}, status code {:#x}", index_, what, status >> 8,
                         status & 0xff);
        }
        co_return Error{Code::io, "the controller refuses an admin command (status code type and code)", 0, status};
    }
    co_return exchange.completion.dw0;
}

io::Task<Result<void>> Admin::identify(u32 cns, u32 nsid, bool optional) {
    std::memset(scratch_.data(), 0, identify_bytes);
    CO_CHECK(co_await command(identify_command(cns, nsid, scratch_.bus()), "IDENTIFY", optional));
    co_return Result<void>{};
}

io::Task<Result<void>> Admin::log_page(u8 which, u32 bytes) {
    std::memset(scratch_.data(), 0, identify_bytes);
    CO_CHECK(co_await command(log_page_command(which, bytes, scratch_.bus()), "GET LOG PAGE"));
    co_return Result<void>{};
}

io::Task<Result<u32>> Admin::set_feature(u32 feature, u32 value, std::string_view what, bool optional) {
    co_return co_await command(set_feature_command(feature, value), what, optional);
}

io::Task<Result<u32>> Admin::accept_delays() {
    std::memset(scratch_.data(), 0, host_behavior_bytes);
    scratch_.data()[0] = std::byte{1};
    co_return co_await command(host_behavior_command(scratch_.bus()), "SET FEATURES (host behavior support)");
}

io::Task<Result<Event>> Admin::next_event() {
    Exchange exchange(environment_.executor);
    exchange.command = event_request_command();
    CO_CHECK(queue_->send(exchange));
    queue_->set_waiting_events(1);
    static_cast<void>(co_await exchange.done.wait());
    queue_->set_waiting_events(0);
    if (!exchange.answered) {
        co_return Error{Code::device_gone, "the controller was closed or reset"};
    }
    if (const u16 status = status_code(exchange.completion.status); status != 0) {
        co_return Error{Code::io, "the controller refuses an asynchronous event request", 0, status};
    }
    co_return event_of(exchange.completion.dw0);
}

} // namespace fl::drivers::nvme
