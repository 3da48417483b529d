"""Reads videos from numpy's ``.npy`` files; nothing is unpickled."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class NPYError(ValueError):
    """A file that is not what it should be; the message names file and fault."""


def read_npy(path: Path) -> np.ndarray:
    """Map a file of unsigned bytes into memory.

    Returns:
        An array of uint8 that cannot be written to; its parts are read when they are looked at.

    Raises:
        NPYError: it cannot be read, is no ``.npy``, holds something else, or its length is not what
            its header says.
    """
    try:
        with path.open("rb") as file:
            version = npy.read_magic(file)
            if version not in _HEADERS:
                raise ValueError(f"version {version[0]}.{version[1]} of the format is not known")
            shape, is_column_major, dtype = _HEADERS[version](file)
            start = file.tell()
            size = path.stat().st_size - start
    except OSError as error:
        raise NPYError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise NPYError(f"{path}: not a .npy file ({error})") from error
    if dtype.hasobject:
        raise NPYError(f"{path}: holds pickled Python objects; nothing is unpickled")
    if dtype != np.uint8:
        raise NPYError(f"{path}: expected unsigned bytes (uint8), got {dtype}")
    if min(shape, default=1) < 1:
        raise NPYError(f"{path}: holds nothing; its header says the shape {words(shape)}")
    expected = math.prod(shape)
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise NPYError(
            f"{path}: {fault}; its header says the shape {words(shape)}, so {expected} bytes were "
            f"expected after it, got {size}"
        )
    return np.memmap(path, np.uint8, "r", start, shape, "F" if is_column_major else "C")


def words(shape: tuple[int, ...]) -> str:
    """Return a shape as it is written in messages."""
    return f"[{', '.join(map(str, shape))}]"
