// The part of the C++ library that the unit tests and the test host use beside core.std. One module, so that their
// hundred units do not each parse these headers again, which takes longer than everything else in most of them.
module;
#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <functional>
#include <iterator>
#include <malloc.h>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <ostream>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>
export module host.std;
export import core.std;

export namespace std {
using std::abort;
using std::abs;
using std::aligned_alloc;
using std::back_inserter;
using std::basic_ostream;
using std::basic_string;
using std::calloc;
using std::char_traits;
using std::condition_variable;
using std::deque;
using std::erase;
using std::erase_if;
using std::exit;
using std::free;
using std::function;
using std::getline;
using std::hex;
using std::ifstream;
using std::ios;
using std::iota;
using std::is_sorted;
using std::istreambuf_iterator;
using std::istringstream;
using std::less;
using std::lock_guard;
using std::make_shared;
using std::make_unique;
using std::map;
using std::minstd_rand;
using std::mt19937;
using std::mt19937_64;
using std::multimap;
using std::mutex;
using std::next;
using std::next_permutation;
using std::ofstream;
using std::ostream;
using std::ostringstream;
using std::prev;
using std::replace;
using std::scoped_lock;
using std::set;
using std::shared_ptr;
using std::shuffle;
using std::sqrt;
using std::stoi;
using std::stoul;
using std::stoull;
using std::streamsize;
using std::string;
using std::strtoul;
using std::strtoull;
using std::thread;
using std::to_string;
using std::tuple_element;
using std::u16string;
using std::uniform_int_distribution;
using std::unique_lock;
using std::vector;
using std::operator>>;
using std::operator^=;
using std::operator|=;
using std::operator&=;
namespace chrono {
using std::chrono::duration;
using std::chrono::duration_cast;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;
using std::chrono::time_point;
using std::chrono::operator+;
using std::chrono::operator-;
using std::chrono::operator<;
using std::chrono::operator>;
} // namespace chrono
namespace this_thread {
using std::this_thread::sleep_for;
using std::this_thread::yield;
} // namespace this_thread
namespace ranges {
using std::ranges::begin;
using std::ranges::count;
using std::ranges::end;
using std::ranges::size;
} // namespace ranges
} // namespace std

// Operators of standard types are found by argument-dependent lookup from an importer only when they are exported.
export namespace std::inline __1 {
using std::__1::operator+;
using std::__1::operator-;
using std::__1::operator==;
using std::__1::operator<=>;
} // namespace std::inline __1

export using ::mallopt;
export inline constexpr int mmap_threshold = M_MMAP_THRESHOLD; // a parameter of mallopt()
