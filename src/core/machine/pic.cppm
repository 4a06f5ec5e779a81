// The pair of 8259 interrupt controllers of a PC [8259A].
export module core.machine.pic;
import core.std;

export namespace fl::pic {

/// Moves the 16 lines to vectors first_vector … first_vector + 15 and masks them all. False: there is no such
/// controller.
bool start(u8 first_vector);
void unmask(u8 irq);
void mask(u8 irq);
/// Level for PCI, edge for ISA; where the machine has the register.
void set_level(u8 irq, bool level);
/// Whether the line that was announced is really in service (7 and 15 stand for "withdrawn" too). Does what a withdrawn
/// one needs.
bool is_real(u8 irq);
void end_of_interrupt(u8 irq);

} // namespace fl::pic
