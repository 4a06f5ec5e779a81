// A XenStore server that answers in pieces, late, wrongly or never, and writes anything into the page, while several
// coroutines read, list, write, watch and use transactions. Checked: while the server conforms, every request ends with
// what the server said, and every watch event reaches its watch; whatever it does, every request ends within its bound,
// the store closes at most once, and an event of a watch that was removed reaches nobody.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>
import core.std;
import core.result;
import core.text;
import core.dma;
import core.log;
import core.time;
import io.executor;
import io.task;
import io.block;
import hv.xen.events;
import hv.xen.store;

#include "fuzz/input.hpp"
#include "fuzz/log.hpp"
// Depends on the imports above.
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using fuzz::require;
namespace xen = hv::xen;
constexpr u32 port = 5;
constexpr u32 max_tasks = 6;
constexpr u32 max_watches = 4;
constexpr Nanoseconds bound = 600'000'000'000;

// Offsets in the page [xen-public io/xs_wire.h].
constexpr usize request_consumer = 2048, request_producer = 2052, response_consumer = 2056, response_producer = 2060;
constexpr u32 ring_bytes = 1024;

struct Header {
    u32 type, id, transaction, length;
};

/// What a conforming server answers to a read: it depends on the path alone.
struct Answer {
    std::string error; // empty: the value
    std::string value;
};
Answer answer_to(std::string_view path) {
    const u32 kind = path.empty() ? 0 : static_cast<u8>(path.back());
    switch (kind % 8) {
    case 0: return {"ENOENT", {}};
    case 1: return {"EACCES", {}};
    case 2: return {"EQUOTA", {}};
    default: return {{}, std::string(path.rbegin(), path.rend()) + std::string(kind * 3, 'v')};
    }
}

struct Machine {
    explicit Machine(fuzz::Input& in) : input(in) {
        hypercalls =
            xen::Hypercalls(xen::Gate{this, [](void*, u32, u64, u64, u64, u64, u64) { return i64{0}; }, nullptr});
        events.install(hypercalls, *shared);
        require(static_cast<bool>(events.join(0, 0, *own, 0, 0))); // accepted where it is
        for (const usize offset : {request_consumer, request_producer, response_consumer, response_producer}) {
            word(offset) = 0xfffffe00; // free-running: soon past 0
        }
        store.install(page.get(), xen::Port{port});
        require(static_cast<bool>(store.start(executor, events)));
        // A turn in which nothing happens sleeps until the next tick: all turns together take less than this.
        store.set_timeout(bound);
        for (Watch& watch : watches) {
            watch.owner = this;
            watch.entry.context = &watch;
            watch.entry.changed = [](void* self) {
                auto& one = *static_cast<Watch*>(self);
                require(one.state != State::none);
                ++one.seen;
            };
        }
    }
    u32& word(usize offset) { return *reinterpret_cast<u32*>(page.get() + offset); }

    // ---- what the guest asks ----
    static io::Task<Result<void>> read(Machine& m, std::string path, bool list) {
        std::array<char, 200> into;
        const auto got = list ? co_await m.store.directory(path, into) : co_await m.store.read(path, into);
        if (!m.damaged) {
            const Answer right = answer_to(path);
            if (!right.error.empty()) {
                require(!got && (right.error != "ENOENT" || got.error().code == Code::not_found));
            } else if (right.value.size() > into.size()) {
                require(!got && got.error().code == Code::exhausted);
            } else {
                require(got && *got == right.value);
            }
        }
        co_return Result<void>{};
    }
    static io::Task<Result<void>> write(Machine& m, std::string path, std::string value) {
        const auto done = co_await m.store.write(path, value);
        require(m.damaged || static_cast<bool>(done) == (path.size() + 1 + value.size() <= 4096));
        co_return Result<void>{};
    }
    static io::Task<Result<void>> transact(Machine& m, u32 entries) {
        std::array<xen::StoreEntry, 4> all;
        for (u32 i = 0; i < entries; ++i) {
            print(all[i].key, "key-{}", i);
            print(all[i].value, "{}", i * 7);
        }
        const auto done = co_await m.store.write_all("device/vbd/1", std::span(all).first(entries));
        require(m.damaged || static_cast<bool>(done) || done.error().code == Code::busy ||
                done.error().code == Code::timed_out);
        co_return Result<void>{};
    }
    enum class State { none, adding, added, removing };
    struct Watch {
        Machine* owner = nullptr;
        xen::Watch entry;
        State state = State::none;
        u32 seen = 0;
    };
    static io::Task<Result<void>> add(Machine& m, Watch& watch) {
        const auto done = co_await m.store.watch(watch.entry);
        require(done || m.damaged);
        watch.state = done ? State::added : State::none;
        co_return Result<void>{};
    }
    static io::Task<Result<void>> remove(Machine& m, Watch& watch) {
        const auto done = co_await m.store.unwatch(watch.entry);
        require(done || m.damaged);
        watch.state = State::none;
        co_return Result<void>{};
    }
    void ask(u8 how) {
        if (group.running() >= max_tasks) {
            return;
        }
        std::string path = "device/" + std::to_string(input.byte());
        Result<void> begun;
        switch (how % 6) {
        case 0: begun = group.spawn(read(*this, path, false)); break;
        case 1: begun = group.spawn(read(*this, path, true)); break;
        case 2: begun = group.spawn(write(*this, path, std::string(input.word() % 4200, 'w'))); break;
        case 3: begun = group.spawn(transact(*this, 1 + input.byte() % 4)); break;
        default: {
            Watch& watch = watches[input.byte() % max_watches];
            if (watch.state == State::none) {
                watch.state = State::adding;
                watch.entry.path = xen::StorePath(path);
                begun = group.spawn(add(*this, watch));
            } else if (watch.state == State::added) {
                watch.state = State::removing;
                begun = group.spawn(remove(*this, watch));
            }
        }
        }
        require(static_cast<bool>(begun));
    }

    static io::Task<Result<void>> sleep(io::Executor& executor, Nanoseconds length) {
        co_await executor.sleep(length);
        co_return Result<void>{};
    }

    // ---- a server that conforms ----
    u32 piece() { return input.empty() ? ring_bytes : 1 + input.word() % ring_bytes; }
    void take() {
        const u32 produced = word(request_producer);
        u32& consumed = word(request_consumer);
        if (produced - consumed > ring_bytes) {
            require(damaged);
            return;
        }
        for (u32 most = piece(); consumed != produced && most != 0; --most) {
            asked.push_back(static_cast<char>(page[consumed++ % ring_bytes]));
        }
        while (asked.size() >= sizeof(Header)) {
            Header header;
            std::memcpy(&header, asked.data(), sizeof header);
            require(damaged || header.length <= 4096);
            if (header.length > 4096 || asked.size() < sizeof header + header.length) {
                break;
            }
            reply(header, asked.substr(sizeof header, header.length));
            asked.erase(0, sizeof header + header.length);
        }
        raise();
    }
    void reply(const Header& header, const std::string& payload) {
        const std::string path(payload.c_str());
        const auto say = [&](u32 type, const std::string& text) {
            queue_message({type, header.id, header.transaction, static_cast<u32>(text.size())}, text);
        };
        const std::string ok("OK\0", 3);
        switch (header.type) {
        case 1:   // directory
        case 2: { // read
            const Answer answer = answer_to(path);
            say(answer.error.empty() ? header.type : 16, answer.error.empty() ? answer.value : answer.error + '\0');
            break;
        }
        case 4: // watch: answered, and it fires once
            tokens.push_back(payload);
            say(4, ok);
            fire(payload);
            break;
        case 5: // unwatch
            std::erase(tokens, payload);
            say(5, ok);
            break;
        case 6: say(6, std::string("17\0", 3)); break; // transaction start
        case 7:
            if (!input.empty() && input.byte() % 4 == 0) {
                say(16, std::string("EAGAIN\0", 7));
            } else {
                say(7, ok);
            }
            break;
        case 11: say(11, ok); break;
        case 13: say(13, ok); break;
        default: require(damaged);
        }
    }
    void fire(const std::string& path_and_token) {
        queue_message({15, 0, 0, static_cast<u32>(path_and_token.size())}, path_and_token);
    }
    void queue_message(const Header& header, const std::string& text) {
        saying.append(reinterpret_cast<const char*>(&header), sizeof header);
        saying += text;
    }
    /// As much of what is to be said as the input wants, and as there is room for.
    void say() {
        u32& produced = word(response_producer);
        const u32 used = produced - word(response_consumer);
        if (used > ring_bytes) {
            require(damaged);
            return;
        }
        usize count = std::min<usize>({saying.size(), ring_bytes - used, piece()});
        for (usize i = 0; i < count; ++i) {
            page[produced++ % ring_bytes + 1024] = static_cast<std::byte>(saying[i]);
        }
        saying.erase(0, count);
        raise();
    }
    void raise() {
        if ((std::atomic_ref<u64>(shared->mask[0]).load() >> port & 1) != 0) {
            std::atomic_ref<u64>(shared->pending[0]).fetch_or(u64{1} << port);
            return;
        }
        std::atomic_ref<u64>(shared->pending[0]).fetch_or(u64{1} << port);
        shared->vcpu[0].pending_selector |= 1;
        shared->vcpu[0].upcall_pending = 1;
        xen::Events::upcall(&events);
    }

    // ---- one that does not ----
    void harm(u8 how) {
        damaged = true;
        switch (how % 7) {
        case 0: word(response_producer) += input.word(); break;
        case 1: word(request_consumer) += input.word(); break;
        case 2: page[input.word() % 4096] = std::byte{input.byte()}; break;
        case 3: { // a message of any kind, with any bytes
            const u32 type = input.byte() % 18, id = input.byte() % 4 == 0 ? input.word() : input.byte();
            const auto bytes = input.take(input.byte());
            queue_message({type, id, input.byte() % 2 == 0 ? 0u : input.word(),
                           input.byte() % 8 == 0 ? input.word() : static_cast<u32>(bytes.size())},
                          std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
            break;
        }
        case 4: saying.erase(0, input.byte()); break; // something is not said
        case 5:
            if (!saying.empty()) {
                saying[input.word() % saying.size()] = static_cast<char>(input.byte());
            }
            break;
        case 6: silent = true; break;
        }
        raise();
    }

    void run() {
        for (u32 steps = 0; steps < 2000 && !input.empty(); ++steps) {
            const u8 op = input.byte();
            switch (op % 12) {
            case 0:
            case 1:
            case 2: ask(op / 12); break;
            case 3:
            case 4:
                if (!silent) {
                    take();
                }
                break;
            case 5:
            case 6: say(); break;
            case 7:
                if (!tokens.empty()) {
                    fire(tokens[input.byte() % tokens.size()]);
                }
                break;
            case 8:
                if (op / 12 >= 12) {
                    harm(input.byte());
                }
                break;
            default: executor.turn(); break;
            }
            require(log.count("XenStore is closed") <= (damaged ? 1u : 0u));
        }
        // The server answers what is left. A request that never gets an answer meets its bound, which counts time in
        // which the machine ran: it sleeps here.
        for (u32 rounds = 0; rounds < 2'000 && group.running() != 0; ++rounds) {
            if (!silent) {
                take();
                say();
            }
            require(static_cast<bool>(executor.run(sleep(executor, damaged ? bound / 10 : 1'000'000))));
        }
        require(group.running() == 0);
        require(log.count("XenStore is closed") <= 1);
    }

    fuzz::Input& input;
    fuzz::Log log;
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    std::unique_ptr<std::byte[]> page = std::make_unique<std::byte[]>(4096);
    std::unique_ptr<xen::SharedInfo> shared = std::make_unique<xen::SharedInfo>();
    std::unique_ptr<xen::SharedWithVcpu> own = std::make_unique<xen::SharedWithVcpu>();
    xen::Hypercalls hypercalls;
    xen::Events events;
    xen::Store store;
    std::array<Watch, max_watches> watches;
    std::string asked;  // taken from the request ring, not answered
    std::string saying; // not in the response ring yet
    std::vector<std::string> tokens;
    bool damaged = false, silent = false;
    io::TaskGroup group{executor};
};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    Machine(input).run();
    return 0;
}
