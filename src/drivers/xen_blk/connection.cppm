// What one queue of a disk shares with its back end: the pages of its ring, their grants, and the event channel. Only
// for processor 0.
export module drivers.xen_blk.connection;
import core.std;
import core.result;
import core.dma;
import hv.xen.events;
import hv.xen.grants;
import drivers.xen_blk.pages;

export namespace fl::drivers::xen_blk {

/// The largest ring requested: four pages, 128 slots. More slots than Ring::max_slots would be unusable.
inline constexpr u32 max_ring_order = 2;

class Connection {
  public:
    static constexpr u32 max_pages = 1u << max_ring_order;

    Connection(hv::xen::Events& events, hv::xen::Grants& grants) : events_(events), grants_(grants) {}
    Connection(const Connection&) = delete;
    Connection& operator=(const Connection&) = delete;
    /// Pages that the back end has mapped are not freed.
    ~Connection() { free(); }

    /// Allocates a ring of 2^order pages, or fewer if grants or memory are short, and an event channel for `domain`.
    /// After an Error as before, or after free().
    Result<void> make(u32 order, hv::xen::Domain domain, DmaAllocator& dma);
    DmaSpan ring() const { return ring_.span(); }
    u32 pages() const { return pages_; }
    hv::xen::GrantRef grant(u32 page) const { return refs_[page]; }
    hv::xen::Port port() const { return port_; }

    /// Whether the back end has a page of the ring mapped.
    bool is_mapped() const {
        return std::any_of(refs_.begin(), refs_.begin() + pages_,
                           [&](hv::xen::GrantRef ref) { return grants_.is_mapped(ref); });
    }
    /// In another domain: the port was the former one's.
    void lose_port() { port_ = hv::xen::Port::none; }
    /// No events from here on; waits until the handler runs nowhere.
    void close_port() {
        if (port_ != hv::xen::Port::none) {
            events_.unbind(std::exchange(port_, hv::xen::Port::none));
        }
    }
    /// Ends it; the queue does not use the ring any more. Pages that the back end has mapped are not freed.
    void free();
    /// The same, but the back end may access the pages for ever.
    void abandon();

  private:
    hv::xen::Events& events_;
    hv::xen::Grants& grants_;
    hv::xen::Port port_ = hv::xen::Port::none;
    DmaBuffer ring_;
    std::array<hv::xen::GrantRef, max_pages> refs_{};
    u32 pages_ = 0;
};

} // namespace fl::drivers::xen_blk
