"""The command line of `experiments.report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.report import ReportError, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Make one page, and a CSV, from any set of records.",
    )
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="+",
        type=Path,
        help="of a study, a sweep or a run, or one with any of these below it",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="the page, HTML or FILE.md; report.html in the first FOLDER",
    )
    options = parser.parse_args(arguments)
    try:
        files = write(options.folders, options.output)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in files:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
