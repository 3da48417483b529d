"""Compile a recipe once and keep the library in a per-user cache.

The cache folder is $RNN_CUDA_CACHE_DIR, else $XDG_CACHE_HOME/rnn_cuda, else ~/.cache/rnn_cuda. It
holds one folder for each key. A key is a hash of everything that the library depends on. So an
entry never needs to be updated, and any number of clones and environments share a cache:

    build.lock               held (flock) by the process that compiles
    <key>/librnn_cuda.so     with inputs.json, from which the key was made, build.ninja, build.log
    <key>/checksum           of the library; a library with another checksum is not loaded
    <key>.tmp-<random>/      a build under way, renamed to <key>/ when complete
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rnn_cuda.build.recipe import Recipe, default_cache_dir
from rnn_cuda.build.toolchain import BuildError, find_ninja

INPUTS_NAME = "inputs.json"
LOG_NAME = "build.log"
CHECKSUM_NAME = "checksum"
COMPILED, MISSING = "compiled", "not compiled yet"
_ENTRY_NAME = re.compile(r"[0-9a-f]{16}(\.tmp-[0-9a-f]+)?")
_ERROR_TAIL_LINES = 40
_FULL_DISK_HINT = (
    " RNN_CUDA_CACHE_DIR names another folder for the kernels, TMPDIR one for the compiler's files."
)


def build(recipe: Recipe | None = None) -> Path:
    """Return the kernel library, compiled first if the cache does not hold it.

    Any number of processes may call this at once: one compiles, the others wait for it. What a
    killed process leaves behind does not disturb the next one. A damaged library is compiled again.

    Args:
        recipe: what to build; by default this package's sources for this machine.

    Returns:
        Path of a shared library for ``torch.ops.load_library``.

    Raises:
        CompilerNotFoundError: there is no C++ compiler or no ninja.
        BuildError: the sources do not compile, or the cache cannot be written.
    """
    recipe = recipe or Recipe.create()
    library = recipe.library
    state = state_of(library)
    if state != COMPILED:
        with _locked(recipe.cache_dir, "" if state == MISSING else f"{library} is {state}"):
            state = state_of(library)  # compiled if another process held the lock before
            if state not in (COMPILED, MISSING):
                _log(f"{library} is {state}")
            if state != COMPILED:
                _compile(recipe, library)
    return library


def state_of(library: Path) -> str:
    """Return :data:`COMPILED`, :data:`MISSING`, or what is wrong with a cached library.

    Loading maps the file. A missing page ends the process with SIGBUS as soon as it is touched; a
    changed page is executed.
    """
    try:
        information = library.stat()
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError as error:
        return f"unreadable ({error.strerror})"
    if not stat.S_ISREG(information.st_mode):
        return "damaged (not a file)"
    try:
        recorded = (library.parent / CHECKSUM_NAME).read_bytes()
    except OSError as error:
        return f"damaged (its checksum: {error.strerror})"
    # The size comes first: it shows most damage, and costs nothing.
    if recorded.split(b" ")[0] != b"%d" % information.st_size:
        return f"damaged ({information.st_size} bytes)"
    try:
        actual = _checksum(library, library.parent.name)
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return COMPILED if actual == recorded else "damaged (another checksum)"


def _checksum(library: Path, key: str) -> bytes:
    """Return the size of a library, and a CRC of its key and contents.

    Every process computes it, so it has to be fast; it need not withstand an attack. The key is
    included, so that an entry under another entry's name is noticed.
    """
    size, crc = 0, zlib.crc32(key.encode())
    with library.open("rb") as file:
        while part := file.read(1 << 20):
            size += len(part)
            crc = zlib.crc32(part, crc)
    return b"%d %08x\n" % (size, crc)


@contextmanager
def _locked(folder: Path, problem: str = "") -> Iterator[None]:
    """Hold the cache's lock. The operating system drops it when its holder ends, in any way.

    The lock file is never removed: a process that waits for a removed file would share the lock
    with a process that creates a new one.
    """
    import fcntl  # not on Windows, where this module must import all the same

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "build.lock").open("w")
    except OSError as error:
        raise _cache_error(folder, error, problem) from error
    with lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log("waiting for another process that is compiling the kernels ...")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise _cache_error(folder, error, problem) from error
        yield


def _compile(recipe: Recipe, library: Path) -> None:
    """Compile into a temporary folder and rename it to the cache entry. Needs the lock."""
    ninja = [str(find_ninja()), *_jobs()]
    entry = library.parent
    work, replaced = (
        recipe.cache_dir / f"{entry.name}.tmp-{secrets.token_hex(4)}" for _ in range(2)
    )
    _log(f"compiling kernels (once, about {recipe.estimated_seconds()} s) ...")
    start = time.monotonic()
    try:
        # The processes that made these were killed: they would hold the lock otherwise.
        for abandoned in recipe.cache_dir.glob("*.tmp-*"):
            if _ENTRY_NAME.fullmatch(abandoned.name):
                _discard(abandoned)
        work.mkdir()
        (work / INPUTS_NAME).write_text(json.dumps(recipe.inputs(), indent=1, sort_keys=True))
        (work / "build.ninja").write_text(recipe.ninja_file())
        _run_ninja(ninja, work)
        if recipe.key != entry.name:
            raise BuildError("The kernels' sources changed while they were compiled; try again.")
        if not (work / library.name).is_file():
            raise BuildError(f"{recipe.toolchain.cxx} reports success but linked nothing; set CXX.")
        _seal(work / library.name, entry.name)
        # A damaged entry goes as a whole: a process may still have its library mapped.
        if os.path.lexists(entry):
            entry.rename(replaced)
        work.rename(entry)
    except OSError as error:
        raise _cache_error(recipe.cache_dir, error) from error
    finally:
        _discard(work)
        _discard(replaced)
    _log(f"compiled in {time.monotonic() - start:.0f} s: {library}")


def _seal(library: Path, key: str) -> None:
    """Write the checksum of a library that was just linked, and flush both to the disk.

    Otherwise a file system may keep their names and lose their contents when the machine stops.
    """
    checksum = library.parent / CHECKSUM_NAME
    checksum.write_bytes(_checksum(library, key))
    for path in (library, checksum):
        with path.open("rb") as file:
            os.fsync(file)


def _discard(path: Path) -> None:
    """Remove a folder or a file, if it is there and as far as it can be removed."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _jobs() -> list[str]:
    """Return ninja's option for MAX_JOBS."""
    jobs = os.environ.get("MAX_JOBS", "").strip()
    if not jobs:
        return []
    if not re.fullmatch(r"0*[1-9][0-9]{0,3}", jobs):
        raise BuildError(
            f"MAX_JOBS must be a number of processes from 1 to 9999, but is {jobs!r}. "
            "Unset, it is chosen by ninja."
        )
    return ["-j", jobs]


def _run_ninja(command: list[str], folder: Path) -> None:
    result = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"NINJA_STATUS": "[%f/%t] "},  # ninja ends at one that it cannot read
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    (folder / LOG_NAME).write_text(result.stdout)
    if result.returncode != 0:
        raise BuildError(_explain(result.stdout))


def _explain(log: str) -> str:
    """Turn ninja's output into a message: the command that failed, the end of what it printed."""
    lines = log.splitlines()
    failed = next((i for i, line in enumerate(lines) if line.startswith("FAILED: ")), None)
    command, output = (
        ("ninja", lines) if failed is None else (lines[failed + 1], lines[failed + 2 :])
    )
    tail = "\n".join(output[-_ERROR_TAIL_LINES:])
    return (
        f"Compiling rnn_cuda's kernels failed.\n"
        f"Command: {command}\n"
        f"Output (end):\n{tail}\n"
        "Hint: another compiler can be named with CXX (g++ 11 or newer is known to work); "
        "RNN_CUDA_BACKEND=reference runs without kernels; `python -m rnn_cuda.build --info` shows "
        "what was found here." + (_FULL_DISK_HINT if os.strerror(errno.ENOSPC) in log else "")
    )


def _cache_error(folder: Path, error: OSError, problem: str = "") -> BuildError:
    return BuildError(
        (f"{problem}. " if problem else "")
        + f"The kernel cache {folder} cannot be written: {error}. "
        "Set RNN_CUDA_CACHE_DIR to a folder you can write to."
    )


def clean(folder: Path | None = None) -> list[Path]:
    """Remove every entry that :func:`build` made in the cache, and nothing else.

    Args:
        folder: the cache; by default the one that :func:`build` uses.

    Returns:
        The folders removed.

    Raises:
        BuildError: one of them cannot be removed.
    """
    folder = folder or default_cache_dir()
    if not folder.is_dir():
        return []
    with _locked(folder):
        entries = [
            path
            for path in sorted(folder.iterdir())
            if _ENTRY_NAME.fullmatch(path.name)
            and not path.is_symlink()
            and (path / INPUTS_NAME).is_file()
        ]
        try:
            for path in entries:
                shutil.rmtree(path)
        except OSError as error:
            raise _cache_error(folder, error) from error
    return entries


def _log(message: str) -> None:
    print(f"rnn_cuda: {message}", file=sys.stderr, flush=True)
