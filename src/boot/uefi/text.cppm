// Parses the text given to the loader (load options, the command line file) and the device path of the console.
export module boot.uefi.text;
import core.std;
import core.result;

export namespace fl::boot::uefi {

/// Maximum length of one OutputString() call, in characters, including the line end and excluding the terminator: some
/// firmware has a fixed buffer of 128 characters.
inline constexpr usize longest_output = 127;
using OutputPiece = std::array<char16_t, longest_output + 1>;
/// Converts the next piece of a line: consumes characters from the front of `rest` and writes them, terminated; the
/// last piece ends with CR LF. True: this was the last piece. Non-ASCII characters become '?'.
bool next_output_piece(std::string_view& rest, OutputPiece& piece);

/// Load options [UEFI-2.10 §9.1 LoadOptions] as text. The options may be arbitrary binary data. Only UCS-2 that
/// consists of printable ASCII and blanks, up to a terminator or the end, is accepted as a command line; anything else
/// is an error. Leading and trailing blanks are removed. `storage` receives the text and truncates it: pass one byte
/// more than the longest text wanted, to detect that.
Result<std::string_view> text_of_load_options(std::span<const std::byte> options, std::span<char> storage);

/// Removes the image name that a shell passes first, possibly in double quotes; a boot manager does not pass one. The
/// first word is removed if it has no '='.
std::string_view without_image_name(std::string_view options);

/// Converts a command line file to one line, in place: line ends, tabs and other control characters become blanks; a
/// UTF-8 byte order mark and leading and trailing blanks are removed. UTF-16, with or without a byte order mark, is an
/// error.
Result<std::string_view> text_of_command_line_file(std::span<char> file);

/// Whether a device path [UEFI-2.10 §10.3] leads to COM1: the ACPI device PNP0501 with UID 0, followed by a UART node.
/// All paths of a multi-instance path (the ConOut variable) are examined. A malformed path does not match.
bool leads_to_com1(std::span<const std::byte> path);

} // namespace fl::boot::uefi
