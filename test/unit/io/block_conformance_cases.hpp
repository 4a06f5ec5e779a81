// The fixtures of the conformance suite: what a case needs of a rig. Include after unit/io/block_conformance.hpp.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

namespace fl::test::conformance {

class BlockConformance : public testing::TestWithParam<const Make*> {
  public:
    static bool fits(const Facts&) { return true; }
    static const Facts& facts() { return GetParam()->facts; }
};
class BlockConformanceHeld : public BlockConformance {
  public:
    static bool fits(const Facts& f) { return f.holds; }
};
class BlockConformanceParts : public BlockConformance {
  public:
    static bool fits(const Facts& f) { return f.retries && f.part_bytes != 0 && f.capacity >= 3; }
};
class BlockConformanceGather : public BlockConformance {
  public:
    static bool fits(const Facts& f) { return f.gathers && !f.copies; }
};
class BlockConformanceIds : public BlockConformance {
  public:
    static bool fits(const Facts& f) { return f.ids; }
};
class BlockConformanceEvents : public BlockConformance {
  public:
    static bool fits(const Facts& f) { return f.events; }
};
class BlockConformanceResets : public BlockConformance {
  public:
    static bool fits(const Facts& f) { return f.resets; }
};
class BlockConformanceStop : public BlockConformance {
  public:
    static bool fits(const Facts& f) { return f.stoppable; }
};
class BlockConformanceExchanges : public BlockConformance {
  public:
    static bool fits(const Facts& f) { return f.exchanges != 0; }
};
class BlockConformanceFaults : public BlockConformance {
  public:
    static bool fits(const Facts& f) { return !f.faults.empty(); }
};
class BlockConformanceElsewhere : public BlockConformance {
  public:
    static bool fits(const Facts& f) { return f.elsewhere; }
};
class BlockConformanceLanes : public BlockConformance {
  public:
    static bool fits(const Facts& f) { return f.lanes > 1; }
};

} // namespace fl::test::conformance
