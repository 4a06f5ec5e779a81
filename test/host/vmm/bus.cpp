module;
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>
module vmm.bus;
import host.std;
import core.result;
import host.platform;
import host.storvsp;
import host.vmbus;
import vmm.counters;
import vmm.image;
import vmm.kvm;
import vmm.machine;
import vmm.synic;

namespace fl::vmm {

bool ImageStore::read(u64 offset, std::span<std::byte> into) {
    std::memcpy(into.data(), image_.bytes().data() + offset, into.size());
    return true;
}

bool ImageStore::write(u64 offset, std::span<const std::byte> from) {
    std::memcpy(image_.bytes().data() + offset, from.data(), from.size());
    return true;
}

bool ImageStore::unmap(u64 offset, u64 length) {
    std::memset(image_.bytes().data() + offset, 0, static_cast<usize>(length));
    return true;
}

namespace {

host::GuestMemory regions_of(Machine& machine) {
    host::GuestMemory memory;
    memory.add(0, {machine.memory().data(), machine.memory().size()});
    return memory;
}

} // namespace

Bus::Bus(Machine& machine, const host::ServerConfig& config, std::function<void(std::string_view)> line,
         Serving serving)
    : machine_(machine), line_(std::move(line)), kind_(serving), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      signals_(serving != Serving::exits ? epoll_create1(EPOLL_CLOEXEC) : -1), memory_(regions_of(machine)),
      server_(memory_, *this, *this, config) {}

Bus::~Bus() = default;

void Bus::connect() {
    machine_.set_counters(&add_counters, this);
    machine_.set_partition(*this);
}

/// On a processor's thread, for a phase or at the end.
void Bus::add_counters(void* context, Snapshot& into) {
    Bus& self = *static_cast<Bus*>(context);
    // The I/O thread's turns are short. At the end it has stopped; if it has not, its counters are read all the same.
    bool locked = false;
    for (u32 tries = 0; self.kind_ == Serving::thread && !locked && tries < 1000; ++tries) {
        locked = self.serving_.try_lock();
        if (!locked) {
            usleep(1000);
        }
    }
    const host::Counters& counters = self.server_.counters();
    counters.each([&](const char* name, u64 value) { into[std::string("bus_") + name] = value; });
    if (locked) {
        self.serving_.unlock();
    }
}

/// Serving::thread: what a processor has put into the server's inbox is served by the I/O thread.
void Bus::leave_to_thread() {
    const u64 one = 1;
    [[maybe_unused]] const auto written = write(wake_.number(), &one, sizeof(one));
}

void Bus::on_woken() {
    u64 value = 0;
    [[maybe_unused]] const auto consumed = read(wake_.number(), &value, sizeof(value));
    if (!ending()) {
        serve(machine_.now());
    }
}

bool Bus::end(u32 seconds) {
    ending_.store(true, std::memory_order_release);
    leave_to_thread();
    for (u32 tries = 0; tries < seconds * 1000; ++tries) {
        if (ended_.load(std::memory_order_acquire)) {
            return true;
        }
        usleep(1000);
    }
    return false;
}

void Bus::serve(u64 now) {
    work_.store(true, std::memory_order_seq_cst);
    while (work_.load(std::memory_order_seq_cst) && serving_.try_lock()) {
        while (work_.exchange(false, std::memory_order_seq_cst)) {
            server_.poll(now);
        }
        serving_.unlock();
    }
}

void Bus::with_server(const std::function<void()>& work) {
    {
        const std::scoped_lock guard(serving_);
        work();
    }
    serve(machine_.now());
}

u64 Bus::deadline() {
    for (;;) {
        u64 next;
        {
            const std::scoped_lock guard(serving_);
            next = server_.deadline();
        }
        // otherwise a processor found the mutex taken and left its work to this thread
        if (!work_.load(std::memory_order_seq_cst)) {
            return next;
        }
        serve(machine_.now());
    }
}

u16 Bus::post_message(u32 connection, u32 type, std::span<const std::byte> payload) {
    const auto status = server_.on_message(connection, type, payload);
    if (kind_ == Serving::thread) {
        leave_to_thread();
        return to_underlying(status);
    }
    serve(Machine::coarse_now());
    return to_underlying(status);
}

/// Runs in the exit of the signalling processor: no other thread has to be woken, and replies that are possible at once
/// have been sent when the guest continues.
u16 Bus::signal_event(u32 connection, u16 flag) {
    const auto status = server_.on_signal(connection, flag);
    if (kind_ == Serving::thread) { // a connection without an eventfd
        leave_to_thread();
        return to_underlying(status);
    }
    serve(Machine::coarse_now());
    return to_underlying(status);
}

host::Delivery::Message Bus::post(u32 vp, u8 sint, u32 type, std::span<const std::byte> payload) {
    switch (machine_.synic().post(vp, sint, type, payload)) {
    case Synic::Posted::delivered: return Message::delivered;
    case Synic::Posted::busy: return Message::busy;
    case Synic::Posted::refused: break;
    }
    return Message::refused;
}

host::Delivery::Event Bus::set_event(u32 vp, u8 sint, u16 flag, bool always) {
    switch (machine_.synic().set_event(vp, sint, flag, always)) {
    case Synic::Flagged::raised: return Event::raised;
    case Synic::Flagged::pending: return Event::pending;
    case Synic::Flagged::refused: break;
    }
    return Event::refused;
}

/// Runs in the serving thread, under its mutex.
void Bus::connection(u32 id, bool exists) {
    if (kind_ == Serving::exits) {
        return;
    }
    if (exists) {
        auto signal = std::make_unique<Signal>(id, Descriptor{eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)});
        epoll_event event{.events = EPOLLIN, .data = {.ptr = signal.get()}};
        if (machine_.kvm().connect_signal(id, signal->event.number(), true)) {
            epoll_ctl(signals_.number(), EPOLL_CTL_ADD, signal->event.number(), &event);
            connections_.push_back(std::move(signal));
        }
        return;
    }
    std::erase_if(connections_, [&](const auto& signal) {
        if (signal->connection != id) {
            return false;
        }
        static_cast<void>(machine_.kvm().connect_signal(id, signal->event.number(), false));
        return true;
    });
}

void Bus::on_signals() {
    {
        const std::scoped_lock guard(serving_); // keeps connections_ unchanged
        std::array<epoll_event, 16> events;
        const int count = epoll_wait(signals_.number(), events.data(), static_cast<int>(events.size()), 0);
        for (int i = 0; i < count; ++i) {
            const auto* const signal = static_cast<const Signal*>(events[static_cast<usize>(i)].data.ptr);
            u64 value = 0;
            if (read(signal->event.number(), &value, sizeof(value)) == static_cast<ssize_t>(sizeof(value))) {
                server_.on_signal(signal->connection, 0);
            }
        }
    }
    serve(kind_ == Serving::thread ? machine_.now() : Machine::coarse_now());
}

void Bus::on_acknowledged() {
    machine_.synic().service(*this);
    serve(kind_ == Serving::thread ? machine_.now() : Machine::coarse_now());
}

} // namespace fl::vmm
