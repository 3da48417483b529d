"""Defects planted in the kernels' sources, many in one program.

Compiling a kernel takes seconds, and a program for each defect took most of its time. So all
edits are compiled into one program, and ``RNN_CUDA_PLANTED`` chooses one when that starts (mutant
schemata: Untch, Offutt & Harrold 1993).
"""

import re
from pathlib import Path
from typing import Protocol

HEADER = """
#pragma once
#include <cstdlib>
inline const int planted_defect = std::atoi(std::getenv("RNN_CUDA_PLANTED"));
constexpr bool planted(int defect) {
  return !__builtin_is_constant_evaluated() && planted_defect == defect;
}
"""


class Edit(Protocol):
    """``right``, which stands in the file once, becomes ``wrong``.

    Where only a part of ``right`` is replaced, that is marked: ``first = «0»;``. What is replaced
    is a statement or an expression.
    """

    file: str
    right: str
    wrong: str


def plant(folder: Path, edits: dict[int, Edit]) -> list[str]:
    """Edit the sources in ``folder``; return the options to compile them with."""
    places: dict[tuple[str, str], dict[int, str]] = {}
    for number, edit in edits.items():
        places.setdefault((edit.file, edit.right), {})[number] = edit.wrong
    for (file, right), choices in places.items():
        before, marked, after = re.fullmatch(
            "(.*)«(.*)»(.*)", right if "«" in right else f"«{right}»", re.DOTALL
        ).groups()
        text = (folder / file).read_text()
        assert text.count(before + marked + after) == 1, right
        planted = before + _choice(marked, choices) + after
        (folder / file).write_text(text.replace(before + marked + after, planted))
    (folder / "planted.h").write_text(HEADER)
    return ["-w", "-include", str(folder / "planted.h")]


def _choice(right: str, choices: dict[int, str]) -> str:
    code = right.partition("//")[0].rstrip()
    if code.endswith((";", "}")):
        wrong = "".join(f"if (planted({n})) {{ {text}\n}} else " for n, text in choices.items())
        return f"{{ {wrong}{{ {right}\n}} }}"
    wrong = "".join(f"planted({number}) ? ({text}) : " for number, text in choices.items())
    return f"({wrong}({right}))"
