// The entry points: three for any thread, which fill the inbox, and those for the polling thread.
module host.vmbus;
import host.std;
import host.channel;
import host.messages;
import host.state;

namespace fl::host {
namespace {
constexpr usize inbox_limit = 1024;
}

struct Server::State : ServerState {
    using ServerState::ServerState;
};

Server::Server(GuestMemory& memory, Delivery& delivery, Log& log, const ServerConfig& config)
    : state_(new State(memory, delivery, log, config)) {}
Server::~Server() = default;

void Server::add_device(std::unique_ptr<Device> device) {
    auto attached = std::make_unique<Attached>();
    attached->offer = device->offer();
    attached->device = std::move(device);
    attached->device->attached(*state_);
    state_->devices_.push_back(std::move(attached));
    state_->offer_device(*state_->devices_.back());
}

void Server::remove(Device& device) { state_->rescind(device); }

HvStatus Server::on_message(u32 connection, u32 type, std::span<const std::byte> payload) {
    state_->messages_in_.fetch_add(1, std::memory_order_relaxed);
    if (connection != 1 && connection != 4) {
        return HvStatus::invalid_connection;
    }
    if (payload.size() > message_bytes) {
        return HvStatus::invalid_parameter;
    }
    while (state_->lock_.test_and_set(std::memory_order_acquire)) { // the other side holds it only for a swap or a copy
    }
    const bool room = state_->posted_.size() < inbox_limit;
    if (room) {
        state_->posted_.push_back({connection, type, InMessage(payload)});
    }
    state_->lock_.clear(std::memory_order_release); // pairs with the test_and_set() in take_messages()
    return room ? HvStatus::success : HvStatus::insufficient_buffers;
}

HvStatus Server::on_signal(u32 connection, u16 flag) {
    state_->signals_in_.fetch_add(1, std::memory_order_relaxed);
    if (flag != 0) {
        return HvStatus::invalid_parameter; // each connection has one flag
    }
    if (connection == event_connection) {
        state_->shared_signal_.store(true, std::memory_order_release); // pairs with the exchange in poll()
        return HvStatus::success;
    }
    const u32 relid = connection ^ u32 { vmbus_sint } << 12;
    if (relid >= relids) {
        return HvStatus::invalid_connection;
    }
    const u64 bit = u64{1} << relid % 64;
    // Acquire: the offer is visible before its use. Pairs with the release in new_offer().
    if ((state_->live_[relid / 64].load(std::memory_order_acquire) & bit) == 0) {
        return HvStatus::invalid_connection;
    }
    state_->signalled_[relid / 64].fetch_or(bit, std::memory_order_release);
    // pairs with the exchange in take_signals()
    state_->signalled_words_.fetch_or(u32{1} << relid / 64, std::memory_order_release);
    return HvStatus::success;
}

void Server::on_end_of_message(u32, u8) { state_->freed_.store(true, std::memory_order_relaxed); }

bool Server::poll(u64 now) { return state_->poll(now); }
u64 Server::deadline() const { return state_->deadline(); }

void Server::reset() {
    while (state_->lock_.test_and_set(std::memory_order_acquire)) { // the other side holds it only for a copy
    }
    state_->posted_.clear();
    state_->lock_.clear(std::memory_order_release); // pairs with the test_and_set() in on_message()
    state_->disconnect();
    state_->unloaded_ = false;
    state_->sweep();
}

const Counters& Server::counters() const {
    state_->counters_.messages_in = state_->messages_in_.load(std::memory_order_relaxed);
    state_->counters_.signals_in = state_->signals_in_.load(std::memory_order_relaxed);
    state_->counters_.faults = state_->faults_.injected();
    return state_->counters_;
}
u32 Server::negotiated_version() const { return state_->version_; }
bool Server::unloaded() const { return state_->unloaded_; }
u32 Server::faults_injected() const { return state_->faults_.injected(); }

} // namespace fl::host
