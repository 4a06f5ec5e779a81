// The time for which a virtual CPU could have run and did not, which Xen counts in memory of the guest [xen-public
// vcpu.h].
export module hv.xen.runstate;
import core.std;
export import hv.xen.protocol;

export namespace fl::hv::xen {

/// The stolen time of a virtual CPU in ns: runnable and offline, since it began. `now`: the system time, which counts
/// the state that it is in at present, if that is one of the two; nothing: without that. Nothing: Xen keeps changing
/// the values. A Xen that does not announce its changes (runstate_update) makes them while the virtual CPU does not
/// run, so that its own readings are consistent, and those by other ones nearly always.
std::optional<u64> stolen_time(const RunstateInfo& info, std::optional<u64> now);

} // namespace fl::hv::xen
