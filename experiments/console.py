"""Text on a terminal or in a file, as it is.

Names and labels are the user's. `Text` keeps Rich from reading markup, emoji codes or numbers into
them.
"""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.files import ERRORS, write_text


def new_console() -> Console:
    """Return a console on stdout; what its encoding lacks is printed as an escape."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=ERRORS)
    # Where nothing is wrapped by a terminal, tables need not be narrow either.
    return Console(width=None if sys.stdout.isatty() else 110)


def as_line(words: str) -> str:
    """Return ``words`` without line breaks and control characters: they become escapes."""
    breaks = ("Cc", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in breaks else c
        for c in words
    )


def as_text(words: str, style: str = "") -> Text:
    """Return one line for a table, or to print."""
    return Text(as_line(words), style)


def say(console: Console, words: str) -> None:
    """Print one line as it is; a path in it stays in one piece."""
    console.print(as_text(words), soft_wrap=True)


def say_items(console: Console, items: Sequence[str]) -> None:
    """Print a list, an item per line; a terminal gets it wrapped."""
    for item in items:
        console.print(as_text(f"  * {item}"), soft_wrap=not console.is_terminal)


def write_printed(path: Path, tell: Callable[[Console], None]) -> None:
    """Leave in a file what ``tell`` prints on a console."""
    target = io.StringIO()
    tell(Console(file=target, width=140, force_terminal=False))
    write_text(path, target.getvalue())


def new_table(title: str, caption: str) -> Table:
    """Return an empty table in the style of the laboratory."""
    return Table(
        title=as_text(title, "table.title"),
        caption=caption,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
