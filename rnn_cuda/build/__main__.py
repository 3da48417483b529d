"""The command line of the build.

    python -m rnn_cuda.build               compile now, print the library's path
    python -m rnn_cuda.build --info        versions, flags, cache, backend in use
    python -m rnn_cuda.build --clean       remove what is cached
    python -m rnn_cuda.build --check-cuda  compile the CUDA kernels, fail on spilled registers

RNN_CUDA_BACKEND=emulated chooses the CUDA kernels that run on the CPU, for tests.
"""

from __future__ import annotations

import argparse
import sys

import torch

import rnn_cuda
from rnn_cuda import backend
from rnn_cuda.build.cache import build, clean, state_of
from rnn_cuda.build.check_cuda import check_cuda
from rnn_cuda.build.recipe import Recipe, default_cache_dir, default_source_dir
from rnn_cuda.build.toolchain import BuildError, find_ninja


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, 0 for success."""
    parser = argparse.ArgumentParser(
        prog="python -m rnn_cuda.build",
        description="Compile rnn_cuda's kernels and keep them in the cache, or look after them.",
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--info", action="store_true", help="show what was found and chosen")
    actions.add_argument("--clean", action="store_true", help="remove what is cached")
    actions.add_argument(
        "--check-cuda",
        action="store_true",
        help="compile the CUDA kernels for every architecture, link and load them; fail on spilled "
        "registers",
    )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.info:
            return _info()
        if chosen.clean:
            return _clean()
        if chosen.check_cuda:
            return check_cuda(default_source_dir())
        recipe = _recipe()
        if recipe.cuda and recipe.cuda_note:
            print(f"rnn_cuda: {recipe.cuda_note}", file=sys.stderr)
        print(build(recipe))
    except (BuildError, ValueError) as error:
        print(f"rnn_cuda: {error}", file=sys.stderr)
        return 1
    return 0


def _recipe() -> Recipe:
    return Recipe.create(kernels="emulated" if backend.requested() == "emulated" else "auto")


def _clean() -> int:
    removed = clean()
    for path in removed:
        print(f"removed {path}")
    if not removed:
        print(f"nothing to remove in {default_cache_dir()}")
    return 0


def _info() -> int:
    rows = {
        "rnn_cuda": rnn_cuda.__version__,
        "torch": f"{torch.__version__} (git {torch.version.git_version[:10]})",
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "sources": str(default_source_dir()),
        "cache": str(default_cache_dir()),
    }
    choice = backend.requested()
    try:
        recipe = _recipe()
        rows |= _describe(recipe)
        on_cpu = "native"
        on_cuda = "native" if recipe.cuda else f"reference ({recipe.cuda_note})"
    except BuildError as error:
        on_cpu = on_cuda = f"reference ({error})"
    if choice == "reference":
        on_cpu = on_cuda = "reference"
    elif choice != "auto":
        on_cpu, on_cuda = (side.replace("reference", "an error") for side in (on_cpu, on_cuda))
    if choice == "emulated":
        on_cpu = on_cpu.replace("native", "the CUDA kernels, emulated")
    rows |= {"RNN_CUDA_BACKEND": choice, "CPU tensors use": on_cpu, "CUDA tensors use": on_cuda}
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
    return 0


def _describe(recipe: Recipe) -> dict[str, str]:
    tools, cuda = recipe.toolchain, recipe.cuda
    rows = {
        "C++ compiler": f"{tools.cxx} ({tools.cxx_version})",
        "ninja": str(find_ninja()),
        "nvcc": f"{cuda.nvcc} ({cuda.version})" if cuda else f"not used: {recipe.cuda_note}",
        "C++ flags": " ".join(recipe.cxx_flags),
        "link flags": " ".join(recipe.link_flags),
    }
    if cuda:
        rows["CUDA headers"] = str(cuda.include)
        rows["CUDA runtime"] = str(cuda.library / "libcudart_static.a")
        rows["CUDA targets"] = " ".join(cuda.archs)
        if recipe.cuda_note:
            rows["left out"] = recipe.cuda_note
    return rows | {"key": recipe.key, "library": f"{recipe.library} ({state_of(recipe.library)})"}


if __name__ == "__main__":
    sys.exit(main())
