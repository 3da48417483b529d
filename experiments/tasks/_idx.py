"""Reads the IDX files of MNIST (http://yann.lecun.com/exdb/mnist), compressed or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

_UNSIGNED_BYTES = 0x08
_FOLDERS = (".", "MNIST/raw", "raw")  # the last two are torchvision's layout


class IDXError(ValueError):
    """A file that is not what it should be; the message names file and fault."""


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an IDX file of unsigned bytes.

    Args:
        path: the file; gzip is recognised by its content.
        dimensions: how many the file must have, 3 for images and 1 for labels.

    Returns:
        A uint8 tensor.

    Raises:
        IDXError: it cannot be read or decompressed, its magic number is another, or its length is
            not what its header says.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise IDXError(f"{path}: cannot be read ({error.strerror})") from error
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise IDXError(f"{path}: truncated or corrupt gzip file ({error})") from error
    magic = bytes((0, 0, _UNSIGNED_BYTES, dimensions))
    header = 4 + 4 * dimensions
    if content[:4] != magic:
        raise IDXError(
            f"{path}: wrong magic number; expected {magic.hex()} (unsigned bytes in {dimensions} "
            f"dimension(s)), got {content[:4].hex() or 'an empty file'}"
        )
    if len(content) < header:
        raise IDXError(
            f"{path}: truncated; expected a header of {header} bytes, got {len(content)}"
        )
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    expected = header + math.prod(shape)
    if len(content) != expected:
        fault = "truncated" if len(content) < expected else "too long"
        raise IDXError(
            f"{path}: {fault}; its header says {' x '.join(map(str, shape))}, so {expected} bytes "
            f"were expected, got {len(content)}"
        )
    if 0 in shape:
        raise IDXError(f"{path}: holds nothing; its header says {' x '.join(map(str, shape))}")
    # A bytearray, because torch wants memory that may be written to.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)


def find_idx(root: Path, name: str) -> Path:
    """Return the file of a name, with ``.gz`` or without, in a folder or where torchvision puts it.

    Raises:
        IDXError: there is no such folder or file.
    """
    if not root.is_dir():
        raise IDXError(f"{root}: expected a folder, got {'a file' if root.exists() else 'nothing'}")
    folders = [root / folder for folder in _FOLDERS]
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise IDXError(
        f"{root / name}: missing; neither it nor {name}.gz is in {', '.join(map(str, folders))}"
    )
