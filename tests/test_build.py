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
from rnn_cuda.build.cache import CHECKSUM_NAME, COMPILED, MISSING, state_of
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


@pytest.mark.parametrize("damaged", [False, True], ids=["empty cache", "damaged library"])
def test_of_eight_processes_one_compiles(damaged, sources, cache, monkeypatch, tmp_path, capfd):
    compiler, log = write_logging_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    recipe = Recipe.create(sources, cache)
    if damaged:
        loaded = ctypes.CDLL(str(build(recipe)))
        flip_a_bit(recipe.library)
        capfd.readouterr()
    start, results = _fork.Event(), _fork.Queue()
    racers = [_fork.Process(target=_race, args=(recipe, start, results)) for _ in range(8)]
    for racer in racers:
        racer.start()
    start.set()
    for racer in racers:
        racer.join(timeout=60)
    assert [racer.exitcode for racer in racers] == [0] * 8
    assert [results.get(timeout=1) for _ in racers] == [7] * 8
    assert links(log) == 1 + damaged
    announced = capfd.readouterr().err
    assert announced.count("compiling kernels") == 1
    assert announced.count("is damaged") == damaged
    assert announced.count("waiting for another process") <= 7
    if damaged:
        assert loaded.stub_value() == 7  # in a process that has mapped the old one


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


def test_a_waiting_process_says_so_once_and_takes_over_from_a_killed_one(
    stuck_builder, cache, capfd
):
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
        assert len(temporary_folders(cache)) == 1
        assert not recipe.library.exists()
        hang.unlink()
        builder.kill()  # its compiler still runs, as an orphan
        builder.join(timeout=10)
        assert builder.exitcode == -signal.SIGKILL
        waiter.join(timeout=60)
        assert waiter.exitcode == 0
    finally:
        waiter.kill()
    announced += capfd.readouterr().err
    assert announced.count("waiting for another process") == 1
    assert stub_value(recipe.library) == 7
    assert temporary_folders(cache) == []  # what the killed one left is gone


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


JOBS = "MAX_JOBS must be a number of processes from 1 to 9999, but is '{}'"
CHOOSE_A_CACHE = "Set RNN_CUDA_CACHE_DIR to a folder you can write to"
# Variables, in which TMP is the test's folder, and what the error says; those before the cache are
# about the compiler.
TROUBLE = {
    "no compiler": ({"PATH": "TMP", "CXX": ""}, "no C++ compiler on the PATH. Install g++ 11 or"),
    "no such compiler": ({"CXX": "nowhere"}, "CXX='nowhere' is not a program. Install g++ 11 or"),
    "with arguments": ({"CXX": "ccache g++"}, "CXX='ccache g++' is not a program, and it takes no"),
    "cannot be started": ({"CXX": "TMP/broken"}, "broken cannot be started"),
    "compiles nothing": ({"CXX": "true"}, "true reports success but linked nothing; set CXX"),
    "full disk": ({"CXX": "TMP/full"}, "RNN_CUDA_CACHE_DIR names another folder for the kernels"),
    **{
        f"{n[:9]} jobs": ({"MAX_JOBS": n}, JOBS.format(n))
        for n in ("many", "0", "-1", "1.5", "2 3")
    },
    "too many jobs": ({"MAX_JOBS": "1" * 40}, JOBS.format("1" * 40)),
    "below a file": ({"RNN_CUDA_CACHE_DIR": "TMP/file/cache"}, CHOOSE_A_CACHE),
    "a file": ({"RNN_CUDA_CACHE_DIR": "TMP/file"}, "file cannot be written: "),
    "no such user": ({"RNN_CUDA_CACHE_DIR": "~nobody-at-all/cache"}, CHOOSE_A_CACHE),
    "long name": ({"RNN_CUDA_CACHE_DIR": "x" * 300}, CHOOSE_A_CACHE),
    "in /proc": ({"RNN_CUDA_CACHE_DIR": "/proc/kernels"}, CHOOSE_A_CACHE),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_says_what_to_set_or_to_install(name, sources, cache, monkeypatch, tmp_path):
    variables, message = TROUBLE[name]
    (tmp_path / "broken").write_bytes(b"\x7fELF nothing")
    (tmp_path / "broken").chmod(0o755)
    full = 'echo "error writing to x.o: No space left on device"; exit 1'
    write_program(tmp_path / "full", f'[ "$1" = --version ] || {{ {full}; }}')
    (tmp_path / "file").touch()  # not even root can make a folder below a file
    monkeypatch.setenv("RNN_CUDA_CACHE_DIR", str(cache))
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value.replace("TMP", str(tmp_path)))
    with pytest.raises(BuildError, match=re.escape(message)) as caught:
        build(Recipe.create(sources))
    assert isinstance(caught.value, CompilerNotFoundError) == (
        "Install g++ 11" in str(caught.value)
    )
    assert ("RNN_CUDA_CACHE_DIR" in str(caught.value)) == ("CACHE_DIR" in str(variables) + message)
    assert temporary_folders(cache) == []


@pytest.mark.parametrize("jobs", ["", " 3 ", "9999"])
def test_variables_of_ninja_do_not_stop_it(jobs, sources, cache, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", jobs)
    monkeypatch.setenv("NINJA_STATUS", "%nonsense")
    assert stub_value(build(Recipe.create(sources, cache))) == 7


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


# ---- libraries that are not as they were compiled -----------------------------------------------
# Each damages an entry of the cache by files of its own: what is mapped elsewhere stays as it is.


def replace(file: Path, contents: bytes) -> None:
    file.unlink()
    file.write_bytes(contents)


def change(library: Path, first: int, contents: bytes) -> None:
    before = library.read_bytes()
    replace(library, before[:first] + contents + before[first + len(contents) :])


def truncate_to_one_page(library: Path) -> None:
    replace(library, library.read_bytes()[:4096])


def flip_a_bit(library: Path) -> None:
    middle = library.stat().st_size // 2
    change(library, middle, bytes([library.read_bytes()[middle] ^ 1]))


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


def put_a_file_in_place_of_the_entry(library: Path) -> None:
    shutil.rmtree(library.parent)
    library.parent.touch()


def put_another_entry_there(library: Path) -> None:
    other = build(Recipe.create(write_sources(library.parents[2] / "other", value=8)))
    shutil.rmtree(library.parent)
    other.parent.rename(library.parent)


DAMAGE = {
    "one page of it": truncate_to_one_page,
    "without its last byte": lambda library: replace(library, library.read_bytes()[:-1]),
    "a byte more": lambda library: replace(library, library.read_bytes() + b"\0"),
    "empty": lambda library: replace(library, b""),
    "zeros at its end": lambda library: change(library, 4096, bytes(library.stat().st_size - 4096)),
    "another bit": flip_a_bit,
    "of another machine": lambda library: change(library, 18, (183).to_bytes(2, "little")),
    "without checksum": lose_the_checksum,
    "an empty checksum": lambda library: (library.parent / CHECKSUM_NAME).write_bytes(b""),
    "zeros for a checksum": lambda library: (library.parent / CHECKSUM_NAME).write_bytes(bytes(17)),
    "a folder": put_a_folder_in_its_place,
    "a pipe": put_a_pipe_in_its_place,
    "another entry": put_another_entry_there,
    # Taken for missing:
    "nothing": lambda library: library.unlink(),
    "a link to nothing": link_it_to_nothing,
    "a file for an entry": put_a_file_in_place_of_the_entry,
}
MISSED = list(DAMAGE)[-3:]
# Those that are to be replaced in another way each; of the rest it is enough that they are noticed.
COMPILED_AGAIN = ["one page of it", "a folder", "a pipe", "another entry", *MISSED]


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the stub, to be copied."""
    folder = tmp_path_factory.mktemp("compiled")
    build(Recipe.create(write_sources(folder / "csrc"), folder / "cache"))
    return folder / "cache"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_repaired(damage, compiled_once, sources, cache, monkeypatch, capfd):
    monkeypatch.setenv("RNN_CUDA_CACHE_DIR", str(cache))
    shutil.copytree(compiled_once, cache)
    recipe = Recipe.create(sources, cache)
    library = recipe.library
    assert state_of(library) == COMPILED
    DAMAGE[damage](library)
    if damage in MISSED:
        assert state_of(library) == MISSING
    else:
        assert state_of(library).startswith("damaged (")
    if damage not in COMPILED_AGAIN:
        return
    capfd.readouterr()

    # Another process, because one that maps a truncated file ends with SIGBUS.
    start, results = _fork.Event(), _fork.Queue()
    start.set()
    user = _fork.Process(target=_race, args=(recipe, start, results))
    user.start()
    user.join(timeout=60)
    assert user.exitcode == 0
    assert results.get(timeout=1) == 7
    assert state_of(library) == COMPILED
    assert temporary_folders(cache) == []
    announced = capfd.readouterr().err
    assert announced.count("compiling kernels") == 1
    assert (f"{library} is damaged (" in announced) == (damage not in MISSED)

    assert build(recipe) == library
    assert capfd.readouterr().err == ""


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


COMMON = ("sm_100", "sm_120", "sm_80", "sm_90")


@pytest.mark.parametrize(
    ("visible", "targets"),
    [
        ([], COMMON),
        (["9.0"], ("sm_90",)),
        (["7.5", "8.6"], ("sm_86",)),
        (["12.1"], ("compute_120",)),  # newer than this nvcc
        (["10.3"], ("compute_100",)),
    ],
)
@pytest.mark.parametrize("listed", ["", " ; "])
def test_each_visible_gpu_gets_a_target_that_runs_on_it(listed, visible, targets, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr(cuda_toolchain, "_visible_gpu_archs", lambda: visible)
    assert cuda_toolchain.cuda_archs(NVCC_ARCHS) == (targets, "")
    if not visible:
        assert cuda_toolchain.cuda_archs({"80", "90"}) == (("compute_90", "sm_80", "sm_90"), "")


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
        ("Common", COMMON, ""),
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


def hang(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_ANSWER_SECONDS", 0.1)
    write_program(toolkit / "bin" / "nvcc", "while :; do :; done")


def lose_the_headers(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(toolkit / "include")
    monkeypatch.chdir(toolkit)
    monkeypatch.setenv("CUDA_PATH", "")  # not the current folder


def name_no_path(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(toolkit / "bin"), prepend=os.pathsep)
    shutil.rmtree(toolkit / "include")
    monkeypatch.setenv("CUDA_HOME", "x" * 5000)


TROUBLE_WITH_CUDA = {
    "old GPUs": (
        lambda _, patch: patch.setenv("TORCH_CUDA_ARCH_LIST", "7.5"),
        "TORCH_CUDA_ARCH_LIST: the kernels and this nvcc do not support 7.5",
    ),
    "broken": (
        lambda toolkit, _: (toolkit / "bin" / "nvcc").write_bytes(b"\x7fELF of another machine"),
        "nvcc cannot be started",
    ),
    "silent": (
        lambda toolkit, _: write_program(toolkit / "bin" / "nvcc", "exit 1"),
        "--list-gpu-arch lists nothing",
    ),
    "hangs": (hang, r"nvcc did not answer in 0\.1 s"),
    "no headers": (lose_the_headers, r"has no cuda_runtime_api\.h beside it; set CUDA_HOME"),
    "moved": (
        lambda _, patch: patch.setenv("CUDA_HOME", "/no/such/toolkit"),
        "nvcc is neither in CUDA_HOME",
    ),
    "long path": (name_no_path, "File name too long|has no cuda_runtime_api"),
}


@pytest.mark.parametrize("name", TROUBLE_WITH_CUDA)
def test_trouble_with_cuda_costs_the_cuda_kernels_alone(name, toolkit, tmp_path, monkeypatch):
    cause, expected = TROUBLE_WITH_CUDA[name]
    cause(toolkit, monkeypatch)
    recipe = Recipe.create(write_sources(tmp_path / "csrc", cuda=True), tmp_path / "cache")
    assert recipe.cuda is None
    assert re.search(expected, recipe.cuda_note)
    assert {path.name for path in recipe.cxx_sources} == {"stub.cpp", "kernel.cpp"}


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
