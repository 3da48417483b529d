"""Keras's SimpleRNN on its JAX backend, compiled."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from benchmarks.contestants.jax import JAX, array_of, compiled, tensor_of
from benchmarks.problem import Problem
from benchmarks.timing import Work


class Keras(JAX):
    """One layer, called without its state, under ``jax.jit``."""

    name = "keras"
    title = "Keras (JAX)"
    needs = ("keras", "jax")

    def missing(self, device: str) -> str | None:
        # Read when Keras is first imported; benchmarks.machine sets it unless the user has.
        if os.environ.get("KERAS_BACKEND") != "jax":
            return "timed on its JAX backend only, and KERAS_BACKEND is not jax"
        return super().missing(device)

    def prepare(self, problem: Problem) -> Work:
        """Set the weights, one bias for both, and lay the sequence out as (B, T, I)."""
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

        x, dy = (array_of(tensor.transpose(0, 1)) for tensor in (problem.x, problem.dy))
        run = compiled(case, forward, weights, x, dy)

        def as_tensors(results: Any) -> list[Tensor]:
            y, gradients, *rest = results
            both = [tensor_of(g).t() for g in gradients]
            both += both[2:]  # the one bias stands for two
            return [_time_major(y), *both, *map(_time_major, rest)]

        return Work(run, as_tensors, runtime="xla")


def _time_major(array: Any) -> Tensor:
    return tensor_of(array).transpose(0, 1)


CONTESTANTS = (Keras,)
