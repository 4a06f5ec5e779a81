module drivers.table;
import core.std;
import core.result;
import core.text;
import core.log;
import core.cmdline;
import core.suggest;
import hv.backend;

namespace fl::drivers {

namespace {

constexpr std::array<std::string_view, 3> verbs{"add", "remove", "rank"};
enum Verb : int { add, remove, rank };
constexpr i32 highest_rank = 1'000'000;

template <usize N>
void write_list(FixedText<N>& out, std::span<const std::string_view> names) {
    for (usize i = 0; i < names.size(); ++i) {
        print(out, "{}{}", i == 0 ? "" : ", ", names[i]);
    }
}

// The names of the native or of the synthetic drivers: for error messages and suggestions.
struct Names {
    std::array<std::string_view, Plan::max_drivers> list{};
    usize count = 0;
    Names(std::span<const DriverInfo> drivers, bool synthetic) {
        for (const DriverInfo& d : drivers) {
            if (d.synthetic == synthetic && count < list.size()) {
                list[count++] = d.name;
            }
        }
    }
    constexpr std::span<const std::string_view> all() const { return {list.data(), count}; }
};

// "expected WHAT (A, B), seen 'x': did you mean 'A'?"
FixedText<160> expected_one_of(std::string_view what, std::span<const std::string_view> valid,
                               std::optional<std::string_view> seen) {
    FixedText<160> text;
    print(text, "expected {}", what);
    if (!valid.empty() && valid.size() <= 6) {
        text.write(" (");
        write_list(text, valid);
        text.write(")");
    }
    if (!seen) {
        text.write(", seen the end of the line");
        return text;
    }
    print(text, ", seen '{}'", shown(*seen));
    if (const std::string_view near = suggest(*seen, valid); !near.empty()) {
        print(text, ": did you mean '{}'?", near);
    }
    return text;
}

// Splits words at blanks (files) or commas (command line).
class Splitter {
  public:
    Splitter(std::string_view text, bool commas) : rest_(text), commas_(commas) {}
    std::optional<std::string_view> next() {
        if (commas_) {
            if (done_) {
                return std::nullopt;
            }
            const usize at = rest_.find(',');
            const std::string_view word = rest_.substr(0, at);
            done_ = at == std::string_view::npos;
            rest_ = done_ ? std::string_view{} : rest_.substr(at + 1);
            return word;
        }
        CmdlineWords words(rest_);
        const auto word = words.next();
        if (!word) {
            return std::nullopt;
        }
        rest_.remove_prefix(static_cast<usize>(word->text.data() - rest_.data()) + word->text.size());
        return word->text;
    }

  private:
    std::string_view rest_;
    bool commas_;
    bool done_ = false;
};

std::optional<i32> parse_rank(std::string_view text) {
    const bool negative = !text.empty() && text.front() == '-';
    if (!text.empty() && (text.front() == '-' || text.front() == '+')) {
        text.remove_prefix(1);
    }
    const auto number = parse_number(text);
    if (!number || *number > static_cast<u64>(highest_rank)) {
        return std::nullopt;
    }
    return negative ? -static_cast<i32>(*number) : static_cast<i32>(*number);
}

bool same_pair(const Rule& a, const Rule& b) { return a.native == b.native && a.synthetic == b.synthetic; }

} // namespace

u32 Table::apply(std::string_view file) {
    u32 bad = 0;
    u32 line = 0;
    while (!file.empty()) {
        ++line;
        const usize end = file.find('\n');
        std::string_view text = file.substr(0, end);
        file.remove_prefix(end == std::string_view::npos ? file.size() : end + 1);
        text = text.substr(0, text.find('#'));
        if (CmdlineWords(text).next() && !apply_line(text, false, line)) {
            ++bad;
        }
    }
    return bad;
}

bool Table::refuse(u32 line, std::string_view message) {
    if (wrong_ < max_diagnostics) {
        diagnostics_[wrong_] = {line, FixedText<160>(message)};
    }
    ++wrong_;
    wrong_word_ = wrong_word_ || line == 0;
    return false;
}

bool Table::apply_word(std::string_view rule) { return apply_line(rule, true, 0); }

bool Table::apply_line(std::string_view text, bool commas, u32 line) {
    const auto refuse = [&](const FixedText<160>& message) { return this->refuse(line, message.view()); };
    Splitter words(text, commas);
    const std::optional<std::string_view> verb_word = words.next();
    const auto verb = static_cast<int>(std::ranges::find(verbs, verb_word.value_or("")) - verbs.begin());
    if (verb == static_cast<int>(verbs.size())) {
        return refuse(expected_one_of("what to do", verbs, verb_word));
    }
    Rule rule;
    const std::optional<std::string_view> guest = words.next();
    if (guest != std::optional<std::string_view>("*")) {
        rule.guest = hv::vm_guest_named(guest.value_or(""));
        if (!rule.guest) {
            return refuse(expected_one_of("a hypervisor's name or *", hv::vm_guest_names, guest));
        }
    }
    for (const bool synthetic : {false, true}) {
        const std::optional<std::string_view> word = words.next();
        const DriverInfo* driver = driver_named(word.value_or(""), drivers_);
        const std::string_view what = synthetic ? "a synthetic driver" : "a native driver";
        if (driver == nullptr || driver->synthetic != synthetic) {
            const Names names(drivers_, synthetic);
            return refuse(expected_one_of(what, names.all(), word));
        }
        (synthetic ? rule.synthetic : rule.native) = driver;
    }
    if (rule.native->kind != rule.synthetic->kind) {
        FixedText<160> message;
        print(message, "expected two drivers of one class of devices, seen '{}' (class {}) and '{}' (class {})",
              rule.native->name, name(rule.native->kind), rule.synthetic->name, name(rule.synthetic->kind));
        return refuse(message);
    }
    if (verb != Verb::remove) {
        const std::optional<std::string_view> word = words.next();
        const auto number = parse_rank(word.value_or(""));
        if (!number) {
            return refuse(expected_one_of("a rank from -1000000 to 1000000", {}, word));
        }
        rule.rank = *number;
    }
    std::optional<std::string_view> word = words.next();
    if (verb == Verb::add && word) {
        const auto twin = static_cast<usize>(std::ranges::find(twin_names, *word) - twin_names.begin());
        if (twin == twin_names.size()) {
            return refuse(expected_one_of("what becomes of the emulated twin", twin_names, word));
        }
        rule.twin = static_cast<Twin>(twin);
        if (rule.twin == Twin::unplug && rule.rank <= 0) {
            return refuse(FixedText<160>("expected a positive rank with unplug: it takes the native driver's device "
                                         "away, which would be tried first"));
        }
        word = words.next();
    }
    if (word) {
        return refuse(expected_one_of("the end of the rule", {}, word));
    }
    return change(rule, verb, line);
}

bool Table::change(const Rule& rule, int verb, u32 line) {
    const auto refuse = [&](std::string_view message) { return this->refuse(line, message); };
    // When re-ranking or removing, `*` matches every rule of the pair; when adding, it is a separate rule, overridden
    // by a rule for a specific hypervisor.
    bool hit = false;
    for (u32 i = 0; i < rule_count_;) {
        Rule& have = rules_[i];
        if (!same_pair(have, rule) || (have.guest != rule.guest && (verb == Verb::add || rule.guest))) {
            ++i;
            continue;
        }
        hit = true;
        if (verb == Verb::remove) {
            std::copy(rules_.begin() + i + 1, rules_.begin() + rule_count_, rules_.begin() + i);
            --rule_count_;
            continue;
        }
        have.rank = rule.rank;
        if (verb == Verb::add) {
            have.twin = rule.twin;
        }
        ++i;
    }
    if (verb != Verb::add) {
        return hit || refuse("expected a rule that is in the table, seen a pair for which it has none: add it, or name "
                             "the hypervisor as its rule does");
    }
    if (!hit) {
        if (rule_count_ == max_rules) {
            ++rules_dropped_;
            return refuse("the table is full: remove rules that are not needed");
        }
        rules_[rule_count_++] = rule;
    }
    return true;
}

Plan Table::plan(hv::VmGuest guest, std::optional<Twin> emulated) const {
    Plan plan;
    plan.known = drivers_;
    const usize count = std::min(drivers_.size(), Plan::max_drivers);
    plan.drivers_dropped = static_cast<u32>(drivers_.size() - count);
    // The rules that count, strongest first. Insertion sort: stable, and the list is short.
    std::array<const Rule*, Plan::max_pairs> chosen{};
    const auto strength = [](const Rule& r) { return r.rank < 0 ? -r.rank : r.rank; };
    u32 chosen_count = 0;
    for (const Rule& rule : rules()) {
        const bool named = rule.guest == guest;
        if (!named && rule.guest) {
            continue;
        }
        const bool beaten = !named && std::ranges::any_of(rules(), [&](const Rule& r) {
            return r.guest == guest && same_pair(r, rule);
        });
        if (beaten) {
            continue;
        }
        u32 at = chosen_count++;
        for (; at > 0 && strength(*chosen[at - 1]) < strength(rule); --at) {
            chosen[at] = chosen[at - 1];
        }
        chosen[at] = &rule;
    }
    for (const Rule* rule : std::span(chosen).first(chosen_count)) {
        plan.pairs[plan.pair_count++] = {rule->native->name, rule->synthetic->name, rule->rank,
                                         rule->synthetic->twins ? emulated.value_or(rule->twin) : Twin::keep};
    }
    // Each pair with a rank orders two drivers. Place drivers one by one: the first (in the order of the table's
    // drivers) that no unplaced one must precede. If there is none, the rules are cyclic, and the pair of the smallest
    // |rank| is dropped.
    std::array<bool, Plan::max_drivers> placed{};
    u32 usable = chosen_count;
    const auto index = [&](const DriverInfo* driver) { return static_cast<usize>(driver - drivers_.data()); };
    while (plan.driver_count < count) {
        usize pick = count;
        for (usize i = 0; i < count && pick == count; ++i) {
            if (placed[i]) {
                continue;
            }
            const bool blocked = std::ranges::any_of(std::span(chosen).first(usable), [&](const Rule* rule) {
                const usize first = index(rule->rank > 0 ? rule->synthetic : rule->native);
                const usize second = index(rule->rank > 0 ? rule->native : rule->synthetic);
                // A driver without room must not block others.
                return rule->rank != 0 && second == i && first < count && !placed[first];
            });
            if (!blocked) {
                pick = i;
            }
        }
        if (pick == count) {
            --usable; // sorted: the last one has the smallest |rank|
            plan.conflicting = true;
            continue;
        }
        placed[pick] = true;
        plan.order[plan.driver_count++] = drivers_[pick].name;
    }
    return plan;
}

const Plan::Pair* Plan::pair(std::string_view a, std::string_view b) const {
    for (const Pair& p : all_pairs()) {
        if ((p.native == a && p.synthetic == b) || (p.native == b && p.synthetic == a)) {
            return &p;
        }
    }
    return nullptr;
}

bool Plan::has_twins(std::string_view native) const {
    return std::ranges::any_of(all_pairs(), [&](const Pair& p) {
        const DriverInfo* synthetic = driver(p.synthetic);
        return p.native == native && synthetic != nullptr && synthetic->twins;
    });
}

bool Plan::pairs_with_twins(std::string_view name) const {
    return std::ranges::any_of(all_pairs(), [&](const Pair& p) {
        const DriverInfo* synthetic = driver(p.synthetic);
        return (p.native == name || p.synthetic == name) && synthetic != nullptr && synthetic->twins;
    });
}

bool Plan::both(std::string_view a, std::string_view b) const {
    const Pair* p = pair(a, b);
    return p != nullptr && (p->rank == 0 || p->twin == Twin::keep);
}

hv::EmulatedClasses Plan::unplugs() const {
    hv::EmulatedClasses classes;
    hv::EmulatedClasses kept; // a class that a native driver is to use first must stay
    for (const Pair& p : all_pairs()) {
        const DriverInfo* native = driver(p.native);
        const DriverInfo* synthetic = driver(p.synthetic);
        if (native == nullptr || synthetic == nullptr || !synthetic->twins) {
            continue;
        }
        if (p.rank < 0) {
            kept |= native->emulated;
        } else if (p.rank > 0 && p.twin == Twin::unplug) {
            classes |= native->emulated;
        }
    }
    return {
        .disks = classes.disks && !kept.disks, .nics = classes.nics && !kept.nics, .nvme = classes.nvme && !kept.nvme};
}

void log_plan(const Plan& plan, hv::VmGuest guest) {
    FixedText<512> order; // fits Plan::max_drivers names
    write_list(order, plan.drivers());
    log::info("drivers on {}: {}", guest, order);
    for (const Plan::Pair& p : plan.all_pairs()) {
        if (const DriverInfo* synthetic = plan.driver(p.synthetic); synthetic != nullptr && !synthetic->twins) {
            continue;
        }
        log::info("drivers: {} and {}, rank {}, twin: {}", p.synthetic, p.native, p.rank,
                  p.rank == 0 ? "keep" : name(p.twin));
    }
    if (plan.conflicting) {
        log::warning(
            "drivers: the rules contradict each other: those with the weakest ranks do not count for the order");
    }
}

} // namespace fl::drivers
