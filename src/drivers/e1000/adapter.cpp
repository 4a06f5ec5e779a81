module;
#include "core/try.hpp"
module drivers.e1000.adapter;
import core.std;
import core.result;
import core.time;
import io.executor;
import io.net;
import io.task;

namespace fl::drivers::e1000 {

namespace {
constexpr Nanoseconds millisecond = 1'000'000;
/// How long what the card has begun on the bus may take [8254x §14.3, as drivers do].
constexpr Nanoseconds settle = 10 * millisecond;

bool usable(const io::MacAddress& address) { return !address.is_group() && address != io::MacAddress{}; }
} // namespace

io::Task<Result<u16>> Adapter::eeprom_word(io::Executor& executor, Nanoseconds bound, u8 number) {
    write(EepromRead::offset, EepromRead{}.set(EepromRead::addr, number).set(EepromRead::start, true).raw);
    const io::Bound until(executor, bound);
    for (;;) {
        const auto answer = EepromRead::from(read(EepromRead::offset));
        if (answer.raw == ~u32{0}) {
            co_return Error{Code::device_gone, "the network card does not answer: its registers read as all ones"};
        }
        if (answer.has(EepromRead::done)) {
            co_return static_cast<u16>(answer.get(EepromRead::data));
        }
        if (until.passed()) {
            co_return Error{Code::timed_out, "the network card's EEPROM does not answer (EERD.DONE)"};
        }
        co_await executor.sleep(millisecond);
    }
}

io::Task<Result<io::MacAddress>> Adapter::address(io::Executor& executor, Nanoseconds bound) {
    const auto high = ReceiveAddressHigh::from(read(ReceiveAddressHigh::offset));
    const u64 number = u64{high.get(ReceiveAddressHigh::rah)} << 32 | read(receive_address_low);
    io::MacAddress address;
    for (usize i = 0; i < address.bytes.size(); ++i) {
        address.bytes[i] = static_cast<u8>(number >> 8 * i);
    }
    if (high.has(ReceiveAddressHigh::av) && usable(address)) {
        co_return address;
    }
    static constexpr u8 words = 3;   // of an address
    for (u8 i = 0; i < words; ++i) { // [8254x §5.6.1]
        CO_TRY(const u16 word, co_await eeprom_word(executor, bound, i));
        address.bytes[2 * i] = static_cast<u8>(word);
        address.bytes[2 * i + 1] = static_cast<u8>(word >> 8);
    }
    if (!usable(address)) {
        co_return Error{Code::protocol, "the network card has no usable hardware address in RAL0 and RAH0, nor in its "
                                        "EEPROM"};
    }
    co_return address;
}

void Adapter::stop() {
    write(mask_clear, ~u32{0});
    write(ReceiveControl::offset, 0);
    write(TransmitControl::offset, 0);
    static_cast<void>(read(Status::offset)); // the writes have arrived
}

io::Task<Result<void>> Adapter::reset(io::Executor& executor, Nanoseconds bound) {
    stop();
    co_await executor.sleep(settle);
    const auto control = Control::from(read(Control::offset));
    if (control.absent()) {
        co_return Error{Code::device_gone, "the network card does not answer: its registers read as all ones"};
    }
    write(Control::offset, Control(control).set(Control::rst, true).raw);
    const io::Bound until(executor, bound);
    for (;;) {
        co_await executor.sleep(millisecond); // no access for a microsecond, and the EEPROM is read [8254x §13.4.1]
        const auto now = Control::from(read(Control::offset));
        if (!now.absent() && !now.has(Control::rst)) {
            break;
        }
        if (until.passed()) {
            co_return Error{now.absent() ? Code::device_gone : Code::timed_out,
                            "the network card does not come out of its reset (CTRL.RST)"};
        }
    }
    write(mask_clear, ~u32{0});
    static_cast<void>(take_causes());
    co_return Result<void>{};
}

void Adapter::place(u64 ring, RingPlace at) {
    write(ring + ring_base_low, static_cast<u32>(at.bus));
    write(ring + ring_base_high, static_cast<u32>(at.bus >> 32));
    write(ring + ring_length, at.bytes);
    write(ring + ring_head, 0);
    write(ring + ring_tail, at.tail);
}

// [8254x §14.3 to §14.5]
void Adapter::start(const io::MacAddress& own, RingPlace receive, RingPlace transmit) {
    auto control = Control::from(read(Control::offset));
    control.set(Control::slu, true).set(Control::asde, true);
    control.set(Control::lrst, false).set(Control::phy_rst, false).set(Control::ilos, false).set(Control::vme, false);
    control.set(Control::frcspd, false).set(Control::frcdplx, false);
    write(Control::offset, control.raw);
    for (const u64 at : flow_control_registers) {
        write(at, 0);
    }
    u64 number = 0;
    for (usize i = 0; i < own.bytes.size(); ++i) {
        number |= u64{own.bytes[i]} << 8 * i;
    }
    write(receive_address_low, static_cast<u32>(number));
    write(ReceiveAddressHigh::offset, ReceiveAddressHigh{}
                                          .set(ReceiveAddressHigh::rah, static_cast<u32>(number >> 32))
                                          .set(ReceiveAddressHigh::av, true)
                                          .raw);
    for (u32 i = 0; i < multicast_words; ++i) {
        write(multicast_table + 4 * i, 0);
    }
    place(receive_ring, receive);
    place(transmit_ring, transmit);
    write(receive_delay, 0);
    write(transmit_gap, copper_gap);
    write(TransmitControl::offset, TransmitControl::of(TransmitControl::en, TransmitControl::psp)
                                       .set(TransmitControl::ct, collision_threshold)
                                       .set(TransmitControl::cold, collision_distance)
                                       .raw);
    write(ReceiveControl::offset,
          ReceiveControl::of(ReceiveControl::en, ReceiveControl::bam, ReceiveControl::secrc).raw);
}

} // namespace fl::drivers::e1000
