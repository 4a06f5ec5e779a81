// io.latch under the name that the Xen modules use.
export module hv.xen.latch;
export import io.latch;

export namespace fl::hv::xen {
using io::Latch;
} // namespace fl::hv::xen
