"""Compile the kernels in ``csrc/`` on first use, and keep the library in a per-user cache."""

from rnn_cuda.build.cache import build, clean
from rnn_cuda.build.recipe import BuildPlan, default_source_dir
from rnn_cuda.build.toolchain import (
    BuildError,
    CompilerNotFoundError,
    CudaToolchain,
    Toolchain,
    find_cuda,
    find_cxx,
    torch_cxx_standard,
    torch_include_dirs,
)

__all__ = [
    "BuildError",
    "BuildPlan",
    "CompilerNotFoundError",
    "CudaToolchain",
    "Toolchain",
    "build",
    "clean",
    "default_source_dir",
    "find_cuda",
    "find_cxx",
    "torch_cxx_standard",
    "torch_include_dirs",
]
