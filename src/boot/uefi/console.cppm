// What the loader says: lines on the firmware's console and on COM1 alike.
export module boot.uefi.console;
import core.std;
import core.text;
import core.verdict;
import boot.uefi.protocol;

export namespace fl::boot::uefi {

/// The only console there is; open() first. Every write is bounded: a port that never gets ready is given up.
class Console {
  public:
    /// COM1 is written directly unless the firmware's own console goes there already, which would print each line
    /// twice.
    void open(const SystemTable& system);
    /// Boot services are about to go: from now on COM1 alone, directly.
    void leave_firmware();

    /// The verdict record (docs/INTERFACES.md), alone on its line, written to COM1 directly: the firmware's console may
    /// break lines.
    void verdict(Verdict verdict, std::string_view reason);

    template <class... Args>
    void line(text_detail::Format<std::type_identity_t<std::remove_cvref_t<Args>>...> format, const Args&... args) {
        FixedText<400> text{"firstlight loader: "};
        print(text, format, args...);
        put(text.view());
    }

  private:
    void put(std::string_view line);
    void put_output(std::string_view line);
    void put_serial(std::string_view text);

    TextOutput* output_ = nullptr;
    bool serial_ = false; // lines are written to COM1 directly
    bool serial_present_ = false;
};

} // namespace fl::boot::uefi
