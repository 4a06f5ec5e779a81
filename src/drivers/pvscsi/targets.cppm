// The targets of a PVSCSI adapter that must be scanned again: those named by its messages (hot plug), and those with a
// unit whose answer says so.
export module drivers.pvscsi.targets;
import core.std;
import core.log;
import drivers.pvscsi.protocol;

export namespace fl::drivers::pvscsi {

class ChangedTargets {
  public:
    /// `notify` is called when there is something to do: a target has changed, or the queue has closed.
    void start(void (*notify)(void* context), void* context) {
        notify_ = notify;
        context_ = context;
    }
    void notify() const { notify_(context_); }
    void set(u32 target) { // below max_targets
        changed_[target] = true;
        notify();
    }
    /// Unknown messages, and those for other targets, are logged and have no effect.
    void accept(const MessageDescriptor& message) {
        if (message.bus == 0 && message.target < max_targets && message.type <= MessageType::device_removed) {
            return set(message.target);
        }
        log::warning("pvscsi: a message of type {} for bus {}, target {}: ignored", to_underlying(message.type),
                     message.bus, message.target);
    }
    /// The next one that has changed since the last call; nullopt: none.
    std::optional<u8> take() {
        const auto found = std::ranges::find(changed_, true);
        if (found == changed_.end()) {
            return std::nullopt;
        }
        *found = false;
        return static_cast<u8>(found - changed_.begin());
    }

  private:
    std::array<bool, max_targets> changed_{};
    void (*notify_)(void* context) = nullptr;
    void* context_ = nullptr;
};

} // namespace fl::drivers::pvscsi
