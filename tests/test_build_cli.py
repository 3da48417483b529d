"""``python -m rnn_cuda.build``: what it prints and how it exits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rnn_cuda.build import BuildError, Recipe, __main__, build, check_cuda, cuda_toolchain, recipe
from tests.build_stubs import write_sources

# Two kernels as ptxas reports them: the first is clean, the second spills.
PTXAS_LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4fillPff' for 'sm_90'
ptxas info    : Function properties for _Z4fillPff
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z5greedPf' for 'sm_90'
ptxas warning : Registers are spilled to local memory in function '_Z5greedPf'
ptxas info    : Function properties for _Z5greedPf
    128 bytes stack frame, 64 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 128 bytes cumulative stack size
"""

LOCAL_MEMORY_CU = """
__global__ void indexed(float* out, const int* index, int n) {
  float local[64];
  for (int i = 0; i < 64; ++i) local[i] = out[i];
  for (int i = 0; i < n; ++i) local[index[i]] += local[index[i + 1]];  // registers have no index
  for (int i = 0; i < 64; ++i) out[i] = local[i];
}
"""

needs_nvcc = pytest.mark.skipif(
    cuda_toolchain._find_nvcc() is None, reason="nvcc is not installed: CUDA sources not checked"
)


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "rnn_cuda.build", *arguments],
        env={k: v for k, v in os.environ.items() if k != "RNN_CUDA_BACKEND"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def main(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """The same in this process: exit status, output and errors."""

    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        monkeypatch.delenv("RNN_CUDA_BACKEND", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return __main__.main([*arguments]), *capsys.readouterr()

    return run


def test_info_says_what_was_found(tmp_path):
    done = run_cli("--info", RNN_CUDA_CACHE_DIR=str(tmp_path / "my cache"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning that runpy imports the module twice
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["cache"] == str(tmp_path / "my cache")
    assert rows["library"].endswith("(not compiled yet)")
    assert rows["RNN_CUDA_BACKEND"] == "auto"
    assert rows["CPU tensors use"] == "native"
    assert "-O3" in rows["C++ flags"]
    assert {"torch", "C++ compiler", "ninja", "nvcc", "CPU capability", "key"} <= rows.keys()
    assert not (tmp_path / "my cache").exists()  # looking makes nothing


def test_info_and_build_without_a_compiler(main, tmp_path):
    environment = {"CXX": "no-such-compiler", "RNN_CUDA_CACHE_DIR": str(tmp_path)}
    status, printed, _ = main("--info", **environment)
    assert status == 0
    assert "CPU tensors use   reference (CXX='no-such-compiler' is not a program" in printed
    status, _, errors = main(**environment)
    assert status == 1
    assert "rnn_cuda: CXX='no-such-compiler' is not a program" in errors


def test_a_bad_backend_is_an_error_without_a_traceback():
    done = run_cli("--info", RNN_CUDA_BACKEND="fast")
    assert done.returncode == 1
    assert "RNN_CUDA_BACKEND must be one of auto, native, emulated, reference" in done.stderr
    assert "Traceback" not in done.stderr


def test_info_names_the_architectures_that_are_left_out(main, tmp_path):
    environment = {"RNN_CUDA_CACHE_DIR": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "7.5;8.0"}
    if cuda_toolchain._find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    rows = dict(line.split("  ", 1) for line in main("--info", **environment)[1].splitlines())
    assert rows["CUDA targets"].strip() == "sm_80"
    assert "TORCH_CUDA_ARCH_LIST: the kernels and this nvcc do not support 7.5." in rows["left out"]
    assert rows["CUDA tensors use"].strip() == "native"

    environment["TORCH_CUDA_ARCH_LIST"] = "7.5"
    info = main("--info", **environment)[1]
    assert "CPU tensors use   native\n" in info
    assert "CUDA tensors use  reference (TORCH_CUDA_ARCH_LIST: the kernels and this nvcc do" in info


def test_info_tells_a_damaged_library_from_a_missing_one(main, tmp_path):
    environment = {"RNN_CUDA_CACHE_DIR": str(tmp_path)}
    line = next(s for s in main("--info", **environment)[1].splitlines() if "(not comp" in s)
    library = Path(line.split("  ", 1)[1].strip().removesuffix(" (not compiled yet)"))
    library.parent.mkdir()
    library.touch()
    assert f"{library} (damaged (" in main("--info", **environment)[1]


def test_clean_lists_what_it_removes(main, tmp_path):
    cache = tmp_path / "cache"
    library = build(Recipe.create(write_sources(tmp_path / "csrc"), cache))
    status, printed, _ = main("--clean", RNN_CUDA_CACHE_DIR=str(cache))
    assert (status, printed) == (0, f"removed {library.parent}\n")
    assert not library.exists()
    status, printed, _ = main("--clean", RNN_CUDA_CACHE_DIR=str(cache))
    assert (status, printed) == (0, f"nothing to remove in {cache}\n")


@pytest.mark.parametrize(
    ("backend", "on_cpu"), [("native", "an error (no C++"), ("reference", "reference\n")]
)
def test_info_under_another_backend(backend, on_cpu, main, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    status, printed, _ = main("--info", RNN_CUDA_BACKEND=backend, PATH=str(tmp_path))
    assert status == 0
    assert f"CPU tensors use   {on_cpu}" in printed


def test_ptxas_output_is_read():
    clean, greedy = check_cuda.parse_ptxas(PTXAS_LOG)
    assert clean == check_cuda.KernelUsage("_Z4fillPff", "sm_90", 8, 0, 0)
    assert greedy == check_cuda.KernelUsage("_Z5greedPf", "sm_90", 255, 124, 128)
    assert clean.is_clean
    assert not greedy.is_clean


def test_unreadable_ptxas_output_is_an_error():
    with pytest.raises(ValueError, match="ptxas printed no"):
        check_cuda.parse_ptxas("ptxas info : Compiling entry function 'k' for 'sm_90'\n")


def test_check_cuda_needs_sources_and_nvcc(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "find_cuda", lambda: (None, "nvcc is nowhere"))
    with pytest.raises(BuildError, match=r"There are no CUDA sources in .*csrc/cuda to"):
        check_cuda.check_cuda(write_sources(tmp_path / "csrc"))
    with pytest.raises(BuildError, match="Cannot check the CUDA kernels: nvcc is nowhere"):
        check_cuda.check_cuda(write_sources(tmp_path / "csrc", cuda=True))


@pytest.fixture
def cuda_sources(tmp_path, monkeypatch) -> Path:
    """CUDA sources to be checked for one architecture, which register no operators."""
    monkeypatch.setattr(check_cuda, "ARCHITECTURES", ("sm_90",))
    return write_sources(tmp_path / "csrc", cuda=True)


@needs_nvcc
def test_check_cuda_fails_where_the_architecture_list_leaves_nothing(cuda_sources, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    with pytest.raises(BuildError, match="Cannot check the CUDA kernels: TORCH_CUDA_ARCH_LIST"):
        check_cuda.check_cuda(cuda_sources)


@needs_nvcc
def test_check_cuda_wants_clean_kernels_that_register(cuda_sources, tmp_path, capsys, monkeypatch):
    architectures = ("sm_80", "sm_90", "sm_100", "sm_120")
    monkeypatch.setattr(check_cuda, "ARCHITECTURES", architectures)
    assert check_cuda.check_cuda(cuda_sources, tmp_path / "cache") == 1
    assert "the library does not load: " in capsys.readouterr().out
    monkeypatch.setattr(check_cuda, "_LOAD", "import ctypes, sys; ctypes.CDLL(sys.argv[1])")
    assert check_cuda.check_cuda(cuda_sources, tmp_path / "cache") == 0
    table = capsys.readouterr().out
    assert all(arch in table for arch in architectures)
    assert "4 kernels, 0 with spills or local memory\n" in table
    assert "the library loads and registers its operators\n" in table


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "summary"),
    [
        (LOCAL_MEMORY_CU, "1 kernels, 1 with spills or local memory"),
        ("// empty\n", "0 kernels, 0 with spills or local memory"),
    ],
    ids=["local memory", "no kernel"],
)
def test_check_cuda_fails_on(source, summary, cuda_sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_cuda, "_LOAD", "")
    (cuda_sources / "cuda" / "kernel.cu").write_text(source)
    (cuda_sources / "cuda" / "binding.cpp").write_text("")
    assert check_cuda.check_cuda(cuda_sources, tmp_path / "cache") == 1
    assert summary in capsys.readouterr().out


@needs_nvcc
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("kernel.cu", "__global__ void broken( {}\n", "error"),
        ("binding.cpp", "int missing(); int f() { return missing(); }\n", "undefined reference"),
    ],
    ids=["does not compile", "does not link"],
)
def test_check_cuda_raises_what_the_compiler_says(file, text, message, cuda_sources, tmp_path):
    (cuda_sources / "cuda" / "binding.cpp").write_text("")
    (cuda_sources / "cuda" / file).write_text(text)
    with pytest.raises(BuildError, match=message):
        check_cuda.check_cuda(cuda_sources, tmp_path / "cache")


def test_info_on_emulated_kernels(main):
    status, printed, _ = main("--info", RNN_CUDA_BACKEND="emulated")
    assert status == 0
    assert "CPU tensors use   the CUDA kernels, emulated\n" in printed
    assert "CUDA tensors use  an error (they were not asked for)\n" in printed
    assert "-DRNN_CUDA_EMULATED" in printed


def test_a_plain_install_has_sources_and_no_emulator(main, tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "rnn_cuda"
    installed = write_sources(package / "_csrc")
    monkeypatch.setattr(recipe, "__file__", str(package / "build" / "recipe.py"))
    assert recipe.default_source_dir() == installed
    assert Recipe.create().source_dir == installed
    status, _, errors = main(RNN_CUDA_BACKEND="emulated")
    assert status == 1
    assert f"rnn_cuda: there is no emulator in {package.parent / 'tests' / 'emulator'}" in errors
