"""Say whether a text is for or against what it is about.

Shape legend: T words that matter, S steps, B batch, I inputs, N reviews.
"""

from __future__ import annotations

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.fields import Config, ConfigError, integer, optional, text
from experiments.looks import Drawing, Look, Text
from experiments.tasks import _opinions as opinions
from experiments.tasks._reviews import ReviewError, Reviews, read_reviews, read_text, words_of
from experiments.tasks._task import BIT, Batch, Task

if TYPE_CHECKING:  # models know tasks
    from experiments.models import SequenceModel

_PADDING = opinions.PADDING
_BAG_SEED = 0
_BAG_SENTENCES = 4000
"""Generated sentences that the bag of words is trained on."""
_SHOWN_TEXTS = 6
_SHOWN_WORDS = 60
_LINE = 110
"""Characters of a line of the drawing."""


@dataclass(frozen=True)
class SentimentConfig(Config):
    """Options of ``task=sentiment``; ``root`` is an aclImdb tree, null for generated sentences."""

    root: str | None = optional(text("data/aclImdb"))
    vocabulary: int = integer(1000, at_least=1)
    test_size: int = integer(1000, at_least=1)


class SentimentTask(Task):
    """Judge a text that is read a word at a time: 1 if it is positive, asked after its last word.

    Without ``root``, sentences of a small grammar (``synthetic_sentiment``): the author's opinion,
    negated or not, is over T words before the end, and others hold opinions that do not count. With
    it, reviews (``sentiment``), of which the last T words are read; words beyond the most frequent
    ones are one symbol. A shorter text has zero vectors in front.
    """

    name = "sentiment"
    Config = SentimentConfig
    output_size = 1
    answer = BIT
    minimum_horizon = 1

    def __init__(self, config: SentimentConfig) -> None:
        super().__init__(config)
        self._source: _Source = _Grammar() if config.root is None else _Folder(config)
        if config.root is None:
            self.name = f"synthetic_{self.name}"
        self.maximum_horizon = self._source.longest
        self.input_size = self._source.input_size
        self._index = {word: index for index, word in enumerate(self._source.words)}
        self._bags: dict[int, Any] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What the data follows from: the settings that matter, and a hash of the files."""
        return {"name": self.name, "test_size": self.config.test_size, **self._source.identity}

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw texts to train on: input ``[S, B, I]``, labels ``[B, 1]``."""
        symbols, labels = self._source.draw(batch_size, horizon, generator, is_held_out=False)
        return self._vectors(symbols), labels.unsqueeze(1)

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Return held-out texts; reviews in order of length."""
        count = self.config.test_size
        symbols, labels = self._source.draw(count, horizon, generator, is_held_out=True)
        return self._vectors(symbols), labels.unsqueeze(1)

    def _vectors(self, symbols: Tensor) -> Tensor:
        """Return words ``[S, B]`` as floats ``[S, B, I]``, one-hot; a zero vector for none."""
        is_word = (symbols != _PADDING).float().unsqueeze(-1)
        vectors = torch.zeros(*symbols.shape, self.input_size)
        return vectors.scatter_(-1, symbols.clamp(min=0).unsqueeze(-1), is_word)

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the entropy of the training labels."""
        share = self._source.positive_share(is_held_out=False)
        return -sum(p * math.log(p) for p in (share, 1 - share))

    def know_nothing_error(self, horizon: int) -> float:
        """Return the test error of always giving the more frequent label of the training part."""
        share = self._source.positive_share(is_held_out=True)
        return 1 - share if self._source.positive_share(is_held_out=False) >= 0.5 else share

    def dependency(self, horizon: int) -> int:
        """Return the lag of the first word that decides, or that is read."""
        return self._source.dependency(horizon)

    def baselines(self, x_TBI: Tensor, target: Tensor, horizon: int) -> dict[str, float]:
        """Return the errors of a bag of words, and of what the source adds to it."""
        if horizon not in self._bags:
            self._bags[horizon] = self._bag_of_words(horizon)
        label = target[:, 0].cpu() > 0.5
        counts = x_TBI.sum(0).double().cpu().numpy()
        bag = torch.from_numpy(self._bags[horizon].predict(counts)) != label
        found = {"bag of words": bag.double().mean().item()}
        for name, guess in self._source.guesses(_symbols(x_TBI)).items():
            found[name] = (guess != label).double().mean().item()
        return found

    def _bag_of_words(self, horizon: int) -> Any:
        """Train a logistic regression on how often each word is in a training text."""
        from scipy.sparse import csr_array
        from sklearn.linear_model import LogisticRegression

        symbols, labels = self._source.training_texts(horizon)
        word, sentence = symbols[symbols != _PADDING], (symbols != _PADDING).nonzero()[:, 1]
        counts = csr_array(
            (torch.ones(len(word), dtype=torch.double).numpy(), (sentence.numpy(), word.numpy())),
            shape=(len(labels), self.input_size),
        )
        return LogisticRegression(max_iter=1000).fit(counts, labels.numpy() > 0.5)

    def measures(
        self, model: SequenceModel, x_TBI: Tensor, target: Tensor, horizon: int
    ) -> dict[str, float]:
        """Return the accuracy on groups of the test data."""
        is_right = ((model(x_TBI) > 0) == (target > 0.5))[:, 0].cpu()
        groups = self._source.groups(_symbols(x_TBI), horizon)
        return {
            f"accuracy, {name}": is_right[group].double().mean().item()
            for name, group in groups.items()
            if group.any()
        }

    def looks(self, model: SequenceModel, horizon: int, generator: torch.Generator) -> list[Look]:
        """Return held-out texts with the gradient of each word, as a drawing and as text."""
        symbols, labels = self._source.draw(_SHOWN_TEXTS, horizon, generator, is_held_out=True)
        scores, gradients = self._gradients(model, symbols)
        texts = [
            _Judged(
                [self._word(s) for s in symbols[:, b].tolist() if s != _PADDING],
                gradients[symbols[:, b] != _PADDING, b].tolist(),
                scores[b].item(),
                labels[b].item(),
            )
            for b in range(symbols.shape[1])
        ]
        kind = "synthetic sentences" if self.config.root is None else "reviews"
        title = f"Held-out {kind}, T = {horizon}: gradient of the logit, word by word"
        lines = [title, *(line for each in texts for line in ("", each.verdict, each.numbers))]
        return [Drawing("gradients", _drawn(title, texts)), Text("gradients", "\n".join(lines))]

    def _word(self, symbol: int) -> str:
        return self._source.words[symbol] if symbol < len(self._source.words) else "?"

    def _gradients(self, model: SequenceModel, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[B]`` and their gradients times the input ``[S, B]``.

        An input is one-hot, so that is the derivative by the entry of the word that is there.
        """
        with torch.enable_grad():
            x = self._vectors(symbols).to(model.readout.weight).requires_grad_()
            logits = model(x)[:, 0]
            (gradient,) = torch.autograd.grad(logits.sum(), x)
        return logits.detach().cpu(), (gradient * x).sum(-1).detach().cpu()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the text to judge."""
        given = parser.add_mutually_exclusive_group(required=True)
        given.add_argument("--text", help="judge this")
        given.add_argument("--file", type=Path, help="judge what is in this UTF-8 file")

    def use(self, model: SequenceModel, arguments: argparse.Namespace, horizon: int) -> None:
        """Print the judgement of a text, and the gradient of each word."""
        key = "--text" if arguments.file is None else "--file"
        try:
            given = arguments.text if arguments.file is None else read_text(arguments.file)
        except ReviewError as error:
            raise ConfigError(f"--file: {error}") from error
        words = words_of(given)
        if not words:
            raise ConfigError(f"{key} must have at least one word; got {given!r}")
        limit = self._source.steps_read(horizon)
        if limit is not None and len(words) > limit:
            print(f"read: the last {limit} of {len(words)} words")
            words = words[-limit:]
        unknown = list(dict.fromkeys(word for word in words if word not in self._index))
        if len(unknown) == len(set(words)):
            raise ConfigError(f"{key} must have a word that the model knows; got {given!r}")
        symbols = [self._index.get(word, self._source.unknown) for word in words]
        padding = [_PADDING] * (self._source.steps(horizon) - len(words))
        scores, gradients = self._gradients(model, torch.tensor([*padding, *symbols]).unsqueeze(1))
        judged = _Judged(words, gradients[len(padding) :, 0].tolist(), scores.item())
        print(judged.verdict)
        if unknown:
            print(f"unknown words: {', '.join(unknown)}")
        print("gradient of the logit:")
        for word, value in zip(words, judged.gradients, strict=True):
            print(f"{value:+11.2e}  {word}")


class _Source(ABC):
    """Where texts come from.

    Attributes:
        words: those that are known, by index.
        unknown: the symbol of any other.
        input_size: I, of words and the unknown one if it was in the training data.
        longest: the largest horizon; ``None`` for no bound.
        identity: what the data follows from.
    """

    words: Sequence[str]
    unknown: int
    input_size: int
    longest: int | None = None
    identity: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def draw(
        self, count: int, horizon: int, generator: torch.Generator, is_held_out: bool
    ) -> tuple[Tensor, Tensor]:
        """Draw symbols ``[S, B]`` and labels ``[B]``, floats."""

    @abstractmethod
    def training_texts(self, horizon: int) -> tuple[Tensor, Tensor]:
        """Return what a baseline is trained on, as ``draw`` returns it."""

    @abstractmethod
    def positive_share(self, is_held_out: bool) -> float:
        """Return the share of positive texts."""

    @abstractmethod
    def dependency(self, horizon: int) -> int:
        """Return the longest lag that matters, in words."""

    @abstractmethod
    def steps(self, horizon: int) -> int:
        """Return S, the steps of a text, padding included."""

    def steps_read(self, horizon: int) -> int | None:
        """Return how many words of a text are read; ``None`` for all."""
        return None

    def guesses(self, symbols: Tensor) -> dict[str, Tensor]:
        """Return the guesses of further simple methods, ``[B]``, by name."""
        return {}

    @abstractmethod
    def groups(self, symbols: Tensor, horizon: int) -> dict[str, Tensor]:
        """Return which texts of the test set belong to which group, ``[B]``, by name."""


class _Grammar(_Source):
    """Generated sentences; T words come after the adjective that decides."""

    words = opinions.WORDS
    unknown = _PADDING  # it was never read, so it is shown as nothing
    input_size = len(opinions.WORDS)

    def draw(
        self, count: int, horizon: int, generator: torch.Generator, is_held_out: bool
    ) -> tuple[Tensor, Tensor]:
        symbols, label = opinions.draw(count, horizon, generator, is_held_out)
        return symbols, label.float()

    def training_texts(self, horizon: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(_BAG_SEED)
        return self.draw(_BAG_SENTENCES, horizon, generator, is_held_out=False)

    def positive_share(self, is_held_out: bool) -> float:
        return 0.5

    def dependency(self, horizon: int) -> int:
        return horizon + opinions.DECIDING - 1

    def steps(self, horizon: int) -> int:
        return horizon + opinions.BEFORE_END

    def guesses(self, symbols: Tensor) -> dict[str, Tensor]:
        polar = opinions.polarity(symbols)
        place = torch.arange(1, len(polar) + 1).unsqueeze(1)
        last = ((polar != 0) * place).argmax(0, keepdim=True)
        is_positive = polar.gather(0, last)[0] > 0
        is_turned = opinions.turns(symbols.gather(0, last - 1)[0])
        return {"last polar word": is_positive, "last opinion": is_positive ^ is_turned}

    def groups(self, symbols: Tensor, horizon: int) -> dict[str, Tensor]:
        negated = opinions.is_negated(symbols, horizon)
        return {"plain sentences": ~negated, "negated sentences": negated}


class _Folder(_Source):
    """Reviews of an aclImdb tree; the last T words of each are read."""

    def __init__(self, config: SentimentConfig) -> None:
        try:
            self._train, self._test, self.words, digest = read_reviews(
                Path(str(config.root)).expanduser(), config.vocabulary
            )
        except ReviewError as error:
            raise ConfigError(
                "task.root must be a folder with train/pos, train/neg, test/pos and test/neg, each "
                f"with reviews as .txt files: {error}"
            ) from error
        self.unknown = len(self.words)
        self.input_size = len(self.words) + 1
        self.longest = int(max(part.lengths.max() for part in (self._train, self._test)))
        self.identity = {"vocabulary": config.vocabulary, "data": digest}

    def _part(self, is_held_out: bool) -> Reviews:
        return self._test if is_held_out else self._train

    def draw(
        self, count: int, horizon: int, generator: torch.Generator, is_held_out: bool
    ) -> tuple[Tensor, Tensor]:
        part = self._part(is_held_out)
        if is_held_out:  # none twice, in order of length
            chosen = torch.randperm(len(part.ends), generator=generator)[:count]
            chosen = chosen[part.lengths[chosen].argsort(stable=True)]
        else:
            chosen = torch.randint(len(part.ends), (count,), generator=generator)
        return part.last_words(chosen, horizon, _PADDING), part.labels[chosen]

    def training_texts(self, horizon: int) -> tuple[Tensor, Tensor]:
        every = torch.arange(len(self._train.ends))
        return self._train.last_words(every, horizon, _PADDING), self._train.labels

    def positive_share(self, is_held_out: bool) -> float:
        return self._part(is_held_out).labels.mean().item()

    def dependency(self, horizon: int) -> int:
        return horizon - 1

    def steps(self, horizon: int) -> int:
        return horizon

    def steps_read(self, horizon: int) -> int | None:
        return horizon

    def groups(self, symbols: Tensor, horizon: int) -> dict[str, Tensor]:
        count = symbols.shape[1]
        third = torch.arange(count) * 3 // count  # the test set lies in order of length
        names = ("shortest third of reviews", "middle third", "longest third")
        return {name: third == i for i, name in enumerate(names)}


def _symbols(x_TBI: Tensor) -> Tensor:
    """Return the words ``[S, B]`` that vectors stand for."""
    return x_TBI.argmax(-1).where(x_TBI.any(-1), _PADDING).cpu()


@dataclass(frozen=True)
class _Judged:
    """A text, the gradient of each word and the logit; the label if it is known."""

    words: list[str]
    gradients: list[float]
    logit: float
    label: float | None = None

    @property
    def verdict(self) -> str:
        name = ("negative", "positive")[self.logit > 0]
        chance = 1 / (1 + math.exp(-abs(self.logit)))
        said = f"judged {name} with {chance:.3f}"
        if self.label is None:
            return said
        is_right = (self.logit > 0) == (self.label > 0.5)
        return f"{'right' if is_right else 'WRONG'}: {said}"

    @property
    def numbers(self) -> str:
        pairs = zip(self.words, self.gradients, strict=True)
        return "\n".join(f"{value:+11.2e}  {word}" for word, value in pairs)


def _drawn(title: str, texts: Sequence[_Judged]) -> Any:
    """Draw texts as lines of words on the colour of their gradients."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    from rnn_cuda.instruments.plots import as_text

    placed: list[tuple[int, int, str, str | float]] = []  # line, column, words, style or colour
    line = 0
    for each in texts:
        placed.append((line, 0, each.verdict, "bold"))
        line, column = line + 1, 0
        cut = max(0, len(each.words) - _SHOWN_WORDS)
        words, gradients = each.words[cut:], each.gradients[cut:]
        largest = max(map(abs, gradients)) or 1.0
        for i, (word, value) in enumerate(zip(words, gradients, strict=True)):
            shown = f"… {word}" if cut and i == 0 else word
            if column and column + len(shown) > _LINE:
                line, column = line + 1, 0
            placed.append((line, column, shown, value / largest))
            column += len(shown) + 1
        line += 2
    figure = Figure(figsize=(8.6, 0.7 + 0.21 * line))
    axes = figure.add_axes((0.01, 0, 0.98, 1 - 0.55 / figure.get_figheight()))
    axes.set(xlim=(0, _LINE + 1), ylim=(line, -1))
    axes.axis("off")
    key = "blue: speaks for, red: against; of each text the largest is darkest"
    figure.suptitle(as_text(f"{title}\n{key}"), fontsize=9, y=1 - 0.08 / figure.get_figheight())
    for row, column, words, style in placed:
        options: dict[str, Any] = {"fontweight": "bold"}
        if not isinstance(style, str):
            ground = colormaps["RdBu"](0.5 + 0.35 * style)
            options = {"bbox": {"facecolor": ground, "edgecolor": "none", "pad": 1.2}}
        axes.text(
            column, row, as_text(words), family="monospace", fontsize=8.8, va="center", **options
        )
    return figure
