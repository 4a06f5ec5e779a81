"""The suite `tidy`: an injected fault is found with the project's configuration, and a run that checked nothing does not pass."""

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from firstlight import paths, tidy
from firstlight.problems import Problem

USED_AFTER_MOVE = """
struct Buffer { Buffer(); Buffer(Buffer&&); ~Buffer(); int size() const; };
namespace std { template <class T> T&& move(T& t) { return static_cast<T&&>(t); } }
void take(Buffer buffer);
int fault(Buffer buffer) {
    take(std::move(buffer));
    return buffer.size();
}
"""
REDUNDANT = "bool fault(int a) { return a == 1 || a == 1; }\n"


class Tidy(unittest.TestCase):
    def found(self, source: str):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "planted.cpp"
            file.write_text(source)
            configuration = paths.REPOSITORY / ".clang-tidy"
            done = subprocess.run([tidy.TOOL, f"--config-file={configuration}", "--quiet", file, "--", "-std=c++20"], capture_output=True, text=True, timeout=60)
        return tidy.judged("tidy/planted", done.returncode, done.stdout, 0)

    def test_planted_faults_are_found(self):
        for source, name in ((USED_AFTER_MOVE, "bugprone-use-after-move"), (REDUNDANT, "misc-redundant-expression")):
            result = self.found(source)
            self.assertEqual(result.status, "failed", result.output)
            self.assertIn(name, result.detail)

    def test_what_is_right_passes(self):
        self.assertEqual(self.found("bool right(int a) { return a == 1 || a == 2; }\n").status, "passed")

    def test_a_tool_that_failed_is_a_failure(self):
        self.assertEqual(tidy.judged("tidy/x", 1, "", 0).status, "failed")
        self.assertIn("exit status 1", tidy.judged("tidy/x", 1, "", 0).detail)

    def test_units_are_those_of_the_build(self):
        with tempfile.TemporaryDirectory() as folder:
            build = Path(folder)
            with self.assertRaisesRegex(Problem, "cmake --preset host"):
                tidy.commands(build)
            (build / "compile_commands.json").write_text('[{"file": "/elsewhere/a.cpp"}]')
            with self.assertRaisesRegex(Problem, "no implementation unit"):
                tidy.commands(build)
            unit = paths.REPOSITORY / "src" / "io" / "executor.cpp"
            (build / "compile_commands.json").write_text(f'[{{"file": "{unit}"}}, {{"file": "{unit}m"}}]')
            self.assertEqual(list(tidy.commands(build)), [unit])

    def test_each_unit_is_checked_by_one_command(self):
        with tempfile.TemporaryDirectory() as folder:
            unit = str(paths.REPOSITORY / "src" / "io" / "executor.cpp")
            entries = [{"file": unit, "output": f"test/model/CMakeFiles/{name}.dir/executor.cpp.o", "command": name} for name in ("executor_threads", "firstlight_host", "other")]
            (Path(folder) / "compile_commands.json").write_text(json.dumps(entries))
            self.assertEqual([entry["command"] for entry in tidy.commands(Path(folder)).values()], ["firstlight_host"])
            (Path(folder) / "compile_commands.json").write_text(json.dumps(entries[2:] + entries[:1]))
            self.assertEqual(len(tidy.commands(Path(folder))), 1)


if __name__ == "__main__":
    unittest.main()
