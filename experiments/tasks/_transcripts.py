"""Transcripts from predictions of every step: connectionist temporal classification.

Class 0 is the blank, no symbol; that of digit d is d + 1.

Shape legend: T time steps, B batch, O outputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import ctc_loss, pad

from experiments.tasks._task import UNSCORED

BLANK = 0


def transcript_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return minus the log probability of the right transcripts, per symbol (Graves et al. 2006).

    Args:
        prediction: logits ``[T, B, O]``.
        target: classes ``[T, B]``, ``UNSCORED`` where there is none; only their order counts.
    """
    exact = torch.promote_types(prediction.dtype, torch.float32)
    steps, size, _ = prediction.shape
    is_symbol_BT = (target != UNSCORED).T
    symbols = target.T[is_symbol_BT]
    total = ctc_loss(
        prediction.to(exact).log_softmax(-1),
        symbols,
        torch.full((size,), steps),
        is_symbol_BT.sum(1),
        blank=BLANK,
        reduction="sum",
    )
    return total / len(symbols)


def peaks(prediction: Tensor) -> list[list[tuple[int, int]]]:
    """Return each sequence's symbols, with the step at which each is first the likeliest class.

    The greedy transcript: the likeliest class of each step, without repeats and blanks.
    """
    best_BT = prediction.argmax(-1).T
    before_BT = pad(best_BT[:, :-1], (1, 0), value=BLANK)
    return _listed(best_BT, (best_BT != BLANK) & (best_BT != before_BT))


def marks(target: Tensor) -> list[list[tuple[int, int]]]:
    """Return each sequence's right symbols, with their steps."""
    return _listed(target.T, target.T != UNSCORED)


def _listed(class_BT: Tensor, is_kept_BT: Tensor) -> list[list[tuple[int, int]]]:
    found: list[list[tuple[int, int]]] = [[] for _ in class_BT]
    for sample, step in is_kept_BT.nonzero().tolist():
        found[sample].append((step, int(class_BT[sample, step]) - 1))
    return found


def texts(found: Sequence[Sequence[tuple[int, int]]]) -> list[str]:
    """Return the digits alone, as text."""
    return ["".join(str(symbol) for _, symbol in each) for each in found]


@lru_cache(maxsize=16)
def constant_error(shares: tuple[float, ...], length: int) -> float:
    """Return the least expected error rate of a transcript that is always the same.

    It is the most frequent symbol over and over, or different ones, the most frequent ones first.

    Args:
        shares: the probability of each symbol, wherever it stands.
        length: of the right transcripts.
    """
    errors = [1.0]
    for count in range(1, min(length, len(shares)) + 1):
        errors.append(_expected_distance(sorted(shares, reverse=True)[:count], length) / length)
        if errors[-1] > errors[-2]:
            break
    return min(*errors, 1 - max(shares))


def _expected_distance(shares: Sequence[float], length: int) -> float:
    """Return the mean edit distance of a text of different symbols from random ones.

    Args:
        shares: the probability of each of the text's symbols; others have the rest.
        length: of the random texts.
    """
    others = max(0.0, 1 - sum(shares))
    # The probabilities of the columns that the table of distances can have after each symbol.
    columns = {tuple(range(len(shares) + 1)): 1.0}
    for row in range(length):
        following: dict[tuple[int, ...], float] = defaultdict(float)
        for column, probability in columns.items():
            for symbol, share in enumerate([*shares, others]):
                entries = [row + 1]
                for i in range(len(shares)):
                    replaced = column[i] + (symbol != i)
                    entries.append(min(replaced, column[i + 1] + 1, entries[i] + 1))
                following[tuple(entries)] += probability * share
        columns = following
    return sum(probability * column[-1] for column, probability in columns.items())
