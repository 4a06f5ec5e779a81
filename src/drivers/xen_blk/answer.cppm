// What the back end answers: the check of a response. Nothing of it is trusted.
export module drivers.xen_blk.answer;
import core.std;
import core.result;
import io.block;
import drivers.xen_blk.requests;

export namespace fl::drivers::xen_blk {

/// The status of a request with this response, whose id is the request's. False: it violates the protocol, as `fault`
/// says.
[[gnu::always_inline]] inline bool decode(const Response& response, const Wire& wire, io::Status& status,
                                          std::optional<Error>& fault) {
    if (response.operation != wire.operation && !(wire.pages.indirect && response.operation == Operation::indirect))
        [[unlikely]] {
        fault = Error{Code::protocol, "a response has another operation than its request",
                      to_underlying(wire.operation), to_underlying(response.operation)};
        return false;
    }
    switch (response.status) {
    case status_ok: status = io::Status::ok; return true;
    case status_error: status = io::Status::io_error; return true;
    case status_not_supported: status = io::Status::not_supported; return true;
    default:
        fault = Error{Code::protocol, "a response has a status that the block interface does not define", 0,
                      static_cast<u16>(response.status)};
        return false;
    }
}

} // namespace fl::drivers::xen_blk
