"""Generates sentences with one opinion of the author's, for ``task=sentiment`` without a folder.

    others found this never dull while | i thought it not good | and critics called it ... in spring

The clause of the author (I, we) decides. What others hold, in clauses of the same form, does not
count, and neither do the clauses about nothing in particular. "not", "never" and "hardly" turn an
adjective around. Everything but the author's clause is drawn without regard to the label.

Shape legend: B batch, C clauses, W words of a clause, S words of a sentence.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEGATED = 0.4
"""The share of opinions with a negation. Not a half, so that a word alone says something."""
HELD_BY_OTHERS = 0.5
"""The share of other clauses that are opinions of others."""
WITHOUT_HEAD = 0.3
"""The share of sentences that begin with the author's clause."""

PADDING = -1
"""Stands for no word, in front of a shorter sentence."""

_POSITIVE = ["good", "great", "lovely", "clever", "funny", "bright", "fresh", "warm", "superb"]
_NEGATIVE = ["bad", "awful", "dull", "silly", "boring", "weak", "empty", "stale", "dreadful"]
_NEGATIONS = ["not", "never", "hardly"]
_EMPHASES = ["quite", "rather", "truly"]
_AUTHORS = ["i", "we"]
_OTHERS = ["critics", "others", "friends", "neighbours", "teachers", "reviewers"]
_FOUND = ["found", "thought", "called"]
_THING = ["it", "this"]
_JOINED = ["and", "but", "while", "though"]
_ADVERBS = ["often", "never", "hardly", "slowly", "quietly", "always"]
_DID = ["left", "passed", "visited", "crossed", "watched", "reached"]
_PLACES = ["station", "river", "market", "library", "bridge", "school"]
_CLOSINGS = (  # of 0 to 5 words
    [""],
    ["today", "yesterday", "again", "tonight"],
    ["last week", "this morning", "last night", "in spring"],
    ["on a monday", "after the rain", "before the holidays", "during the summer"],
    ["on the way home", "at the old cinema", "in the same week", "near the old bridge"],
    ["in front of the station", "at the end of spring", "on the way to school"],
)

_OPINION = (_JOINED, _OTHERS, _FOUND, _THING)  # then a modifier and an adjective
_NEUTRAL = (_JOINED, _AUTHORS + _OTHERS, _ADVERBS, _DID, ["the"], _PLACES)
_LENGTH = len(_NEUTRAL)
DECIDING = _LENGTH - 1
"""Words of the author's clause, which no other word joins to what comes before."""
BEFORE_END = DECIDING + _LENGTH
"""Words of a sentence up to and including the deciding adjective, padding included."""

WORDS = sorted(
    {word for slot in (*_OPINION, *_NEUTRAL, _NEGATIONS, _EMPHASES) for word in slot}
    | {*_POSITIVE, *_NEGATIVE}
    | {word for closings in _CLOSINGS for closing in closings for word in closing.split()}
)
_INDEX = {word: index for index, word in enumerate(WORDS)}


def _ids(words: list[str]) -> Tensor:
    return torch.tensor([_INDEX[word] for word in words])


_ADJECTIVE_IDS = torch.stack((_ids(_NEGATIVE), _ids(_POSITIVE)))
_MODIFIER_IDS = torch.stack((_ids(_EMPHASES), _ids(_NEGATIONS)))
_CLOSING_IDS = [torch.stack([_ids(closing.split()).long() for closing in c]) for c in _CLOSINGS]


def polarity(symbols: Tensor) -> Tensor:
    """Return 1 where a word is a positive adjective, -1 where a negative one, else 0."""
    table = torch.zeros(len(WORDS) + 1, dtype=torch.long)  # its last entry is PADDING's
    table[_ADJECTIVE_IDS[1]], table[_ADJECTIVE_IDS[0]] = 1, -1
    return table[symbols]


def is_negated(symbols_SB: Tensor, after: int) -> Tensor:
    """Return ``[B]``: whether the adjective that is so many words before the end is negated."""
    return turns(symbols_SB[-after - 2])


def turns(symbols: Tensor) -> Tensor:
    """Return whether words turn the adjective behind them around."""
    return torch.isin(symbols, _MODIFIER_IDS[1])


def draw(
    count: int, after: int, generator: torch.Generator, is_held_out: bool
) -> tuple[Tensor, Tensor]:
    """Draw sentences in which so many words come after the deciding adjective.

    A third of all pairs of a modifier and an adjective are in held-out sentences alone: a model
    trained on the others has read "not good" and "hardly bad", but never "hardly good".

    Args:
        count: B.
        after: words behind the author's adjective.
        generator: the only source of randomness.
        is_held_out: which pairs to draw from.

    Returns:
        Indices of words ``[S, B]`` with S = ``BEFORE_END + after``, and the labels ``[B]``.
    """
    draws = _Draws(generator, is_held_out)
    author, label = draws.opinions((count, 1), (_AUTHORS, *_OPINION[2:]))
    head, tail = draws.clauses((count, 1)), draws.clauses((count, after // _LENGTH))
    head = head.roll(-1, -1)  # the word that joins it to the author's clause comes last
    head[torch.rand(count, generator=generator) < WITHOUT_HEAD] = PADDING
    closings = _CLOSING_IDS[after % _LENGTH]
    closing = closings[torch.randint(len(closings), (count,), generator=generator)]
    parts = (head.flatten(1), author.flatten(1), tail.flatten(1), closing)
    return torch.cat(parts, 1).T.contiguous(), label[:, 0]


class _Draws:
    def __init__(self, generator: torch.Generator, is_held_out: bool) -> None:
        self._generator = generator
        self._is_held_out = is_held_out

    def _below(self, bound: int, shape: tuple[int, int]) -> Tensor:
        return torch.randint(bound, shape, generator=self._generator)

    def _happens(self, share: float, shape: tuple[int, int]) -> Tensor:
        return torch.rand(shape, generator=self._generator) < share

    def _words(self, slots: tuple[list[str], ...], shape: tuple[int, int]) -> list[Tensor]:
        return [_ids(slot)[self._below(len(slot), shape)] for slot in slots]

    def opinions(
        self, shape: tuple[int, int], slots: tuple[list[str], ...]
    ) -> tuple[Tensor, Tensor]:
        """Draw opinions ``[B, C, W]`` and whether each is positive, ``[B, C]``."""
        is_positive, is_negated = self._happens(0.5, shape), self._happens(NEGATED, shape)
        # The polarity is drawn, then the adjective that has it once it is negated or not.
        adjective = self._below(len(_POSITIVE), shape)
        offset = 0 if self._is_held_out else 1 + self._below(2, shape)
        modifier = (offset - adjective) % len(_NEGATIONS)
        words = [
            *self._words(slots, shape),
            _MODIFIER_IDS[is_negated.long(), modifier],
            _ADJECTIVE_IDS[(is_positive ^ is_negated).long(), adjective],
        ]
        return torch.stack(words, -1), is_positive

    def clauses(self, shape: tuple[int, int]) -> Tensor:
        """Draw clauses ``[B, C, W]`` that do not count."""
        neutral = torch.stack(self._words(_NEUTRAL, shape), -1)
        opinions, _ = self.opinions(shape, _OPINION)
        return opinions.where(self._happens(HELD_BY_OTHERS, shape).unsqueeze(-1), neutral)
