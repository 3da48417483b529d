"""One stage in a process of its own.

    python -m benchmarks.gpu.run_stage NAME --work FOLDER --seconds N

The last line that it prints goes into the table; the exit status is 0, 1, or `stages.SKIPPED`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import session
from benchmarks.gpu.context import Context, SkippedError, StageError
from benchmarks.gpu.stages import SKIPPED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run_stage")
    parser.add_argument("name")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    kind, *parts = options.name.split(":")
    context = Context(options.work, options.seconds, options.device, options.commit)
    try:
        _run(kind, parts, context)
    except SkippedError as reason:
        print(reason)
        return SKIPPED
    except StageError as error:
        print(error)
        return 1
    return 0


def _run(kind: str, parts: Sequence[str], context: Context) -> None:
    # Imported where needed: a stage must not fail for what another one needs.
    if kind == "info":
        from benchmarks.gpu.info import info

        info(context)
    elif kind == "build":
        from benchmarks.gpu.build import build

        build(context)
    elif kind == "check":
        from benchmarks.gpu.checks import check

        check(context, *parts)
    elif kind in session.SANITIZERS:
        from benchmarks.gpu.checks import sanitize

        sanitize(context, kind, *parts)
    elif kind == "tests":
        from benchmarks.gpu.checks import tests

        tests(context)
    elif kind == "bench":
        from benchmarks.gpu.bench import bench

        bench(context)
    elif kind == "floor":
        from benchmarks.gpu.floor import floor

        floor(context)
    elif kind == "profile":
        from benchmarks.gpu.profiling import profile

        profile(context)
    else:
        raise StageError(f"there is no stage {kind!r}")


if __name__ == "__main__":
    sys.exit(main())
