// The datagrams that arrived for a socket and were not received yet, oldest first, in memory of the socket's owner.
export module io.net.datagram_queue;
import core.std;
import io.net.ipv4;
import io.net.udp;
import io.net.wire;

export namespace fl::io::net {

class DatagramQueue {
  public:
    /// Bytes that each datagram takes in addition to its own.
    static constexpr usize overhead = 8;

    explicit DatagramQueue(std::span<std::byte> storage) : storage_(storage) {}

    bool empty() const { return used_ == 0; }
    /// False: there is no room for it.
    bool push(const Endpoint& from, std::span<const std::byte> data) {
        if (data.size() > 0xffff || overhead + data.size() > storage_.size() - used_) {
            return false;
        }
        std::array<std::byte, overhead> head{};
        put(std::span(head), Head{static_cast<u16>(data.size()), from.port, from.address});
        write(head);
        write(data);
        return true;
    }
    struct Datagram {
        Endpoint from;
        u32 size = 0; // what does not fit into `into` is lost
    };
    /// Takes the oldest one. Not if empty().
    Datagram pop(std::span<std::byte> into) {
        std::array<std::byte, overhead> bytes{};
        read(bytes);
        const auto head = take<Head>(bytes);
        const usize size = head.size;
        const usize copied = std::min(size, into.size());
        read(into.first(copied));
        skip(size - copied);
        return {{head.address, head.port}, static_cast<u32>(size)};
    }

  private:
    struct Head {
        Big16 size;
        Big16 port;
        Ipv4Address address;
    };
    static_assert(sizeof(Head) == overhead);
    void write(std::span<const std::byte> bytes) {
        const usize at = (first_ + used_) % storage_.size();
        const usize before_end = std::min(bytes.size(), storage_.size() - at);
        std::ranges::copy(bytes.first(before_end), storage_.begin() + static_cast<std::ptrdiff_t>(at));
        std::ranges::copy(bytes.subspan(before_end), storage_.begin());
        used_ += bytes.size();
    }
    void read(std::span<std::byte> into) {
        const usize before_end = std::min(into.size(), storage_.size() - first_);
        std::ranges::copy(storage_.subspan(first_, before_end), into.begin());
        std::ranges::copy(storage_.first(into.size() - before_end),
                          into.begin() + static_cast<std::ptrdiff_t>(before_end));
        skip(into.size());
    }
    void skip(usize size) {
        first_ = (first_ + size) % storage_.size();
        used_ -= size;
    }

    std::span<std::byte> storage_;
    usize first_ = 0;
    usize used_ = 0;
};

} // namespace fl::io::net
