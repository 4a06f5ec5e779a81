module io.net.interface;
import core.std;
import core.result;
import core.time;
import io.executor;
import io.net;
import io.net.datagram_queue;
import io.net.udp;
import io.random;

namespace fl::io::net {

namespace {
constexpr u16 first_free_port = 49152; // [rfc6335 §6]
} // namespace

UdpSocket* Interface::find_socket(u16 port) const {
    for (UdpSocket* socket = sockets_; socket != nullptr; socket = socket->next_) {
        if (socket->port_ == port) {
            return socket;
        }
    }
    return nullptr;
}

Result<void> UdpSocket::bind(u16 port) {
    unbind();
    constexpr u32 ports = 0x10000 - first_free_port;
    for (u32 i = 0, first = static_cast<u32>(interface_.random_.below(ports)); port == 0 && i < ports; ++i) {
        const u16 free = static_cast<u16>(first_free_port + (first + i) % ports);
        port = interface_.find_socket(free) == nullptr ? free : u16{0};
    }
    if (port == 0 || interface_.find_socket(port) != nullptr) {
        return Error{Code::busy, "another socket has this UDP port"};
    }
    port_ = port;
    next_ = interface_.sockets_;
    interface_.sockets_ = this;
    return {};
}

void UdpSocket::unbind() {
    for (UdpSocket** at = &interface_.sockets_; *at != nullptr; at = &(*at)->next_) {
        if (*at == this) {
            *at = next_;
            break;
        }
    }
    port_ = 0;
}

bool UdpSocket::deliver(const Endpoint& from, std::span<const std::byte> data) {
    if (receiver_ == nullptr) {
        const bool room = queue_.push(from, data);
        counters_.overflowed += room ? 0 : 1;
        return room;
    }
    std::ranges::copy(data.first(std::min(data.size(), receiver_->buffer_.size())), receiver_->buffer_.begin());
    receiver_->end(Datagram{from, static_cast<u32>(data.size())});
    return true;
}

void UdpSocket::fail(const Error& error) {
    ++counters_.errors;
    if (receiver_ != nullptr) {
        receiver_->end(error);
    } else {
        error_ = error;
    }
}

bool UdpSocket::Receive::await_ready() {
    if (socket_.receiver_ != nullptr) {
        result_.emplace(Error{Code::busy, "another coroutine receives from this socket"});
    } else if (socket_.error_) {
        result_.emplace(*std::exchange(socket_.error_, std::nullopt));
    } else if (!socket_.queue_.empty()) {
        const auto oldest = socket_.queue_.pop(buffer_);
        result_.emplace(Datagram{oldest.from, oldest.size});
    } else if (!socket_.interface_.device_.is_open()) {
        result_.emplace(to_error(SendStatus::device_gone));
    }
    return result_.has_value();
}

void UdpSocket::Receive::await_suspend(std::coroutine_handle<> h) {
    waiter = h;
    socket_.receiver_ = this;
    Executor& executor = socket_.interface_.executor();
    Bound(executor, bound_).apply_to(*this);
    executor.start(*this);
}

void UdpSocket::Receive::end(const Result<Datagram>& result) {
    withdraw();
    result_.emplace(result);
    socket_.interface_.executor().make_ready(*this);
}

void UdpSocket::Receive::withdraw() {
    socket_.interface_.executor().cancel(*this);
    if (socket_.receiver_ == this) {
        socket_.receiver_ = nullptr;
    }
}

Result<UdpSocket::Datagram> UdpSocket::Receive::await_resume() {
    withdraw();
    if (!result_) { // resumed by the timer
        return Error{Code::timed_out, "no datagram was received within the bound"};
    }
    if (*result_) {
        ++socket_.counters_.received;
        socket_.counters_.truncated += (*result_)->size > buffer_.size() ? 1 : 0;
    }
    return *result_;
}

} // namespace fl::io::net
