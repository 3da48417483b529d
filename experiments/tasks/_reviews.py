"""Reads labelled reviews from a tree of folders as that of aclImdb (Maas et al. 2011).

``train/pos``, ``train/neg``, ``test/pos`` and ``test/neg`` hold a review in each ``.txt`` file.
Nothing else is read.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_CLASSES = ("neg", "pos")
_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
_LINE_BREAK = re.compile(r"<br ?/?>")


class ReviewError(ValueError):
    """A file or folder that is not what it should be; the message names it and the fault."""


def words_of(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, in lower case, without ``<br />``."""
    return _WORD.findall(_LINE_BREAK.sub(" ", text.lower()))


@dataclass(frozen=True)
class Reviews:
    """Reviews, one behind the other.

    Attributes:
        symbols: the index of each word of all reviews.
        ends: where each review ends in ``symbols``, ``[N]``.
        labels: 1.0 for a positive one, ``[N]``.
    """

    symbols: Tensor
    ends: Tensor
    labels: Tensor

    @property
    def lengths(self) -> Tensor:
        """The words of each review, ``[N]``."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    def last_words(self, chosen: Tensor, length: int, padding: int) -> Tensor:
        """Return the last words of some reviews, ``[length, B]``, shorter ones padded in front."""
        back = torch.arange(length, 0, -1).unsqueeze(1)
        at = (self.ends[chosen] - back).clamp(min=0)
        return self.symbols[at].long().where(back <= self.lengths[chosen], padding)


def read_reviews(root: Path, vocabulary: int) -> tuple[Reviews, Reviews, list[str], str]:
    """Read a tree of reviews.

    Args:
        root: the folder with ``train`` and ``test``.
        vocabulary: how many words to know, the most frequent of the training part; all others are
            one more symbol, the last.

    Returns:
        Training part, test part, the words by index, and a digest of all files.

    Raises:
        ReviewError: a folder is missing or has no ``.txt`` file, or a file cannot be read, is not
            UTF-8 or has no word in it.
    """
    digest = hashlib.sha256()
    train, test = (_read_part(root / part, digest) for part in ("train", "test"))
    counts = Counter(word for review in train[0] for word in review)
    words = sorted(counts, key=lambda word: (-counts[word], word))[:vocabulary]
    index = {word: i for i, word in enumerate(words)}
    return _packed(train, index), _packed(test, index), words, digest.hexdigest()


def _read_part(folder: Path, digest) -> tuple[list[list[str]], list[float]]:
    reviews, labels = [], []
    for label, name in enumerate(_CLASSES):
        for path in _text_files(folder / name):
            content = _content(path)
            digest.update(f"{folder.name}/{name} {len(content)}\n".encode() + content)
            words = words_of(_decoded(path, content))
            if not words:
                raise ReviewError(f"{path}: has no word in it")
            reviews.append(words)
            labels.append(float(label))
    return reviews, labels


def _text_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        fault = "a file" if folder.exists() else "nothing"
        raise ReviewError(f"{folder}: expected a folder of .txt files, got {fault}")
    entries = sorted(folder.iterdir())
    files = [path for path in entries if path.suffix == ".txt"]
    if not files:
        fault = f"{len(entries)} other file(s)" if entries else "an empty folder"
        raise ReviewError(f"{folder}: expected at least one .txt file, got {fault}")
    return files


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReviewError(f"{path}: cannot be read ({error.strerror})") from error


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ReviewError(f"{path}: is not UTF-8 (byte {error.start}: {error.reason})") from error


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        ReviewError: it cannot be read or is not UTF-8.
    """
    return _decoded(path, _content(path))


def _packed(part: tuple[Sequence[Sequence[str]], list[float]], index: dict[str, int]) -> Reviews:
    reviews, labels = part
    unknown = len(index)
    return Reviews(
        torch.tensor([index.get(w, unknown) for words in reviews for w in words], dtype=torch.int),
        torch.tensor([len(words) for words in reviews]).cumsum(0),
        torch.tensor(labels),
    )
