"""An independent computation for the instruments' tests: torch's own modules, one step at a time.

Each layer and direction is copied into a module of its own, in float64, that is called with one
time step after the other; Jacobians come from autograd through that call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from rnn_cuda import AntisymmetricRNN, FusedRNN, LeakyRNN
from rnn_cuda.cells.elman import NONLINEARITIES, activation
from rnn_cuda.trajectory import trajectory_of

KINDS = {
    **{f"FusedRNN {f}": (FusedRNN, {"nonlinearity": f}) for f in NONLINEARITIES},
    "RNN tanh": (nn.RNN, {}),
    "RNN relu": (nn.RNN, {"nonlinearity": "relu"}),
    "LeakyRNN": (LeakyRNN, {"leak": 0.3}),
    "AntisymmetricRNN": (AntisymmetricRNN, {"step_size": 0.4, "diffusion": 0.2}),
    "GRU": (nn.GRU, {}),
    "LSTM": (nn.LSTM, {}),
    "LSTM with projections": (nn.LSTM, {"proj_size": 3}),
}


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


def first_layer(module, x):
    """The steps of the first layer, as the instruments see it."""
    with torch.no_grad():
        return trajectory_of(module, x, None, layer=0, reverse=False)


class Unrolled:
    """One layer and direction over one input, step by step; time in the order of processing.

    ``states[t]`` is s_t as a tuple (h_t,) or (h_t, c_t), each (B, features).
    """

    def __init__(self, module, input, hx=None, layer=0, reverse=False):
        x = input.double()
        x = x.transpose(0, 1) if module.batch_first else x
        directions = 2 if module.bidirectional else 1
        for below in range(layer):
            runs = [
                Unrolled._layer(module, x, hx, below, direction == 1)
                for direction in range(directions)
            ]
            outputs = [torch.stack([state[0] for state in states[1:]]) for _, _, states in runs]
            x = torch.cat([outputs[0], *(o.flip(0) for o in outputs[1:])], dim=-1)
        self.cell, self.x, self.states = self._layer(module, x, hx, layer, reverse)

    @staticmethod
    def _layer(module, x, hx, layer, reverse):
        cell = _Cell(module, x.shape[-1], layer, reverse)
        x = x.flip(0) if reverse else x
        index = layer * (2 if module.bidirectional else 1) + reverse
        if hx is None:
            sizes = [cell.output_size] + [module.hidden_size] * isinstance(module, nn.LSTM)
            state = tuple(x.new_zeros(x.shape[1], size) for size in sizes)
        else:
            state = tuple(h[index].double() for h in (hx if isinstance(hx, tuple) else (hx,)))
        states = [state]
        with torch.no_grad():
            for x_t in x:
                states.append(cell(x_t, states[-1]))
        return cell, x, states

    def jacobian(self, t: int, sample: int) -> Tensor:
        """ds_t/ds_{t-1} of one sample, (S, S); for an LSTM s is (h, c)."""
        before = [part[sample : sample + 1] for part in self.states[t - 1]]
        sizes = [part.shape[1] for part in before]

        def step(s):
            after = self.cell(self.x[t - 1, sample : sample + 1], tuple(s.split(sizes, dim=1)))
            return torch.cat(after, dim=1)

        j = jacobian(step, torch.cat(before, dim=1))
        return j[0, :, 0, :]

    def product(self, start: int, stop: int, sample: int) -> Tensor:
        """ds_stop/ds_start."""
        size = sum(part.shape[1] for part in self.states[0])
        found = torch.eye(size, dtype=torch.float64)
        for t in range(start + 1, stop + 1):
            found = self.jacobian(t, sample) @ found
        return found


class _Cell:
    """(x_t, state) -> state."""

    def __init__(self, module, input_size, layer, reverse):
        suffix = f"l{layer}{'_reverse' if reverse else ''}"
        kinds = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * module.bias
        kinds += ["weight_hr"] * bool(module.proj_size)
        weights = {kind: getattr(module, f"{kind}_{suffix}").detach().double() for kind in kinds}
        self.output_size = module.proj_size or module.hidden_size
        self.nonlinearity = getattr(module, "nonlinearity", None)
        self.weights = weights
        if isinstance(module, nn.RNN | FusedRNN):
            self.layer = None
            return
        own = ("leak", "step_size", "diffusion", "proj_size")
        options = {name: getattr(module, name) for name in own if getattr(module, name, 0)}
        self.layer = type(module)(
            input_size, module.hidden_size, bias=module.bias, dtype=torch.float64, **options
        )
        self.layer.load_state_dict({f"{kind}_l0": w for kind, w in weights.items()})

    def __call__(self, x_t, state):
        if self.layer is None:
            w = self.weights
            zero = x_t.new_zeros(())
            z = x_t @ w["weight_ih"].T + state[0] @ w["weight_hh"].T
            return (
                activation(z + w.get("bias_ih", zero) + w.get("bias_hh", zero), self.nonlinearity),
            )
        given = tuple(part.unsqueeze(0) for part in state)
        _, after = self.layer(x_t.unsqueeze(0), given if len(given) > 1 else given[0])
        return tuple(part[0] for part in (after if isinstance(after, tuple) else (after,)))
