module boot.nets;
import core.std;
import core.result;
import core.text;
import core.log;
import io.block;
import io.net;

namespace fl::boot {

Result<void> Nets::takes(const io::NetDevice& card) const {
    if (const io::NetDevice* other = find(card.identity().name.view());
        other != nullptr && other != &card && other->is_open()) {
        return Error{Code::busy, "a network card of this name is attached already"};
    }
    if (count_ == capacity && !has(card)) {
        return Error{Code::exhausted, "more network cards than boot::Nets has room for", capacity, capacity + 1};
    }
    return {};
}

void Nets::add(io::NetDevice& card) {
    if (!has(card)) {
        cards_[count_++] = &card;
    }
    report(card);
}

io::NetDevice* Nets::find(std::string_view name) const {
    io::NetDevice* closed = nullptr;
    for (io::NetDevice* card : all()) {
        if (card->identity().name == name) {
            if (card->is_open()) {
                return card;
            }
            closed = card;
        }
    }
    return closed;
}

FixedText<16> Nets::free_name() const {
    for (u32 number = 0;; ++number) { // ends: there are finitely many cards
        FixedText<16> name;
        print(name, "eth{}", number);
        if (const io::NetDevice* card = find(name.view()); card == nullptr || !card->is_open()) {
            return name;
        }
    }
}

FixedText<256> Nets::names() const {
    FixedText<256> text;
    for (const io::NetDevice* card : all()) {
        print(text, "{}{}", text.empty() ? "" : ", ", card->identity().name.view());
    }
    if (text.empty()) {
        text.write("none");
    }
    return text;
}

void report(const io::NetDevice& card) {
    const auto& id = card.identity();
    FixedText<20> mac;
    for (usize i = 0; i < id.mac.bytes.size(); ++i) {
        print(mac, "{}{:02x}", i == 0 ? "" : ":", id.mac.bytes[i]);
    }
    log::info("{}: {} network card by {}, {}, MTU {}{} [{}] {}", id.name.view(), id.kind, id.driver, mac.view(), id.mtu,
              card.link_up() ? "" : ", no link", id.features.view(), id.model.view());
    log::Record record("net");
    record.text("name", id.name.view()).text("driver", id.driver).text("kind", name(id.kind));
    record.text("mac", mac.view()).number("mtu", id.mtu).text("model", id.model.view());
    record.open("features", '[');
    std::string_view rest = id.features.view();
    while (!rest.empty()) {
        const usize end = std::min(rest.find(' '), rest.size());
        if (end > 0) {
            record.text("", rest.substr(0, end));
        }
        rest.remove_prefix(std::min(end + 1, rest.size()));
    }
    record.close(']');
    record.number("queues", card.lanes());
}

} // namespace fl::boot
