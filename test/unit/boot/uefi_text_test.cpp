#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import boot.uefi.text;

namespace {
using namespace fl;
using namespace fl::boot;

std::vector<std::byte> bytes_of(std::initializer_list<int> values) {
    std::vector<std::byte> bytes;
    for (int v : values) {
        bytes.push_back(static_cast<std::byte>(v));
    }
    return bytes;
}

std::vector<std::byte> ucs2(const std::string& text) {
    std::vector<std::byte> bytes;
    for (char c : text) {
        bytes.push_back(static_cast<std::byte>(c));
        bytes.push_back(std::byte{0});
    }
    return bytes;
}

std::string options(const std::vector<std::byte>& bytes) {
    std::array<char, 64> storage{};
    const auto text = uefi::text_of_load_options(bytes, storage);
    return text ? std::string(*text) : "error: " + std::string(text.error().message);
}

TEST(UefiLoadOptions, AreTextUpToTheTerminator) {
    EXPECT_EQ(options(bytes_of({'j', 0, '=', 0, '1', 0, 0, 0, 'x', 0})), "j=1");
    EXPECT_EQ(options(ucs2("  job=bench\tqd=4\r\n ")), "job=bench qd=4");
    EXPECT_EQ(options({}), "");
    EXPECT_EQ(options(bytes_of({0, 0})), "");
}

TEST(UefiLoadOptions, AnythingElseIsAnError) {
    EXPECT_EQ(options(bytes_of({'j', 0, '='})).substr(0, 5), "error");     // an odd size
    EXPECT_EQ(options(bytes_of({'a', 0, 0xe9, 0})).substr(0, 5), "error"); // é
    EXPECT_EQ(options(bytes_of({'a', 0, 'b', 1})).substr(0, 5), "error");  // a high byte
    // binary data of a boot manager
    EXPECT_EQ(options(bytes_of({0x4e, 0xac, 0x08, 0x81, 0x11, 0x9f})).substr(0, 5), "error");
    EXPECT_EQ(options(bytes_of({0x7f, 0})).substr(0, 5), "error");
}

TEST(UefiLoadOptions, LongOnesAreCutAtTheStorage) {
    EXPECT_EQ(options(ucs2(std::string(100, 'a'))), std::string(64, 'a'));
}

TEST(UefiLoadOptions, LoseTheImageName) {
    EXPECT_EQ(uefi::without_image_name("fs0:\\EFI\\BOOT\\BOOTX64.EFI job=bench qd=4"), "job=bench qd=4");
    EXPECT_EQ(uefi::without_image_name("BOOTX64.EFI"), "");
    EXPECT_EQ(uefi::without_image_name("job=bench qd=4"), "job=bench qd=4");
    EXPECT_EQ(uefi::without_image_name("\"fs0:\\my files=1\\boot.efi\"  job=bench"), "job=bench");
    EXPECT_EQ(uefi::without_image_name("\"fs0:\\never closed"), "");
    EXPECT_EQ(uefi::without_image_name("boot.efi bad word=1"), "bad word=1");
    EXPECT_EQ(uefi::without_image_name(""), "");
}

std::string file(std::string text) {
    const auto line = uefi::text_of_command_line_file(text);
    return line ? std::string(*line) : "error";
}

TEST(UefiCommandLineFile, BecomesOneLine) {
    EXPECT_EQ(file("job=bench\nqd=4\n\n"), "job=bench qd=4");
    EXPECT_EQ(file("job=bench\r\n\tqd=4 \r\n"), "job=bench   qd=4");
    EXPECT_EQ(file("\xef\xbb\xbfjob=bench"), "job=bench");
    EXPECT_EQ(file(std::string("a=1\0b=2\x7f", 8)), "a=1 b=2");
    EXPECT_EQ(file(" \n"), "");
    EXPECT_EQ(file(""), "");
    EXPECT_EQ(file("d=\xc3\xa9"), "d=\xc3\xa9"); // rejected later, by the command line parser
    EXPECT_EQ(file(std::string("\xff\xfej\0=\0", 6)), "error");
    EXPECT_EQ(file(std::string("\xfe\xff\0j", 4)), "error");
    EXPECT_EQ(file("\xff\xfe"), "error");
    EXPECT_EQ(file(std::string("j\0o\0b\0=\0", 8)), "error"); // UTF-16 without a byte order mark
    EXPECT_EQ(file(std::string("\0j\0o\0b\0=", 8)), "error");
    EXPECT_EQ(file(std::string("j\0", 2)), "j"); // too short to detect
}

// PciRoot(0)/Pci(1,0)/Serial(0)/Uart(115200,8,N,1)/VenVt100()/End, node by node from the specification.
std::vector<std::byte> serial_console(int uid) {
    // ACPI PNP0A03
    return bytes_of({0x02, 0x01, 0x0c, 0x00, 0xd0, 0x41, 0x03, 0x0a, 0, 0, 0, 0,
                     // PCI function 0, device 1
                     0x01, 0x01, 0x06, 0x00, 0x00, 0x01,
                     // ACPI PNP0501
                     0x02, 0x01, 0x0c, 0x00, 0xd0, 0x41, 0x01, 0x05, uid, 0, 0, 0,
                     // UART
                     0x03, 0x0e, 0x13, 0x00, 0, 0, 0, 0, 0x00, 0xc2, 0x01, 0, 0, 0, 0, 0, 8, 1, 1,
                     // vendor: VT100
                     0x03, 0x0a, 0x14, 0x00, 0x66, 0xd4, 0x60, 0xdf, 0x2a, 0x2a, 0x2a, 0x4a, 1, 2, 3, 4, 5, 6, 7, 8,
                     0x7f, 0xff, 0x04, 0x00});
}

// First the video device, then the serial port, as one variable.
std::vector<std::byte> video_and(std::vector<std::byte> second) {
    auto path = bytes_of({0x02, 0x01, 0x0c, 0x00, 0xd0, 0x41, 0x03, 0x0a, 0,    0,    0,    0,
                          0x01, 0x01, 0x06, 0x00, 0x00, 0x02, //
                          0x02, 0x03, 0x08, 0x00, 0,    1,    1,    0x80, 0x7f, 0x01, 0x04, 0x00});
    path.insert(path.end(), second.begin(), second.end());
    return path;
}

TEST(UefiDevicePath, FindsCom1) {
    EXPECT_TRUE(uefi::leads_to_com1(serial_console(0)));
    EXPECT_TRUE(uefi::leads_to_com1(video_and(serial_console(0))));
    EXPECT_FALSE(uefi::leads_to_com1(serial_console(1)));
    EXPECT_FALSE(uefi::leads_to_com1(video_and(bytes_of({0x7f, 0xff, 0x04, 0x00}))));
    EXPECT_FALSE(uefi::leads_to_com1({}));
}

TEST(UefiDevicePath, MalformedPathsLeadNowhere) {
    const auto good = serial_console(0);
    // The UART's node ends at byte 49: no shorter path contains all of it. Separate allocations, so that the sanitizer
    // detects reads past the end.
    for (std::size_t size = 0; size < 49; ++size) {
        const std::vector<std::byte> cut(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size));
        EXPECT_FALSE(uefi::leads_to_com1(cut)) << size;
    }
    auto zero = good;
    zero[2] = std::byte{0}; // a node of size 0 would never end
    EXPECT_FALSE(uefi::leads_to_com1(zero));
    auto after_the_end = bytes_of({0x7f, 0xff, 0x04, 0x00});
    after_the_end.insert(after_the_end.end(), good.begin(), good.end());
    EXPECT_FALSE(uefi::leads_to_com1(after_the_end));
}

} // namespace
