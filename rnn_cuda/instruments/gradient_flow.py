"""`GradientFlow`: the total gradient that reaches every time step of every recurrent layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from rnn_cuda._adjoint import recorders
from rnn_cuda._autograd import plain_eager_mode
from rnn_cuda.instruments._recording import (
    AdjointRecord,
    CallLog,
    Log,
    Sink,
    Watch,
    native_nodes,
    refuse,
)
from rnn_cuda.instruments._stack import Layout, Recurrent, StackCall, has_dropout, layer_names


class GradientFlow:
    r"""Record the total adjoint :math:`dL/dh_t` of every recurrent layer of a model.

        >>> import torch, rnn_cuda
        >>> model = torch.nn.Sequential(torch.nn.LSTM(3, 5, num_layers=2))
        >>> with rnn_cuda.instruments.GradientFlow(model) as flow:
        ...     output, _ = model(torch.randn(7, 2, 3))
        ...     output[-1].sum().backward()
        >>> flow.adjoint_norm["0.l1"].shape  # time steps, samples
        torch.Size([7, 2])

    The gradient of a recurrent module's output tensor is only the direct part :math:`g_t`, what
    reaches :math:`h_t` without passing through :math:`h_{t+1}`. The total one,

    .. math:: a_t = \frac{dL}{dh_t}
              = g_t + \left(\frac{\partial h_{t+1}}{\partial h_t}\right)^\top a_{t+1},

    is what vanishes or explodes (Bengio, Simard & Frasconi 1994; Pascanu, Mikolov & Bengio 2013).
    It is recorded for `FusedRNN`, ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` (and `LeakyRNN` and
    `AntisymmetricRNN`) anywhere in the model, for every layer and direction. Outputs, gradients of
    parameters and random states are, to the last bit, what they are without recording.

    Results are ``(T, B)`` whatever ``batch_first`` is, time steps and samples being the caller's;
    B = 1 for an unbatched call. Behind the end of a packed sample they are NaN. An LSTM's
    :math:`h_t` is what it carries on, after the projection if it has one.

    **LSTM.** What it carries on is :math:`(h_t, c_t)`. By default the adjoint is the gradient with
    respect to that state: each component with the other held fixed. So :math:`dL/dc_t` leaves out
    what :math:`c_t` does through :math:`h_t = o_t \tanh c_t`, and after the last step it is zero
    unless the loss reads ``c_n``. With ``cell_through_hidden`` it is counted in, as in textbooks'
    backpropagation through time: :math:`dL/dc_t + o_t (1 - \tanh^2 c_t)\, dL/dh_t`.

    **Names.** ``encoder.l0``, ``encoder.l1_reverse``: the module's qualified name with the suffix
    of its weights; ``l0`` if the model itself is the recurrent layer. A module that is called again
    inside the block goes on as ``encoder.l0[1]``, ``encoder.l0[2]``: one name per call that built a
    graph, in the order of the calls, so neither a decoder's steps nor micro-batches of gradient
    accumulation run into each other. A module that stands in the model under several names counts
    under the first.

    **Several backward passes through one call** (``retain_graph=True``) are separate records; the
    dictionaries show the latest, `records` has all. To see the gradient of a sum of losses, add the
    losses.

    **What is not there.** A call that no backward pass reached, or that had nothing to
    differentiate (no input, state or weight that requires grad), has no entry. An exact zero is a
    zero: norms are accumulated in float64 and do not underflow before the gradient itself does.

    **How.** `FusedRNN`'s fused backward emits the norms, for a few percent of its time. For the
    others, hooks catch the direct parts, and when the backward pass is over the adjoints follow
    from a sweep over the layer's steps (``python -m benchmarks.recording`` measures what it costs).
    Calls are those made inside the block; their backward pass may also come after it.

    With `torch.utils.checkpoint`, use ``use_reentrant=False``. Second derivatives: a backward pass
    through a call that was differentiated with ``create_graph=True`` before is exact for a
    `FusedRNN` on native kernels (f' then counts as a function of :math:`h_t`); for the others it is
    not recorded, with a warning.

    Args:
        model: any module; it is searched for recurrent layers once, here.
        vectors: whether to keep the adjoints themselves, and not only their norms.
        cell_through_hidden: see above.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no recurrent layer in it, or it is compiled.

    A recorded call raises RuntimeError under `torch.func` transforms and forward-mode automatic
    differentiation, and for dropout between layers on a device other than the CPU (but for native
    kernels), and TypeError for a `FusedRNN` whose recurrence a subclass has overridden. Its
    backward pass raises RuntimeError if an input, initial state or weight was modified in place
    since, if it is mapped (``is_grads_batched``), and inside a reentrant checkpoint.

    """

    def __init__(
        self, model: nn.Module, vectors: bool = False, *, cell_through_hidden: bool = False
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.vectors = vectors
        self.cell_through_hidden = cell_through_hidden
        self._modules: dict[str, Recurrent] = {}
        for name, module in model.named_modules():
            if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
                raise ValueError(
                    f"model: {name or 'it'} is compiled, and a compiled model has no calls to "
                    "record; pass the model before torch.compile, and run that"
                )
            if isinstance(module, Recurrent):
                self._modules[name] = module
        if not self._modules:
            raise ValueError(
                "model: expected a FusedRNN, nn.RNN, nn.LSTM or nn.GRU somewhere in it, found none"
            )
        self._handles: list[RemovableHandle] = []
        self._random_states: dict[str, Tensor] = {}
        self.clear()

    # ---- what was recorded -----------------------------------------------------------------------

    @property
    def records(self) -> list[AdjointRecord]:
        """Every record, ordered by layer, call and backward pass."""
        return [record for _, records in sorted(self._log.items()) for record in records]

    @property
    def adjoint_norm(self) -> dict[str, Tensor]:
        """Norm of dL/dh_t by layer, float64 ``(T, B)``."""
        return self._latest(lambda record: record.adjoint_norm)

    @property
    def cell_adjoint_norm(self) -> dict[str, Tensor]:
        """Norm of dL/dc_t by LSTM layer, float64 ``(T, B)``."""
        return self._latest(lambda record: record.cell_adjoint_norm)

    @property
    def joint_adjoint_norm(self) -> dict[str, Tensor]:
        """Norm of both together, float64 ``(T, B)``; where there is no cell, of dL/dh_t."""
        return self._latest(lambda record: record.joint_adjoint_norm)

    @property
    def adjoint(self) -> dict[str, Tensor]:
        """dL/dh_t by layer, ``(T, B, H)``.

        Raises:
            RuntimeError: the vectors were not asked for.

        """
        return self._vectors(lambda record: record.adjoint)

    @property
    def cell_adjoint(self) -> dict[str, Tensor]:
        """dL/dc_t by LSTM layer, ``(T, B, H)``.

        Raises:
            RuntimeError: the vectors were not asked for.

        """
        return self._vectors(lambda record: record.cell_adjoint)

    def clear(self) -> None:
        """Forget all records; the next call of each module is its first again."""
        # Calls hold on to the log that was current when they were made.
        self._log: Log = {}
        self._calls: dict[str, int] = {}

    def _latest(self, value_of: Callable[[AdjointRecord], Tensor | None]) -> dict[str, Tensor]:
        latest = {}
        for (_, _, call), records in sorted(self._log.items()):
            value = value_of(records[-1])
            if value is not None:
                latest[records[-1].layer + (f"[{call}]" if call else "")] = value
        return latest

    def _vectors(self, value_of: Callable[[AdjointRecord], Tensor | None]) -> dict[str, Tensor]:
        if not self.vectors:
            raise RuntimeError("only norms were recorded; pass vectors=True to GradientFlow")
        return self._latest(value_of)

    # ---- recording -------------------------------------------------------------------------------

    def __enter__(self) -> GradientFlow:
        if self._handles:
            raise RuntimeError("this GradientFlow is recording already")
        recorders.add(self)
        for name, module in self._modules.items():
            self._handles += [
                module.register_forward_pre_hook(self._before(name)),
                module.register_forward_hook(self._after(name), prepend=True, with_kwargs=True),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        recorders.discard(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._random_states.clear()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            self._random_states.pop(name, None)  # of a call that failed
            if has_dropout(module):
                self._random_states[name] = torch.get_rng_state()

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            random_state = self._random_states.pop(name, None)
            where = name or "the model"
            if not plain_eager_mode():
                raise RuntimeError(
                    f"GradientFlow cannot record {where} under torch.func transforms, forward-mode "
                    "automatic differentiation or torch.compile"
                )
            output, states = result
            output = output.data if isinstance(output, PackedSequence) else output
            results = [output, *(states if isinstance(states, tuple) else (states,))]
            if not any(tensor.requires_grad for tensor in results):
                return
            if torch._C._current_graph_task_id() != -1:
                for tensor in results:
                    refuse(tensor, where)
                return
            input, hx = _arguments(*args, **kwargs)
            log = self._new_call(name, module)
            nodes = native_nodes(module, results[1])
            if nodes is not None:
                layout = Layout.of(module, input)
                for index, (node, direction) in enumerate(nodes):
                    node.adjoint_sinks[direction] += (Sink(log, index, layout),)
                return
            if random_state is not None and output.device.type != "cpu":
                raise RuntimeError(
                    f"GradientFlow cannot record {where}: the masks of the dropout "
                    f"between its layers cannot be had again on {output.device}"
                )
            call = StackCall.of(module, input, hx, result[0], random_state)
            Watch(log, call).attach(results)

        return hook

    def _new_call(self, name: str, module: Recurrent) -> CallLog:
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        return CallLog(
            self._log,
            (list(self._modules).index(name), call),
            [f"{name}.{layer}" if name else layer for layer in layer_names(module)],
            vectors=self.vectors,
            cell_through_hidden=self.cell_through_hidden,
        )


def _arguments(input: Any, hx: Any = None) -> tuple[Any, Any]:
    """The arguments that every recurrent module takes, by position or by name."""
    return input, hx
