"""Translate a text, character by character, from what one state remembers of it."""

from __future__ import annotations

import argparse
import itertools
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.fields import (
    Config,
    ConfigError,
    choice,
    fraction,
    integer,
    names,
    optional,
    seed,
    text,
)
from experiments.looks import Look, Text
from experiments.tasks._edit_distance import edit_distances, error_marks, error_rate
from experiments.tasks._parallel_text import Pair, normalized, parallel_text
from experiments.tasks._task import CLASS, UNSCORED, Answer, Batch, Task

if TYPE_CHECKING:  # models know tasks
    from experiments.models import SequenceModel

TRANSLATION = Answer("character error rate", CLASS.loss, CLASS.error)
"""Trained as ``CLASS``; ``error`` is that of the next character, given those before it."""

_SHOWN = 8
_END = 0


@dataclass(frozen=True)
class TranslationConfig(Config):
    """Options of ``task=translation``; ``hydra_conf/task/translation.yaml`` says what they mean."""

    source: str = choice("auto", ("auto", "file", "catalogs", "dates"))
    file: str | None = optional(text(""))
    columns: tuple[str, ...] = names()
    root: str | None = optional(text(""))
    language: str = text("de")
    dates: int = integer(10_000, at_least=1)
    languages: tuple[str, ...] = names()
    data_seed: int = seed(0)
    test_fraction: float = fraction(0.1)
    test_size: int = integer(1000, at_least=1)


class TranslationTask(Task):
    """Read a text, then write its translation: encoder and decoder in one sequence.

    The source's characters, right-aligned so that they end at step T; a GO symbol; the target's
    characters, each fed back at the next step (Sutskever, Vinyals & Le 2014; no attention). Scored
    are the steps from GO to that where the end is due. All that the decoder knows of the source is
    the state after it. T is the length of the longest source; longer ones are left out.

    The test error is that of what the model writes alone: it reads the character that it found the
    most probable one step before. The character error rate is edits over characters expected.

    A pair is held out by a hash of its source's letters and digits, so a source is in one part,
    however it is punctuated. Dates and numbers are held out by their target: no date of the test
    was seen in training in any wording.
    """

    name = "translation"
    Config = TranslationConfig
    reads = "masked"
    answer = TRANSLATION
    is_shown_later = True

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__(config)
        self._text = parallel = parallel_text(config)
        if parallel.is_synthetic:
            self.name = f"synthetic_{self.name}"
        self._source_alphabet, self._target_alphabet = (
            "".join(sorted({character for pair in parallel.pairs for character in pair[side]}))
            for side in (0, 1)
        )
        self._go = len(self._source_alphabet)
        self.input_size = self._go + 1 + len(self._target_alphabet)
        self.output_size = 1 + len(self._target_alphabet)
        train, test = parallel.split(config.test_fraction)
        if not train or not test:
            raise ConfigError(
                f"task.test_fraction must leave pairs to train on and to test on; "
                f"{config.test_fraction:g} leaves {len(train)} and {len(test)}"
            )
        self._train, self._test = self._encoded(train), self._encoded(test)
        self.minimum_horizon = max(len(train[0][0]), len(test[0][0]))
        self.maximum_horizon = len(parallel.pairs[-1][0])
        self._constants: dict[int, str] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """The data, however it was come by, and how it is split."""
        chosen = {key: self.settings[key] for key in ("name", "test_fraction", "test_size")}
        return {**chosen, "origin": self._text.origin, "data": self._text.digest}

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw training pairs: input ``[T + 1 + L, B, I]`` and target ``[T + 1 + L, B]``.

        L is the longest target of a source of at most T characters.
        """
        part = self._train
        chosen = torch.randint(part.count(horizon), (batch_size,), generator=generator)
        return self._batch(part, chosen, horizon)

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Return ``test_size`` held-out pairs, or as many as there are."""
        order = torch.randperm(self._test.count(horizon), generator=generator)
        return self._batch(self._test, order[: self.config.test_size], horizon)

    def _batch(self, part: _Part, chosen: Tensor, horizon: int) -> Batch:
        length = self._longest_target(horizon)
        read = part.sources[chosen, part.sources.shape[1] - horizon :]
        written = part.targets[chosen, : length + 1].long()
        fed_back = (written[:, :-1] + self._go + 1).where(written[:, :-1] != _END, 0)
        go = torch.full((len(chosen), 1), self._go + 1)
        x_TBI = self._one_hot(torch.cat((read.long(), go, fed_back), 1).T)
        target_TB = torch.full(x_TBI.shape[:2], UNSCORED)
        target_TB[horizon:] = written.where(part.is_scored[chosen, : length + 1], UNSCORED).T
        return x_TBI, target_TB

    def _one_hot(self, symbols: Tensor) -> Tensor:
        """Return symbols, counted from 1, as floats; those of 0 are zero vectors."""
        x = torch.zeros(*symbols.shape, self.input_size, device=symbols.device)
        where = (symbols - 1).clamp(min=0).unsqueeze(-1)
        return x.scatter_(-1, where, (symbols > 0).float().unsqueeze(-1))

    def _longest_target(self, horizon: int) -> int:
        return max(part.longest(horizon) for part in (self._train, self._test))

    def _encoded(self, pairs: Sequence[Pair]) -> _Part:
        width, longest = (max(map(len, side)) for side in zip(*self._text.pairs, strict=True))
        sources = torch.zeros(len(pairs), width, dtype=torch.int16)
        targets = torch.zeros(len(pairs), longest + 1, dtype=torch.int16)
        read, written = map(_numbered, (self._source_alphabet, self._target_alphabet))
        rows = zip(sources.numpy(), targets.numpy(), pairs, strict=True)
        for source_row, target_row, (source, target) in rows:
            source_row[width - len(source) :] = [read[character] for character in source]
            target_row[: len(target)] = [written[character] for character in target]
        return _Part(pairs, sources, targets)

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the entropy of the training targets' characters, step by step."""
        part = self._train
        count = part.count(horizon)
        is_scored = part.is_scored[:count]
        cost = 0.0
        for symbols, is_one in zip(part.targets[:count].T, is_scored.T, strict=True):
            counts = symbols[is_one].bincount().double()
            cost -= torch.xlogy(counts, counts / counts.sum()).sum().item()
        return cost / int(is_scored.sum())

    def know_nothing_error(self, horizon: int) -> float:
        """Return the error rate, on all held-out pairs, of the best constant answer.

        The best on training pairs, of their most frequent target and of a sample of targets.
        """
        expected = [target for _, target in self._test.pairs[: self._test.count(horizon)]]
        return error_rate([self._constant(horizon)] * len(expected), expected)

    def _constant(self, horizon: int) -> str:
        if horizon not in self._constants:
            targets = [target for _, target in self._train.pairs[: self._train.count(horizon)]]
            known = targets[:: max(1, len(targets) // 200)]
            ((frequent, _),) = Counter(targets).most_common(1)
            tried = [frequent, *dict.fromkeys(targets[:: max(1, len(targets) // 60)])]
            costs = edit_distances(
                [text for text in tried for _ in known], known * len(tried)
            ).view(len(tried), -1)
            self._constants[horizon] = tried[int(costs.sum(1).argmin())]
        return self._constants[horizon]

    def dependency(self, horizon: int) -> int:
        """Return the lag between a source's first character and the end of its target."""
        return horizon + self._longest_target(horizon)

    def judge(self, model: SequenceModel, x_TBI: Tensor, target: Tensor) -> Tensor:
        """Return the character error rate of what the model writes alone."""
        return torch.tensor(error_rate(self._answers(model, x_TBI), self._targets(target)))

    def _answers(self, model: SequenceModel, x_TBI: Tensor) -> list[str]:
        horizon = int(x_TBI[:, 0, self._go].argmax())
        return self._written(model, x_TBI[: horizon + 1], len(x_TBI) - horizon)

    def _written(self, model: SequenceModel, x_TBI: Tensor, most: int) -> list[str]:
        """Return what a model writes after what it read, at most so many characters.

        The state is carried from step to step, for all texts at once.
        """
        prediction, state = model.stream(x_TBI)
        written: list[Tensor] = []
        is_over = torch.zeros(x_TBI.shape[1], dtype=torch.bool, device=x_TBI.device)
        while True:
            symbols = prediction[-1].argmax(-1)
            is_over = is_over | (symbols == _END)
            written.append(symbols.where(~is_over, _END))
            if len(written) == most or is_over.all():
                return self._texts(torch.stack(written))
            fed_back = self._one_hot((symbols + self._go + 1).unsqueeze(0)).to(x_TBI.dtype)
            prediction, state = model.stream(fed_back, state)

    def _texts(self, symbols_TB: Tensor) -> list[str]:
        return [
            "".join(self._target_alphabet[symbol - 1] for symbol in symbols if symbol > _END)
            for symbols in symbols_TB.T.tolist()
        ]

    _targets = _texts

    def _sources(self, x_TBI: Tensor) -> list[str]:
        shown = x_TBI[..., : self._go]
        symbols = shown.argmax(-1).where(shown.any(-1), -1)
        return [
            "".join(self._source_alphabet[symbol] for symbol in column if symbol >= 0)
            for column in symbols.T.tolist()
        ]

    def baselines(self, x_TBI: Tensor, target: Tensor, horizon: int) -> dict[str, float]:
        """Return the error rates of the nearest source's target and, of real text, of copying."""
        sources, expected = self._sources(x_TBI), self._targets(target)
        known = self._train.pairs[: self._train.count(horizon)]
        nearest = _nearest(sources, [source for source, _ in known])
        found = {"nearest neighbour": error_rate([known[i][1] for i in nearest], expected)}
        if not self._text.is_synthetic:
            found["copying the source"] = error_rate(sources, expected)
        return found

    def measures(
        self, model: SequenceModel, x_TBI: Tensor, target: Tensor, horizon: int
    ) -> dict[str, float]:
        """Return the share of texts without any error, also by source length, and that of symbols.

        The last one is of characters, the end among them, that are predicted after right ones.
        """
        written, expected = self._answers(model, x_TBI), self._targets(target)
        is_exact = torch.tensor([a == b for a, b in zip(written, expected, strict=True)]).double()
        lengths = torch.tensor([len(source) for source in self._sources(x_TBI)])
        found = {"exact match": is_exact.mean().item()}
        bounds = [0, -(-horizon // 3), -(-2 * horizon // 3), horizon]
        for low, high in itertools.pairwise(bounds):
            inside = is_exact[(lengths > low) & (lengths <= high)]
            if len(inside):
                name = f"exact match, sources of {low + 1} to {high} characters"
                found[name] = inside.mean().item()
        error = self.error(model(x_TBI).float(), target)
        return {**found, "error rate of the next symbol": error.item()}

    def looks(self, model: SequenceModel, horizon: int, generator: torch.Generator) -> list[Look]:
        """Return held-out examples, with carets under what is wrong in them."""
        x_TBI, target = self.test_set(horizon, generator)
        x_TBI = x_TBI[:, :_SHOWN].to(next(model.parameters()))
        kind = "synthetic" if self._text.is_synthetic else "real"
        lines = [f"{kind}: {self._text.origin}; held out"]
        for source, expected, got in zip(
            self._sources(x_TBI),
            self._targets(target[:, :_SHOWN]),
            self._answers(model, x_TBI),
            strict=True,
        ):
            marks = error_marks(got, expected)
            lines += ["", f"source    {source}", f"expected  {expected}", f"got       {got}"]
            lines += [f"          {marks}"] if marks else []
        return [Text("translations", "\n".join(lines))]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add ``--text``."""
        parser.add_argument("--text", required=True, help="what to translate")

    def use(self, model: SequenceModel, arguments: argparse.Namespace, horizon: int) -> None:
        """Print the translation of a text; say so where it is longer than those of training."""
        source = normalized(arguments.text)
        if not source:
            raise ConfigError(f"--text must have characters; got {arguments.text!r}")
        if unknown := sorted(set(source) - set(self._source_alphabet)):
            raise ConfigError(
                f"--text must be of characters that the model has seen; got {', '.join(unknown)}, "
                f"but they are: {self._source_alphabet}"
            )
        if len(source) > horizon:
            print(
                f"{len(source)} characters; the model was trained on texts of up to {horizon}",
                file=sys.stderr,
            )
        symbols = [self._source_alphabet.index(character) + 1 for character in source]
        before = [0] * (horizon - len(source))  # as in training: the state is not zero after them
        x_TBI = self._one_hot(torch.tensor([*before, *symbols, self._go + 1]).unsqueeze(1))
        most = 1 + self._longest_target(horizon) * max(len(source), horizon) // horizon
        (written,) = self._written(model, x_TBI.to(next(model.parameters())), most)
        print(written)
        if len(written) == most:
            print(f"cut off after {most} characters", file=sys.stderr)


@dataclass(frozen=True)
class _Part:
    """Training or held-out pairs, in order of the source's length, and their symbols.

    Attributes:
        pairs: they.
        sources: ``[N, longest]``, right-aligned, counted from 1; 0 in front.
        targets: ``[N, longest + 1]``, counted from 1; `_END` behind.
    """

    pairs: Sequence[Pair]
    sources: Tensor
    targets: Tensor

    @cached_property
    def is_scored(self) -> Tensor:
        """Which targets count: the characters and the end behind them."""
        return torch.arange(self.targets.shape[1]) <= self._lengths.unsqueeze(1)

    @cached_property
    def _lengths(self) -> Tensor:
        return (self.targets != _END).sum(1)

    def count(self, horizon: int) -> int:
        """Return how many have a source of at most so many characters: the first ones."""
        return bisect_right(self.pairs, horizon, key=lambda pair: len(pair[0]))

    def longest(self, horizon: int) -> int:
        """Return the length of the longest target of these."""
        return int(self._lengths[: self.count(horizon)].max())


def _numbered(alphabet: str) -> dict[str, int]:
    return {character: number for number, character in enumerate(alphabet, start=1)}


def _nearest(texts: Sequence[str], known: Sequence[str]) -> Iterable[int]:
    """Return the index of each text's nearest one.

    Near is the cosine of counts of one to three characters, the rarer the weightier.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 3), lowercase=False, dtype=np.float32
    )
    rows = vectorizer.fit_transform(known).T.tocsr()
    asked = vectorizer.transform(texts)
    for start in range(0, len(texts), 100):  # a part at a time: the products are not sparse
        yield from (asked[start : start + 100] @ rows).argmax(1).A1
