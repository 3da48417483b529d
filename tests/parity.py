"""Configurations of an RNN, and the comparison of two modules on one of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

LAYOUTS = ("dense", "unbatched", "packed_sorted", "packed_unsorted")
MEMORY = ("contiguous", "strided", "expanded")


@dataclass(frozen=True)
class Config:
    """One module and one input; sizes as in rnn_cuda: T time steps, B batch, I input, H hidden."""

    seed: int
    layout: str
    memory: str
    nonlinearity: str
    num_layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    with_hx: bool
    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        flags = {
            "bi": self.bidirectional,
            "bias": self.bias,
            "bf": self.batch_first,
            "hx": self.with_hx,
        }
        return "-".join(
            [
                f"{self.seed:03d}-{self.layout}-{self.memory}-{self.nonlinearity}",
                f"L{self.num_layers}-T{self.T}-B{self.B}-I{self.I}-H{self.H}",
                *(name for name, on in flags.items() if on),
            ]
        )

    @property
    def options(self) -> dict[str, object]:
        """Constructor arguments, common to nn.RNN and FusedRNN."""
        return {
            "input_size": self.I,
            "hidden_size": self.H,
            "num_layers": self.num_layers,
            "nonlinearity": self.nonlinearity,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "bidirectional": self.bidirectional,
        }

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


def sample_configs(count: int, seed: int) -> list[Config]:
    """Draw ``count`` configurations; the layouts take turns, everything else is random."""
    rng = random.Random(seed)

    def flip() -> bool:
        return rng.random() < 0.5

    configs = []
    for index in range(count):
        layout = LAYOUTS[index % len(LAYOUTS)]
        packed = layout.startswith("packed")
        batch = 1 if layout == "unbatched" else rng.choice([1, 2, 3, 4, 5, 6])
        # nn.RNN, the oracle, takes an empty dense batch; there is no empty PackedSequence.
        if layout == "dense" and rng.random() < 0.1:
            batch = 0
        configs.append(
            Config(
                seed=index,
                layout=layout,
                memory="contiguous" if packed else rng.choice(MEMORY),
                nonlinearity=rng.choice(["tanh", "relu"]),
                num_layers=rng.choice([1, 2, 3]),
                bidirectional=flip(),
                bias=flip(),
                batch_first=flip(),
                with_hx=flip(),
                T=rng.randint(1, 9),
                B=batch,
                I=rng.choice([1, 2, 3, 5, 7, 8, 13, 16, 17, 20]),
                H=rng.choice([1, 2, 3, 5, 7, 8, 15, 16, 17, 20, 32, 33]),
            )
        )
    return configs


@dataclass
class Case:
    """The tensors of one configuration, in one dtype."""

    x: Tensor  # what is differentiated; the module's input is a view of it, or packed from it
    hx: Tensor | None
    lengths: Tensor | None
    output_cotangent: Tensor
    h_n_cotangent: Tensor


def make_case(config: Config, dtype: torch.dtype) -> Case:
    """Make reproducible tensors for ``config``, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(config.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    features = config.directions * config.H
    states = (config.num_layers * config.directions, config.B, config.H)
    lengths, rows = None, (config.T, config.B)
    if config.layout == "unbatched":
        rows, states = (config.T,), (states[0], config.H)
    elif config.layout.startswith("packed"):
        lengths = torch.randint(1, config.T + 1, (config.B,), generator=generator)
        if config.layout == "packed_sorted":
            lengths = lengths.sort(descending=True).values
        rows = (int(lengths.sum()),)
    elif config.batch_first:
        rows = (config.B, config.T)
    x_rows = (config.B, int(lengths.max())) if lengths is not None else rows
    x_features = {"contiguous": config.I, "strided": 2 * config.I, "expanded": 1}[config.memory]
    return Case(
        x=normal(*x_rows, x_features).requires_grad_(),
        hx=normal(*states).requires_grad_() if config.with_hx else None,
        lengths=lengths,
        output_cotangent=normal(*rows, features),
        h_n_cotangent=normal(*states),
    )


def module_input(config: Config, case: Case) -> Tensor | PackedSequence:
    """Return what the module is called with: a view of ``case.x``, or a packed sequence."""
    if case.lengths is not None:
        return pack_padded_sequence(
            case.x,
            case.lengths,
            batch_first=True,
            enforce_sorted=config.layout == "packed_sorted",
        )
    if config.memory == "strided":
        return case.x[..., ::2]
    if config.memory == "expanded":
        return case.x.expand(*case.x.shape[:-1], config.I)
    return case.x


def results(module: nn.Module, config: Config, case: Case) -> dict[str, Tensor]:
    """Run ``module`` forward and backward; return every output and every gradient by name."""
    output, h_n = module(module_input(config, case), case.hx)
    output = output.data if isinstance(output, PackedSequence) else output
    inputs = {"input": case.x, **dict(module.named_parameters())}
    if case.hx is not None:
        inputs["hx"] = case.hx
    gradients = torch.autograd.grad(
        (output, h_n), list(inputs.values()), (case.output_cotangent, case.h_n_cotangent)
    )
    named = {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {"output": output.detach(), "h_n": h_n.detach(), **named}


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return ``|actual - expected| / scale`` in the 2-norm, for every tensor by name.

    The scale of an output is its own norm. That of a gradient is the largest norm among all of
    them: a gradient that is a sum of large terms that cancel has no accuracy relative to itself.
    """
    assert actual.keys() == expected.keys()
    norms = {name: tensor.double().norm().item() for name, tensor in expected.items()}
    largest = max(norm for name, norm in norms.items() if name.startswith("gradient"))
    errors = {}
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, f"{name}: {tuple(actual[name].shape)}"
        difference = (actual[name].double() - tensor.double()).norm().item()
        scale = largest if name.startswith("gradient") else norms[name]
        errors[name] = difference / scale if difference else 0.0
    return errors
