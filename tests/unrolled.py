"""Adjoints by autograd, through cells written out: the judge of ``rnn_cuda.instruments``.

One sample at a time, one step at a time; every h_t and c_t is a node of the graph. Nothing here is
shared with what it judges but the modules' parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import rnn_cuda

NONLINEARITIES = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}


@dataclass
class Trajectory:
    """The states of one layer and direction over one sample, as nodes of the graph."""

    h: list[Tensor] = field(default_factory=list)
    # c_t as the next step uses it: h_t does not hang on it
    c: list[Tensor] = field(default_factory=list)
    c_total: list[Tensor] = field(default_factory=list)  # c_t as h_t and the next step use it


@dataclass
class Unrolled:
    input: Tensor  # (T, I)
    output: Tensor  # (T, D * P)
    h_n: Tensor  # (L * D, P)
    c_n: Tensor | None  # (L * D, H)
    trajectories: dict[str, Trajectory]  # by suffix; steps in the order of time


def unroll(
    module: nn.Module,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    cuts_cell: bool = False,
    cuts_hidden: bool = False,
) -> Unrolled:
    """Run ``module`` over one sample ``x`` (T, I), in float64 and without dropout.

    Two mistakes can be planted: that gradients do not pass from one c_t to the next, or that they
    do not pass from h_t to the next step.
    """
    input = x
    is_lstm = isinstance(module, nn.LSTM)
    H, P = module.hidden_size, module.proj_size or module.hidden_size
    trajectories, finals, cells, index = {}, [], [], 0
    for layer in range(module.num_layers):
        outputs = []
        for suffix in [""] + (["_reverse"] if module.bidirectional else []):
            name, states = f"l{layer}{suffix}", Trajectory()

            def weight(kind, name=name):
                value = getattr(module, f"{kind}_{name}", None)
                return None if value is None else value.detach().double()

            h = torch.zeros(P).double() if h0 is None else h0[index]
            c = torch.zeros(H).double() if c0 is None else c0[index]
            steps = range(len(x))
            for t in reversed(steps) if suffix else steps:
                h, c_total = _step(
                    module,
                    weight,
                    x[t],
                    h.detach() if cuts_hidden else h,
                    c.detach() if cuts_cell else c,
                )
                states.h.append(h)
                if is_lstm:
                    c = c_total.clone()
                    states.c.append(c)
                    states.c_total.append(c_total)
            if suffix:
                for nodes in (states.h, states.c, states.c_total):
                    nodes.reverse()
            trajectories[name] = states
            outputs.append(torch.stack(states.h))
            finals.append(h)
            cells.append(c)
            index += 1
        x = torch.cat(outputs, dim=-1)
    c_n = torch.stack(cells) if is_lstm else None
    return Unrolled(input, x, torch.stack(finals), c_n, trajectories)


def _step(module, weight, x, h, c):
    """h_t, and c_t of an LSTM."""

    def affine(kind, v):
        bias = weight(f"bias_{kind}")
        return weight(f"weight_{kind}") @ v + (0 if bias is None else bias)

    if isinstance(module, nn.LSTM):
        i, f, g, o = (affine("ih", x) + affine("hh", h)).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if weight("weight_hr") is None else weight("weight_hr") @ h), c
    if isinstance(module, nn.GRU):
        (x_r, x_z, x_n), (h_r, h_z, h_n) = affine("ih", x).chunk(3), affine("hh", h).chunk(3)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        return (1 - z) * (x_n + r * h_n).tanh() + z * h, None
    f = NONLINEARITIES[module.nonlinearity]
    if isinstance(module, rnn_cuda.LeakyRNN):
        return (1 - module.leak) * h + module.leak * f(affine("ih", x) + affine("hh", h)), None
    if isinstance(module, rnn_cuda.AntisymmetricRNN):
        M = weight("weight_hh")
        A = M - M.T - module.diffusion * torch.eye(len(M)).double()
        z = weight("weight_ih") @ x + A @ h
        for bias in (weight("bias_ih"), weight("bias_hh")):
            z = z if bias is None else z + bias
        return h + module.step_size * f(z), None
    return f(affine("ih", x) + affine("hh", h)), None


@dataclass
class Adjoints:
    """By suffix, over all samples: (T, B, features), NaN behind a sample's end."""

    hidden: dict[str, Tensor]
    cell: dict[str, Tensor]
    cell_total: dict[str, Tensor]


def adjoints(module, samples, h0, c0, loss_of_sample, **mistakes) -> Adjoints:
    """Total adjoints of ``sum_b loss_of_sample(b, unrolled)``.

    ``samples`` are (T_b, I); h0 and c0, (L * D, B, features) or None; all float64.
    """
    T = max(len(x) for x in samples)
    found = Adjoints({}, {}, {})
    for b, x in enumerate(samples):
        start = [None if s is None else s[:, b] for s in (h0, c0)]
        # The weights are constants here: something has to require a gradient.
        run = unroll(module, x.detach().requires_grad_(), *start, **mistakes)
        loss = loss_of_sample(b, run)
        for suffix, states in run.trajectories.items():
            for kind in ("hidden", "cell", "cell_total"):
                nodes = getattr(states, "h" if kind == "hidden" else kind.replace("cell", "c"))
                if not nodes:
                    continue
                grads = torch.autograd.grad(
                    loss, nodes, retain_graph=True, materialize_grads=True, allow_unused=True
                )
                whole = getattr(found, kind).setdefault(
                    suffix, torch.full((T, len(samples), len(nodes[0])), torch.nan).double()
                )
                whole[: len(nodes), b] = torch.stack(grads)
    return found
