"""A run's folder belongs to one process, from the first byte to the last.

Runs of a job array start in the same second, and so their folders have the same name. A process
takes a folder by creating ``owner.json`` in it, which only one of them can (``O_EXCL``, on NFS
too), and keeps that file locked as long as it lives. Of a folder that the clock named the next one
takes ``..._2``; a folder that somebody named is refused once a run is, or was, in it.

Hydra makes a run's folder before it calls the run, and writes into that of a sweep before any
member runs. `FolderCallback` takes them earlier still.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from experiments import distributed
from experiments.record import OWNER, this_process

STUDY, FAILURE = "study.json", "failure.json"

# What runs and sweeps left behind before folders had an owner.
_EARLIER = (".hydra", "multirun.yaml", "partial_results.json", "results.json")

# The locked files of the folders that this process has taken.
_taken: dict[Path, int] = {}


class FolderTakenError(FileExistsError):
    """A folder that another run is, or was, in."""


def claim(folder: Path) -> None:
    """Take ``folder`` for a run of this process; make it if it is missing.

    A folder that this process has already taken is its own until there are results in it.

    Raises:
        FolderTakenError: a run is or was there; the message says which, and what to do.
    """
    path = folder.resolve()
    if path in _taken:
        _refuse_earlier(folder, (STUDY,))
        return
    if folder.exists() and not folder.is_dir():
        raise FolderTakenError(f"{folder} is not a folder; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_earlier(folder, (STUDY, *(() if (folder / OWNER).exists() else _EARLIER)))
    try:
        file = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise FolderTakenError(_on_owner(folder)) from None
    # A file system without locks costs nothing but the answer to whether the owner still runs.
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    os.write(file, this_process())
    _taken[path] = file


def claim_next(folder: Path) -> Path:
    """Take the first of ``folder``, ``folder_2``, ``folder_3``, ... that is free; return it."""
    for number in itertools.count(1):
        numbered = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        if numbered.resolve() not in _taken:
            with suppress(FolderTakenError):
                claim(numbered)
                return numbered
    raise AssertionError("unreachable: there is always a next number")


def release(folder: Path) -> None:
    """Give a folder back in which nothing was written, or whose results keep others away."""
    os.unlink(folder / OWNER)
    os.close(_taken.pop(folder.resolve()))
    with suppress(OSError):  # it is not empty
        folder.rmdir()


def _refuse_earlier(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (folder / name).exists():
            raise FolderTakenError(f"{folder} already holds a run ({name}); choose another folder")


def _on_owner(folder: Path) -> str:
    """Say what became of the process that took a folder."""
    unknown = f"{folder} was taken by another process; choose another folder"
    try:
        file = (folder / OWNER).open(encoding="utf-8")
    except FileNotFoundError:  # released since
        return unknown
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            state = "which has ended"
        except BlockingIOError:
            state = "which is still running"
        except OSError:
            state = "which may still be running"
        try:
            owner = json.load(file)
        except ValueError:  # between its creation and its first byte
            return unknown
    words = (
        f"{folder} was taken by process {owner['pid']} on {owner['host']}, started "
        f"{owner['started']}, {state}; choose another folder"
    )
    if state == "which has ended":
        words += ", or delete this one if what it holds is not needed"
    return words


class FolderCallback(Callback):
    """Takes the folder of a run, or of a sweep, before Hydra makes it or writes into it."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Take ``hydra.run.dir``, or end the process with the reason why not."""
        _take(config, config.hydra.run)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Take ``hydra.sweep.dir``, or end the process with the reason why not."""
        _take(config, config.hydra.sweep)
        # The members' configurations are composed anew, from the command line and from this.
        folder = QuotedString(config.hydra.sweep.dir, Quote.single).with_quotes()
        with read_write(config.hydra):
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={folder}")


def _take(config: DictConfig, node: Any) -> None:
    if not distributed.is_main():
        # Of the processes that torchrun started one has the folder; Hydra makes one for each.
        with read_write(config.hydra):
            node.dir = str(config.output.root)
        return
    folder = Path(node.dir)
    is_named_by_clock = "${now:" in OmegaConf.to_container(node, resolve=False)["dir"]
    # Hydra turns any other exception of a callback into a warning, and goes on.
    try:
        if is_named_by_clock:
            folder = claim_next(folder)
        else:
            claim(folder)
    except FolderTakenError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        raise SystemExit(f"error: cannot make the folder {folder}: {error}") from error
    with read_write(config.hydra):
        node.dir = str(folder)


def file_name(text: str) -> str:
    """Return ``text`` as part of a file's name: one line without ``/``, 80 bytes at most."""
    safe = "".join("_" if c == "/" or unicodedata.category(c)[0] == "C" else c for c in text)
    return safe.encode()[:80].decode(errors="ignore")


def _file_name_of(key: str, *, _root_: DictConfig) -> str:
    # A key without a usable value must not keep a member of a sweep from being refused by its name.
    try:
        return file_name(str(OmegaConf.select(_root_, key, default="unnamed")))
    except OmegaConfBaseException:
        return "unnamed"


OmegaConf.register_new_resolver("file_name", _file_name_of, replace=True)
