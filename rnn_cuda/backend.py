"""Which implementation runs: the compiled kernels ("native") or plain PyTorch ("reference").

The environment variable RNN_CUDA_BACKEND chooses, and :func:`use` overrides it for a while:

    auto       kernels where they can be compiled, else the reference with one warning (default)
    native     kernels, or an error
    emulated   the CUDA kernels, executed on CPU tensors by an emulator, or an error: slow, for
               tests of the CUDA path on machines without a GPU, in a process of their own, from a
               clone of the repository
    reference  plain PyTorch; nothing is compiled

The kernels are compiled and loaded when an operation first asks for them, never on import.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rnn_cuda import operators

BACKENDS = ("auto", "native", "emulated", "reference")
"""Values of RNN_CUDA_BACKEND and arguments of :func:`use`."""

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes that the kernels are compiled for."""


class BackendWarning(UserWarning):
    """Operations run on the reference, although kernels would be faster."""


class NativeBackendError(RuntimeError):
    """Kernels were asked for ("native", "emulated") and there are none; the message says why."""


# A plain global and not a context variable: autograd runs backward passes in threads of its own,
# which would not see the caller's context.
_override: str | None = None
# Keyed by override, device type and dtype.
_decisions: dict[tuple[str | None, str, torch.dtype], bool] = {}

_lock = threading.RLock()
_library: Path | None = None
_is_emulated = False  # the library
_failures: dict[bool, str] = {}  # by whether the library was to be emulated
_no_cuda_reason = ""
_warned: set[str] = set()


def requested() -> str:
    """Return the backend asked for: :func:`use`'s, else RNN_CUDA_BACKEND's, else ``"auto"``.

    Raises:
        ValueError: RNN_CUDA_BACKEND is none of :data:`BACKENDS`.
    """
    if _override is not None:
        return _override
    return _checked(os.environ.get("RNN_CUDA_BACKEND") or "auto", "RNN_CUDA_BACKEND")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, but is {name!r}")
    return name


def use_native(device_type: str, dtype: torch.dtype) -> bool:
    """Decide whether an operation on tensors of this kind runs on the kernels.

    The first call compiles and loads them. The decision is kept: a later change of the
    environment needs :func:`reset`.

    Args:
        device_type: as in ``tensor.device.type``.
        dtype: the tensors' dtype.

    Raises:
        ValueError: RNN_CUDA_BACKEND has an unknown value.
        NativeBackendError: the backend is "native" or "emulated" and there are no kernels for
            these tensors.
    """
    key = (_override, device_type, dtype)
    # In a traced function the table of decisions would be a guard, and its first entry a reason to
    # compile once more.
    if torch.compiler.is_compiling():
        return _decide(*key)
    decision = _decisions.get(key)
    if decision is None:
        decision = _decide(*key)
        _decisions[key] = decision
    return decision


def _decide(override: str | None, device_type: str, dtype: torch.dtype) -> bool:
    choice = override or requested()
    problem = None if choice == "reference" else _why_not_native(device_type, dtype, choice)
    if problem is not None:
        _report(problem, choice)
    return choice != "reference" and problem is None


def takes_gated_cells(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the kernels for these tensors take cells with several sums: those of CPUs do."""
    return device_type in ("cpu", "meta") and use_native(device_type, dtype) and not _is_emulated


# torch.compile calls this while it traces, instead of tracing into the build; its guard on the
# override traces again when the backend changes. The public spelling of this mark,
# torch.compiler.assume_constant_result, imports all of Dynamo, which takes seconds.
_decide._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def run_on_reference(problem: str) -> None:
    """Raise or warn if anything but the reference was asked for, and ``problem`` rules it out."""
    if requested() != "reference":
        _report(problem, requested())


run_on_reference._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _report(problem: str, choice: str) -> None:
    """Raise if kernels were asked for, else warn, once in this process for each problem."""
    if choice != "auto":
        raise NativeBackendError(f"The backend asked for is {choice!r}, but {problem}")
    _warn_once(
        f"rnn_cuda runs on the slower plain-PyTorch reference: {problem}\n"
        "(RNN_CUDA_BACKEND=reference silences this)"
    )


def _warn_once(message: str) -> None:
    with _lock:
        if message not in _warned:
            _warned.add(message)
            warnings.warn(message, BackendWarning, stacklevel=3)


def _why_not_native(device_type: str, dtype: torch.dtype, choice: str) -> str | None:
    """Return what stands against the kernels for such tensors, or None."""
    if dtype not in NATIVE_DTYPES:
        return f"there are no kernels for {dtype}"
    if problem := load_library(emulated=choice == "emulated"):
        return problem
    if not _has_kernels(device_type):
        reason = f": {_no_cuda_reason}" if device_type == "cuda" else ""
        return f"there are no kernels for {device_type} tensors{reason}"
    # Where a CUDA tensor is traced without a GPU, there is no device to ask.
    if device_type == "cuda" and torch.cuda.is_initialized():
        return _why_not_on_this_device()
    return None


def _why_not_on_this_device() -> str | None:
    """Return why the current GPU cannot run the CUDA kernels, or None; it is asked once."""
    try:
        torch.ops.rnn_cuda.cuda_device_figures(torch.cuda.current_device())
    except RuntimeError as error:
        return str(error)
    return None


def load_library(*, emulated: bool = False) -> str | None:
    """Compile and load the library unless that was tried; return why it failed, or None."""
    global _library, _is_emulated, _no_cuda_reason
    with _lock:
        if _library is None and emulated not in _failures:
            from rnn_cuda.build import BuildError

            try:
                library, _no_cuda_reason = _build_and_load(emulated)
                operators.register()
                _library, _is_emulated = library, emulated
            except BuildError as error:
                _failures[emulated] = str(error)
            except OSError as error:
                _failures[emulated] = f"the compiled library cannot be loaded: {error}"
        if _library is not None and _is_emulated != emulated:
            have, want = ("emulated", "native") if _is_emulated else ("native", "emulated")
            return f"this process has loaded the {have} kernels; the {want} ones need another"
        return _failures.get(emulated)


def _build_and_load(emulated: bool) -> tuple[Path, str]:
    """Load a library; return it and why it has no CUDA kernels (nothing if it has them).

    If the CUDA kernels fail, the CPU kernels are built alone.
    """
    from rnn_cuda.build import BuildError, CompilerNotFoundError, Recipe, build

    recipe = Recipe.create(kernels="emulated" if emulated else "auto")
    note = recipe.cuda_note
    try:
        library = _loaded(build(recipe))
    except CompilerNotFoundError:
        raise
    except (BuildError, OSError) as error:
        if recipe.cuda is None:
            raise
        library = _loaded(build(Recipe.create(kernels="cpu")))
        problem = "do not compile" if isinstance(error, BuildError) else "cannot be loaded"
        _warn_once(f"rnn_cuda has no CUDA kernels, because they {problem}: {error}")
        return library, f"they {problem}: {error}"
    if recipe.cuda is not None and note:
        _warn_once(f"rnn_cuda has no CUDA kernels for some devices. {note}")
    return library, note


def _loaded(library: Path) -> Path:
    torch.ops.load_library(str(library))
    return library


def has_operator(name: str) -> bool:
    """Return whether the library that is loaded defines this operator."""
    return torch._C._dispatch_has_kernel(f"rnn_cuda::{name}")


def _has_kernels(device_type: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        "rnn_cuda::layer_forward", key
    )


def native_library_loaded() -> bool:
    """Return whether the kernels are compiled and loaded in this process."""
    return _library is not None


@contextmanager
def use(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block, in every thread; blocks can be nested.

    Args:
        name: one of :data:`BACKENDS`.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _override
    previous, _override = _override, _checked(name, "backend name")
    try:
        yield
    finally:
        _override = previous


def reset() -> None:
    """Forget decisions, failures and warnings, so that the environment is looked at again.

    A library that is loaded stays loaded.
    """
    with _lock:
        _decisions.clear()
        _warned.clear()
        _failures.clear()


def describe() -> dict[str, object]:
    """Return what an experiment should record about the implementation that it ran on.

    Nothing is compiled or loaded for this; ask at the end of a run.
    """
    return {
        "requested": requested(),
        "native_library_loaded": native_library_loaded(),
        "library_key": _library.parent.name if _library else None,
        "emulated": _is_emulated,
        "why_not_native": next(iter(_failures.values()), None),
        "decisions": {
            f"{device} {str(dtype).removeprefix('torch.')}": "native" if native else "reference"
            for (override, device, dtype), native in sorted(_decisions.items(), key=str)
            if override == _override
        },
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
