// The pair of 8259 interrupt controllers of a PC [8259A].
export module core.machine.pic;
import core.std;

export namespace fl::pic {

/// Remaps the 16 lines to vectors first_vector … first_vector + 15 and masks them all. False: no such controller.
bool start(u8 first_vector);
void unmask(u8 irq);
void mask(u8 irq);
/// Sets level (PCI) or edge (ISA) triggering, if the machine has the register.
void set_level(u8 irq, bool level);
/// Whether the raised line is in service: lines 7 and 15 also signal spurious interrupts, which this function
/// completes.
bool is_real(u8 irq);
/// Sends the end-of-interrupt for a line.
void end_of_interrupt(u8 irq);

} // namespace fl::pic
