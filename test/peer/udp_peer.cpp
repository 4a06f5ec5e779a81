// The other end of job=net's udp=send and udp=receive, for a Linux machine: sends or receives numbered datagrams
// (docs/INTERFACES.md, "Numbered datagrams") and prints what it has counted. Shares no code with the kernel.
//
//     firstlight-udp-peer receive PORT SECONDS
//     firstlight-udp-peer send ADDRESS PORT COUNT BYTES RATE
//
// receive: a receiver of one run; ends a second after the last announcement of its end. SECONDS: how long to wait for
// each datagram. send: COUNT datagrams of BYTES bytes, at most RATE per second; the first one is repeated for a minute
// while the host says that nobody has the port. Exit status 0: everything has arrived, once.
#include <arpa/inet.h>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <endian.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

namespace {

constexpr uint32_t magic = 0x464c5544;
enum Kind : uint32_t { data = 1, end = 2, report = 3 };
constexpr uint64_t most = 1 << 20;            // datagrams of a run
constexpr int buffer_bytes = 8 * 1024 * 1024; // of the socket: this program need not run while they arrive
constexpr int refused_tries = 300, refused_milliseconds = 200;
constexpr int report_tries = 10, report_milliseconds = 500, linger_milliseconds = 1000;

struct Header {
    uint32_t magic, kind;
    uint64_t run, number, total;
};
static_assert(sizeof(Header) == 32);

Header big_endian(Kind kind, uint64_t run, uint64_t number, uint64_t total) {
    return {htobe32(magic), htobe32(kind), htobe64(run), htobe64(number), htobe64(total)};
}

int fail(const char* what) {
    std::printf("udp peer: %s: %s\n", what, std::strerror(errno));
    return 1;
}

int open_socket() {
    const int s = socket(AF_INET, SOCK_DGRAM, 0);
    const bool sized = s >= 0 && setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &buffer_bytes, sizeof buffer_bytes) == 0 &&
                       setsockopt(s, SOL_SOCKET, SO_SNDBUFFORCE, &buffer_bytes, sizeof buffer_bytes) == 0;
    return sized ? s : -1;
}

bool readable(int s, int milliseconds) {
    pollfd wanted{s, POLLIN, 0};
    return poll(&wanted, 1, milliseconds) > 0;
}

// A whole header with our magic, in the machine's byte order; false: none within the time, or an ICMP error (errno).
bool take(int s, int milliseconds, Header& into, sockaddr_in& from) {
    static char datagram[65536];
    errno = 0;
    if (!readable(s, milliseconds)) {
        return false;
    }
    socklen_t size = sizeof from;
    const ssize_t got = recvfrom(s, datagram, sizeof datagram, 0, reinterpret_cast<sockaddr*>(&from), &size);
    if (got < static_cast<ssize_t>(sizeof into)) {
        return false;
    }
    std::memcpy(&into, datagram, sizeof into);
    into = {be32toh(into.magic), be32toh(into.kind), be64toh(into.run), be64toh(into.number), be64toh(into.total)};
    return into.magic == magic;
}

int receive(uint16_t port, int seconds) {
    static bool seen[most];
    const int s = open_socket();
    const sockaddr_in here{
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_ANY)}, .sin_zero = {}};
    if (s < 0 || bind(s, reinterpret_cast<const sockaddr*>(&here), sizeof here) != 0) {
        return fail("socket");
    }
    uint64_t run = 0, sent = 0, different = 0, duplicates = 0;
    bool begun = false, ended = false;
    Header header;
    sockaddr_in from{};
    for (;;) {
        if (!take(s, ended ? linger_milliseconds : seconds * 1000, header, from)) {
            break;
        }
        if ((begun && header.run != run) || header.number > most || header.kind == report) {
            continue;
        }
        begun = true;
        run = header.run;
        if (header.kind == data && header.number < most) {
            ++(seen[header.number] ? duplicates : different);
            seen[header.number] = true;
        } else if (header.kind == end) {
            ended = true;
            sent = header.number;
            const Header answer = big_endian(report, run, different, duplicates);
            sendto(s, &answer, sizeof answer, 0, reinterpret_cast<const sockaddr*>(&from), sizeof from);
        }
    }
    std::printf("udp peer: receive: %llu sent, %llu received, %llu duplicated%s\n",
                static_cast<unsigned long long>(sent), static_cast<unsigned long long>(different),
                static_cast<unsigned long long>(duplicates), ended ? "" : ", and no end");
    return ended && different == sent && duplicates == 0 ? 0 : 1;
}

// Of a time in which this machine did not run at most 10 ms are made up for: a network card's queue would not have room
// for all of it at once.
void limit_catch_up(timespec& due) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const long long late = (now.tv_sec - due.tv_sec) * 1'000'000'000LL + (now.tv_nsec - due.tv_nsec);
    if (late > 10'000'000) {
        const long long earliest = now.tv_sec * 1'000'000'000LL + now.tv_nsec - 10'000'000;
        due.tv_sec = earliest / 1'000'000'000;
        due.tv_nsec = earliest % 1'000'000'000;
    }
}

int send(const char* address, uint16_t port, uint64_t count, size_t bytes, long rate) {
    static char datagram[65536];
    const int s = open_socket();
    sockaddr_in there{.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {}, .sin_zero = {}};
    if (bytes < sizeof(Header) || bytes > 65507 || rate <= 0 || rate > 1'000'000 || count == 0 || count > most ||
        inet_pton(AF_INET, address, &there.sin_addr) != 1) {
        errno = EINVAL;
        return fail("arguments");
    }
    // Connected: then the system tells us of a port that nobody has.
    if (s < 0 || connect(s, reinterpret_cast<const sockaddr*>(&there), sizeof there) != 0) {
        return fail("socket");
    }
    timespec due;
    clock_gettime(CLOCK_MONOTONIC, &due);
    const uint64_t run = static_cast<uint64_t>(due.tv_nsec) << 20 ^ static_cast<uint64_t>(getpid());
    const auto put = [&](Kind kind, uint64_t number) {
        const Header header = big_endian(kind, run, number, count);
        std::memcpy(datagram, &header, sizeof header);
        return ::send(s, datagram, bytes, 0) == static_cast<ssize_t>(bytes);
    };
    Header header;
    sockaddr_in from{};
    int tries = 0;
    do {
        if (++tries > refused_tries) {
            return fail("nobody has the port");
        }
        errno = 0;
        if (put(data, 0)) {
            take(s, refused_milliseconds, header, from);
        }
        if (errno != 0) { // refused, or no neighbour yet
            usleep(refused_milliseconds * 1000);
        }
    } while (errno != 0);
    clock_gettime(CLOCK_MONOTONIC, &due);
    for (uint64_t i = 1; i < count; ++i) {
        if (!put(data, i)) {
            return fail("send");
        }
        due.tv_nsec += 1'000'000'000 / rate;
        due.tv_sec += due.tv_nsec / 1'000'000'000;
        due.tv_nsec %= 1'000'000'000;
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, nullptr);
        limit_catch_up(due);
    }
    for (tries = 0; tries < report_tries; ++tries) {
        put(end, count);
        if (take(s, report_milliseconds, header, from) && header.kind == report && header.run == run) {
            std::printf("udp peer: send: %llu sent, %llu received, %llu duplicated\n",
                        static_cast<unsigned long long>(count), static_cast<unsigned long long>(header.number),
                        static_cast<unsigned long long>(header.total));
            return header.number == count && header.total == 0 ? 0 : 1;
        }
    }
    return fail("the receiver did not answer with what it has counted");
}

} // namespace

int main(int count, char** words) {
    if (count == 4 && std::strcmp(words[1], "receive") == 0) {
        return receive(static_cast<uint16_t>(std::atoi(words[2])), std::atoi(words[3]));
    }
    if (count == 7 && std::strcmp(words[1], "send") == 0) {
        return send(words[2], static_cast<uint16_t>(std::atoi(words[3])), std::strtoull(words[4], nullptr, 10),
                    std::strtoull(words[5], nullptr, 10), std::atol(words[6]));
    }
    std::printf("udp peer: receive PORT SECONDS, or send ADDRESS PORT COUNT BYTES RATE\n");
    return 2;
}
