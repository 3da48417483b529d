"""Predict the next character of a text.

Shape legend: T time steps, B batch, V characters of the alphabet.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.fields import Config, ConfigError, optional, text
from experiments.looks import Look, Text
from experiments.tasks._task import CHARACTERS, Batch, Task, generator_of, one_hot

if TYPE_CHECKING:  # models know tasks
    from experiments.models import SequenceModel

HELD_OUT = 0.1
"""The share of the text, its end, that is for testing."""
RARE = 10
"""Characters that the training part has less often are one symbol, "unknown"."""
TEMPERATURES = (0.5, 0.8, 1.0)
SHOWN = 2**26
"""Input numbers of the test set, at most: of a long text with many characters, its beginning."""
STREAMED = 100_000
"""Held-out characters that are read as one stream, at most."""
PIECE = 1000
"""Characters of a stream that are read in one call."""


@dataclass(frozen=True)
class TextConfig(Config):
    """Options of ``task=text``; ``file`` is UTF-8, null the language reference of Python."""

    file: str | None = optional(text("book.txt"))


class TextTask(Task):
    """Predict each character of a window from those before it in the window, from a zero state.

    The text is a UTF-8 file or, by default, the language reference that comes with Python
    (``pydoc_data.topics``). Its last tenth is held out; the test set covers that once, in windows
    of T characters. The error is the cross-entropy in bits per character. Knowing nothing is the
    frequency of characters in the training part; the baselines count pairs and triples there.
    """

    name = "text"
    Config = TextConfig
    reads = "every"
    answer = CHARACTERS
    is_shown_later = True
    minimum_horizon = 1

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        words = _reference() if config.file is None else _read("task.file", Path(config.file))
        self._digest = hashlib.sha256(words.encode()).hexdigest()
        cut = len(words) - int(HELD_OUT * len(words))
        codes = _codes(words)
        known = (codes[:cut].bincount() >= RARE).nonzero()[:, 0]
        self.alphabet = [chr(code) for code in known.tolist()]
        if not self.alphabet or cut > len(words) - 2:
            raise ConfigError(
                f"task.file must have some characters at least {RARE} times; got {config.file} "
                f"with {len(words)} characters"
            )
        self.input_size = self.output_size = len(self.alphabet) + 1
        # V - 1 stands for those that are unknown.
        self._symbol_of = torch.full((sys.maxunicode + 1,), len(self.alphabet))
        self._symbol_of[known] = torch.arange(len(self.alphabet))
        self._train = self._symbol_of[codes[:cut]]
        self._test = self._symbol_of[codes[cut:][: SHOWN // self.input_size]]
        self.maximum_horizon = len(self._test) - 1

    @property
    def identity(self) -> dict[str, Any]:
        """The settings, with a hash of the text for the file it came from."""
        return {"name": self.name, "data": self._digest}

    def check_horizon(self, key: str, horizon: int) -> None:
        """Raise :class:`ConfigError` if the held-out part has no such window."""
        longest = len(self._test) - 1
        if horizon > longest:
            raise ConfigError(
                f"{key} must be at most {longest} for task text, since the held-out "
                f"tenth of {self.config.file or 'the language reference'} has {len(self._test)} "
                f"characters; got {horizon}"
            )
        super().check_horizon(key, horizon)

    @cached_property
    def _counts(self) -> _NGrams:
        return _NGrams(self._train, self.input_size)

    def _symbols(self, words: str) -> Tensor:
        return self._symbol_of[_codes(words)]

    def sample(self, batch_size: int, horizon: int, generator: torch.Generator) -> Batch:
        """Draw windows of the training part: input ``[T, B, V]``, next characters ``[T, B]``."""
        last = len(self._train) - horizon
        starts = torch.randint(0, last, (batch_size,), generator=generator)
        return self._windows(self._train, starts, horizon)

    def test_set(self, horizon: int, generator: torch.Generator) -> Batch:
        """Return windows, end to end, of the part that is held out."""
        starts = torch.arange(0, len(self._test) - horizon, horizon)
        return self._windows(self._test, starts, horizon)

    def _windows(self, symbols: Tensor, starts: Tensor, horizon: int) -> Batch:
        window = symbols[starts + torch.arange(horizon + 1).unsqueeze(1)]
        return one_hot(window[:-1], self.input_size), window[1:]

    def know_nothing_loss(self, horizon: int) -> float:
        """Return the entropy of the training part's characters, in nats."""
        return self._counts.bits((), self._train) * math.log(2)

    def know_nothing_error(self, horizon: int) -> float:
        """Return what their frequencies cost on the held-out part, in bits."""
        return self._counts.bits((), self._test)

    def dependency(self, horizon: int) -> int:
        """Return the lag between the first character of a window and the last prediction."""
        return horizon - 1

    def baselines(self, x_TBI: Tensor, target: Tensor, horizon: int) -> dict[str, float]:
        """Return what counts of pairs and triples cost on the same windows, in bits."""
        shown, answers = x_TBI.argmax(-1).cpu(), target.cpu()
        pairs = self._counts.bits((shown[:1],), answers[:1])
        found = {"bigram": self._counts.bits((shown,), answers)}
        if horizon > 1:  # the first answer has one character before it
            triples = self._counts.bits((shown[:-1], shown[1:]), answers[1:])
            found["trigram"] = (pairs + triples * (horizon - 1)) / horizon
        return found

    def measures(
        self, model: SequenceModel, x_TBI: Tensor, target: Tensor, horizon: int
    ) -> dict[str, float]:
        """Return what context is worth: bits by place in the window, and of the whole stream."""
        prediction = model(x_TBI).float()
        places = sorted({place for place in (1, 10, 100, horizon) if place <= horizon})
        measured = {
            f"bits at character {place}": _bits(prediction[place - 1], target[place - 1])
            for place in places
        }
        symbols = self._test[: STREAMED + 1]
        measured["bits per character, streamed"] = self._streamed_bits(model, symbols)
        return measured

    def _streamed_bits(self, model: SequenceModel, symbols: Tensor) -> float:
        """Return what a text costs that is read from its beginning to its end, in bits."""
        total, state = 0.0, None
        for at in range(0, len(symbols) - 1, PIECE):
            answers = symbols[at + 1 : at + PIECE + 1].to(model.readout.weight.device)
            x = self._shown(model, symbols[at : at + len(answers)].unsqueeze(1))
            prediction, state = model.stream(x, state)
            total += _bits(prediction[:, 0], answers) * len(answers)
        return total / (len(symbols) - 1)

    def _shown(self, model: SequenceModel, symbols: Tensor) -> Tensor:
        return one_hot(symbols, self.input_size).to(model.readout.weight)

    def looks(self, model: SequenceModel, horizon: int, generator: torch.Generator) -> list[Look]:
        """Return text that the model writes at several temperatures."""
        written = zip(
            *self._write(model, self._beginning, 300, TEMPERATURES, generator), strict=True
        )
        lines = [
            f"--- temperature {temperature}\n{''.join(characters)}"
            for temperature, characters in zip(TEMPERATURES, written, strict=True)
        ]
        return [Text("samples", "\n\n".join(lines))]

    @property
    def _beginning(self) -> str:
        """What is read before anything is written, where nothing else is given."""
        return "\n" if "\n" in self.alphabet else self.alphabet[0]

    def _write(
        self,
        model: SequenceModel,
        prompt: str,
        characters: int,
        temperatures: Sequence[float],
        generator: torch.Generator,
    ) -> Iterator[list[str]]:
        """Yield what follows a prompt, a character for each temperature at a time."""
        symbols = self._symbols(prompt).unsqueeze(1).expand(-1, len(temperatures))
        prediction, state = model.stream(self._shown(model, symbols))
        rows = self._shown(model, torch.arange(self.input_size))  # made once, not at every step
        scale = torch.tensor(temperatures, dtype=torch.float64).unsqueeze(1)
        noise = torch.empty(len(temperatures), len(self.alphabet), dtype=torch.float64)
        for _ in range(characters):
            # Never the last symbol, which stands for what is unknown.
            logits = prediction[-1, :, :-1].double().cpu()
            # The largest of logits / temperature under Gumbel noise is a draw from their softmax.
            gumbel = noise.exponential_(generator=generator).log_().neg_()
            chosen = (logits + scale * gumbel).argmax(-1)
            yield [self.alphabet[index] for index in chosen.tolist()]
            prediction, state = model.stream(rows[chosen].unsqueeze(0), state)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add what to write, or what to read."""
        given = parser.add_mutually_exclusive_group()
        given.add_argument("--prompt", help="what the text begins with")
        given.add_argument("--file", type=Path, help="say how well this UTF-8 text is predicted")
        parser.add_argument("--characters", type=int, default=500, help="to write (500)")
        parser.add_argument(
            "--temperature", type=float, default=0.8, help="of sampling (0.8); 0: none"
        )
        parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")

    def use(self, model: SequenceModel, arguments: argparse.Namespace, horizon: int) -> None:
        """Write text as it comes, a character at a time; or judge a file."""
        if arguments.file is not None:
            words = _read("--file", arguments.file)
            symbols = self._symbols(words)
            bits = self._streamed_bits(model, symbols)
            unknown = int((symbols == len(self.alphabet)).sum())
            print(
                f"{arguments.file}: {bits:.3f} bits per character, {len(words)} characters, "
                f"{unknown} of them unknown"
            )
            return
        prompt = self._beginning if arguments.prompt is None else arguments.prompt
        unknown = sorted(set(prompt).difference(self.alphabet))
        if not prompt or unknown:
            raise ConfigError(
                "--prompt must be some characters of the text that the model was trained on; got "
                + (f"{prompt!r}, of which it does not know {unknown}" if prompt else "nothing")
            )
        if arguments.characters < 1:
            raise ConfigError(f"--characters must be at least 1; got {arguments.characters}")
        if not 0 <= arguments.temperature < math.inf:
            raise ConfigError(
                f"--temperature must be a finite number of at least 0; got {arguments.temperature}"
            )
        generator = generator_of(arguments.seed)
        temperatures = (arguments.temperature,)
        start = time.perf_counter()
        print(prompt.lstrip("\n"), end="", flush=True)
        for (character,) in self._write(
            model, prompt, arguments.characters, temperatures, generator
        ):
            print(character, end="", flush=True)
        seconds = time.perf_counter() - start
        print(f"\n{arguments.characters / seconds:.0f} characters a second", file=sys.stderr)


class _NGrams:
    """How often characters follow others, in the training part.

    A context that is rare borrows from the shorter one (a Dirichlet prior of weight ``_PRIOR``,
    MacKay & Peto 1995); characters themselves, from equal chances. Only what occurs is kept: a
    large alphabet has more triples than memory.
    """

    _PRIOR = 2.0

    def __init__(self, symbols: Tensor, size: int) -> None:
        self._size = size
        self._tables: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []
        codes = torch.zeros_like(symbols)
        for order in range(3):
            codes = codes[: len(symbols) - order] * size + symbols[order:]
            grams, counts = codes.unique(return_counts=True)
            contexts, index = (grams // size).unique_consecutive(return_inverse=True)
            totals = torch.zeros_like(contexts).index_add_(0, index, counts)
            self._tables.append(((grams, counts), (contexts, totals)))

    def bits(self, context: Sequence[Tensor], answers: Tensor) -> float:
        """Return the mean cost of answers, each after its context, in bits."""
        symbols = (*context, answers)
        chance = torch.full(answers.shape, 1 / self._size, dtype=torch.float64)
        for order, (grams, contexts) in enumerate(self._tables[: len(symbols)]):
            codes = torch.zeros_like(answers)
            for each in symbols[len(context) - order :]:
                codes = codes * self._size + each
            prior = self._PRIOR * chance
            chance = (_count(grams, codes) + prior) / (
                _count(contexts, codes // self._size) + self._PRIOR
            )
        return -chance.log2().mean().item()


def _count(table: tuple[Tensor, Tensor], codes: Tensor) -> Tensor:
    """Return the count of each code, 0 of one that is not in the table."""
    keys, counts = table
    at = torch.searchsorted(keys, codes).clamp(max=len(keys) - 1)
    return counts[at].where(keys[at] == codes, 0)


def _codes(words: str) -> Tensor:
    """Return the code point of each character."""
    return torch.frombuffer(bytearray(words.encode("utf-32-le")), dtype=torch.int32)


def _bits(prediction: Tensor, target: Tensor) -> float:
    return cross_entropy(prediction.float(), target).item() / math.log(2)


def _reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _read(key: str, path: Path) -> str:
    """Return a file's text.

    Raises:
        ConfigError: it cannot be read, is not UTF-8 or not a text; names key, file and fault.
    """
    try:
        words = path.expanduser().read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key}: {path} is not UTF-8 (byte {error.start}: {error.reason})"
        ) from error
    if "\0" in words:
        raise ConfigError(
            f"{key}: {path} is no text (a zero byte at character {words.index(chr(0))})"
        )
    if len(words) < 2:
        raise ConfigError(f"{key}: {path} must have at least 2 characters; got {len(words)}")
    return words
