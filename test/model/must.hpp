// Runs a relacy suite through all schedules found by its search and then through random ones, and compares the result
// with the expectation: an unmodified property must hold, one with a weakened ordering must not. Include after
// <relacy/relacy.hpp>.
#pragma once
#include <iostream>
#include <sstream>
#include <string_view>

namespace model {

struct Way {
    rl::scheduler_type_e scheduler;
    rl::iteration_t iterations;
};
inline constexpr Way ways[] = {
    {rl::fair_full_search_scheduler_type, 20'000'000},
    {rl::random_scheduler_type, 100'000},
};

inline int failures = 0;

template <class Test>
void must(bool pass, std::string_view what) {
    bool passed = true;
    rl::iteration_t schedules = 0;
    std::ostringstream report;
    for (const Way& way : ways) {
        rl::test_params params;
        params.search_type = way.scheduler;
        params.iteration_count = way.iterations;
        params.output_stream = &report;
        params.progress_stream = &report;
        passed = rl::simulate<Test>(params) && passed;
        schedules += params.stop_iteration;
        if (passed && way.scheduler == rl::fair_full_search_scheduler_type && params.stop_iteration >= way.iterations) {
            std::cout << "the search was cut short: not every schedule was seen\n";
            ++failures;
        }
        if (!passed) {
            break;
        }
    }
    const bool as_expected = passed == pass;
    std::cout << (as_expected ? "ok      " : "NOT OK  ") << what << ": " << (passed ? "holds" : "violated") << " ("
              << schedules << " schedules)\n"
              << std::flush;
    if (!as_expected) {
        std::cout << report.str().substr(0, 8000) << '\n';
        ++failures;
    }
}

inline int verdict() {
    std::cout << (failures == 0 ? "all as expected\n" : "some were not as expected\n");
    return failures == 0 ? 0 : 1;
}

} // namespace model
