"""Signals that ask a program to end, as a flag that it looks at.

Ctrl-C sends SIGINT; SLURM sends SIGTERM, and what ``sbatch --signal`` names: SIGUSR1 here.

A flag, because Python drops a KeyboardInterrupt that comes up in a destructor or in a library's
callback, and the program would go on for hours.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether one of `SIGNALS` came inside the ``with`` block.

    A second Ctrl-C raises KeyboardInterrupt at once; a third ends the process whatever it does.
    The other signals can come any number of times. Only the main thread receives signals: in
    another one the answer is always no.
    """
    came = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and came.is_set():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        came.set()

    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            # None: not set from Python, so Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold `SIGNALS` back until the end of the block; processes started in it never get them.

    Until they unblock them: a process that is still importing can do nothing about a signal.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
