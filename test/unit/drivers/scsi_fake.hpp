// A SCSI target in memory, written from [SPC-4] and [SBC-3]: conforming units, until a test changes their properties or
// replaces the reply to one command. Include after the imports.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

namespace fake {
using namespace fl;
namespace scsi = drivers::scsi;

inline void put_be(std::vector<u8>& data, usize at, usize n, u64 value) {
    for (usize i = n; i-- > 0; value >>= 8) {
        data[at + i] = static_cast<u8>(value);
    }
}

/// The result of one command.
struct Answer {
    u8 status = 0;
    std::vector<u8> data;                   // data returned by the unit, truncated to the requested length
    std::optional<std::array<u8, 3>> sense; // key, ASC, ASCQ
    scsi::ServiceResponse service = scsi::ServiceResponse::command_complete;
};
inline Answer check(u8 key, u8 asc, u8 ascq = 0) { return {.status = 2, .sense = {{key, asc, ascq}}}; }

struct Unit {
    u8 peripheral = 0; // qualifier and device type
    std::string vendor = "Msft    ", product = "Virtual Disk    ", revision = "1.0 ";
    u64 blocks = 2048;
    bool zero_bytes = false; // READ CAPACITY is refused, as by QEMU's units
    u32 block_bytes = 512;
    u8 physical_exponent = 0;
    bool thin = true;
    bool empty = false;
    bool capacity_16 = true;
    bool write_protected = false;
    bool dpofua = false;
    std::optional<bool> write_cache = true; // nothing: no caching page
    bool mode_sense = true;
    std::vector<u8> pages{0x00, 0xb0, 0xb2}; // empty: INQUIRY rejects vital product data
    u32 max_transfer_blocks = 0;
    u32 max_unmap_blocks = 0x1000;
    u32 max_unmap_descriptors = 1;
    bool unmaps = true;
    u64 max_write_same_blocks = 0;
    bool write_same = false; // LBPWS
    std::string designator;  // of page 0x83, if that is listed

    Answer answer(const scsi::Cdb& cdb) const {
        const auto& c = cdb.bytes;
        switch (c[0]) {
        case 0x00: return empty ? check(2, 0x3a) : Answer{};
        case 0x12: return (c[1] & 1) != 0 ? page(c[2]) : Answer{.data = inquiry()};
        case 0x1a: return mode_sense ? Answer{.data = mode(c[2])} : check(5, 0x20);
        case 0x25: {
            std::vector<u8> data(8);
            put_be(data, 0, 4, std::min<u64>(blocks - 1, 0xffffffff));
            put_be(data, 4, 4, block_bytes);
            return empty ? check(2, 0x3a) : zero_bytes ? check(2, 0x04, 0x03) : Answer{.data = data};
        }
        case 0x9e: {
            if (!capacity_16 || c[1] != 0x10) {
                return check(5, 0x20);
            }
            std::vector<u8> data(32);
            put_be(data, 0, 8, blocks - 1);
            put_be(data, 8, 4, block_bytes);
            data[13] = physical_exponent;
            data[14] = thin ? 0x80 : 0;
            return empty ? check(2, 0x3a) : zero_bytes ? check(2, 0x04, 0x03) : Answer{.data = data};
        }
        default: return check(5, 0x20);
        }
    }

  private:
    std::vector<u8> inquiry() const {
        std::vector<u8> data(36);
        data[0] = peripheral;
        data[4] = 31;
        std::copy(vendor.begin(), vendor.end(), data.begin() + 8);
        std::copy(product.begin(), product.end(), data.begin() + 16);
        std::copy(revision.begin(), revision.end(), data.begin() + 32);
        return data;
    }
    std::vector<u8> mode(u8 which) const {
        std::vector<u8> data(4);
        data[2] = static_cast<u8>((write_protected ? 0x80 : 0) | (dpofua ? 0x10 : 0));
        if (which == 8 && write_cache) {
            data.resize(24);
            data[4] = 8;
            data[5] = 18;
            data[6] = *write_cache ? 4 : 0;
        }
        data[0] = static_cast<u8>(data.size() - 1);
        return data;
    }
    Answer page(u8 number) const {
        if (std::find(pages.begin(), pages.end(), number) == pages.end()) {
            return check(5, 0x24);
        }
        std::vector<u8> data(4);
        data[0] = peripheral;
        data[1] = number;
        if (number == 0x00) {
            data.insert(data.end(), pages.begin(), pages.end());
        } else if (number == 0xb0) {
            data.resize(64);
            put_be(data, 8, 4, max_transfer_blocks);
            put_be(data, 20, 4, max_unmap_blocks);
            put_be(data, 24, 4, max_unmap_descriptors);
            put_be(data, 36, 8, max_write_same_blocks);
        } else if (number == 0xb2) {
            data.resize(8);
            data[5] = static_cast<u8>((unmaps ? 0x80 : 0) | (write_same ? 0x40 : 0));
        } else if (number == 0x83) {
            data.insert(data.end(), {2, 1, 0, static_cast<u8>(designator.size())}); // ASCII, T10 vendor id
            data.insert(data.end(), designator.begin(), designator.end());
        }
        put_be(data, 2, 2, data.size() - 4);
        return {.data = data};
    }
};

/// The target with its units, and a record of the commands received.
class Target final : public scsi::Nexus {
  public:
    explicit Target(io::Executor& executor) : Nexus(executor, "fake") {}

    std::map<u16, Unit> units;
    /// Called before the regular handling: a value it returns is used instead. It may change units.
    std::function<std::optional<Answer>(u16 lun, const scsi::Cdb& cdb)> answer_override;
    std::vector<u8> asked; // operation codes received
    bool dead = false;     // no command is completed

    usize count(u8 opcode) const { return static_cast<usize>(std::count(asked.begin(), asked.end(), opcode)); }

    io::Task<Result<void>> execute(u16 lun, scsi::Cdb cdb, u32 bytes, scsi::Response& response) override {
        EXPECT_LE(bytes, max_data);
        EXPECT_EQ(bytes, allocation(cdb)) << "the buffer is as long as the CDB says";
        asked.push_back(cdb.bytes[0]);
        if (dead) {
            co_return Error{Code::timed_out, "no answer"};
        }
        Answer a = answer(lun, cdb);
        a.data.resize(std::min<usize>(a.data.size(), bytes));
        // a separate allocation, so that the sanitizers detect an overrun
        data_ = std::vector<u8>(a.data.begin(), a.data.end());
        response = {.service = a.service,
                    .status = a.status,
                    .moved = static_cast<u32>(data_.size()),
                    .sense = {},
                    .transport = {},
                    .data = data_};
        if (a.sense) {
            response.sense = scsi::Sense{(*a.sense)[0], (*a.sense)[1], (*a.sense)[2], std::nullopt};
        }
        co_return Result<void>{};
    }

  private:
    Answer answer(u16 lun, const scsi::Cdb& cdb) {
        if (answer_override) {
            if (auto answer = answer_override(lun, cdb)) {
                return *answer;
            }
        }
        if (cdb.bytes[0] == 0xa0) {
            std::vector<u8> data(8);
            for (const auto& [n, unit] : units) {
                const u64 entry = n < 256 ? n : 0x4000u | n;
                data.resize(data.size() + 8);
                put_be(data, data.size() - 8, 2, entry);
            }
            put_be(data, 0, 4, data.size() - 8);
            return {.data = data};
        }
        const auto at = units.find(lun);
        if (at == units.end()) {
            return check(5, 0x25);
        }
        return at->second.answer(cdb);
    }
    static u32 allocation(const scsi::Cdb& cdb) {
        const auto& c = cdb.bytes;
        switch (c[0]) {
        case 0x12: return static_cast<u32>(c[3] << 8 | c[4]);
        case 0x1a: return c[4];
        case 0x25: return 8;
        case 0x9e: return static_cast<u32>(c[12] << 8 | c[13]);
        case 0xa0: return static_cast<u32>(c[8] << 8 | c[9]);
        default: return 0;
        }
    }
    std::vector<u8> data_;
};

} // namespace fake
