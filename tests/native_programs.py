"""Programs around the kernels, without PyTorch: plain, under sanitizers, with planted defects."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Protocol

import pytest

from rnn_cuda.build import default_source_dir, find_cxx

TESTS = Path(__file__).parent
NATIVE, EMULATOR = TESTS / "native", TESTS / "emulator"

# Left out is what AddressSanitizer or the results show anyway; and its checks are calls: half the
# time to compile.
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize=null,pointer-overflow"]
UNDEFINED += ["-fno-sanitize-recover=undefined"]
ADDRESS = ["-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0"]
SANITIZERS = {
    "none": [],
    "address": [*ADDRESS, *UNDEFINED],
    "thread": ["-fsanitize=thread"],
}
SCHEDULES = ("ascending", "descending", "random:1", "starving:1")

# CUDA kernels are compiled as C++; -g1 names the lines in what sanitizers report. -O1 would take
# two to three times as long to compile, and little less to run.
EMULATED_OPTIONS = ["-x", "c++", "-std=c++17", "-O0", "-g1", "-DRNN_CUDA_EMULATED"]
EMULATED_OPTIONS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]

# Fresh memory is NaN, so that what is read before it is written shows in the results.
RUN_ENVIRONMENT = {
    "ASAN_OPTIONS": f"malloc_fill_byte=255:max_malloc_fill_size={1 << 30}",
    "TSAN_OPTIONS": "halt_on_error=1",
}


class Workshop:
    """Compiles and links, as many programs at a time as there are cores.

    Tasks wait for those they need, which must have been submitted before them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(os.cpu_count())

    @cached_property
    def emulator(self) -> list[Future[Path]]:
        """The emulator without sanitizers: it talks to them itself, if the program has one."""
        return [
            self.compile(
                source,
                f"emulator-{source.stem}",
                ["-std=c++17", "-O2", "-g1", "-DRNN_CUDA_EMULATED"],
            )
            for source in sorted(EMULATOR.glob("*.cpp"))
        ]

    def compile(
        self, source: Path, name: str, options: Iterable[str], headers: Path | None = None
    ) -> Future[Path]:
        def task() -> Path:
            target = self.folder / f"{name}.o"
            include = [f"-I{headers or default_source_dir()}", f"-I{TESTS}"]
            command = [find_cxx(), *options, *include, "-c", source, "-o", target]
            subprocess.run(command, check=True)
            return target

        return self.pool.submit(task)

    def link(self, name: str, objects: list[Future[Path]], options: Iterable[str]) -> Future[Path]:
        """Of an inline function that several objects hold, the program has the first one's."""

        def task() -> Path:
            target = self.folder / name
            files = [object_.result() for object_ in objects]
            command = [find_cxx(), *options, "-pthread", *files, "-o", target, "-ldl"]
            subprocess.run(command, check=True)
            return target

        return self.pool.submit(task)

    def link_emulated(
        self,
        name: str,
        objects: list[Future[Path]],
        sanitizer: str,
        emulator: list[Future[Path]] | None = None,
    ) -> Future[Path]:
        """With -rdynamic the emulator's errors can name kernels."""
        options = [*SANITIZERS[sanitizer], "-rdynamic"]
        return self.link(name, [*objects, *(emulator or self.emulator)], options)


def run(
    program: Path, *arguments: str, under: Iterable[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*under, program, *arguments],
        env=os.environ | RUN_ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=900,
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run where addresses are this random")
    return done


# ---- planted defects ----------------------------------------------------------------------------

# Compiling a kernel takes seconds, and a program for each defect took most of its time. So all
# defects are compiled into one program, and a variable of the environment chooses one when that
# starts (mutant schemata: Untch, Offutt & Harrold 1993).
PLANTED_HEADER = """
#pragma once
#include <cstdlib>
inline const char* const chosen_defect = std::getenv("RNN_CUDA_PLANTED");
inline const int planted_defect = chosen_defect == nullptr ? -1 : std::atoi(chosen_defect);
constexpr bool planted(int defect) {
  return !__builtin_is_constant_evaluated() && planted_defect == defect;
}
"""


class Defect(Protocol):
    """``right``, which stands in the file once, becomes ``wrong``.

    Where only a part of ``right`` is replaced, that is marked: ``first = «0»;``. What is replaced
    is a statement or an expression. Files are named as seen from the kernels' folder.
    """

    file: str
    right: str
    wrong: str


def plant(defects: dict[str, Defect], kernels: str, folder: Path) -> tuple[Path, list[str]]:
    """Copy the sources to ``folder``, with defects that wait to be chosen.

    Returns:
        The sources, and the options to compile them with.
    """
    sources = shutil.copytree(default_source_dir(), folder)
    places: dict[tuple[str, str], dict[int, str]] = {}
    for number, defect in enumerate(defects.values()):
        places.setdefault((defect.file, defect.right), {})[number] = defect.wrong
    for (file, right), choices in places.items():
        before, marked, after = re.fullmatch(
            "(.*)«(.*)»(.*)", right if "«" in right else f"«{right}»", re.DOTALL
        ).groups()
        path = sources / kernels / file
        text = path.read_text()
        assert text.count(before + marked + after) == 1, right
        changed = before + _choice(marked, choices) + after
        path.write_text(text.replace(before + marked + after, changed))
    header = sources / "planted.h"
    header.write_text(PLANTED_HEADER)
    return sources, ["-w", "-include", str(header)]


def _choice(right: str, choices: dict[int, str]) -> str:
    code = right.partition("//")[0].rstrip()
    if code.endswith((";", "}")):
        wrong = "".join(f"if (planted({n})) {{ {text}\n}} else " for n, text in choices.items())
        return f"{{ {wrong}{{ {right}\n}} }}"
    wrong = "".join(f"planted({number}) ? ({text}) : " for number, text in choices.items())
    return f"({wrong}({right}))"


def run_with_defect(
    program: Path, defects: dict[str, Defect], name: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return run(program, *arguments, RNN_CUDA_PLANTED=str(list(defects).index(name)))
