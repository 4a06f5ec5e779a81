module;
#include "core/try.hpp"
module drivers.xen_control;
import core.std;
import core.result;
import core.log;
import core.panic;
import io.executor;
import io.latch;
import io.shutdown;
import io.task;
import hv.xen;
import drivers.driver;

namespace fl::drivers::xen_control {

using namespace hv::xen;

namespace {

constexpr std::string_view shutdown_path = "control/shutdown";
constexpr std::string_view sysrq_path = "control/sysrq";

bool is_power_off(std::string_view request) { return request == "poweroff" || request == "halt"; }
bool is_known(std::string_view request) { return is_power_off(request) || request == "reboot" || request == "suspend"; }

} // namespace

io::Task<Result<void>> Parked::park() {
    const auto others = environment_.executors;
    if (stopped_.load(std::memory_order_acquire) != sent_) { // its post is still on the way
        co_return Error{Code::busy, "a processor has not stopped for an earlier suspension yet"};
    }
    const u64 suspension = released_.load(std::memory_order_relaxed) + 1; // written here only
    for (usize i = 1; i < others.size(); ++i) {
        stops_[i].parked = this;
        stops_[i].suspension = suspension;
        stops_[i].run = stop;
        sent_ += others[i]->post(stops_[i]) ? 1 : 0; // refused: it does nothing any more
    }
    const io::Bound bound(environment_.executor, environment_.timeout);
    while (stopped_.load(std::memory_order_acquire) != sent_) {
        if (bound.passed()) {
            co_return Error{Code::timed_out, "not every processor stops for the suspension", 0,
                            sent_ - stopped_.load(std::memory_order_relaxed)};
        }
        co_await environment_.executor.sleep(100'000);
    }
    co_return Result<void>{};
}

void Parked::release() {
    released_.fetch_add(1, std::memory_order_release);
    environment_.executor.rearm();
}

// On the other processor. It ends with this suspension, even if the next one has begun by then.
void Parked::stop(io::Post& post) {
    const Stop& own = static_cast<Stop&>(post);
    Parked& self = *own.parked;
    const u64 suspension = own.suspension; // the next park() may write it once this has been counted
    self.stopped_.fetch_add(1, std::memory_order_release);
    while (self.released_.load(std::memory_order_acquire) < suspension) {
        __builtin_ia32_pause();
    }
    io::Executor::current()->rearm();
}

Control::Control(Environment& environment, hv::Xen& xen)
    : environment_(environment), xen_(xen), store_(xen.store()), parked_(environment_), changed_(environment.executor),
      tasks_(environment.executor) {
    shutdown_.path = StorePath(shutdown_path);
    sysrq_.path = StorePath(sysrq_path);
    for (Watch* const watch : {&shutdown_, &sysrq_}) {
        watch->changed = [](void* self) { static_cast<Control*>(self)->changed_.open(); };
        watch->context = this;
    }
}

io::Task<Result<void>> Control::connect() {
    if (environment_.shutdown == nullptr) {
        co_return Error{Code::not_supported, "nothing here can shut the machine down"};
    }
    CO_CHECK(co_await announce());
    // A new watch fires at once. It is awaited here, so that serve() has nothing to do, and no coroutine frame to
    // allocate, while a job is measured; a request that was there already is left to it.
    const io::Bound bound(environment_.executor, environment_.timeout);
    CO_CHECK(co_await store_.watch(shutdown_));
    static_cast<void>(co_await changed_.wait(bound));
    auto begun = co_await store_.watch(sysrq_);
    if (begun) {
        static_cast<void>(co_await changed_.wait(bound));
        for (const std::string_view path : {shutdown_path, sysrq_path}) {
            std::array<char, 8> text;
            const auto read = co_await store_.read(path, text);
            if (read ? !read->empty() : read.error().code == Code::exhausted) {
                changed_.open();
            }
        }
        begun = tasks_.spawn(serve());
        if (begun) {
            co_return begun;
        }
        static_cast<void>(co_await store_.unwatch(sysrq_));
    }
    static_cast<void>(co_await store_.unwatch(shutdown_));
    co_return begun;
}

// The toolstack asks only for what is announced; without the nodes it assumes all [xenstore-paths].
io::Task<Result<void>> Control::announce() {
    for (const std::string_view feature :
         {"control/feature-poweroff", "control/feature-reboot", "control/feature-suspend"}) {
        if (auto written = co_await store_.write(feature, "1"); !written) {
            log::info("xen_control: {} is not writable: {}", feature, written.error());
        }
    }
    co_return Result<void>{};
}

// A job goes on before and after it, and knows nothing of it.
io::Task<Result<void>> Control::suspend() {
    const auto moved = co_await xen_.suspend(parked_);
    if (!moved) {
        log::error("xen_control: the machine was not suspended as requested: {}", moved.error());
    } else if (!*moved) {
        log::info("xen_control: the toolstack has cancelled the suspension");
    } else {
        co_return co_await announce();
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Control::disconnect() {
    auto done = co_await store_.unwatch(shutdown_);
    auto also = co_await store_.unwatch(sysrq_);
    co_return done ? also : done;
}

io::Task<Result<void>> Control::serve() {
    for (;;) {
        static_cast<void>(co_await changed_.wait());
        auto done = co_await shut_down();
        if (done) {
            done = co_await take_key();
        }
        if (!done) {
            log::error("xen_control: requests of the toolstack cannot be read any more: {}", done.error());
            co_return done;
        }
    }
}

/// Reads the request and clears it, in one transaction, so that one that the toolstack withdraws or changes meanwhile
/// is not confirmed.
io::Task<Result<Control::Confirmed>> Control::confirm(std::string_view path, std::span<char> into,
                                                      std::string_view& request, bool (*known)(std::string_view)) {
    for (u32 tries = 0; tries < Store::transaction_tries; ++tries) {
        // A look first: most often there is nothing, and a transaction would be two requests more.
        u32 transaction = 0;
        auto text = co_await store_.read(path, into);
        if (text && !text->empty() && known(*text)) {
            CO_TRY(transaction, co_await store_.begin());
            text = co_await store_.read(path, into, transaction);
        }
        const bool ours = transaction != 0 && text && !text->empty() && known(*text);
        Result<void> cleared;
        if (ours) {
            cleared = co_await store_.write(path, "", transaction);
        }
        bool committed = true;
        if (transaction != 0) {
            CO_TRY(committed, co_await store_.commit(transaction));
        }
        if (!text) {
            if (text.error().code == Code::not_found) {
                co_return Confirmed::no;
            }
            co_return text.error();
        }
        if (!cleared) {
            co_return cleared.error();
        }
        request = *text;
        if (committed) {
            co_return request.empty() ? Confirmed::no : ours ? Confirmed::yes : Confirmed::not_ours;
        }
    }
    co_return Error{Code::timed_out, "the toolstack keeps changing its request", 0, Store::transaction_tries};
}

io::Task<Result<void>> Control::shut_down() {
    std::array<char, 24> text;
    std::string_view request;
    auto confirmed = co_await confirm(shutdown_path, text, request, is_known);
    if (!confirmed && confirmed.error().code == Code::exhausted) { // longer than any that is known
        request = "a longer text";
        confirmed = Confirmed::not_ours;
    }
    if (!confirmed) {
        co_return confirmed.error();
    }
    if (*confirmed == Confirmed::no) {
        co_return Result<void>{};
    }
    if (*confirmed == Confirmed::not_ours) {
        log::warning("xen_control: the toolstack requests '{}' in {}; this kernel knows poweroff, halt, reboot and "
                     "suspend: left "
                     "unanswered",
                     request, shutdown_path);
        co_return Result<void>{};
    }
    log::info("xen_control: the toolstack requests '{}'", request);
    if (request == "suspend") {
        co_return co_await suspend();
    }
    const auto end = is_power_off(request) ? io::Shutdown::End::off : io::Shutdown::End::restart;
    if (!environment_.shutdown->request("Xen's toolstack", end)) {
        co_return Result<void>{}; // one is under way
    }
    static_cast<void>(co_await environment_.shutdown->await_quiesced());
    environment_.shutdown->answered(); // the answer is the end of the domain
    co_return Result<void>{};
}

io::Task<Result<void>> Control::take_key() {
    std::array<char, 8> text;
    std::string_view key;
    auto confirmed = co_await confirm(sysrq_path, text, key, [](std::string_view) { return true; });
    if (!confirmed && confirmed.error().code != Code::exhausted) {
        co_return confirmed.error();
    }
    if (!confirmed || *confirmed != Confirmed::yes) {
        co_return Result<void>{};
    }
    if (key == "c") {
        panic("xen_control: the toolstack requests a crash (sysrq c)");
    }
    log::warning("xen_control: sysrq '{}': this kernel knows c, which crashes it", key);
    co_return Result<void>{};
}

io::Task<Result<void>> probe(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice&) {
    auto* control = new (std::nothrow) Control(environment, xen); // lives until machine shutdown
    if (control == nullptr) {
        co_return Error{Code::exhausted, "no memory for the control device"};
    }
    auto connected = co_await control->connect();
    if (!connected) {
        delete control;
    }
    co_return connected;
}

} // namespace fl::drivers::xen_control
