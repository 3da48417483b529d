"""Small stand-ins for the real kernels and compilers, so that the build tests take seconds."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

STUB_CPP = """
#include "value.h"
extern "C" __attribute__((visibility("default"))) int stub_value() { return STUB_VALUE; }
"""

STUB_CU = """
#include "value.h"
__global__ void fill(float* out, float value) { out[threadIdx.x] = value + STUB_VALUE; }
extern "C" int launch_fill(float* out) {
  fill<<<1, 32>>>(out, 1.0f);
  return static_cast<int>(cudaGetLastError());
}
"""

STUB_CUDA_BINDING = """
#include <cuda_runtime_api.h>
extern "C" int launch_fill(float* out);
extern "C" __attribute__((visibility("default"))) int stub_launch() { return launch_fill(nullptr); }
"""


def write_sources(folder: Path, *, value: int = 7, cuda: bool = False) -> Path:
    """Write a source tree laid out like csrc/, whose function ``stub_value`` returns ``value``."""
    (folder / "cpu").mkdir(parents=True, exist_ok=True)
    (folder / "stub.cpp").write_text(STUB_CPP)
    (folder / "value.h").write_text(f"#define STUB_VALUE {value}\n")
    (folder / "cpu" / "kernel.cpp").write_text("int kernel() { return 1; }\n")
    if cuda:
        (folder / "cuda").mkdir(exist_ok=True)
        (folder / "cuda" / "kernel.cu").write_text(STUB_CU)
        (folder / "cuda" / "binding.cpp").write_text(STUB_CUDA_BINDING)
    return folder


def stub_value(library: Path) -> int:
    return ctypes.CDLL(str(library)).stub_value()


def write_program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def write_logging_compiler(folder: Path) -> tuple[Path, Path]:
    """Write a compiler that logs each run and hands over to the real one; return it and its log.

    A run that starts while ``folder / "hang"`` exists compiles nothing and lasts until
    ``folder / "stuck"`` is gone.
    """
    real = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    log = folder / "compiler.log"
    log.touch()
    script = f"""
echo "$@" >> "{log}"
if [ -e "{folder}/hang" ] && [ "$1" != --version ]; then
  while [ -e "{folder}/stuck" ]; do sleep 0.05; done
  exit 1
fi
exec "{real}" "$@"
"""
    return write_program(folder / "logging-c++", script), log


def links(log: Path) -> int:
    """Count the runs of a logging compiler that linked a library: one for each build."""
    return sum(" -shared " in line for line in log.read_text().splitlines())
