"""Compile the kernels in ``csrc/`` on first use, and keep the library in a per-user cache.

``recipe.py`` says what is compiled with which flags, ``cache.py`` compiles it once,
``toolchain.py`` and ``cuda_toolchain.py`` find the compilers. ``python -m rnn_cuda.build`` is the
command line.
"""

from rnn_cuda.build.cache import build, clean
from rnn_cuda.build.cuda_toolchain import CudaToolchain, find_cuda
from rnn_cuda.build.recipe import Recipe, default_source_dir
from rnn_cuda.build.toolchain import (
    BuildError,
    CompilerNotFoundError,
    Toolchain,
    find_cxx,
    torch_cxx_standard,
    torch_include_dirs,
)

__all__ = [
    "BuildError",
    "CompilerNotFoundError",
    "CudaToolchain",
    "Recipe",
    "Toolchain",
    "build",
    "clean",
    "default_source_dir",
    "find_cuda",
    "find_cxx",
    "torch_cxx_standard",
    "torch_include_dirs",
]
