"""JAX: ``lax.scan`` over the steps, the input product before it, all of it compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Prepared, plain_float32_only
from benchmarks.problems import Problem


class JaxPeer(Peer):
    """XLA on the CPU."""

    name = "jax"
    title = "JAX"
    runtime = "xla"
    needs = ("jax",)

    def refuses(self, case: Case) -> str | None:
        """Refuse what the scan below is not written for."""
        return plain_float32_only(case)

    def version(self) -> str | None:
        """Return JAX's version."""
        import jax

        return jax.__version__

    def prepare(self, problem: Problem) -> Prepared:
        """Copy everything, and compile on the first run."""
        import jax
        from jax import lax
        from jax import numpy as jnp

        case = problem.case
        f = {"tanh": jnp.tanh, "relu": jax.nn.relu}[case.nonlinearity]

        # Matrices are (in, out), as is usual in JAX: then no product needs a transpose.
        def forward(parameters: Any, x: Any) -> Any:
            W, U, b_ih, b_hh = parameters
            z = x @ W + (b_ih + b_hh)  # (T, B, H)

            def step(h: Any, z_t: Any) -> Any:
                h = f(z_t + h @ U)
                return h, h

            return lax.scan(step, jnp.zeros(z.shape[1:], z.dtype), z)[1]

        def train(parameters: Any, x: Any, dy: Any) -> Any:
            if case.wants_input_gradient:
                y, pullback = jax.vjp(forward, parameters, x)
            else:
                y, pullback = jax.vjp(lambda p: forward(p, x), parameters)
            return y, *pullback(dy)

        parameters = [
            jnp.asarray(np.ascontiguousarray(w.t().numpy())) for w in problem.weights.values()
        ]
        x, dy = jnp.asarray(problem.x.numpy()), jnp.asarray(problem.dy.numpy())
        if case.mode == "forward":
            compiled = jax.jit(forward)
            return Prepared(
                lambda: jax.block_until_ready(compiled(parameters, x)), lambda y: [as_tensor(y)]
            )
        compiled = jax.jit(train)
        return Prepared(
            lambda: jax.block_until_ready(compiled(parameters, x, dy)), _tensors_of_training
        )


def _tensors_of_training(result: Any) -> list[Tensor]:
    y, parameters, *rest = result
    return [as_tensor(y), *(as_tensor(p).t() for p in parameters), *map(as_tensor, rest)]


def as_tensor(array: Any) -> Tensor:
    """Return a copy of a JAX array."""
    return torch.from_numpy(np.array(array))
