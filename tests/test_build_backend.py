"""Choosing between the kernels and the reference, and what happens when there are no kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import timeit
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rnn_cuda import backend
from rnn_cuda.build import BuildError, Recipe, build
from tests.build_stubs import write_program, write_sources

KINDS = [("cpu", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16)]


@pytest.fixture(autouse=True)
def fresh_backend(monkeypatch: pytest.MonkeyPatch):
    """A process in which nothing has been decided yet; the library may be loaded already."""
    monkeypatch.delenv("RNN_CUDA_BACKEND", raising=False)
    backend.reset()
    yield
    monkeypatch.undo()
    backend.reset()


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend, "_library", None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_the_default_is_auto():
    assert backend.requested() == "auto"


def test_an_unknown_backend_names_the_variable_and_what_it_takes(monkeypatch):
    monkeypatch.setenv("RNN_CUDA_BACKEND", "fast")
    expected = "RNN_CUDA_BACKEND must be one of auto, native, emulated, reference, but is 'fast'"
    with pytest.raises(ValueError, match=expected):
        backend.requested()
    with pytest.raises(ValueError, match=expected):
        backend.use_native("cpu", torch.float32)


def test_use_overrides_the_environment_and_nests(monkeypatch):
    monkeypatch.setenv("RNN_CUDA_BACKEND", "native")
    with backend.use("reference"):
        assert backend.requested() == "reference"
        assert not backend.use_native("cpu", torch.float32)
        with backend.use("auto"):
            assert backend.requested() == "auto"
        assert backend.requested() == "reference"
    assert backend.requested() == "native"
    with pytest.raises(ValueError, match="but is 'quick'"), backend.use("quick"):
        pass


def test_use_reaches_other_threads():
    seen = []
    with backend.use("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend.requested()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.usefixtures("without_compiler")
def test_the_reference_backend_compiles_nothing(monkeypatch):
    monkeypatch.setenv("RNN_CUDA_BACKEND", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend.use_native("cpu", torch.float32)
    assert not backend.native_library_loaded()


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_auto_warns_once_and_uses_the_reference():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decisions = [backend.use_native(*kind) for kind in KINDS for _ in range(2)]
        with backend.use("reference"):
            backend.use_native(*KINDS[0])
        decisions.append(backend.use_native("cuda", torch.float32))
    assert decisions == [False] * 7
    assert [warning.category for warning in caught] == [backend.BackendWarning]
    assert "no C++ compiler on the PATH" in str(caught[0].message)
    assert "apt install g++" in str(caught[0].message)


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_native_raises_every_time():
    with backend.use("native"):
        for _ in range(2):
            with pytest.raises(backend.NativeBackendError, match=r"no C\+\+ compiler.*apt install"):
                backend.use_native("cpu", torch.float32)


def test_a_failure_is_remembered_until_reset(monkeypatch):
    attempts = []

    def fail(recipe: object) -> Path:
        attempts.append(recipe)
        raise BuildError("does not compile")

    monkeypatch.setattr(backend, "_library", None)
    monkeypatch.setattr("rnn_cuda.build.build", fail)
    with pytest.warns(backend.BackendWarning, match="does not compile"):
        decisions = [backend.use_native(*kind) for kind in KINDS]
    assert decisions == [False] * 3
    assert len(attempts) == 1
    assert backend.describe()["why_not_native"] == "does not compile"
    backend.reset()
    with pytest.warns(backend.BackendWarning, match="does not compile"):
        backend.use_native(*KINDS[0])
    assert len(attempts) == 2


def test_a_library_that_does_not_load_falls_back(monkeypatch, tmp_path):
    damaged = tmp_path / "librnn_cuda.so"
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(backend, "_library", None)
    monkeypatch.setattr("rnn_cuda.build.build", lambda recipe: damaged)
    with pytest.warns(backend.BackendWarning, match="cannot be loaded"):
        assert not backend.use_native("cpu", torch.float32)


NO_CUDA = "rnn_cuda has no CUDA kernels"
ARCHITECTURES = "TORCH_CUDA_ARCH_LIST: 7.5 is not supported."
CUDA_TROUBLE = {
    "does not compile": ("", f"{NO_CUDA}, because they do not compile: nvcc: unsupported GNU"),
    "does not load": ("", f"{NO_CUDA}, because they cannot be loaded"),
    "left out": (ARCHITECTURES, f"{NO_CUDA} for some devices. {ARCHITECTURES}"),
}


@pytest.mark.parametrize("trouble", CUDA_TROUBLE)
def test_cuda_kernels_with_trouble_cost_one_warning_and_not_the_cpu_kernels(
    trouble, monkeypatch, tmp_path
):
    note, expected = CUDA_TROUBLE[trouble]
    library, damaged = build(), tmp_path / "librnn_cuda.so"
    damaged.write_bytes(b"not a library")

    def create(*_: object, kernels: str = "auto") -> SimpleNamespace:
        return SimpleNamespace(cuda=object() if kernels == "auto" else None, cuda_note=note)

    def build_for(recipe: SimpleNamespace) -> Path:
        if recipe.cuda is not None and trouble == "does not compile":
            raise BuildError("nvcc: unsupported GNU version")
        return damaged if recipe.cuda is not None and trouble == "does not load" else library

    monkeypatch.setattr(backend, "_library", None)
    monkeypatch.setattr("rnn_cuda.build.Recipe.create", create)
    monkeypatch.setattr("rnn_cuda.build.build", build_for)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [backend.use_native(*kind) for kind in KINDS] == [True] * 3
    assert len(caught) == 1
    assert str(caught[0].message).startswith(expected)
    if trouble == "does not compile" and not backend._has_kernels("cuda"):
        with pytest.warns(backend.BackendWarning, match="for cuda tensors: they do not compile"):
            assert not backend.use_native("cuda", torch.float32)


def test_a_gpu_that_the_kernels_are_not_compiled_for_runs_the_reference(monkeypatch):
    def refuse(index: int) -> list[int]:
        raise RuntimeError(f"cuda:{index}: the kernels were not compiled for this device")

    backend.use_native("cpu", torch.float32)
    monkeypatch.setattr(backend, "_has_kernels", lambda device_type: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.ops.rnn_cuda, "cuda_device_figures", refuse, raising=False)
    with pytest.warns(backend.BackendWarning, match="cuda:1: the kernels were not compiled for"):
        assert not backend.use_native("cuda", torch.float32)
    with backend.use("native"), pytest.raises(backend.NativeBackendError, match="not compiled for"):
        backend.use_native("cuda", torch.float32)
    assert backend.use_native("cpu", torch.float32)
    backend.reset()
    monkeypatch.setattr(torch.ops.rnn_cuda, "cuda_device_figures", lambda index: [9, 0])
    assert backend.use_native("cuda", torch.float32)


FORWARD = """
import torch, rnn_cuda
torch.manual_seed(0)
rnn, x = rnn_cuda.FusedRNN(3, 5), torch.randn(4, 2, 3)
exact = torch.nn.RNN(3, 5).double()
exact.load_state_dict(rnn.state_dict())
error = (rnn(x)[0] - exact(x.double())[0]).abs().max().item()
print(error < 1e-6, rnn_cuda.backend.native_library_loaded())
"""


def forward(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FORWARD],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_truncated_library_that_cannot_be_replaced_costs_a_warning(tmp_path):
    """It would end the process with SIGBUS if it were loaded."""
    library = build()
    copy = tmp_path / library.parent.name / library.name
    shutil.copytree(library.parent, copy.parent)
    copy.write_bytes(copy.read_bytes()[: 64 << 10])
    (tmp_path / "build.lock").mkdir()  # not even root can open that for writing
    done = forward(RNN_CUDA_CACHE_DIR=str(tmp_path))
    assert done.stdout == "True False\n", done.stderr
    assert f"{copy} is damaged (65536 bytes). The kernel cache {tmp_path} cannot" in done.stderr
    assert "Set RNN_CUDA_CACHE_DIR" in done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {
            "ATEN_CPU_CAPABILITY": "nonsense",
            "RNN_CUDA_PLAN": "residency=nonsense",
            "MAX_JOBS": "nonsense",
            "RNN_CUDA_BACKEND": "",
        },
        {"TORCH_CUDA_ARCH_LIST": "Volta", "CUDA_HOME": "/no/such/folder"},
    ],
    ids=["of CPU kernels", "of CUDA kernels"],
)
def test_what_cpu_kernels_do_not_need_does_not_cost_them(environment):
    if "CUDA_HOME" in environment and Recipe.create().cuda is not None:
        pytest.skip("the library of this session has CUDA kernels: another one would be compiled")
    done = forward(**environment)
    assert done.stdout == "True True\n", done.stderr


def test_native_and_emulated_kernels_need_a_process_each():
    with backend.use("native"):
        backend.use_native("cpu", torch.float32)
    with (
        backend.use("emulated"),
        pytest.raises(backend.NativeBackendError, match="has loaded the native kernels; the emul"),
    ):
        backend.use_native("cpu", torch.float32)
    assert backend.describe()["emulated"] is False


def test_the_emulated_backend_needs_a_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "_library", None)
    package = tmp_path / "site-packages" / "rnn_cuda"
    write_sources(package / "_csrc", cuda=True)
    monkeypatch.setattr("rnn_cuda.build.recipe.__file__", str(package / "build" / "recipe.py"))
    expected = rf"'emulated', but there is no emulator in {tmp_path}/.*: clone the repository and"
    with backend.use("emulated"), pytest.raises(backend.NativeBackendError, match=expected):
        backend.use_native("cpu", torch.float32)


def test_the_kernels_are_used_where_they_exist():
    with backend.use("native"):
        for dtype in backend.NATIVE_DTYPES:
            assert backend.use_native("cpu", dtype)
        with pytest.raises(backend.NativeBackendError, match=r"no kernels for torch\.complex64"):
            backend.use_native("cpu", torch.complex64)
        with pytest.raises(backend.NativeBackendError, match="no kernels for mps tensors"):
            backend.use_native("mps", torch.float32)
    record = backend.describe()
    assert record["native_library_loaded"] is True
    assert record["library_key"] == build().parent.name


def test_describe_reports_the_decisions_made():
    with backend.use("reference"):
        backend.use_native("cpu", torch.float64)
        record = backend.describe()
    assert record["requested"] == "reference"
    assert record["decisions"] == {"cpu float64": "reference"}
    assert record["threads"] == torch.get_num_threads()


def test_a_decision_that_stands_costs_less_than_two_microseconds():
    with backend.use("reference"):
        seconds = min(timeit.repeat(lambda: backend.use_native(*KINDS[0]), number=1000)) / 1000
    assert seconds < 2e-6


def test_threads_that_ask_at_once_load_one_library(monkeypatch):
    library = build()
    builds = []

    def count(recipe: object) -> Path:
        builds.append(recipe)
        return library

    monkeypatch.setattr(backend, "_library", None)
    monkeypatch.setattr("rnn_cuda.build.build", count)
    start = threading.Barrier(8)
    answers = []

    def ask() -> None:
        start.wait()
        answers.append(backend.use_native("cpu", torch.float32))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8
    assert len(builds) == 1


def _choose(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if backend.use_native(x.device.type, x.dtype) else x - 1


def test_torch_compile_follows_the_choice_without_a_graph_break():
    x = torch.zeros(3)
    compiled = torch.compile(_choose, fullgraph=True, backend="eager")
    for name, expected in [("native", 1), ("reference", -1), ("native", 1)]:
        with backend.use(name):
            assert compiled(x).tolist() == [expected] * 3


def test_import_compiles_nothing(tmp_path):
    """Importing the package must not cost a compilation, nor fail without a compiler."""
    compiler = write_program(tmp_path / "c++", f'touch "{tmp_path}/called"')
    code = "import rnn_cuda, sys; assert 'rnn_cuda.build' not in sys.modules"
    environment = {"PATH": str(tmp_path), "CXX": str(compiler), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert not (tmp_path / "called").exists()
    assert not (tmp_path / ".cache" / "rnn_cuda").exists()
