// GoogleTest as a module: a test imports it and includes "gtest_macros.hpp", which has the macros. Parsing GoogleTest's
// headers took four of the five seconds that most tests took to compile.
module;
// All headers that gtest.h includes, so that their contents do not become part of this module.
#include <cassert>
#include <cctype>
#include <cerrno>
#include <climits>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <cwchar>
#include <cxxabi.h>
#include <fcntl.h>
#include <float.h>
#include <functional>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <limits>
#include <locale>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <ostream>
#include <pthread.h>
#include <regex.h>
#include <set>
#include <signal.h>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <strings.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <tuple>
#include <type_traits>
#include <typeinfo>
#include <unistd.h>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>
#include <version>
export module test.gtest;
import host.std;

// For what GoogleTest prints.
export namespace std {
using std::operator<<;
}
// Of the global module: its library is compiled without modules.
#pragma clang diagnostic ignored "-Winclude-angled-in-module-purview"
export extern "C++" {
#include <gtest/gtest.h>
}
