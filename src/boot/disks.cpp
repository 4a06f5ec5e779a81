module boot.disks;
import core.std;
import core.result;
import core.text;
import core.log;
import io.block;

namespace fl::boot {

Result<void> Disks::takes(const io::BlockDevice& disk) const {
    if (const io::BlockDevice* other = find(disk.identity().name.view());
        other != nullptr && other != &disk && !other->removed()) {
        return Error{Code::busy, "a disk of this name is attached already"};
    }
    if (count_ == capacity && !has(disk)) {
        return Error{Code::exhausted, "more disks than boot::Disks has room for", capacity, capacity + 1};
    }
    return {};
}

void Disks::add(io::BlockDevice& disk) {
    if (!has(disk)) {
        disks_[count_++] = &disk;
    }
    report(disk);
}

io::BlockDevice* Disks::find(std::string_view name) const {
    io::BlockDevice* removed = nullptr;
    for (io::BlockDevice* disk : all()) {
        if (disk->identity().name == name) {
            if (!disk->removed()) {
                return disk;
            }
            removed = disk;
        }
    }
    return removed;
}

FixedText<256> Disks::names() const {
    static constexpr usize max_listed = 24; // so that the names and the total fit into a verdict's reason
    FixedText<256> text;
    for (const io::BlockDevice* disk : all().first(std::min(count_, max_listed))) {
        print(text, "{}{}", text.empty() ? "" : ", ", disk->identity().name.view());
    }
    if (count_ > max_listed) {
        print(text, " and {} more", count_ - max_listed);
    }
    if (text.empty()) {
        text.write("none");
    }
    return text;
}

void report(const io::BlockDevice& disk) {
    const auto& id = disk.identity();
    const auto& g = disk.geometry();
    const ShownSize size = shown_size(g.sectors * g.sector_size);
    log::info("{}: {} disk by {}, {} {}, {}-byte sectors{}{} [{}] {}", id.name.view(), id.kind, id.driver, size.number,
              size.unit, g.sector_size, g.flush ? ", flush" : "", g.read_only ? ", read-only" : "", id.features.view(),
              id.model.view());
    log::Record record("disk");
    record.text("name", id.name.view()).text("driver", id.driver).text("kind", name(id.kind));
    record.number("sectors", g.sectors * (g.sector_size / 512)).number("sector_size", g.sector_size);
    record.number("physical_sector_size", g.physical_sector_size)
        .flag("read_only", g.read_only)
        .text("model", id.model.view());
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
    record.number("queues", disk.queues()).number("lanes", disk.lanes());
}

static FixedText<16> null_name(u64 number) {
    FixedText<16> name;
    print(name, "null{}", number);
    return name;
}

u32 null_disks(std::span<const std::string_view> names) {
    constexpr std::string_view prefix = "null";
    constexpr u64 max_disks = 256;
    u64 count = 0;
    for (const std::string_view name : names) {
        if (!name.starts_with(prefix)) {
            continue;
        }
        const auto number = parse_number(name.substr(prefix.size()));
        if (number && *number < max_disks && null_name(*number).view() == name) { // not null01, not null0x1
            count = std::max(count, *number + 1);
        }
    }
    return static_cast<u32>(count);
}

} // namespace fl::boot
