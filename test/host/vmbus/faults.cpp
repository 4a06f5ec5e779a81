module host.faults;
import host.std;
import core.result;

namespace fl::host {

Result<FaultSpec> parse_fault(std::string_view text) {
    FaultSpec spec;
    const usize comma = std::min(text.find(','), text.size());
    const std::string_view name = text.substr(0, comma);
    for (const FaultName& known : fault_names) {
        if (known.name == name) {
            spec.fault = known.fault;
        }
    }
    if (spec.fault == Fault::none) {
        return Error{Code::bad_argument, "no fault has this name"};
    }
    std::string_view rest = text.substr(comma);
    while (!rest.empty()) {
        rest.remove_prefix(1); // the comma
        const usize end = std::min(rest.find(','), rest.size());
        const std::string_view word = rest.substr(0, end);
        rest.remove_prefix(end);
        const usize equals = word.find('=');
        const std::string_view key = word.substr(0, equals);
        u32 value = 0;
        const char* last = word.data() + word.size();
        const auto parsed = equals == std::string_view::npos ? std::from_chars(last, last, value)
                                                             : std::from_chars(word.data() + equals + 1, last, value);
        if (parsed.ec != std::errc{} || parsed.ptr != last || (key != "after" && key != "count")) {
            return Error{Code::bad_argument, "after a fault's name: expected after=N or count=N"};
        }
        (key == "after" ? spec.after : spec.count) = value;
    }
    return spec;
}

} // namespace fl::host
