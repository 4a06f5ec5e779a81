// The loader's console: writes lines to the firmware's console and to COM1.
export module boot.uefi.console;
import core.std;
import core.text;
import core.verdict;
import boot.uefi.protocol;

export namespace fl::boot::uefi {

/// The only instance; call open() first. Every write is bounded: a port that never becomes ready is abandoned.
class Console {
  public:
    /// Writes to COM1 directly unless the firmware's console already goes there, which would print each line twice.
    void open(const SystemTable& system);
    /// Call before boot services end: from then on writes to COM1 only, directly.
    void leave_firmware();

    /// Writes the verdict record (docs/INTERFACES.md) on a line of its own, directly to COM1: the firmware's console
    /// may wrap lines.
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
