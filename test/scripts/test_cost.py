"""scripts/firstlight/cost.py and counts.py: what the plugin writes is read strictly, and divided among parties, functions and workloads."""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from firstlight import cost, counts
from firstlight.problems import Problem
from firstlight.workloads import Workload

COUNTS = """section
vmm 900
kernel 90
kvm 9
0xffffffff80000000 1000
section
vmm 200
kernel 20
kvm 40
guest 7
0xffffffff80000000 10
0xffffffff80000004 10
0xffffffff80000010 30
section
vmm 5
kernel 5
kvm 5
guest 5
"""
LISTING = """ffffffff80000000 T fl::io::Ring@io.ring<int, fl::Map<u32>>::add(std::__1::span<int>)
ffffffff80000008 d fl::data
ffffffff80000010 t fl::boot::(anonymous namespace)::mark_phase(unsigned int)
ffffffff80000020 T fl::operator<=>(int, int) (.llvm.4234803394322806550)
"""
RESULT = {"driver": "storvsc", "errors": 0, "runtime_ns": 320}
WORKLOAD = Workload("randread", "4k", 32, 10)


class Counts(unittest.TestCase):
    def measured(self, text=COUNTS, results=(RESULT,)):
        return cost.costs("storvsc", [WORKLOAD], counts.workload_sections(counts.read_sections(text), 1), results)

    def test_a_workload_is_between_its_marks(self):
        (found,) = self.measured()
        self.assertEqual(found.per_io, {"guest": 5.7, "vmm": 20.0, "kernel": 2.0, "kvm": 4.0})
        row = cost.table([found]).splitlines()[1].split()
        self.assertEqual(row, ["storvsc-randread-4k-qd32", "6", "4", "2", "20", "26", "32", "18.0%", "99.1%"])

    def test_another_number_of_marks_is_an_error(self):
        for text in (COUNTS + "section\n", COUNTS[: COUNTS.rindex("section")]):
            with self.assertRaisesRegex(Problem, "sections of counts"):
                self.measured(text)

    def test_results_must_be_of_the_driver_and_without_errors(self):
        for change in ({"driver": "ata"}, {"errors": 1}):
            with self.assertRaisesRegex(Problem, "were expected"):
                self.measured(results=[RESULT | change])
        with self.assertRaisesRegex(Problem, "0 results"):
            self.measured(results=[])

    def test_a_damaged_file_is_an_error(self):
        for damage in ("vmm 1\nsection\n", "section\nvmm\n", "section\nvmm -1\n", "section\nothers 1\n", "section\n0xg 1\n"):
            with self.assertRaisesRegex(Problem, "of the counts is"):
                counts.read_sections(damage)

    def test_functions(self):
        symbols = counts.Symbols(LISTING)
        (found,) = self.measured()
        self.assertEqual(list(cost.by_function(found.section, symbols).items()), [("boot::mark_phase(unsigned int)", 30), ("io::Ring::add(std::span)", 20)])
        self.assertEqual(symbols.address(counts.MARK), 0xFFFFFFFF80000010)
        self.assertEqual(symbols.name(0xFFFFFFFF80000020), "operator<=>(int, int)")
        self.assertEqual(symbols.name(0x1000), "?")
        with self.assertRaisesRegex(Problem, "0 functions"):
            symbols.address("nothing(")

    def test_the_image_is_all_of_its_segments(self):
        headers = "  LOAD  0x001000 0xffffffff80000000 0x0000000000200000 0x0c9053 0x0c9053 R E 0x1000\n  LOAD  0x0e7000 0xffffffff800e6000 0x00000000002e6000 0x0013f0 0x101f90 RW  0x1000\n"
        self.assertEqual(counts.image_range(headers), (0xFFFFFFFF80000000, 0xFFFFFFFF801E7F90))

    def test_a_bound_is_for_the_guest_alone(self):
        (found,) = self.measured()
        found.section.addresses[0xFFFFFFFF80000000] = 10 * cost.BOUNDS[found.label] - 47
        self.assertEqual(cost.beyond_bound(found), "")
        found.section.addresses[0xFFFFFFFF80000000] += 1
        self.assertIn("instructions per I/O", cost.beyond_bound(found))

    def test_each_workload_has_a_bound(self):
        drivers = [cost.DRIVERS[bus].name for bus in cost.PLATFORMS]
        self.assertEqual(set(cost.BOUNDS), {f"{driver}-{workload.label}" for driver in drivers for workload in cost.WORKLOADS})


if __name__ == "__main__":
    unittest.main()
