// Turns the run-time choice of a backend into statically typed code, once. Generic over the list of backends, so that
// tests can supply their own; the kernel's list is hv.list.
//
//     hv::with_backend(hv::list, choice, environment, [&](auto& backend) {
//         …clock from backend.tsc_hz(), interrupts, executor…
//         hv::upgrade(hv::list, choice, environment, services, backend, [&](auto& final_backend) {
//             kernel_main(final_backend);
//         });
//     });
export module hv.visit;
import core.std;
import core.result;
import core.log;
import hv.backend;
import hv.bare;

export namespace fl::hv {

/// A closed list of backends. The last one is the fallback and must be Bare.
template <Backend... Bs>
struct BackendList {
    static constexpr usize size = sizeof...(Bs);
};

namespace visit_detail {

template <class B>
constexpr bool serves(VmGuest guest) {
    if constexpr (requires {
                      { B::serves(guest) } -> std::same_as<bool>;
                  }) {
        return B::serves(guest);
    } else {
        return B::guest == guest;
    }
}

// In static storage: instances may be large, the boot stack is small. At most two live at a time, and then one of them
// is Bare, so all others share their storage.
template <class List>
struct Storage;
template <class... Bs>
struct Storage<BackendList<Bs...>> {
    static constexpr usize size = std::max({std::same_as<Bs, Bare> ? usize{1} : sizeof(Bs)...});
    static constexpr usize alignment = std::max({std::same_as<Bs, Bare> ? usize{1} : alignof(Bs)...});
    alignas(alignment) static constinit inline std::array<std::byte, size> bytes{};
};
struct BareStorage {
    alignas(Bare) static constinit inline std::array<std::byte, sizeof(Bare)> bytes{};
};

// A backend constructed in `Place`.
template <class B, class Place>
struct Alive {
    B& backend = *std::construct_at(reinterpret_cast<B*>(Place::bytes.data()));
    Alive() = default;
    Alive(const Alive&) = delete;
    Alive& operator=(const Alive&) = delete;
    ~Alive() { std::destroy_at(&backend); }
};

inline void log_failure(std::string_view name, std::string_view what, const Error& error) {
    log::warning("backend {}: {} failed: {}: continuing as bare", name, what, error);
}

template <class Visitor>
auto visit_bare(Environment& environment, Visitor& visitor) {
    Alive<Bare, BareStorage> bare;
    if (auto done = bare.backend.install(environment); !done) {
        log::error("backend {}: {}", Bare::name, done.error());
    }
    return visitor(bare.backend);
}

// Installs the first backend that serves the choice and calls visitor(backend); if there is none or it fails, calls
// otherwise().
template <class Place, class Visitor, class Otherwise>
auto visit_first(BackendList<>, const Choice&, Environment&, Services*, Visitor&, Otherwise& otherwise) {
    return otherwise();
}
template <class Place, class B, class... Rest, class Visitor, class Otherwise>
auto visit_first(BackendList<B, Rest...>, const Choice& choice, Environment& environment, Services* services,
                 Visitor& visitor, Otherwise& otherwise) {
    if (!serves<B>(choice.guest)) {
        return visit_first<Place>(BackendList<Rest...>{}, choice, environment, services, visitor, otherwise);
    }
    if (!choice.overridden && !B::recognises(environment.sightings)) {
        return otherwise();
    }
    Alive<B, std::conditional_t<std::same_as<B, Bare>, BareStorage, Place>> alive;
    if (auto done = alive.backend.install(environment); !done) {
        log_failure(B::name, "install()", done.error());
        return otherwise();
    }
    if (services != nullptr) {
        if (auto done = alive.backend.start(*services); !done) {
            log_failure(B::name, "start()", done.error());
            return otherwise();
        }
    }
    return visitor(alive.backend);
}

} // namespace visit_detail

/// Constructs and installs the chosen backend and calls visitor(backend) exactly once; the backend lives until the
/// visitor returns. Uses Bare, on which the machine runs fully virtualised, for When::late, if the build does not
/// support the choice, or if install() fails (logged as a warning).
template <Backend... Bs, class Visitor>
auto with_backend(BackendList<Bs...> list, const Choice& choice, Environment& environment, Visitor&& visitor) {
    auto bare = [&] { return visit_detail::visit_bare(environment, visitor); };
    if (choice.when == When::late) {
        log::info("backend: bare at first, {} is started later", choice.guest);
        return bare();
    }
    return visit_detail::visit_first<visit_detail::Storage<BackendList<Bs...>>>(list, choice, environment, nullptr,
                                                                                visitor, bare);
}

/// Called at a fixed point of every boot: interrupts and the executor exist, no bus has been probed, no driver has
/// attached. Starts a backend that was installed at entry; installs and starts one whose choice is When::late. Then
/// calls next(backend) exactly once, with Bare if this fails.
template <Backend... Bs, Backend Current, class Next>
auto upgrade(BackendList<Bs...> list, const Choice& choice, Environment& environment, Services& services,
             Current& current, Next&& next) {
    if constexpr (std::same_as<Current, Bare>) {
        auto stay = [&] { return next(current); };
        if (choice.when == When::late && !visit_detail::serves<Bare>(choice.guest)) {
            return visit_detail::visit_first<visit_detail::Storage<BackendList<Bs...>>>(list, choice, environment,
                                                                                        &services, next, stay);
        }
        return stay();
    } else {
        if (auto done = current.start(services); !done) {
            visit_detail::log_failure(Current::name, "start()", done.error());
            return visit_detail::visit_bare(environment, next);
        }
        return next(current);
    }
}

} // namespace fl::hv
