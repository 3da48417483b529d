"""How far a text is from the right one: the fewest characters to insert, delete or replace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def edit_distances(texts: Sequence[str], others: Sequence[str]) -> Tensor:
    """Return the Levenshtein distance of each text from its counterpart, ``[B]`` integers.

    All pairs at once, a row of the table (Wagner & Fischer 1974) at a time. Within a row an entry
    is at most one more than that before it; counted from its column, the least so far.
    """
    (one, one_length), (two, two_length) = _code_points(texts), _code_points(others)
    column = torch.arange(two.shape[1] + 1)
    row = column.repeat(len(two), 1)
    distances = two_length.clone()  # of an empty text
    for i in range(one.shape[1]):
        replaced = row[:, :-1] + (two != one[:, i : i + 1])
        row = torch.cat((row[:, :1] + 1, torch.minimum(replaced, row[:, 1:] + 1)), 1)
        row = (row - column).cummin(1).values + column
        ends = row.gather(1, two_length.unsqueeze(1)).squeeze(1)
        distances = ends.where(one_length == i + 1, distances)
    return distances


def error_rate(texts: Sequence[str], expected: Sequence[str]) -> float:
    """Return the character error rate: edits over characters expected."""
    return edit_distances(texts, expected).sum().item() / sum(map(len, expected))


def error_marks(text: str, expected: str) -> str:
    """Return carets under the characters of a text that are wrong.

    A character that is missing is marked under the one that follows; past the end, if none does.
    The alignment is one with the fewest edits.
    """
    table = np.zeros((len(text) + 1, len(expected) + 1), dtype=int)
    table[0], table[:, 0] = range(len(expected) + 1), range(len(text) + 1)
    for i, character in enumerate(text, start=1):
        for j, right in enumerate(expected, start=1):
            replaced = table[i - 1, j - 1] + (character != right)
            table[i, j] = min(replaced, table[i - 1, j] + 1, table[i, j - 1] + 1)
    marks = [" "] * (len(text) + 1)
    i, j = len(text), len(expected)
    while i or j:
        is_wrong = i == 0 or j == 0 or text[i - 1] != expected[j - 1]
        if i and j and table[i, j] == table[i - 1, j - 1] + is_wrong:
            i, j = i - 1, j - 1
        elif i and table[i, j] == table[i - 1, j] + 1:
            i, is_wrong = i - 1, True
        else:
            j, is_wrong = j - 1, True
        if is_wrong:
            marks[i] = "^"
    return "".join(marks).rstrip()


def _code_points(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return code points ``[B, L]``, -1 after the end, and lengths ``[B]``."""
    lengths = torch.tensor([len(text) for text in texts])
    width = int(lengths.max()) if len(texts) else 0
    rows = np.full((len(texts), width), -1, dtype=np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<i4")
    return torch.from_numpy(rows), lengths
