// The registers of a PVSCSI adapter: commands, kicks, interrupts; and the layout of its memory. No queue and no policy.
// Every access of the driver is made, and counted, here.
//
//   access            when
//   KICK_RW_IO        once per turn that has sent commands, all of them reads and writes
//   KICK_NON_RW_IO    the same with another command among them: it makes the adapter process the whole ring
//   INTR_STATUS       with a line: read, and written if it was this adapter. With messages it is never accessed
//   INTR_MASK         set-up, the end; else only while a processor polls: once when it needs no more interrupts of
//                     completions, once when it needs them again
//   COMMAND …         set-up, recovery
export module drivers.pvscsi.adapter;
import core.std;
import core.dma;
import core.mmio;
import core.result;
import io.executor;
import io.ring;
import drivers.pvscsi.protocol;
import drivers.scsi.commands;

export namespace fl::drivers::pvscsi {

/// Views of the adapter's memory: one DMA buffer of rings and one of the commands' areas, owned by the controller.
struct Memory {
    static constexpr u32 request_pages = 4;
    static constexpr u32 completion_pages = 1;
    static constexpr u32 message_pages = 1;
    static constexpr u32 page = static_cast<u32>(page_size);
    static constexpr u32 entries = request_pages * page / RequestDescriptor::stride;
    static constexpr u32 message_entries = message_pages * page / sizeof(MessageDescriptor);
    static_assert(entries == completion_pages * page / sizeof(CompletionDescriptor)); // no completion without room
    static_assert(valid_pages(request_pages, SetupRings::max_pages) &&
                  valid_pages(completion_pages, SetupRings::max_pages) &&
                  valid_pages(message_pages, SetupMessageRing::max_pages));
    static constexpr u32 requests_at = page; // after the rings state
    static constexpr u32 completions_at = requests_at + request_pages * page;
    static constexpr u32 messages_at = completions_at + completion_pages * page;
    static constexpr u32 zeros_at = messages_at + message_pages * page; // read by WRITE SAME
    static constexpr u32 ring_bytes = zeros_at + scsi::zeros_bytes;
    static_assert(zeros_at % page == 0 && page % scsi::zeros_bytes == 0);
    // A command's area. It does not cross a page, as is required of a list of SG elements.
    static constexpr u32 sense_bytes = 96;
    static constexpr u32 unmap_at = 128;
    static constexpr u32 list_at = 256;
    static constexpr u32 max_elements = 16;
    static constexpr u32 area_bytes = list_at + max_elements * sizeof(SgElement);
    static_assert(page % area_bytes == 0);
    static constexpr u32 areas_bytes = entries * area_bytes;

    DmaSpan rings; // ring_bytes, zeroed
    DmaSpan areas; // areas_bytes
    inline DmaSpan area(u32 slot) const { return areas.subspan(slot * area_bytes, area_bytes); }
};

class Adapter {
  public:
    /// `registers`: register_bytes. Call before anything else.
    void open(Mmio registers) { registers_ = registers; }

    /// Sends a command with its descriptor. Error{not_supported}: the adapter has failed or does not know it.
    template <class T>
    Result<void> command(AdapterCommand which, const T& descriptor) {
        static_assert(sizeof(T) % 4 == 0);
        std::array<u32, sizeof(T) / 4> words;
        std::memcpy(words.data(), &descriptor, sizeof descriptor);
        return send(which, words);
    }
    Result<void> command(AdapterCommand which) { return send(which, {}); }
    /// Whether the adapter knows a command: its status is read before its descriptor is written [pvscsi].
    bool knows(AdapterCommand which) {
        write(command_register, to_underlying(which));
        return status() != status_failed;
    }
    /// Announces the rings, and checks what the adapter has written to the rings state.
    Result<void> set_up(const Memory& memory);
    /// The same for the message ring. False: there is none.
    bool set_up_messages(const Memory& memory);
    /// True: from now on kicks for reads and writes depend on the threshold in the rings state.
    bool set_up_threshold();
    /// The number of targets. `page`: memory for the answer, zeroed by the call.
    u32 read_targets(DmaSpan page);

    inline void kick(bool rw_only) { write(rw_only ? kick_rw_io_register : kick_non_rw_io_register, 0); }
    void enable_interrupts(bool messages) {
        silent_ = false;
        messages_ = messages;
        write_mask(3);
    }
    /// No interrupts for completions, until listen().
    void silence() {
        silent_ = true;
        write_mask(0);
    }
    /// Before the completion ring is looked at for the last time: undoes silence(). `wanted`: a completion may come.
    inline void listen(bool wanted) {
        if (silent_ && wanted) [[unlikely]] {
            silent_ = false;
            write_mask(3);
            static_cast<void>(read(InterruptStatus::offset)); // flushes the posted write: from here on they interrupt
        }
    }
    void disable_interrupts() { write(InterruptMask::offset, 0); }
    bool absent() { return InterruptStatus::from(read(InterruptStatus::offset)).absent(); }
    /// From the handler of a line: clears the causes. False: another device has interrupted.
    bool acknowledge() {
        const u32 causes = registers_.read<u32>(InterruptStatus::offset);
        const bool own = (causes & InterruptStatus::known) != 0; // an absent adapter too: the queue finds that out
        if (own && causes != ~u32{0}) {
            registers_.write<u32>(InterruptStatus::offset, causes);
        }
        count_in_handler(own ? 2 : 1);
        return own;
    }
    /// Register accesses since the last call.
    inline u32 take_accesses() {
        return std::exchange(accesses_, 0) + in_handler_.exchange(0, std::memory_order_relaxed);
    }

  private:
    Result<void> send(AdapterCommand which, std::span<const u32> words);
    void write_mask(u32 completions) {
        write(InterruptMask::offset,
              InterruptMask{}.set(InterruptMask::cmpl, completions).set(InterruptMask::msg, messages_ ? 3 : 0).raw);
    }
    u32 status() { return read(command_status_register); }
    u32 read(u64 at) { return ++accesses_, registers_.read<u32>(at); }
    inline void write(u64 at, u32 value) {
        ++accesses_;
        registers_.write<u32>(at, value);
    }
    void count_in_handler(u32 count) {
        in_handler_.store(in_handler_.load(std::memory_order_relaxed) + count, std::memory_order_relaxed);
    }

    Mmio registers_;
    bool messages_ = false; // interrupt
    bool silent_ = false;   // completions do not
    u32 accesses_ = 0;
    std::atomic<u32> in_handler_{0}; // relaxed: the handler runs on the queue's processor, and only counts
};

} // namespace fl::drivers::pvscsi
