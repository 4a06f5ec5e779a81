// How a processor that polls finds the answers of a port: by the FIS that the HBA stores in memory, which costs no
// access, and then by one read of PxSACT or PxCI, instead of the two writes that clear an interrupt. Meanwhile the port
// interrupts for errors and changes of the link only (PxIE).
//
//   interrupts ──silence()──> silent: found() in each turn ──listen(), with commands issued──> interrupts
//
// A FIS that is overwritten by the next one before it was seen ends nothing by itself, but the read for the next one
// shows its commands too. Those that a FIS has announced are read for in each turn until the registers show them. So
// nothing depends on a FIS but the time at which an answer is found; without one the registers are read every 20 ms.
// listen() enables the interrupts first and reads the register afterwards.
export module drivers.ahci.polling;
import core.std;
import core.time;
import io.executor;
import drivers.ahci.protocol;
import drivers.ahci.port;
import drivers.ahci.slots;
import drivers.ahci.recovery;
import drivers.ahci.interrupts;

export namespace fl::drivers::ahci {

class Polling {
  public:
    Polling(io::Executor& executor, Port& port, Slots& slots, Recovery& recovery, PortEvents& events)
        : executor_(executor), port_(port), slots_(slots), recovery_(recovery), events_(events) {}

    /// Commands end without an interrupt.
    inline bool on() const { return silent_; }
    /// From now on. Has no effect during a recovery, which decides on the interrupts itself.
    void silence();
    /// True: commands have ended [Slots::next_done].
    inline bool found() { return silent_ && look(); }
    /// Before the processor sleeps: the commands that are issued will interrupt. True: as found().
    inline bool listen() { return silent_ && slots_.issued() != 0 && stop(); }

  private:
    bool look();
    bool stop();
    bool read();

    io::Executor& executor_;
    Port& port_;
    Slots& slots_;
    Recovery& recovery_;
    PortEvents& events_;
    bool silent_ = false;
    u32 expected_ = 0;      // slots that a FIS has announced, and the registers have not shown
    Instant next_read_ = 0; // of the registers, without a FIS
};

} // namespace fl::drivers::ahci
