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

from rnn_cuda.build import (
    BuildError,
    CompilerNotFoundError,
    Recipe,
    build,
    clean,
    cuda_toolchain,
    toolchain,
)
from rnn_cuda.build.cache import CHECKSUM_NAME, COMPILED, state_of
from rnn_cuda.build.recipe import Kernels, default_cache_dir
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
    cuda_toolchain._find_nvcc() is None,
    reason="nvcc is not installed: stub CUDA sources not compiled",
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
    monkeypatch.setattr(cuda_toolchain, "DEFAULT_CUDA_HOME", tmp_path / "no-cuda")


def temporary_folders(cache: Path) -> list[Path]:
    return list(cache.glob("*.tmp-*"))


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "condition not reached in time"
        time.sleep(0.01)


def test_builds_once_and_announces_it(sources, cache, capfd):
    library = build(Recipe.create(sources, cache))
    assert stub_value(library) == 7
    assert temporary_folders(cache) == []
    announced = capfd.readouterr().err
    assert re.search(r"rnn_cuda: compiling kernels \(once, about \d+ s\) \.\.\.\n", announced)
    assert f"rnn_cuda: compiled in 0 s: {library}" in re.sub(r"in \d+ s", "in 0 s", announced)

    assert build(Recipe.create(sources, cache)) == library
    assert capfd.readouterr().err == ""


def test_paths_with_spaces_and_special_characters(tmp_path):
    sources = write_sources(tmp_path / "my $ources: 'quoted'")
    assert stub_value(build(Recipe.create(sources, tmp_path / "my $cache: x"))) == 7


def _race(recipe: Recipe, start, results) -> None:
    start.wait()
    results.put(stub_value(build(recipe)))


def test_eight_processes_on_an_empty_cache_build_once(sources, cache, monkeypatch, tmp_path, capfd):
    compiler, log = write_logging_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    recipe = Recipe.create(sources, cache)
    start, results = _fork.Event(), _fork.Queue()
    racers = [_fork.Process(target=_race, args=(recipe, start, results)) for _ in range(8)]
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
    """A recipe, and a process in the middle of building it whose compiler does not come back.

    The compiler outlives the process; other processes' compilers work once "hang" is removed.
    """
    hang, stuck = tmp_path / "hang", tmp_path / "stuck"
    hang.touch()
    stuck.touch()
    compiler, log = write_logging_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    recipe = Recipe.create(sources, cache)
    builder = _fork.Process(target=build, args=(recipe,))
    builder.start()
    try:
        wait_until(lambda: " -c " in log.read_text())
        yield recipe, builder, hang
    finally:
        stuck.unlink()  # ends the compilers
        builder.kill()
        builder.join()


def test_a_waiting_process_says_so_once_and_takes_over_from_a_killed_one(stuck_builder, capfd):
    recipe, builder, hang = stuck_builder
    announced = ""

    def waits() -> bool:
        nonlocal announced
        announced += capfd.readouterr().err
        return "waiting for another process" in announced

    waiter = _fork.Process(target=build, args=(recipe,))
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
    assert stub_value(recipe.library) == 7


def test_a_killed_builder_leaves_nothing_that_stops_the_next(stuck_builder, cache):
    recipe, builder, hang = stuck_builder
    builder.kill()
    builder.join(timeout=10)
    assert builder.exitcode == -signal.SIGKILL
    assert len(temporary_folders(cache)) == 1
    assert not recipe.library.exists()

    hang.unlink()  # the killed builder's compiler still runs, as an orphan
    assert stub_value(build(recipe)) == 7
    assert temporary_folders(cache) == []


def test_changed_sources_and_headers_are_compiled_again(sources, cache):
    first = build(Recipe.create(sources, cache))
    (sources / "value.h").write_text("#define STUB_VALUE 8\n")
    second = build(Recipe.create(sources, cache))
    assert (stub_value(first), stub_value(second)) == (7, 8)

    (sources / "stub.cpp").write_text((sources / "stub.cpp").read_text() + "// a comment\n")
    third = Recipe.create(sources, cache).library
    (sources / "cpu" / "new.cpp").write_text("int added() { return 2; }\n")
    fourth = Recipe.create(sources, cache).library
    assert len({first, second, third, fourth}) == 4


def test_sources_that_change_while_they_compile_are_not_cached(
    sources, cache, monkeypatch, tmp_path
):
    edit = f'echo "#define STUB_VALUE 9" > "{sources}/value.h"'
    compiler = write_program(tmp_path / "c++", f'[ "$1" = --version ] || {edit}\nexec g++ "$@"')
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match="changed while they were compiled"):
        build(Recipe.create(sources, cache))
    assert stub_value(build(Recipe.create(sources, cache))) == 9


def test_another_torch_compiler_or_processor_is_another_key(sources, cache, monkeypatch, tmp_path):
    keys = [Recipe.create(sources, cache).key]

    def record(change: Callable[[pytest.MonkeyPatch], None]) -> None:
        with monkeypatch.context() as patch:
            change(patch)
            keys.append(Recipe.create(sources, cache).key)

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
    here = Recipe.create(write_sources(tmp_path / "here"), tmp_path / "a")
    there = Recipe.create(write_sources(tmp_path / "there"), tmp_path / "b")
    assert here.key == there.key


@pytest.mark.parametrize(
    ("version", "standard"),
    [("2.11.0", "c++17"), ("2.12.0a0+git1", "c++20"), ("2.13.0+cpu", "c++20"), ("3.0", "c++20")],
)
def test_the_cxx_standard_is_that_of_torch(version, standard, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert toolchain.torch_cxx_standard() == standard


def test_instruction_sets_follow_what_torch_reports(sources, cache, monkeypatch):
    def flags(capability: str) -> list[str]:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return [f for f in Recipe.create(sources, cache).cxx_flags if f.startswith("-m")]

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
    library = build(Recipe.create(sources, cache))
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
        build(Recipe.create(sources, cache))
    message = str(caught.value)
    assert re.search(r"Command: \S+ .*-c .*stub\.cpp", message)
    assert "error:" in message
    assert "RNN_CUDA_BACKEND=reference" in message
    assert temporary_folders(cache) == []
    # A failed build is no obstacle to the next one.
    write_sources(sources)
    assert stub_value(build(Recipe.create(sources, cache))) == 7


def test_no_compiler_says_what_to_install(sources, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompilerNotFoundError, match=r"no C\+\+ compiler on the PATH.*apt install"):
        Recipe.create(sources, cache)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilerNotFoundError, match="CXX='no-such-compiler' is not a program"):
        Recipe.create(sources, cache)


def test_a_compiler_that_cannot_start_is_a_build_error(sources, cache, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nothing")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match="broken cannot be started"):
        Recipe.create(sources, cache)


def test_a_compiler_with_arguments_is_told_from_one_that_is_missing(monkeypatch):
    monkeypatch.setenv("CXX", "ccache g++")
    with pytest.raises(CompilerNotFoundError, match=r"CXX='ccache g\+\+' .* takes no arguments"):
        toolchain.find_cxx()


def test_a_compiler_that_compiles_nothing_is_named(sources, cache, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("true") or "")
    with pytest.raises(BuildError, match=r"true reports success but linked nothing; set CXX"):
        build(Recipe.create(sources, cache))
    assert temporary_folders(cache) == []


@pytest.mark.parametrize("jobs", ["many", "0", "-1", "1.5", "2 3", "1" * 40])
def test_a_bad_number_of_jobs_names_the_variable(jobs, sources, cache, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", jobs)
    expected = f"MAX_JOBS must be a number of processes from 1 to 9999, but is '{jobs}'"
    with pytest.raises(BuildError, match=re.escape(expected)):
        build(Recipe.create(sources, cache))


@pytest.mark.parametrize(
    ("name", "value"),
    [("MAX_JOBS", ""), ("MAX_JOBS", " 3 "), ("MAX_JOBS", "9999"), ("NINJA_STATUS", "%nonsense")],
)
def test_variables_of_ninja_do_not_stop_it(name, value, sources, cache, monkeypatch):
    monkeypatch.setenv(name, value)
    assert stub_value(build(Recipe.create(sources, cache))) == 7


def test_a_full_disk_says_what_to_set(sources, cache, monkeypatch, tmp_path):
    script = (
        '[ "$1" = --version ] || { echo "error writing to x.o: No space left on device"; exit 1; }'
    )
    monkeypatch.setenv("CXX", str(write_program(tmp_path / "c++", script)))
    with pytest.raises(BuildError, match="RNN_CUDA_CACHE_DIR names another folder"):
        build(Recipe.create(sources, cache))


def test_no_ninja_says_what_to_install(sources, cache, monkeypatch, tmp_path):
    recipe = Recipe.create(sources, cache)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("ninja.BIN_DIR", str(tmp_path))
    with pytest.raises(CompilerNotFoundError, match="pip install ninja"):
        build(recipe)


def test_ninja_is_found_without_an_activated_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.find_ninja().is_file()


def test_no_sources_is_a_clear_error(cache, tmp_path):
    with pytest.raises(BuildError, match="no C\\+\\+ sources"):
        Recipe.create(tmp_path / "nothing", cache)


def test_an_unwritable_cache_says_what_to_set(sources, tmp_path):
    (tmp_path / "file").touch()  # not even root can make a folder below a file
    recipe = Recipe.create(sources, tmp_path / "file" / "cache")
    with pytest.raises(BuildError, match=r"file/cache cannot be written.*RNN_CUDA_CACHE_DIR"):
        build(recipe)


def test_a_cache_that_is_a_file_says_what_to_set(sources, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match=r"file cannot be written: .*Set RNN_CUDA_CACHE_DIR"):
        build(Recipe.create(sources, tmp_path / "file"))


@pytest.mark.parametrize("name", ["~no-such-user/cache", "x" * 300, "/proc/kernels"])
def test_a_cache_that_cannot_be_says_what_to_set(name, sources, monkeypatch):
    monkeypatch.setenv("RNN_CUDA_CACHE_DIR", name)
    with pytest.raises(BuildError, match="Set RNN_CUDA_CACHE_DIR to a folder you can write to"):
        build(Recipe.create(sources))


def test_a_relative_cache_needs_a_current_folder(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("RNN_CUDA_CACHE_DIR", "cache")
    with pytest.raises(BuildError, match="Set RNN_CUDA_CACHE_DIR"):
        default_cache_dir()


def _build_as_ordinary_user(recipe: Recipe, results) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)  # root may write everywhere
    if not os.access(torch.__file__, os.R_OK):
        results.put("unreachable")
        return
    try:
        build(recipe)
    except BuildError as error:
        results.put(str(error))


def _leave_empty(recipe: Recipe) -> None:
    recipe.cache_dir.mkdir()


def _leave_a_damaged_library(recipe: Recipe) -> None:
    truncate_to_one_page(build(recipe))


def _leave_a_closed_library(recipe: Recipe) -> None:
    build(recipe).chmod(0)


@pytest.mark.parametrize(
    ("mode", "fill", "expected"),
    [
        (0o000, _leave_empty, "Permission denied"),
        (0o555, _leave_empty, "Permission denied"),
        (
            0o555,
            _leave_a_damaged_library,
            r"librnn_cuda\.so is damaged \(4096 bytes\)\. The kernel",
        ),
        (
            0o555,
            _leave_a_closed_library,
            r"librnn_cuda\.so is unreadable \(Permission denied\)\. T",
        ),
    ],
    ids=["closed", "read-only", "damaged", "unreadable"],
)
def test_a_protected_cache_says_what_to_set(mode, fill, expected):
    # Not in tmp_path, which pytest closes to other users.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        recipe = Recipe.create(write_sources(folder / "csrc"), folder / "cache")
        fill(recipe)
        recipe.cache_dir.chmod(mode)
        results = _fork.Queue()
        user = _fork.Process(target=_build_as_ordinary_user, args=(recipe, results))
        user.start()
        try:
            message = results.get(timeout=10)
            if message == "unreachable":
                pytest.skip(
                    "root's virtual environment is closed to the ordinary user of this test"
                )
            assert re.search(expected, message)
            assert "Set RNN_CUDA_CACHE_DIR" in message
        finally:
            user.join(timeout=10)
            recipe.cache_dir.chmod(0o755)


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
    library = build(Recipe.create(sources, cache))
    foreign = [cache / "0123456789abcdef", cache / "documents"]
    for folder in foreign:
        folder.mkdir()
        (folder / "thesis.tex").touch()
    assert clean(cache) == [library.parent]
    assert not library.exists()
    assert all((folder / "thesis.tex").exists() for folder in foreign)
    assert clean(cache) == []
    assert clean(cache / "missing") == []
    assert stub_value(build(Recipe.create(sources, cache))) == 7


def test_an_entry_that_lost_its_library_is_built_again(sources, cache):
    library = build(Recipe.create(sources, cache))
    library.unlink()
    assert stub_value(build(Recipe.create(sources, cache))) == 7


# ---- libraries that are not as they were compiled -----------------------------------------------
# Each damages an entry of the cache by files of its own: what is mapped elsewhere stays as it is.


def replace(file: Path, contents: bytes) -> None:
    file.unlink()
    file.write_bytes(contents)


def truncate_to_one_page(library: Path) -> None:
    replace(library, library.read_bytes()[:4096])


def cut_off_the_last_byte(library: Path) -> None:
    replace(library, library.read_bytes()[:-1])


def append_a_byte(library: Path) -> None:
    replace(library, library.read_bytes() + b"\0")


def empty(library: Path) -> None:
    replace(library, b"")


def zero_the_tail(library: Path) -> None:
    contents = library.read_bytes()
    replace(library, contents[:4096].ljust(len(contents), b"\0"))


def flip_a_bit(library: Path) -> None:
    contents = bytearray(library.read_bytes())
    contents[len(contents) // 2] ^= 1
    replace(library, bytes(contents))


def take_the_machine_for_another(library: Path) -> None:
    contents = bytearray(library.read_bytes())
    contents[18:20] = (183).to_bytes(2, "little")  # e_machine: EM_AARCH64
    replace(library, bytes(contents))


def put_a_folder_in_its_place(library: Path) -> None:
    library.unlink()
    library.mkdir()
    (library / "file").touch()


def put_a_pipe_in_its_place(library: Path) -> None:
    library.unlink()
    os.mkfifo(library)


def link_it_to_nothing(library: Path) -> None:
    library.unlink()
    library.symlink_to("elsewhere")


def lose_the_checksum(library: Path) -> None:
    (library.parent / CHECKSUM_NAME).unlink()


def empty_the_checksum(library: Path) -> None:
    (library.parent / CHECKSUM_NAME).write_bytes(b"")


def zero_the_checksum(library: Path) -> None:
    checksum = library.parent / CHECKSUM_NAME
    checksum.write_bytes(bytes(checksum.stat().st_size))


def put_a_file_in_place_of_the_entry(library: Path) -> None:
    shutil.rmtree(library.parent)
    library.parent.touch()


def put_another_entry_there(library: Path) -> None:
    other = build(Recipe.create(write_sources(library.parents[2] / "other", value=8)))
    shutil.rmtree(library.parent)
    other.parent.rename(library.parent)


DAMAGE = [
    truncate_to_one_page,
    cut_off_the_last_byte,
    append_a_byte,
    empty,
    zero_the_tail,
    flip_a_bit,
    take_the_machine_for_another,
    put_a_folder_in_its_place,
    put_a_pipe_in_its_place,
    link_it_to_nothing,
    lose_the_checksum,
    empty_the_checksum,
    zero_the_checksum,
    put_a_file_in_place_of_the_entry,
    put_another_entry_there,
]


def _build_and_ask(recipe: Recipe, results) -> None:
    results.put(stub_value(build(recipe)))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_compiled_again(damage, sources, cache, monkeypatch, capfd):
    monkeypatch.setenv("RNN_CUDA_CACHE_DIR", str(cache))
    recipe = Recipe.create(sources, cache)
    library = build(recipe)
    damage(library)
    assert state_of(library) != COMPILED
    capfd.readouterr()

    # Another process, because one that maps a truncated file ends with SIGBUS.
    results = _fork.Queue()
    user = _fork.Process(target=_build_and_ask, args=(recipe, results))
    user.start()
    user.join(timeout=60)
    assert user.exitcode == 0
    assert results.get(timeout=1) == 7
    assert state_of(library) == COMPILED
    assert temporary_folders(cache) == []
    announced = capfd.readouterr().err
    assert announced.count("compiling kernels") == 1
    missing = (link_it_to_nothing, put_a_file_in_place_of_the_entry)
    assert (f"{library} is damaged (" in announced) == (damage not in missing)

    assert build(recipe) == library
    assert capfd.readouterr().err == ""


def test_processes_that_notice_damage_at_once_build_once(
    sources, cache, monkeypatch, tmp_path, capfd
):
    compiler, log = write_logging_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    recipe = Recipe.create(sources, cache)
    library = build(recipe)
    loaded = ctypes.CDLL(str(library))
    flip_a_bit(library)
    start, results = _fork.Event(), _fork.Queue()
    racers = [_fork.Process(target=_race, args=(recipe, start, results)) for _ in range(8)]
    for racer in racers:
        racer.start()
    start.set()
    for racer in racers:
        racer.join(timeout=60)
    assert [racer.exitcode for racer in racers] == [0] * 8
    assert [results.get(timeout=1) for _ in racers] == [7] * 8
    assert links(log) == 2
    assert capfd.readouterr().err.count("is damaged") == 1
    assert loaded.stub_value() == 7  # in a process that has mapped the old one


def test_a_library_that_is_replaced_is_a_new_file(sources, cache):
    """Written in place, it would change under whoever has it mapped."""
    recipe = Recipe.create(sources, cache)
    library = build(recipe)
    lose_the_checksum(library)
    with library.open("rb") as held:
        before = held.read()
        assert build(recipe) == library
        assert not os.path.samestat(os.fstat(held.fileno()), library.stat())
        held.seek(0)
        assert held.read() == before


@pytest.mark.usefixtures("without_nvcc")
def test_without_nvcc_the_cpu_kernels_are_built(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    recipe = Recipe.create(write_sources(tmp_path / "csrc", cuda=True), cache)
    assert recipe.cuda is None
    assert "nvcc is neither in CUDA_HOME" in recipe.cuda_note
    library = build(recipe)
    assert stub_value(library) == 7
    assert b"stub_launch" not in library.read_bytes()


@needs_nvcc
def test_with_nvcc_the_cuda_kernels_are_built_in(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    sources = write_sources(tmp_path / "with space", cuda=True)
    recipe = Recipe.create(sources, tmp_path / "cache")
    assert recipe.cuda is not None
    assert recipe.cuda.archs == ("sm_90",)
    library = build(recipe)
    # It loads next to any torch, this one too, whether or not it knows CUDA.
    assert stub_value(library) == 7
    assert b"stub_launch" in library.read_bytes()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert Recipe.create(sources, tmp_path / "cache").key != recipe.key


def test_cuda_kernels_are_compiled_where_they_can_run_or_are_asked_for(
    tmp_path, cache, monkeypatch
):
    """Compiling them takes minutes; a torch without CUDA has no use for them."""
    monkeypatch.setattr("rnn_cuda.build.recipe.find_cuda", lambda: (None, "asked for nvcc"))
    sources = write_sources(tmp_path / "csrc", cuda=True)

    def note(kernels: Kernels = "auto") -> str:
        return Recipe.create(sources, cache, kernels=kernels).cuda_note

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
    emulator = tmp_path / "tests" / "emulator"
    emulator.mkdir(parents=True)
    (emulator / "machine.h").write_text("int machine();\n")
    (emulator / "machine.cpp").write_text('#include "machine.h"\nint machine() { return 1; }\n')
    (sources / "cpu" / "kernel.cpp").write_text("#error CPU kernels are another library\n")
    recipe = Recipe.create(sources, cache, kernels="emulated", emulator_dir=emulator)
    names = [path.name for path in recipe.cxx_sources + recipe.cuda_sources]
    assert names == ["binding.cpp", "stub.cpp", "machine.cpp", "kernel.cu"]
    assert ctypes.CDLL(str(build(recipe))).stub_emulated() == 8

    keys = [recipe.key, Recipe.create(sources, cache).key]
    (emulator / "machine.h").write_text("// another\nint machine();\n")
    assert recipe.key not in keys
    assert Recipe.create(sources, cache).key == keys[1]


@needs_nvcc
def test_an_nvcc_that_is_a_wrapper_script_leads_to_the_real_toolkit(tmp_path, monkeypatch):
    real = cuda_toolchain.find_cuda()[0]
    assert real is not None
    wrapper = write_program(tmp_path / "nvcc", f'exec "{real.nvcc}" "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(cuda_toolchain, "DEFAULT_CUDA_HOME", tmp_path / "no-cuda")
    found, note = cuda_toolchain.find_cuda()
    assert found is not None, note
    assert found.nvcc == wrapper
    assert (found.include, found.library) == (real.include, real.library)


# As nvcc 12.8 lists them, those too old for the kernels left out.
NVCC_ARCHS = {"80", "86", "87", "89", "90", "100", "120", "90a", "100a", "120a"}


def test_cuda_architectures(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(cuda_toolchain, "_visible_gpu_archs", list)
    default = ("sm_100", "sm_120", "sm_80", "sm_90")
    assert cuda_toolchain.cuda_archs(NVCC_ARCHS) == (default, "")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " ; ")
    assert cuda_toolchain.cuda_archs(NVCC_ARCHS) == (default, "")
    assert cuda_toolchain.cuda_archs({"80", "90"}) == (("compute_90", "sm_80", "sm_90"), "")


@pytest.mark.parametrize(
    ("visible", "targets"),
    [
        (["9.0"], ("sm_90",)),
        (["7.5", "8.6"], ("sm_86",)),
        (["12.1"], ("compute_120",)),  # newer than this nvcc
        (["10.3"], ("compute_100",)),
    ],
)
def test_each_visible_gpu_gets_a_target_that_runs_on_it(visible, targets, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(cuda_toolchain, "_visible_gpu_archs", lambda: visible)
    assert cuda_toolchain.cuda_archs(NVCC_ARCHS) == (targets, "")


def test_gpus_that_are_all_too_old_are_a_reason(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(cuda_toolchain, "_visible_gpu_archs", lambda: ["7.0", "7.5"])
    with pytest.raises(BuildError, match=r"no visible GPU is of compute capability 8\.0 or newer"):
        cuda_toolchain.cuda_archs(NVCC_ARCHS)


@pytest.mark.parametrize(
    ("listed", "targets", "left_out"),
    [
        ("8.0;9.0a 12.0+PTX", ("compute_120", "sm_120", "sm_80", "sm_90a"), ""),
        ("9.0a+PTX", ("compute_90a", "sm_90a"), ""),
        ("Ampere", ("compute_86", "sm_80", "sm_86"), ""),
        ("Ampere+Tegra", ("sm_87",), ""),
        ("Hopper+PTX;Ada", ("compute_89", "compute_90", "sm_89", "sm_90"), ""),
        ("All", tuple(sorted(f"sm_{n}" for n in (80, 86, 87, 89, 90, 100, 120))), ""),
        ("Common", ("sm_100", "sm_120", "sm_80", "sm_90"), ""),
        ("native", ("sm_90",), ""),
        # Some that the kernels, this nvcc or anyone knows, some not.
        ("7.5;8.0", ("sm_80",), "7.5"),
        ("5.2 6.0 7.0;8.0 8.6 9.0+PTX", ("compute_90", "sm_80", "sm_86", "sm_90"), "5.2, 6.0, 7.0"),
        ("Volta;Turing;Hopper", ("compute_90", "sm_90"), "Volta, Turing"),
        ("Blackwell", ("sm_100", "sm_120"), "10.3, 12.1+PTX"),
        ("9.0;9.0f;8.0a", ("sm_90",), "9.0f, 8.0a"),
        ("9.0;13.0;99", ("sm_90",), "13.0, 99"),
        ("9.0;hopper;sm_80;8.0,8.6;-1", ("sm_90",), "hopper, sm_80, 8.0,8.6, -1"),
        ("9.0;+PTX;+PTX", ("sm_90",), "+PTX, +PTX"),
    ],
)
def test_an_architecture_list(listed, targets, left_out, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr(cuda_toolchain, "_visible_gpu_archs", lambda: ["9.0"])
    found, why = cuda_toolchain.cuda_archs(NVCC_ARCHS)
    assert found == targets
    expected = f"TORCH_CUDA_ARCH_LIST: the kernels and this nvcc do not support {left_out}. Supp"
    assert why.startswith(expected) if left_out else why == ""


@pytest.mark.parametrize("listed", ["7.5", "Volta+PTX", "9", "9.0f", "x", "13.0", "+PTX", "7.0;é"])
def test_a_list_without_any_supported_architecture_names_the_variable(listed, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    expected = r"TORCH_CUDA_ARCH_LIST: .* do not support .*Supported are 8.0, .*, each also with"
    with pytest.raises(BuildError, match=expected):
        cuda_toolchain.cuda_archs(NVCC_ARCHS)


NVCC = """
case "$*" in
*--list-gpu-arch*) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
*--help*) echo "'sm_80','sm_90','sm_90a'." ;;
*--version*) echo "release 12.8, V12.8.93" ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_nvcc: None) -> Path:
    """A CUDA toolkit that can say what it is, and compile nothing."""
    home = tmp_path / "toolkit"
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir(parents=True)
    (home / "include" / "cuda_runtime_api.h").touch()
    (home / "lib64" / "libcudart_static.a").touch()
    write_program(home / "bin" / "nvcc", NVCC)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    return home


def test_what_nvcc_says_it_knows_is_what_an_architecture_list_may_name(toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0;9.0a;9.0f;12.0")
    found, note = cuda_toolchain.find_cuda()
    assert found is not None, note
    assert found.archs == ("sm_80", "sm_90a")
    assert "support 7.5, 9.0f, 12.0. Supported are 8.0, 9.0, each" in note


def remove_architectures(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    return "TORCH_CUDA_ARCH_LIST: the kernels and this nvcc do not support 7.5"


def break_nvcc(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (toolkit / "bin" / "nvcc").write_bytes(b"\x7fELF of another machine")
    return "nvcc cannot be started"


def silence_nvcc(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write_program(toolkit / "bin" / "nvcc", "exit 1")
    return "--list-gpu-arch lists nothing"


def hang_nvcc(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(toolchain, "_ANSWER_SECONDS", 0.1)
    write_program(toolkit / "bin" / "nvcc", "while :; do :; done")
    return r"nvcc did not answer in 0\.1 s"


def lose_headers(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shutil.rmtree(toolkit / "include")
    monkeypatch.chdir(toolkit)
    monkeypatch.setenv("CUDA_PATH", "")  # not the current folder
    return r"has no cuda_runtime_api\.h beside it; set CUDA_HOME"


def move_the_toolkit(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CUDA_HOME", "/no/such/toolkit")
    return "nvcc is neither in CUDA_HOME"


def name_no_path(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PATH", str(toolkit / "bin"), prepend=os.pathsep)
    shutil.rmtree(toolkit / "include")
    monkeypatch.setenv("CUDA_HOME", "x" * 5000)
    return "File name too long|has no cuda_runtime_api"


@pytest.mark.parametrize(
    "trouble",
    [
        remove_architectures,
        break_nvcc,
        silence_nvcc,
        hang_nvcc,
        lose_headers,
        move_the_toolkit,
        name_no_path,
    ],
)
def test_trouble_with_cuda_costs_the_cuda_kernels_alone(trouble, toolkit, tmp_path, monkeypatch):
    expected = trouble(toolkit, monkeypatch)
    recipe = Recipe.create(write_sources(tmp_path / "csrc", cuda=True), tmp_path / "cache")
    assert recipe.cuda is None
    assert re.search(expected, recipe.cuda_note)
    assert stub_value(build(recipe)) == 7


def test_a_broken_nvidia_smi_is_as_none(toolkit, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    (tmp_path / "programs" / "nvidia-smi").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "programs" / "nvidia-smi").chmod(0o755)
    found, note = cuda_toolchain.find_cuda()
    assert found is not None, note
    assert found.archs == ("compute_90", "sm_80", "sm_90")


def test_visible_gpus_are_those_that_nvidia_smi_lists(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    write_program(tmp_path / "nvidia-smi", "printf '9.0\\n9.0\\n8.6\\n'")
    assert cuda_toolchain._visible_gpu_archs() == ["8.6", "9.0"]
    write_program(tmp_path / "nvidia-smi", "echo 'no driver is running'; exit 9")
    assert cuda_toolchain._visible_gpu_archs() == []
