"""Compile the kernels in ``csrc/`` once and keep the library in a per-user cache.

The first call that needs a kernel compiles them (:func:`build`); from the command line:

    python -m rnn_cuda.build               compile now, print the library's path
    python -m rnn_cuda.build --info        versions, flags, cache, backend in use
    python -m rnn_cuda.build --clean       remove what is cached
    python -m rnn_cuda.build --emulated    compile the CUDA kernels to run on the CPU, for tests
    python -m rnn_cuda.build --check-cuda  compile the CUDA kernels, fail on spilled registers

The cache folder is $RNN_CUDA_CACHE_DIR, else $XDG_CACHE_HOME/rnn_cuda, else ~/.cache/rnn_cuda. It
holds one folder for each key; a key is a hash of everything that the library depends on, so an
entry never needs to be updated, and any number of checkouts and environments share a cache:

    build.lock               held (flock) by the process that compiles
    <key>/librnn_cuda.so     with inputs.json, from which the key was made, build.ninja, build.log
    <key>/checksum           of the library, which is not loaded unless it agrees
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

from rnn_cuda.build.recipe import BuildPlan, default_cache_dir
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


def build(plan: BuildPlan | None = None) -> Path:
    """Return the kernel library, compiled first if the cache does not hold it.

    Any number of processes may call this at once: one compiles, the others wait for it. A process
    that is killed while compiling leaves nothing behind that the next one trips over. A library
    that is not as it was compiled is replaced by a new one.

    Args:
        plan: what to build; by default this package's sources for this machine.

    Returns:
        Path of a shared library for ``torch.ops.load_library``.

    Raises:
        CompilerNotFoundError: there is no C++ compiler or no ninja.
        BuildError: the sources do not compile, or the cache cannot be written.
    """
    plan = plan or BuildPlan.create()
    library = plan.library
    state = state_of(library)
    if state != COMPILED:
        with _locked(plan.cache_dir, "" if state == MISSING else f"{library} is {state}"):
            state = state_of(library)  # compiled if another process held the lock before
            if state not in (COMPILED, MISSING):
                _say(f"{library} is {state}")
            if state != COMPILED:
                _compile(plan, library)
    return library


def state_of(library: Path) -> str:
    """Return :data:`COMPILED`, :data:`MISSING`, or in words what is wrong with a cached library.

    Loading maps the file: a page that is missing ends the process with SIGBUS as soon as it is
    touched, and one that was changed is executed.
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
    # The size comes first: it tells most damage, and at no cost.
    if recorded.split(b" ")[0] != b"%d" % information.st_size:
        return f"damaged ({information.st_size} bytes)"
    try:
        found = _checksum(library, library.parent.name)
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return COMPILED if found == recorded else "damaged (another checksum)"


def _checksum(library: Path, key: str) -> bytes:
    """Return the size of a library, and a CRC of its key and contents.

    It is read in every process, so it has to be fast; nobody damages a library on purpose. With the
    key, an entry under another one's name does not agree.
    """
    size, crc = 0, zlib.crc32(key.encode())
    with library.open("rb") as file:
        while part := file.read(1 << 20):
            size += len(part)
            crc = zlib.crc32(part, crc)
    return b"%d %08x\n" % (size, crc)


@contextmanager
def _locked(folder: Path, problem: str = "") -> Iterator[None]:
    """Hold the cache's lock. The kernel drops it when its holder ends, however it ends.

    The lock file is never removed: whoever waits for a removed one would share the lock with
    whoever creates it anew.
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
                _say("waiting for another process that is compiling the kernels ...")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise _cache_error(folder, error, problem) from error
        yield


def _compile(plan: BuildPlan, library: Path) -> None:
    """Compile into a temporary folder and rename it to the cache entry. Needs the lock."""
    ninja = [str(find_ninja()), *_jobs()]
    entry = library.parent
    work, replaced = (plan.cache_dir / f"{entry.name}.tmp-{secrets.token_hex(4)}" for _ in range(2))
    _say(f"compiling kernels (once, about {plan.estimated_seconds()} s) ...")
    start = time.monotonic()
    try:
        # Whoever made these was killed: it would hold the lock otherwise.
        for abandoned in plan.cache_dir.glob("*.tmp-*"):
            if _ENTRY_NAME.fullmatch(abandoned.name):
                _discard(abandoned)
        work.mkdir()
        (work / INPUTS_NAME).write_text(json.dumps(plan.inputs(), indent=1, sort_keys=True))
        (work / "build.ninja").write_text(plan.ninja_file())
        _run_ninja(ninja, work)
        if plan.key != entry.name:
            raise BuildError("The kernels' sources changed while they were compiled; try again.")
        if not (work / library.name).is_file():
            raise BuildError(f"{plan.toolchain.cxx} reports success but linked nothing; set CXX.")
        _seal(work / library.name, entry.name)
        # A damaged entry goes as a whole: a process may still have its library mapped.
        if os.path.lexists(entry):
            entry.rename(replaced)
        work.rename(entry)
    except OSError as error:
        raise _cache_error(plan.cache_dir, error) from error
    finally:
        _discard(work)
        _discard(replaced)
    _say(f"compiled in {time.monotonic() - start:.0f} s: {library}")


def _seal(library: Path, key: str) -> None:
    """Write the checksum of a library that was just linked, and let both reach the disk.

    A file system may otherwise keep their names and lose their contents when the machine stops.
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
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"NINJA_STATUS": "[%f/%t] "},  # ninja ends at one that it cannot read
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    (folder / LOG_NAME).write_text(done.stdout)
    if done.returncode != 0:
        raise BuildError(_explain(done.stdout))


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


def _say(message: str) -> None:
    print(f"rnn_cuda: {message}", file=sys.stderr, flush=True)
