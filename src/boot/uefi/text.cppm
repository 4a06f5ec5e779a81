// What a person gave the loader to read: load options, the command line file; and the device path that says where the
// console goes.
export module boot.uefi.text;
import core.std;
import core.result;

export namespace fl::boot::uefi {

/// The longest text that is given to OutputString() at once, in characters, a line end included and the terminator not:
/// some firmware has a fixed buffer of 128 for it.
inline constexpr usize longest_output = 127;
using OutputPiece = std::array<char16_t, longest_output + 1>;
/// The next piece of a line: takes its characters from the front of `rest`, writes them with a terminator; the last
/// piece ends with CR LF. True: that was the last one. What is not ASCII becomes '?'.
bool next_output_piece(std::string_view& rest, OutputPiece& piece);

/// Load options [UEFI-2.10 §9.1 LoadOptions] as text. Anything may stand there: only UCS-2 that is wholly printable
/// ASCII (and blanks), up to a terminator or the end, is a command line; everything else is an error. Blanks at both
/// ends are cut. `storage` receives the text; what does not fit is dropped, so give it a byte more than the longest
/// text that is wanted.
Result<std::string_view> text_of_load_options(std::span<const std::byte> options, std::span<char> storage);

/// A shell passes the image's name first, maybe in double quotes; a boot manager does not. The first word goes if it
/// has no '='.
std::string_view without_image_name(std::string_view options);

/// A command line file as one line: line ends, tabs and other control characters become blanks, a UTF-8 byte order mark
/// and the blanks at both ends are cut. The text is changed in place. UTF-16, with a mark or not, is an error.
Result<std::string_view> text_of_command_line_file(std::span<char> file);

/// Whether a device path [UEFI-2.10 §10.3] has COM1 in it: the ACPI device PNP0501 with UID 0, followed by a UART. With
/// several paths in a row (the ConOut variable) all of them are looked at. A malformed path has none.
bool leads_to_com1(std::span<const std::byte> path);

} // namespace fl::boot::uefi
