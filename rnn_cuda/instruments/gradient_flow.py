"""`GradientFlow`: the total gradient that reaches every time step of every recurrent layer."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from rnn_cuda._dynamo import untraced
from rnn_cuda.instruments._recording import (
    TORCH_RECURRENCES,
    AdjointRecord,
    CallLog,
    KeptCall,
    Log,
    add_sinks,
    record_at,
    torch_call,
)
from rnn_cuda.modules import FusedGRU, FusedLSTM, FusedRNN
from rnn_cuda.operators.function import plain_eager_mode
from rnn_cuda.recording import RecurrentCall, recorders
from rnn_cuda.residual import AntisymmetricRNN, LeakyRNN
from rnn_cuda.stack import RecurrentStack

_TORCH_MODULES = (nn.RNN, nn.LSTM, nn.GRU)
_TENSORS_OWN: Any = Tensor.__torch_function__.__func__  # pyright: ignore
_FUSED = (FusedRNN, FusedGRU, FusedLSTM)
_RECURRENT_NAMES = {
    module.__name__ for module in (*_TORCH_MODULES, *_FUSED, LeakyRNN, AntisymmetricRNN)
}


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
    It is recorded for the recurrent layers of this package and of torch (``nn.RNN``, ``nn.LSTM``,
    ``nn.GRU``) anywhere in the model, for every layer and direction. Outputs, gradients of
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

    **How.** The fused backward of a `FusedRNN`, `FusedGRU` or `FusedLSTM` on native kernels emits
    the norms, for a few percent of its time. For the others, a node of the autograd graph stands
    between the recurrence and its results. What arrives there is the direct part of the gradient,
    after all hooks. From it a sweep over the layer's steps finds the adjoints, before the
    recurrence's own backward pass, with the weights that ran (``python -m benchmarks.instruments
    recording`` measures what it costs). So whatever a subclass,
    a hook or a wrapper does outside of the recurrence, to input, output or gradient, is seen as it
    is. Calls are those made inside the block; their backward pass may also come after it. A torch
    module whose ``forward`` is called by name, which runs no hooks either, is not recorded.

    With `torch.utils.checkpoint`, use ``use_reentrant=False``. Second derivatives: a backward pass
    through a call that was differentiated with ``create_graph=True`` before is exact for a
    fused layer on native kernels (f' then counts as a function of :math:`h_t`); for the others it
    is not recorded, with a warning.

    Args:
        model: any module; it is searched for recurrent layers once, here.
        vectors: whether to keep the adjoints themselves, and not only their norms.
        cell_through_hidden: see above.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no recurrent layer in it, one is compiled, scripted or traced, or it
            holds a DataParallel with several devices.

    A recorded call raises RuntimeError under `torch.func` transforms, forward-mode automatic
    differentiation, compilers and tracers, for dropout between layers on a device other than the
    CPU (but for native kernels), and for a subclass of torch's modules that does not run torch's
    recurrence; TypeError for a fused layer whose recurrence a subclass has overridden. Its backward
    pass raises RuntimeError if an input, initial state or weight was modified in place or freed
    since, if it is mapped (``is_grads_batched``), under compiled autograd (but for native kernels),
    and inside a reentrant checkpoint.

    """

    def __init__(
        self, model: nn.Module, vectors: bool = False, *, cell_through_hidden: bool = False
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.vectors = vectors
        self.cell_through_hidden = cell_through_hidden
        self._names: dict[nn.Module, tuple[int, str]] = {}  # position and name of what is recorded
        for name, module in model.named_modules():
            compiled = getattr(module, _Caller.PLACE)
            if hasattr(module, "_orig_mod") or not isinstance(compiled, _Caller | None):
                raise ValueError(
                    f"model: {name or 'it'} is compiled, and a compiled model has no calls to "
                    "record; pass the model before torch.compile, and run that"
                )
            if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
                raise ValueError(
                    f"model: {name or 'it'} is a DataParallel module, which runs copies of what it "
                    "holds; pass that, or use DistributedDataParallel"
                )
            if getattr(module, "original_name", None) in _RECURRENT_NAMES:
                raise ValueError(
                    f"model: {name or 'it'} is scripted or traced, and has no calls to record; "
                    "pass the model before torch.jit.script or torch.jit.trace, and run that"
                )
            if isinstance(module, (*_TORCH_MODULES, RecurrentStack)):
                self._names[module] = len(self._names), name
        if not self._names:
            raise ValueError(
                "model: expected a recurrent layer of this package or of torch (nn.RNN, nn.LSTM, "
                "nn.GRU) somewhere in it, found none"
            )
        self._callers: list[_Caller] = []
        self._thread = threading.local()
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
        self._calls = {name: itertools.count() for _, name in self._names.values()}

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
        if self._callers:
            raise RuntimeError("this GradientFlow is recording already")
        recorders.append(self)
        self._callers = [_Caller(self, module) for module in self._names]
        return self

    def __exit__(self, error: object, *_: object) -> None:
        recorders.remove(self)
        callers, self._callers = self._callers, []
        replaced = [caller.module for caller in callers if not caller.remove()]
        if replaced and error is None:
            raise RuntimeError(
                f"GradientFlow did not record {self.words(replaced[0])}: it was compiled inside "
                "the block, by its method compile()"
            )

    @property
    def running(self) -> list[_ModuleCall]:
        """The calls of recorded modules that this thread is in, the innermost last."""
        return self._thread.__dict__.setdefault("running", [])

    def record(
        self,
        call: RecurrentCall,
        results: tuple[Tensor, ...],
        batch_first: bool = False,
    ) -> tuple[Tensor, ...]:
        """See `rnn_cuda.recording.Recorder`; torch's results may be ``batch_first``."""
        module = call.module
        if module not in self._names:
            return results
        if self.running and self.running[-1].module is module:
            self.running[-1].seen = True
        if not any(tensor.requires_grad for tensor in results):
            return results
        if torch._C._current_graph_task_id() != -1:
            for tensor in results:
                _refuse_checkpoint(tensor, self.words(module))
            return results
        if isinstance(module, _FUSED) and call.taps is None:
            raise TypeError(
                f"GradientFlow cannot record {self.words(module)}: it does not know the "
                f"recurrence of a {type(module).__name__}, which overrides _layer"
            )
        log = self._new_call(call)
        if add_sinks(log, call):
            return results
        if call.random_state is not None and call.input.device.type != "cpu":
            raise RuntimeError(
                f"GradientFlow cannot record {self.words(module)}: the masks of the dropout "
                f"between its layers cannot be had again on {call.input.device}"
            )
        output = results[0].transpose(0, 1) if batch_first else results[0]
        return record_at(KeptCall(call, output), log, batch_first, results)

    def _new_call(self, call: RecurrentCall) -> CallLog:
        position, name = self._names[call.module]
        return CallLog(
            self._log,
            (position, next(self._calls[name])),
            self.words(call.module),
            [f"{name}.{layer}" if name else layer for layer in call.layer_names],
            vectors=self.vectors,
            cell_through_hidden=self.cell_through_hidden,
        )

    def words(self, module: nn.Module) -> str:
        """Name a module in an error."""
        return self._names[module][1] or "the model"


class _Caller:
    """What torch calls in place of ``module._call_impl`` while a flow records.

    It stands where ``module.compile()`` puts the compiled module. Unlike a hook, it is outside of
    all hooks, ends with the call however that ends, and is in no copy or pickle of the module.
    """

    PLACE = "_compiled_call_impl"
    is_recording = True

    def __init__(self, flow: GradientFlow, module: nn.Module) -> None:
        self._flow: GradientFlow | None = flow
        self.module = module
        self._before: Any = module.__dict__.get(self.PLACE)  # of another flow
        module.__dict__[self.PLACE] = self

    def remove(self) -> bool:
        """Step aside; return whether this, or another flow's, was still in its place."""
        self._flow = None  # a later wrapper may still call this
        current = self.module.__dict__.get(self.PLACE)
        while isinstance(current, _Caller) and current._flow is None:
            current = current._before
        if current is not None:
            self.module.__dict__[self.PLACE] = current
            return isinstance(current, _Caller)
        self.module.__dict__.pop(self.PLACE, None)
        return True

    def __deepcopy__(self, _: Any) -> None:
        """None, since torch's recurrent modules copy every attribute."""

    def __reduce__(self) -> Any:
        return type(None), ()

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caller: Any = sys._getframe(1).f_locals.get("self")
        if caller is not self.module and getattr(caller, self.PLACE, None) is self:
            return caller._call_impl(*args, **kwargs)  # a copy that shares every attribute
        flow, module = self._flow, self.module
        if flow is None:
            return self._call(*args, **kwargs)
        if not plain_eager_mode() or torch._C._is_tracing():
            raise RuntimeError(
                f"GradientFlow cannot record {flow.words(module)} under torch.func transforms, "
                "forward-mode automatic differentiation, torch.compile or a tracer"
            )
        call = _ModuleCall(flow, module)
        flow.running.append(call)
        try:
            is_torchs = isinstance(module, _TORCH_MODULES)
            with _beneath_other_modes(call) if is_torchs else contextlib.nullcontext():
                result = self._call(*args, **kwargs)
        finally:
            flow.running.pop()
        if not call.seen and any(tensor.requires_grad for tensor in _tensors(result)):
            raise RuntimeError(
                f"GradientFlow cannot record {flow.words(module)}: the forward of a "
                f"{type(module).__name__} did not run the recurrence that it inherits"
            )
        return result

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return (self._before or self.module._call_impl)(*args, **kwargs)


class _ModuleCall(TorchFunctionMode):
    """One call of a recorded module. Active while it runs, it sees torch's recurrence called."""

    def __init__(self, flow: GradientFlow, module: nn.Module) -> None:
        super().__init__()
        self._flow, self.module = flow, module
        self.seen = False  # its recurrence

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in TORCH_RECURRENCES or self._flow.running[-1] is not self:
            return func(*args, **kwargs)
        self.seen = True
        random_state = torch.get_rng_state()
        results = func(*args, **kwargs)
        if not any(tensor.requires_grad for tensor in results):
            return results
        for kind in types:
            if getattr(kind.__torch_function__, "__func__", None) is not _TENSORS_OWN:
                raise RuntimeError(
                    f"GradientFlow cannot record {self._flow.words(self.module)}: its recurrence "
                    f"is that of a {kind.__name__}, whose __torch_function__ may change it"
                )
        call, batch_first = torch_call(self.module, func, args, kwargs, self._sample_order)
        if call.dropout:
            call = dataclasses.replace(call, random_state=random_state)
        return self._flow.record(call, results, batch_first)

    def _sample_order(self, batch_sizes: Tensor) -> Tensor | None:
        """The order of a packed call's samples. Torch's ``forward`` keeps it to itself."""
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code in _TORCH_FORWARDS and frame.f_locals["batch_sizes"] is batch_sizes:
                return frame.f_locals["unsorted_indices"]
            frame = frame.f_back
        raise RuntimeError(
            f"GradientFlow cannot record {self._flow.words(self.module)}: it runs its recurrence "
            "over packed rows without torch's forward, so the order of its samples is not known"
        )


@contextlib.contextmanager
def _beneath_other_modes(mode: TorchFunctionMode) -> Iterator[None]:
    """Activate a mode that sees what other people's modes make of a call, and not what they got."""
    others = _pop_all_modes()
    _push_mode(mode)
    for other in others:
        _push_mode(other)
    try:
        yield
    finally:
        for other in _pop_all_modes():
            if other is not mode:
                _push_mode(other)


def _pop_all_modes() -> list[TorchFunctionMode]:
    """Return them, the outermost first."""
    return [_pop_mode() for _ in range(torch._C._len_torch_function_stack())][::-1]


_TORCH_FORWARDS = {module.forward.__code__ for module in _TORCH_MODULES}


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a module returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(value):
        yield from _tensors(vars(value))


def _refuse_checkpoint(tensor: Tensor, name: str) -> None:
    """Let a backward pass through what a checkpoint computed again fail.

    Unless the checkpoint is reentrant, none comes: the first computation's graph is used.
    """

    def hook(_: Tensor | None) -> None:
        raise RuntimeError(
            f"GradientFlow cannot record a call of {name} inside a backward pass, as that of a "
            "reentrant checkpoint; pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
        )

    if tensor.requires_grad:
        tensor.register_hook(hook)
