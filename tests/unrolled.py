"""Recurrent layers of every kind, written out step by step: the judge of ``rnn_cuda.instruments``.

Derivatives are autograd's. Nothing here is shared with what it judges but the modules' parameters.
What a program does with its layers is unrolled by ``unrolled_calls.py``, with the same steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from rnn_cuda import AntisymmetricRNN, FusedGRU, FusedLSTM, FusedRNN, LeakyRNN

NONLINEARITIES = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
    "softplus": torch.nn.functional.softplus,
}
KINDS = {
    "FusedRNN": (FusedRNN, {}),
    "FusedRNN_relu": (FusedRNN, {"nonlinearity": "relu"}),
    "FusedRNN_sigmoid": (FusedRNN, {"nonlinearity": "sigmoid"}),
    "FusedRNN_identity": (FusedRNN, {"nonlinearity": "identity"}),
    "FusedRNN_softplus": (FusedRNN, {"nonlinearity": "softplus"}),
    "FusedGRU": (FusedGRU, {}),
    "FusedLSTM": (FusedLSTM, {}),
    "RNN": (nn.RNN, {}),
    "RNN_relu": (nn.RNN, {"nonlinearity": "relu"}),
    "LeakyRNN": (LeakyRNN, {"leak": 0.3}),
    "AntisymmetricRNN": (AntisymmetricRNN, {"step_size": 0.4, "diffusion": 0.2}),
    "GRU": (nn.GRU, {}),
    "LSTM": (nn.LSTM, {}),
    "LSTM_projected": (nn.LSTM, {"proj_size": 3}),
}
LSTMS, GRUS = (nn.LSTM, FusedLSTM), (nn.GRU, FusedGRU)


def step_of(module, weights, x, h, c):
    """h_t, and c_t of an LSTM, of some samples."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if module.bias else (0, 0)
    if isinstance(module, AntisymmetricRNN):
        w_hh = w_hh - w_hh.T - module.diffusion * torch.eye(len(w_hh), dtype=w_hh.dtype)
    z_x, z_h = x @ w_ih.T + b_ih, h @ w_hh.T + b_hh
    if isinstance(module, LSTMS):
        i, f, g, o = (z_x + z_h).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h @ rest[-1].T if module.proj_size else h), c
    if isinstance(module, GRUS):
        (x_r, x_z, x_n), (h_r, h_z, h_n) = z_x.chunk(3, dim=-1), z_h.chunk(3, dim=-1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        return (1 - z) * (x_n + r * h_n).tanh() + z * h, None
    new = NONLINEARITIES[module.nonlinearity](z_x + z_h)
    if isinstance(module, LeakyRNN):
        return (1 - module.leak) * h + module.leak * new, None
    return (h + module.step_size * new if isinstance(module, AntisymmetricRNN) else new), None


def make(kind: str, input_size: int = 3, hidden_size: int = 5, **options) -> nn.Module:
    """A module of that kind with larger weights than the default, so that all matters."""
    cls, own = KINDS[kind]
    module = cls(input_size, hidden_size, **own, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
        for name, parameter in module.named_parameters():
            if "relu" in kind and name.startswith("bias_ih"):
                parameter.add_(4)  # or all units would close sooner or later
    return module


class Unrolled:
    """One layer and direction over one input, in float64; time in the order of processing.

    ``states[t]`` is s_t as a tuple (h_t,) or (h_t, c_t), each (B, features).
    """

    def __init__(self, module, input, hx=None, layer=0, reverse=False):
        self.module = module
        x = input.double()
        x = x.transpose(0, 1) if module.batch_first else x
        for below in range(layer):
            outputs = []
            for direction in range(2 if module.bidirectional else 1):
                self._run(x, hx, below, direction == 1)
                output = torch.stack([state[0] for state in self.states[1:]])
                outputs.append(output.flip(0) if direction == 1 else output)
            x = torch.cat(outputs, dim=-1)
        self._run(x, hx, layer, reverse)

    @torch.no_grad()
    def _run(self, x, hx, layer, reverse):
        module, name = self.module, f"l{layer}{'_reverse' if reverse else ''}"
        kinds = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * module.bias
        kinds += ["weight_hr"] * bool(module.proj_size)
        self._weights = [getattr(module, f"{kind}_{name}").double() for kind in kinds]
        if hx is None:
            sizes = [module.proj_size or module.hidden_size]
            sizes += [module.hidden_size] * isinstance(module, LSTMS)
            state = tuple(x.new_zeros(x.shape[1], size) for size in sizes)
        else:
            index = layer * (2 if module.bidirectional else 1) + reverse
            state = tuple(h[index].double() for h in (hx if isinstance(hx, tuple) else (hx,)))
        self.x, self.states = x.flip(0) if reverse else x, [state]
        for x_t in self.x:
            self.states.append(self._step(x_t, self.states[-1]))

    def _step(self, x, state):
        after = step_of(self.module, self._weights, x, *state, *[None] * (2 - len(state)))
        return after[: len(state)]

    def jacobian(self, t: int, sample: int) -> Tensor:
        """ds_t/ds_{t-1} of one sample, (S, S); for an LSTM s is (h, c)."""
        before = [part[sample] for part in self.states[t - 1]]
        sizes = [len(part) for part in before]
        x = self.x[t - 1, sample]
        return jacobian(lambda s: torch.cat(self._step(x, s.split(sizes))), torch.cat(before))

    def product(self, start: int, stop: int, sample: int) -> Tensor:
        """ds_stop/ds_start."""
        found = torch.eye(sum(part.shape[1] for part in self.states[0]), dtype=torch.float64)
        for t in range(start + 1, stop + 1):
            found = self.jacobian(t, sample) @ found
        return found
