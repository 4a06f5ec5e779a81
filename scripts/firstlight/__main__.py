"""python3 scripts/firstlight COMMAND …: entry point of the scripts of the same names."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from firstlight import launch, paths  # noqa: E402
from firstlight.problems import Exit, Problem  # noqa: E402

COMMANDS = {"run": "run", "bench": "bench", "cost": "cost", "test": "testing", "setup": "setup", "outputs": "outputs", "script-tests": "scripttests"}


def main() -> int:
    launch.die_on_signals()
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return Exit.USAGE
    name, words = sys.argv[1], sys.argv[2:]
    try:
        return int(importlib.import_module(f"firstlight.{COMMANDS[name]}").main(words))
    except Problem as problem:
        print(f"scripts/{name}: {problem}", file=sys.stderr)
        return problem.code
    except KeyboardInterrupt:
        print(f"scripts/{name}: interrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.INTERRUPTED
    except OSError as error:
        print(f"scripts/{name}: {paths.explain(error)}", file=sys.stderr)
        return Exit.ERROR
    except Exception:
        # Python's own exit status would be 1, which means that a test failed.
        traceback.print_exc()
        print(f"scripts/{name}: a fault of the script itself, see above", file=sys.stderr)
        return Exit.ERROR


if __name__ == "__main__":
    sys.exit(main())
