"""JAX: ``lax.scan`` over the steps, the input product before it, all of it compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contestants.base import PlainContestant
from benchmarks.problem import Problem
from benchmarks.timing import Work


class JAX(PlainContestant):
    """XLA on the CPU."""

    name = "jax"
    title = "JAX"
    needs = ("jax",)

    def refuses(self, case: Case) -> str | None:
        return super().refuses(case) if case.mode != "hvp" else "timed without second derivatives"

    def prepare(self, problem: Problem) -> Work:
        import jax
        from jax import lax
        from jax import numpy as jnp

        f = {"tanh": jnp.tanh, "relu": jax.nn.relu}[problem.case.nonlinearity]

        def forward(parameters: Any, x: Any) -> Any:
            W, U, b_ih, b_hh = parameters
            z = x @ W + (b_ih + b_hh)  # (T, B, H)

            def step(h: Any, z_t: Any) -> Any:
                h = f(z_t + h @ U)
                return h, h

            return lax.scan(step, jnp.zeros(z.shape[1:], z.dtype), z)[1]

        # Matrices are (in, out), as is usual in JAX: then no product needs a transpose.
        parameters = [array_of(w.t()) for w in problem.weights.values()]
        run = compiled(problem.case, forward, parameters, array_of(problem.x), array_of(problem.dy))

        def as_tensors(results: Any) -> list[Tensor]:
            y, gradients, *rest = results
            return [tensor_of(y), *(tensor_of(g).t() for g in gradients), *map(tensor_of, rest)]

        return Work(run, as_tensors, runtime="xla")


def compiled(
    case: Case, forward: Callable[[Any, Any], Any], parameters: Any, x: Any, dy: Any
) -> Callable[[], Any]:
    """Return the work of a case for a function of JAX arrays.

    It returns ``(y, gradients of the parameters if any, gradient of x if any)``.
    """
    import jax

    def train(parameters: Any, x: Any, dy: Any) -> Any:
        if case.wants_input_gradient:
            y, pullback = jax.vjp(forward, parameters, x)
        else:
            y, pullback = jax.vjp(lambda p: forward(p, x), parameters)
        return y, *pullback(dy)

    if case.mode == "forward":
        pass_forward = jax.jit(forward)
        return lambda: (jax.block_until_ready(pass_forward(parameters, x)), ())
    step = jax.jit(train)
    return lambda: jax.block_until_ready(step(parameters, x, dy))


def array_of(tensor: Tensor) -> Any:
    """Return a copy as a JAX array."""
    from jax import numpy as jnp

    return jnp.asarray(np.ascontiguousarray(tensor.numpy()))


def tensor_of(array: Any) -> Tensor:
    """Return a copy of a JAX array."""
    return torch.from_numpy(np.array(array))


CONTESTANTS = (JAX(),)
