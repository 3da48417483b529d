"""Scenes: programs with a recurrent layer, played with and without `GradientFlow`.

A situation is a function of a `Scene`. It is played three times: as it is, under GradientFlow, and
with its recurrences unrolled (tests/unrolled_calls.py).
"""

import contextlib
import dataclasses
import functools
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from rnn_cuda.instruments import GradientFlow
from tests.unrolled import KINDS, LSTMS
from tests.unrolled_calls import UnrolledCalls

B, I, H = 3, 4, 5
MAIN = ("RNN", "LSTM", "GRU", "FusedRNN", "LeakyRNN")
VARIANTS = {
    "dense": {"T": 4},
    "batch_first": {"T": 4, "batch_first": True},
    "packed": {"lengths": (2, 4, 3), "num_layers": 2, "bidirectional": True},
    "unbatched": {"T": 3, "batch": (), "num_layers": 2, "bidirectional": True},
    "deep": {"T": 3, "num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
    "one_step": {"T": 1},
    "two_steps": {"T": 2, "batch_first": True, "bidirectional": True},
}


class Scene:
    """A layer of some kind, its input, a block that watches, and a loss that reads everything.

    All numbers are first rounded to the dtype ``rounded``, then computed with in ``dtype``.
    """

    def __init__(
        self,
        kind="LSTM",
        variant="dense",
        watcher=None,
        *,
        dtype=torch.float64,
        rounded=torch.float64,
    ):
        torch.manual_seed(0)
        self.cls, options = KINDS[kind]
        variant = dict(VARIANTS[variant])
        self.T, lengths = variant.pop("T", None), variant.pop("lengths", None)
        self.batch = variant.pop("batch", (B,))
        self.options, self.dtype, self.rounded = {**options, **variant}, dtype, rounded
        self.batch_first = variant.get("batch_first", False)
        if lengths:
            packed = pack_sequence([self.normal(n, I) for n in lengths], enforce_sorted=False)
            self.leaf = packed.data.requires_grad_()
            self.x = packed._replace(data=self.leaf)
        else:
            self.x = self.leaf = self.dense(self.T).requires_grad_()
        self._watcher, self.flow, self.model, self.seen = watcher, None, None, []

    def normal(self, *shape):
        return torch.randn(shape, dtype=torch.float64).to(self.rounded).to(self.dtype)

    def dense(self, T):
        return (
            self.normal(*self.batch, T, I) if self.batch_first else self.normal(T, *self.batch, I)
        )

    def layer(self, cls=None, **options):
        """Make a layer of the kind, or of a subclass of it."""
        options = {**self.options, "dtype": torch.float64, **options}
        return (cls or self.cls)(I, H, **options).to(self.rounded).to(self.dtype)

    def initial_states(self, layer):
        """Make leaves, as the layer takes them."""
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        sizes = [layer.proj_size or H] + [H] * isinstance(layer, LSTMS)
        states = [self.normal(count, *self.batch, size).requires_grad_() for size in sizes]
        return tuple(states) if len(states) > 1 else states[0]

    def watch(self, layer):
        """Watch the layer under the name ``encoder``."""
        return self.watch_model(nn.ModuleDict({"encoder": layer}))

    def watch_model(self, model):
        self.model = model
        self.flow = contextlib.nullcontext() if self._watcher is None else self._watcher(model)
        return self.flow

    @contextlib.contextmanager
    def watched(self, cls=None, **options):
        """Make a layer and watch it under the name ``encoder``."""
        layer = self.layer(cls, **options)
        with self.watch(layer):
            yield layer

    def loss(self, *results):
        """Read every element of the tensors with another weight."""
        terms = []
        for tensor in tensors_of(results):
            self.seen.append(tensor.detach().clone())
            weights = torch.arange(1.0, tensor.numel() + 1, dtype=torch.float64).cos()
            terms.append((tensor * weights.view(tensor.shape)).sum())
        return torch.stack(terms).sum()

    def evidence(self):
        """What must be the same with and without GradientFlow."""
        values = {f"result {k}": tensor for k, tensor in enumerate(self.seen)}
        values |= {"input": self.leaf.grad}
        values |= {name: p.grad for name, p in self.model.named_parameters()}
        values |= {f"value of {name}": value for name, value in self.model.state_dict().items()}
        return values


class Encoder(nn.Module):
    """A module around a layer that returns its output alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def tensors_of(results):
    """All tensors in what a module returns, however it packs them."""
    if results is None:
        return []
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, PackedSequence):
        return [results.data]
    if dataclasses.is_dataclass(results):
        results = vars(results)
    values = results.values() if isinstance(results, dict) else results
    return [tensor for value in values for tensor in tensors_of(value)]


def data_of(sequence):
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def mapped(function, sequence):
    if isinstance(sequence, PackedSequence):
        return sequence._replace(data=function(sequence.data))
    return function(sequence)


def states_of(state):
    return state if isinstance(state, tuple) else (state,)


class Situations:
    """Situations by name, and the kinds of layer and the variants that each is played with."""

    def __init__(self):
        self._cases, self._count = {}, 0

    def add(
        self,
        function=None,
        *,
        kinds=None,
        variants=("dense",),
        name=None,
        all_pairs=False,
        records_nothing=False,
    ):
        """Add a function, also as a decorator.

        It is played with each kind and with each variant, but not with all pairs of these unless
        they are asked for. The pairs are others from one situation to the next. So are the default
        kinds: those that are recorded alike take turns.
        """
        if function is None:
            options = {"kinds": kinds, "variants": variants, "all_pairs": all_pairs}
            return functools.partial(self.add, **options, records_nothing=records_nothing)
        name = name or function.__name__
        function.records_nothing = records_nothing
        first = self._count
        self._count += 1
        if kinds is None:
            fused = ("FusedRNN", "FusedGRU", "FusedLSTM")[first % 3]
            kinds = ("LSTM", fused, "LeakyRNN", ("RNN", "GRU")[first % 2])
        kinds, variants = list(kinds), list(variants)
        pairs = itertools.product(kinds, variants)
        if not all_pairs:
            count = max(len(kinds), len(variants))
            shifted = (variants[(first + k) % len(variants)] for k in range(count))
            pairs = zip(itertools.islice(itertools.cycle(kinds), count), shifted, strict=True)
        for kind, variant in pairs:
            assert (name, kind, variant) not in self._cases
            self._cases[name, kind, variant] = function
        return function

    def cases(self):
        return [
            pytest.param(function, kind, variant, id=f"{name}-{kind}-{variant}")
            for (name, kind, variant), function in self._cases.items()
        ]


def play(situation, kind, variant, watcher=None, **options):
    scene = Scene(kind, variant, watcher, **options)
    returned = situation(scene)
    evidence = scene.evidence()
    for k, tensor in enumerate(tensors_of(returned)):
        evidence[f"returned {k}"] = tensor.detach()
    return scene, evidence | {"random state": torch.get_rng_state()}


def assert_same(actual, expected, compare=torch.equal):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (actual[name] is None), name
        assert value is None or compare(actual[name], value), name


def assert_close(actual, expected, what, tolerance=1e-11):
    """Each row, a time step of a sample, is right in proportion to its own norm."""
    assert actual.shape == expected.shape, what
    assert torch.equal(actual.isnan(), expected.isnan()), what
    error = (actual - expected).nan_to_num().norm(dim=-1)
    right = (error <= tolerance * expected.nan_to_num().norm(dim=-1)).all()
    assert right, f"{what}: recorded {actual.tolist()}, unrolled {expected.tolist()}"


def assert_records(flow, expected, tolerance=1e-11):
    """Compare the records of a GradientFlow with those of UnrolledCalls."""
    keys = [(r.layer, r.call, r.backward) for r in expected.records]
    assert [(r.layer, r.call, r.backward) for r in flow.records] == keys
    latest = {}
    for actual, right in zip(flow.records, expected.records, strict=True):
        latest[right.layer + (f"[{right.call}]" if right.call else "")] = actual
        states = {"dL/dh": (actual.adjoint, actual.adjoint_norm, right.hidden)}
        joint = right.hidden
        if right.cell is not None:
            cell = right.cell_total if flow.cell_through_hidden else right.cell
            states["dL/dc"] = actual.cell_adjoint, actual.cell_adjoint_norm, cell
            joint = torch.cat([joint, cell], dim=-1)
        else:
            assert actual.cell_adjoint_norm is None
        states["both"] = None, actual.joint_adjoint_norm, joint
        for name, (vectors, norms, expected_vectors) in states.items():
            what = f"{name} of {actual.layer}, {actual.call}, {actual.backward}"
            assert norms.dtype == torch.float64
            expected_norms = expected_vectors.norm(dim=-1, keepdim=True)
            assert_close(norms.unsqueeze(-1), expected_norms, f"norm of {what}", tolerance)
            if flow.vectors and name != "both":
                assert_close(vectors, expected_vectors, what, tolerance)
    # What the dictionaries show is the latest record of each call.
    norms = ["adjoint_norm", "cell_adjoint_norm"]
    for attribute in norms + ["adjoint", "cell_adjoint"] * flow.vectors:
        shown = [(name, getattr(record, attribute)) for name, record in latest.items()]
        shown = [(name, value) for name, value in shown if value is not None]
        assert list(getattr(flow, attribute).items()) == shown
    assert list(flow.joint_adjoint_norm) == list(latest)


def recorded_equals_unrolled(situation, kind="LSTM", variant="dense", **options):
    """Records are those of the unrolled program; all else is what it is without recording."""
    _, evidence = play(situation, kind, variant)
    unrolled, its = play(situation, kind, variant, UnrolledCalls)
    assert_same(its, evidence, functools.partial(torch.allclose, rtol=1e-9, atol=1e-12))
    watcher = functools.partial(GradientFlow, **{"vectors": True, **options})
    recorded, its = play(situation, kind, variant, watcher)
    assert_same(its, evidence)
    assert unrolled.flow.records or getattr(situation, "records_nothing", False)
    assert_records(recorded.flow, unrolled.flow)
