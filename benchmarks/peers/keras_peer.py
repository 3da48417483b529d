"""Keras's SimpleRNN on its JAX backend, compiled."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Prepared, plain_float32_only
from benchmarks.peers.jax_peer import as_tensor
from benchmarks.problems import Problem


class KerasPeer(Peer):
    """One layer, called without its state, under ``jax.jit``."""

    name = "keras"
    title = "Keras (JAX)"
    runtime = "xla"
    needs = ("keras", "jax")

    def missing(self) -> str | None:
        """Return why it cannot run here, or None."""
        # Read when Keras is first imported; benchmarks.machine sets it unless the user has.
        if os.environ.get("KERAS_BACKEND") != "jax":
            return "timed on its JAX backend only, and KERAS_BACKEND is not jax"
        return super().missing()

    def refuses(self, case: Case) -> str | None:
        """Refuse what the layer is not set up for here."""
        return plain_float32_only(case)

    def version(self) -> str | None:
        """Return Keras's version."""
        import keras

        return keras.__version__

    def prepare(self, problem: Problem) -> Prepared:
        """Set the weights, one bias for both, and lay the sequence out as (B, T, I)."""
        import jax
        import keras

        case = problem.case
        layer = keras.layers.SimpleRNN(case.H, activation=case.nonlinearity, return_sequences=True)
        layer.build((case.B, case.T, case.I))
        W, U, b_ih, b_hh = (w.numpy() for w in problem.weights.values())
        layer.set_weights([W.T, U.T, b_ih + b_hh])
        weights = [variable.value for variable in layer.trainable_variables]
        state = [variable.value for variable in layer.non_trainable_variables]

        def forward(weights: Any, x: Any) -> Any:
            return layer.stateless_call(weights, state, x)[0]

        def train(weights: Any, x: Any, dy: Any) -> Any:
            if case.wants_input_gradient:
                y, pullback = jax.vjp(forward, weights, x)
            else:
                y, pullback = jax.vjp(lambda w: forward(w, x), weights)
            return y, *pullback(dy)

        x, dy = (_batch_major(tensor) for tensor in (problem.x, problem.dy))
        if case.mode == "forward":
            compiled = jax.jit(forward)
            return Prepared(
                lambda: jax.block_until_ready(compiled(weights, x)),
                lambda y: [_time_major(y)],
            )
        compiled = jax.jit(train)
        return Prepared(
            lambda: jax.block_until_ready(compiled(weights, x, dy)), _tensors_of_training
        )


def _tensors_of_training(result: Any) -> list[Tensor]:
    y, (W, U, bias), *rest = result
    bias = as_tensor(bias)
    return [_time_major(y), as_tensor(W).t(), as_tensor(U).t(), bias, bias, *map(_time_major, rest)]


def _batch_major(tensor: Tensor) -> Any:
    from jax import numpy as jnp

    return jnp.asarray(np.ascontiguousarray(tensor.transpose(0, 1).numpy()))


def _time_major(array: Any) -> Tensor:
    return as_tensor(array).transpose(0, 1)
