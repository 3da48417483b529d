"""Compiling and caching: the cases in which a JIT build goes wrong, on stub sources."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rnn_cuda import _toolchain
from rnn_cuda._plan import Kernels, default_cache_dir
from rnn_cuda.build import BuildError, BuildPlan, CompilerNotFoundError, build, clean
from tests.build_stubs import (
    links,
    stub_value,
    write_logging_compiler,
    write_program,
    write_sources,
)

# A forked child shares the import of torch, which would cost every other kind two seconds. Python
# 3.12 warns of locks that torch's threads may hold; the children call nothing of torch's.
_fork = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

needs_nvcc = pytest.mark.skipif(
    _toolchain._find_nvcc() is None, reason="nvcc is not installed: stub CUDA sources not compiled"
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return write_sources(tmp_path / "csrc")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH with the programs of a C++ build only."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "g++", "as", "ld", "ninja"):
        if path := shutil.which(name):
            (programs / name).symlink_to(path)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(_toolchain, "DEFAULT_CUDA_HOME", tmp_path / "no-cuda")


def temporary_folders(cache: Path) -> list[Path]:
    return list(cache.glob("*.tmp-*"))


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "condition not reached in time"
        time.sleep(0.01)


def test_builds_once_and_announces_it(sources, cache, capfd):
    library = build(BuildPlan.create(sources, cache))
    assert stub_value(library) == 7
    assert temporary_folders(cache) == []
    announced = capfd.readouterr().err
    assert re.search(r"rnn_cuda: compiling kernels \(once, about \d+ s\) \.\.\.\n", announced)
    assert f"rnn_cuda: compiled in 0 s: {library}" in re.sub(r"in \d+ s", "in 0 s", announced)

    assert build(BuildPlan.create(sources, cache)) == library
    assert capfd.readouterr().err == ""


def test_paths_with_spaces_and_special_characters(tmp_path):
    sources = write_sources(tmp_path / "my $ources: 'quoted'")
    assert stub_value(build(BuildPlan.create(sources, tmp_path / "my $cache: x"))) == 7


def _race(plan: BuildPlan, start, results) -> None:
    start.wait()
    results.put(stub_value(build(plan)))


def test_eight_processes_on_an_empty_cache_build_once(sources, cache, monkeypatch, tmp_path, capfd):
    compiler, log = write_logging_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    plan = BuildPlan.create(sources, cache)
    start, results = _fork.Event(), _fork.Queue()
    racers = [_fork.Process(target=_race, args=(plan, start, results)) for _ in range(8)]
    for racer in racers:
        racer.start()
    start.set()
    for racer in racers:
        racer.join(timeout=60)
    assert [racer.exitcode for racer in racers] == [0] * 8
    assert [results.get(timeout=1) for _ in racers] == [7] * 8
    assert links(log) == 1
    announced = capfd.readouterr().err
    assert announced.count("compiling kernels") == 1
    assert announced.count("waiting for another process") <= 7


@pytest.fixture
def stuck_builder(sources, cache, monkeypatch, tmp_path):
    """A plan, and a process in the middle of building it whose compiler does not come back.

    The compiler outlives the process; other processes' compilers work once "hang" is removed.
    """
    hang, stuck = tmp_path / "hang", tmp_path / "stuck"
    hang.touch()
    stuck.touch()
    compiler, log = write_logging_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    plan = BuildPlan.create(sources, cache)
    builder = _fork.Process(target=build, args=(plan,))
    builder.start()
    try:
        wait_until(lambda: " -c " in log.read_text())
        yield plan, builder, hang
    finally:
        stuck.unlink()  # ends the compilers
        builder.kill()
        builder.join()


def test_a_waiting_process_says_so_once_and_takes_over_from_a_killed_one(stuck_builder, capfd):
    plan, builder, hang = stuck_builder
    announced = ""

    def waits() -> bool:
        nonlocal announced
        announced += capfd.readouterr().err
        return "waiting for another process" in announced

    waiter = _fork.Process(target=build, args=(plan,))
    waiter.start()
    try:
        wait_until(waits)
        assert waiter.is_alive()
        hang.unlink()
        builder.kill()
        waiter.join(timeout=60)
        assert waiter.exitcode == 0
    finally:
        waiter.kill()
    announced += capfd.readouterr().err
    assert announced.count("waiting for another process") == 1
    assert stub_value(plan.library) == 7


def test_a_killed_builder_leaves_nothing_that_stops_the_next(stuck_builder, cache):
    plan, builder, hang = stuck_builder
    builder.kill()
    builder.join(timeout=10)
    assert builder.exitcode == -signal.SIGKILL
    assert len(temporary_folders(cache)) == 1
    assert not plan.library.exists()

    hang.unlink()  # the killed builder's compiler still runs, as an orphan
    assert stub_value(build(plan)) == 7
    assert temporary_folders(cache) == []


def test_changed_sources_and_headers_are_compiled_again(sources, cache):
    first = build(BuildPlan.create(sources, cache))
    (sources / "value.h").write_text("#define STUB_VALUE 8\n")
    second = build(BuildPlan.create(sources, cache))
    assert (stub_value(first), stub_value(second)) == (7, 8)

    (sources / "stub.cpp").write_text((sources / "stub.cpp").read_text() + "// a comment\n")
    third = BuildPlan.create(sources, cache).library
    (sources / "cpu" / "new.cpp").write_text("int added() { return 2; }\n")
    fourth = BuildPlan.create(sources, cache).library
    assert len({first, second, third, fourth}) == 4


def test_sources_that_change_while_they_compile_are_not_cached(
    sources, cache, monkeypatch, tmp_path
):
    edit = f'echo "#define STUB_VALUE 9" > "{sources}/value.h"'
    compiler = write_program(tmp_path / "c++", f'[ "$1" = --version ] || {edit}\nexec g++ "$@"')
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match="changed while they were compiled"):
        build(BuildPlan.create(sources, cache))
    assert stub_value(build(BuildPlan.create(sources, cache))) == 9


def test_another_torch_compiler_or_processor_is_another_key(sources, cache, monkeypatch, tmp_path):
    keys = [BuildPlan.create(sources, cache).key]

    def record(change: Callable[[pytest.MonkeyPatch], None]) -> None:
        with monkeypatch.context() as patch:
            change(patch)
            keys.append(BuildPlan.create(sources, cache).key)

    record(lambda patch: patch.setattr(torch, "__version__", "2.14.0"))
    record(lambda patch: patch.setattr(torch.version, "git_version", "0123abcd"))
    record(lambda patch: patch.setattr(torch, "compiled_with_cxx11_abi", lambda: False))
    record(lambda patch: patch.setattr("platform.machine", lambda: "riscv64"))
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        if capability != torch.backends.cpu.get_cpu_capability():
            record(
                lambda patch, name=capability: patch.setattr(
                    torch.backends.cpu, "get_cpu_capability", lambda: name
                )
            )
    other = write_program(tmp_path / "c++", "echo 'another compiler 1.0'")
    record(lambda patch: patch.setenv("CXX", str(other)))
    newer = write_program(tmp_path / "newer-c++", "echo 'another compiler 2.0'")
    record(lambda patch: patch.setenv("CXX", str(newer)))
    assert len(keys) >= 9
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_depend_on_the_folders(tmp_path):
    here = BuildPlan.create(write_sources(tmp_path / "here"), tmp_path / "a")
    there = BuildPlan.create(write_sources(tmp_path / "there"), tmp_path / "b")
    assert here.key == there.key


@pytest.mark.parametrize(
    ("version", "standard"),
    [("2.11.0", "c++17"), ("2.12.0a0+git1", "c++20"), ("2.13.0+cpu", "c++20"), ("3.0", "c++20")],
)
def test_the_cxx_standard_is_that_of_torch(version, standard, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert _toolchain.torch_cxx_standard() == standard


def test_instruction_sets_follow_what_torch_reports(sources, cache, monkeypatch):
    def flags(capability: str) -> list[str]:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return [f for f in BuildPlan.create(sources, cache).cxx_flags if f.startswith("-m")]

    assert "-mavx512f" in flags("AVX512")
    assert flags("AVX2") == ["-mavx2", "-mfma", "-mf16c"]
    assert flags("DEFAULT") == []


@pytest.mark.usefixtures("restored_threads")
def test_one_openmp_runtime_in_the_process(sources, cache):
    (sources / "stub.cpp").write_text(
        "#include <omp.h>\n"
        'extern "C" __attribute__((visibility("default")))'
        " int stub_value() { return omp_get_max_threads(); }\n"
    )
    library = build(BuildPlan.create(sources, cache))
    torch.set_num_threads(3)
    # torch's setting reaches our code only if both call the same runtime.
    assert stub_value(library) == 3
    mapped = Path("/proc/self/maps").read_text()
    runtimes = set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", mapped))
    # Not ours: scikit-learn brings its own, if another test has imported it.
    runtimes = {path for path in runtimes if "/scikit_learn.libs/" not in path}
    assert len(runtimes) == 1, runtimes


def test_a_compile_error_shows_command_output_and_hint(sources, cache, capfd):
    (sources / "stub.cpp").write_text("int broken( { return 1; }\n")
    with pytest.raises(BuildError) as caught:
        build(BuildPlan.create(sources, cache))
    message = str(caught.value)
    assert re.search(r"Command: \S+ .*-c .*stub\.cpp", message)
    assert "error:" in message
    assert "RNN_CUDA_BACKEND=reference" in message
    assert temporary_folders(cache) == []
    # A failed build is no obstacle to the next one.
    write_sources(sources)
    assert stub_value(build(BuildPlan.create(sources, cache))) == 7


def test_no_compiler_says_what_to_install(sources, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompilerNotFoundError, match=r"no C\+\+ compiler on the PATH.*apt install"):
        BuildPlan.create(sources, cache)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilerNotFoundError, match="CXX='no-such-compiler' is not a program"):
        BuildPlan.create(sources, cache)


def test_a_compiler_that_cannot_start_is_a_build_error(sources, cache, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nothing")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match="broken cannot be started"):
        BuildPlan.create(sources, cache)


def test_no_ninja_says_what_to_install(sources, cache, monkeypatch, tmp_path):
    plan = BuildPlan.create(sources, cache)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("ninja.BIN_DIR", str(tmp_path))
    with pytest.raises(CompilerNotFoundError, match="pip install ninja"):
        build(plan)


def test_ninja_is_found_without_an_activated_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _toolchain.find_ninja().is_file()


def test_no_sources_is_a_clear_error(cache, tmp_path):
    with pytest.raises(BuildError, match="no C\\+\\+ sources"):
        BuildPlan.create(tmp_path / "nothing", cache)


def test_an_unwritable_cache_says_what_to_set(sources, tmp_path):
    (tmp_path / "file").touch()  # not even root can make a folder below a file
    plan = BuildPlan.create(sources, tmp_path / "file" / "cache")
    with pytest.raises(BuildError, match=r"file/cache cannot be written.*RNN_CUDA_CACHE_DIR"):
        build(plan)


def _build_as_ordinary_user(plan: BuildPlan, results) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)  # root may write everywhere
    if not os.access(torch.__file__, os.R_OK):
        results.put("unreachable")
        return
    try:
        build(plan)
    except BuildError as error:
        results.put(str(error))


@pytest.mark.parametrize("mode", [0o000, 0o555], ids=["closed", "read-only"])
def test_a_protected_cache_says_what_to_set(mode):
    # Not in tmp_path, which pytest closes to other users.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        plan = BuildPlan.create(write_sources(folder / "csrc"), folder / "cache")
        plan.cache_dir.mkdir()
        plan.cache_dir.chmod(mode)
        results = _fork.Queue()
        user = _fork.Process(target=_build_as_ordinary_user, args=(plan, results))
        user.start()
        try:
            message = results.get(timeout=10)
            if message == "unreachable":
                pytest.skip(
                    "root's virtual environment is closed to the ordinary user of this test"
                )
            assert "Set RNN_CUDA_CACHE_DIR" in message
        finally:
            user.join(timeout=10)
            plan.cache_dir.chmod(0o755)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("RNN_CUDA_CACHE_DIR", raising=False)
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "rnn_cuda"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "rnn_cuda"
    monkeypatch.setenv("RNN_CUDA_CACHE_DIR", str(tmp_path / "chosen"))
    assert default_cache_dir() == tmp_path / "chosen"


def test_clean_removes_our_folders_and_nothing_else(sources, cache):
    library = build(BuildPlan.create(sources, cache))
    foreign = [cache / "0123456789abcdef", cache / "documents"]
    for folder in foreign:
        folder.mkdir()
        (folder / "thesis.tex").touch()
    assert clean(cache) == [library.parent]
    assert not library.exists()
    assert all((folder / "thesis.tex").exists() for folder in foreign)
    assert clean(cache) == []
    assert clean(cache / "missing") == []
    assert stub_value(build(BuildPlan.create(sources, cache))) == 7


def test_an_entry_that_lost_its_library_is_built_again(sources, cache):
    library = build(BuildPlan.create(sources, cache))
    library.unlink()
    assert stub_value(build(BuildPlan.create(sources, cache))) == 7


@pytest.mark.usefixtures("without_nvcc")
def test_without_nvcc_the_cpu_kernels_are_built(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    plan = BuildPlan.create(write_sources(tmp_path / "csrc", cuda=True), cache)
    assert plan.cuda is None
    assert "nvcc is neither in CUDA_HOME" in plan.toolchain.cuda_note
    library = build(plan)
    assert stub_value(library) == 7
    assert b"stub_launch" not in library.read_bytes()


@needs_nvcc
def test_with_nvcc_the_cuda_kernels_are_built_in(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    sources = write_sources(tmp_path / "with space", cuda=True)
    plan = BuildPlan.create(sources, tmp_path / "cache")
    assert plan.cuda is not None
    assert plan.cuda.archs == ("sm_90",)
    library = build(plan)
    # It loads next to any torch, this one too, whether or not it knows CUDA.
    assert stub_value(library) == 7
    assert b"stub_launch" in library.read_bytes()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert BuildPlan.create(sources, tmp_path / "cache").key != plan.key


def test_cuda_kernels_are_compiled_where_they_can_run_or_are_asked_for(
    tmp_path, cache, monkeypatch
):
    """Compiling them takes minutes; a torch without CUDA has no use for them."""
    monkeypatch.setattr(_toolchain, "find_cuda", lambda: (None, "asked for nvcc"))
    sources = write_sources(tmp_path / "csrc", cuda=True)

    def note(kernels: Kernels = "auto") -> str:
        return BuildPlan.create(sources, cache, kernels=kernels).toolchain.cuda_note

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert note() == "this build of torch has no CUDA"
    assert note("cuda") == "asked for nvcc"
    assert note("cpu") == "they were not asked for"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert note() == "asked for nvcc"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert note() == "asked for nvcc"


EMULATED_CU = """
#ifndef RNN_CUDA_EMULATED
#error "compiled for a GPU"
#endif
#include "value.h"
#pragma unroll
extern "C" __attribute__((visibility("default"))) int stub_emulated() { return STUB_VALUE + 1; }
"""


@pytest.mark.usefixtures("without_nvcc")
def test_emulated_kernels_are_a_library_of_their_own_and_need_no_nvcc(tmp_path, cache):
    sources = write_sources(tmp_path / "csrc", cuda=True)
    (sources / "cuda" / "kernel.cu").write_text(EMULATED_CU)
    (sources / "cuda" / "binding.cpp").write_text("int binding() { return 1; }\n")
    (sources / "emulator").mkdir()
    (sources / "emulator" / "machine.cpp").write_text("int machine() { return 1; }\n")
    (sources / "cpu" / "kernel.cpp").write_text("#error CPU kernels are another library\n")
    plan = BuildPlan.create(sources, cache, kernels="emulated")
    names = [path.name for path in plan.cxx_sources + plan.cuda_sources]
    assert names == ["binding.cpp", "machine.cpp", "stub.cpp", "kernel.cu"]
    assert plan.key != BuildPlan.create(sources, cache).key
    assert ctypes.CDLL(str(build(plan))).stub_emulated() == 8


@needs_nvcc
def test_an_nvcc_that_is_a_wrapper_script_leads_to_the_real_toolkit(tmp_path, monkeypatch):
    real = _toolchain.find_cuda()[0]
    assert real is not None
    wrapper = write_program(tmp_path / "nvcc", f'exec "{real.nvcc}" "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(_toolchain, "DEFAULT_CUDA_HOME", tmp_path / "no-cuda")
    found, note = _toolchain.find_cuda()
    assert found is not None, note
    assert found.nvcc == wrapper
    assert (found.include, found.library) == (real.include, real.library)


def test_cuda_architectures(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    supported = [75, 80, 90, 100, 120]
    assert _toolchain.cuda_archs(supported) == ("compute_120", "sm_120", "sm_80", "sm_90a")

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(_toolchain, "_visible_gpu_archs", list)
    assert _toolchain.cuda_archs(supported) == ("sm_100", "sm_120", "sm_80", "sm_90")
    assert _toolchain.cuda_archs([75, 80, 90]) == ("compute_90", "sm_80", "sm_90")

    monkeypatch.setattr(_toolchain, "_visible_gpu_archs", lambda: ["9.0"])
    assert _toolchain.cuda_archs(supported) == ("sm_90",)
    monkeypatch.setattr(_toolchain, "_visible_gpu_archs", lambda: ["12.1"])
    assert _toolchain.cuda_archs(supported) == ("compute_120",)
    monkeypatch.setattr(_toolchain, "_visible_gpu_archs", lambda: ["7.0"])
    assert _toolchain.cuda_archs(supported) == ()


@pytest.mark.parametrize("entry", ["Hopper", "9", "7.5", "13.0"])
def test_a_bad_architecture_list_names_the_variable(entry, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{entry}")
    with pytest.raises(BuildError, match=f"TORCH_CUDA_ARCH_LIST.*{re.escape(repr(entry))}"):
        _toolchain.cuda_archs([75, 80, 90])


def test_visible_gpus_are_those_that_nvidia_smi_lists(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    write_program(tmp_path / "nvidia-smi", "printf '9.0\\n9.0\\n8.6\\n'")
    assert _toolchain._visible_gpu_archs() == ["8.6", "9.0"]
    write_program(tmp_path / "nvidia-smi", "echo 'no driver is running'; exit 9")
    assert _toolchain._visible_gpu_archs() == []
