"""What scripts/run --gdb does before QEMU starts, and how a gdb session is judged."""

import contextlib
import io
import socket
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from firstlight import debugger, paths, run  # noqa: E402
from firstlight.problems import Exit, Problem  # noqa: E402


class Port(unittest.TestCase):
    def test_one_that_is_taken_is_found_before_anything_is_done(self):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            for words in (["--gdb", "--gdb-port", str(port)], ["--gdb"]):
                with (
                    mock.patch.object(run.setup, "ensure", side_effect=AssertionError("too late")),
                    mock.patch.object(debugger, "PORT", port),
                    contextlib.redirect_stderr(io.StringIO()) as said,
                    self.assertRaises(Problem) as refused,
                ):
                    run.main(words)
                self.assertIs(refused.exception.code, Exit.ERROR)
                self.assertIn(f"port {port} of this machine cannot be used", str(refused.exception))
                self.assertIn("--gdb-port", str(refused.exception))
                self.assertNotIn("QEMU waits", said.getvalue())
        debugger.demand_free(port)

    def test_no_port_at_all(self):
        for words in (["--gdb", "--gdb-port", "0"], ["--gdb", "--gdb-port", "65536"], ["--gdb-port", "1234"]):
            with mock.patch.object(run.setup, "ensure", side_effect=AssertionError("too late")), self.assertRaises(Problem) as refused:
                run.main(words)
            self.assertIs(refused.exception.code, Exit.USAGE, words)

    def test_qemu_and_gdb_get_the_same(self):
        self.assertEqual(debugger.qemu_words(4321), ["-gdb", "tcp:127.0.0.1:4321", "-S"])
        self.assertEqual(debugger.command(paths.KERNEL, 4321)[-1], "target remote localhost:4321")

    def test_the_symbols_are_those_of_the_kernel_that_is_booted(self):
        with tempfile.TemporaryDirectory() as folder:
            kernel = Path(folder) / "other.elf"
            self.assertIn(str(kernel), debugger.command(kernel, 1))
            (Path(folder) / "other.debug.elf").write_bytes(b"")
            self.assertIn(str(Path(folder) / "other.debug.elf"), debugger.command(kernel, 1))


class Sessions(unittest.TestCase):
    """A correct session, and one fault at a time."""

    SOURCE = "".join(f"line {number}\n" for number in range(1, 8)) + "[[noreturn]] void kernel_start(BootInfo& info) {\n    first();\n"
    FRAME = "#0  fl::boot::kernel_start (info=...) at ./src/a.cpp:9\n"
    ENTRY = "#1  0xffffffff800000f2 in pvh_entry32 () at ./src/pvh.S:114\n"
    ANSWERS = (
        "Breakpoint 1 at 0xffffffff80045e9d: file ./src/a.cpp, line 9.\n",
        "\nThread 1 hit Breakpoint 1, fl::boot::kernel_start (info=...) at ./src/a.cpp:9\n9\t    first();\n",
        "4\tline 4\n5\tline 5\n6\tline 6\n7\tline 7\n8\t[[noreturn]] void kernel_start(BootInfo& info) {\n9\t    first();\n",
        "10\t    second();\n",
        "fl::second () at src/b.cppm:1\n1\tx\n",
        FRAME + ENTRY,
        "",
        "Breakpoint 2 at 0x1: file ./src/t.cpp, line 277.\n",
        "\nBreakpoint 2, interrupt_raised (vector=48) at ./src/t.cpp:277\n277\t    x\n",
        "#0  interrupt_raised (vector=48) at ./src/t.cpp:277\n#1  <signal handler called>\n" + FRAME.replace("#0 ", "#2 ") + ENTRY.replace("#1 ", "#3 "),
        "\nThread 2 (Thread 1.2 (CPU#1 [halted ])):\n#0  fl::rest (a=<optimized out>) at x:1\n#1  0x1 in processor_entry () at s.S:95\n"
        "\nThread 1 (Thread 1.1 (CPU#0 [running])):\n" + FRAME + ENTRY,
    )

    def complaints(self, **changed):
        answers = [changed.get(f"at{number}", answer) for number, answer in enumerate(self.ANSWERS)]
        said = "0x000000000000fff0 in ?? ()\n" + "".join(f"{debugger.MARK}{typed}\n{answer}" for typed, answer in zip(debugger.TYPED, answers))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "src").mkdir()
            (Path(folder) / "src/a.cpp").write_text(self.SOURCE)
            return debugger.complaints(said, "pvh_entry32", 2, Path(folder))

    def test_right(self):
        self.assertEqual(self.complaints(), [])

    def test_wrong(self):
        unknown = "#2  0x0000000000000000 in ?? ()\n"
        for number, answer, wanted in (
            (0, 'Function "fl::boot::kernel_start" not defined.\n', "no breakpoint by plain name"),
            (0, "Breakpoint 1 at 0x1: file build/kernel/src/a.cpp, line 9.\n", "no breakpoint by plain name"),
            (1, "\nProgram received signal SIGINT\n", "did not stop there"),
            (1, self.ANSWERS[1].replace(":9\n", ":8\n"), "did not stop there"),
            (2, "454\tbuild/kernel/src/a.cpp: No such file or directory.\n", "the lines listed are not those"),
            (2, self.ANSWERS[2].replace("line 5", "line five"), "the lines listed are not those"),
            (3, "0x0000000000000001 in ?? ()\n", "next showed no line"),
            (4, "", "step showed no line"),
            (5, self.ANSWERS[5] + unknown, "the backtrace of kernel_start is"),
            (5, self.FRAME + "#1  0x0000000000000001 in ?? ()\n" + self.ENTRY.replace("#1 ", "#2 "), "the backtrace of kernel_start is"),
            (5, self.FRAME, "the backtrace of kernel_start is fl::boot::kernel_start;"),
            (5, self.ENTRY, "the backtrace of kernel_start is pvh_entry32;"),
            (5, "", "the backtrace of kernel_start is empty"),
            (8, "[Inferior 1 (process 1) exited]\n", "did not stop at an interrupt"),
            (9, "#0  interrupt_raised (vector=48) at x:1\n#1  <signal handler called>\n", "the backtrace of an interrupt is"),
            (9, self.ANSWERS[9].replace("<signal handler called>", "0x1 in interrupt_common () at t.S:9"), "not marked as one"),
            (10, self.ANSWERS[10].replace("processor_entry", "??"), "the backtrace of processor 2 is"),
            (10, self.ANSWERS[10].partition("\nThread 1 ")[0], "1 processors have a backtrace, 2 expected"),
        ):
            (complaint,) = self.complaints(**{f"at{number}": answer})
            self.assertIn(wanted, complaint)

    def test_a_command_that_was_not_carried_out(self):
        with self.assertRaises(Problem):
            debugger.complaints(f"{debugger.MARK}{debugger.TYPED[0]}\nx\n", "pvh_entry32", 1, Path("/"))

    def test_without_gdb_nothing_counts_as_passed(self):
        with mock.patch.object(debugger.shutil, "which", return_value=None):
            results = list(debugger.checks())
        self.assertEqual([(result.name, result.status) for result in results], [(f"gdb/{name}", "failed") for name in ("pvh", "uefi", "names")])
        self.assertIn("gdb: not found, so nothing was tried", results[0].output)


if __name__ == "__main__":
    unittest.main()
