// Data protected by a lock is written without holding it.
// expect: writing variable 'count' requires holding mutex 'lock'
#include "core/thread_annotations.hpp"
import core.std;
import core.spinlock;

namespace {
fl::SpinLock lock;
int count GUARDED_BY(lock) = 0;
[[maybe_unused]] void caller() { ++count; }
} // namespace
