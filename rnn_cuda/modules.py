"""`FusedRNN`, `FusedGRU` and `FusedLSTM`: torch's recurrent modules, on the fused recurrence.

Shape legend: T time steps, B batch, I input size, H hidden size, L layers, D directions,
N = sum(batch_sizes) packed rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor, nn

from rnn_cuda import export
from rnn_cuda.arguments import check_bool, check_dtype, check_nonlinearity, type_name
from rnn_cuda.cells import State, cell_named
from rnn_cuda.rebuild import TORCH_NONLINEARITIES, parameter_copier, rebuild
from rnn_cuda.stack import GatedFunctions, HiddenAndCellState, RecurrentStack

if TYPE_CHECKING:
    from torch.nn.utils.rnn import PackedSequence

_Self = TypeVar("_Self", bound="_DropIn")


class _DropIn(RecurrentStack):
    """A stack that can be had from torch's module of the same cell, and made into it."""

    @classmethod
    def from_torch(cls: type[_Self], rnn: nn.RNNBase) -> _Self:
        """Return a module of this class with copies of the parameters of torch's ``rnn``.

        Configuration, dtype, device, ``requires_grad`` and training mode are those of ``rnn``, and
        parameters that it shares between layers stay shared; hooks are not taken over.

        Raises:
            TypeError: ``rnn`` is not torch's module of this cell: ``nn.RNN`` for a FusedRNN,
                ``nn.GRU`` for a FusedGRU, ``nn.LSTM`` for a FusedLSTM.
            ValueError: a parameter is parametrized, pruned or weight-normalised; or ``rnn`` is an
                LSTM with projections.

        """
        if not isinstance(rnn, cls._torch_class):
            expected = cls._torch_class.__name__
            raise TypeError(f"rnn must be a torch.nn.{expected}, got {type_name(rnn)}")
        return rebuild(rnn, cls, parameter_copier())

    def to_torch(self) -> Any:
        """Return torch's module of this cell with copies of the parameters; see :meth:`from_torch`.

        Raises:
            ValueError: torch's module has no such nonlinearity, or a parameter is parametrized,
                pruned or weight-normalised.

        """
        return rebuild(self, self._torch_class, parameter_copier())


class ElmanStack(export.ElmanScriptMethods, RecurrentStack):
    """Layers and directions of Elman cells, plain, leaky or antisymmetric."""

    _torch_class = nn.RNN
    __constants__: ClassVar[list[str]] = [*RecurrentStack.__constants__, "nonlinearity"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: None = None,
    ) -> None:
        _refuse_proj_size(proj_size)
        nonlinearity = check_nonlinearity(nonlinearity)
        check_dtype(dtype, nonlinearity)
        super().__init__(
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            *(device, dtype),
            cell=cell_named(f"elman.{nonlinearity}"),
        )
        self.nonlinearity = nonlinearity

    if TYPE_CHECKING:

        @overload
        def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

        @overload
        def forward(
            self, input: PackedSequence, hx: Tensor | None = None
        ) -> tuple[PackedSequence, Tensor]: ...

        def forward(self, input: Any, hx: Any = None) -> Any: ...  # noqa: D102

    @property
    def mode(self) -> str:
        """The name that ``nn.RNN`` gives its kind, such as ``"RNN_TANH"``."""
        return f"RNN_{self.nonlinearity.upper()}"

    def _more_repr(self) -> list[str]:
        # nn.RNN never shows its nonlinearity, so only those that it does not have are added.
        is_torch = self.nonlinearity in TORCH_NONLINEARITIES
        return [] if is_torch else [f"nonlinearity={self.nonlinearity}"]

    @property
    def _cell_name(self) -> str:
        return f"elman.{self.nonlinearity}"

    def _trace_layers(
        self,
        sequence: Tensor,
        states: State,
        weights: list[list[Tensor]],
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return export.trace_layers(self, sequence, states, weights, batch_sizes)

    # TorchScript, which knows no cells, compiles these two.

    def _coefficients(self) -> tuple[float, float]:
        """Return keep and rate of ``h_t = keep h_{t-1} + rate f(W x_t + A h_{t-1} + b)``."""
        return 0.0, 1.0

    def _recurrent_matrix(self, weight_hh: Tensor) -> Tensor:
        """Return A."""
        return weight_hh


def _refuse_proj_size(proj_size: None) -> None:
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


class FusedRNN(ElmanStack, _DropIn):
    r"""Multi-layer Elman RNN; a drop-in for :class:`torch.nn.RNN`.

    Each layer and direction computes, for every time step,

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Arguments, parameter names, initialisation, ``state_dict`` and results are those of
    ``torch.nn.RNN``. Beyond it: two more nonlinearities, derivatives of any order, and a backward
    pass in eval mode on every device.

    Two differences: it is not an instance of ``nn.RNNBase``, and ``output`` must not be modified in
    place before the backward pass, which reads the states from it (autograd raises if it was).
    ``docs/limitations.md`` lists what it does not do.

    Args:
        input_size: number of features I of the input.
        hidden_size: number of features H of the hidden state.
        num_layers: number of stacked layers L.
        nonlinearity: ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"`` or ``"softplus"``.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: whether dense batched input and output are ``(B, T, features)`` instead of
            ``(T, B, features)``; unbatched and packed sequences and hidden states are not affected.
        dropout: probability of dropping each output of every layer but the last, in training.
        bidirectional: whether a second direction runs from the last time step to the first (D = 2).
        device: where the parameters are created.
        dtype: data type of the parameters: float32, float64, bfloat16 or float16; complex64 and
            complex128 are computed by the reference.
        proj_size: refused as ``torch.nn.RNN`` refuses it; only an LSTM has projections.

    Inputs:
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)`` for one unbatched
            sequence, or a :class:`~torch.nn.utils.rnn.PackedSequence`.
        hx: initial states, ``(L * D, B, H)``, or ``(L * D, H)`` if unbatched; zeros by default.

    Outputs:
        output: the last layer's hidden state at every step, shaped as the input with D * H features
            (packed if the input was).
        h_n: the final hidden state of every layer and direction, shaped as ``hx``.

    Parameters of layer k (direction 1 has the suffix ``_reverse``): ``weight_ih_l{k}`` of shape
    ``(H, I)``, or ``(H, D * H)`` above the first layer, ``weight_hh_l{k}`` ``(H, H)``,
    ``bias_ih_l{k}`` and ``bias_hh_l{k}`` ``(H,)``; all drawn uniformly from
    :math:`(-1/\sqrt{H}, 1/\sqrt{H})`.

    Raises:
        TypeError: an argument, the input or ``hx`` is of the wrong type.
        ValueError: an argument is out of range, the input has not 2 or 3 dimensions, or its dtype
            is not that of the parameters.
        RuntimeError: ``dtype`` is not one of these; or the input's features, its length (0), its
            device, or the shape, dtype or device of ``hx`` do not fit.

    Example:
        >>> import torch
        >>> rnn = FusedRNN(input_size=3, hidden_size=5, num_layers=2, bidirectional=True)
        >>> output, h_n = rnn(torch.zeros(7, 2, 3))  # 7 time steps, 2 samples, 3 features
        >>> output.shape, h_n.shape
        (torch.Size([7, 2, 10]), torch.Size([4, 2, 5]))
        >>> same = torch.nn.RNN(3, 5, num_layers=2, bidirectional=True)
        >>> same.load_state_dict(rnn.state_dict())
        <All keys matched successfully>

    """

    def to_torch(self) -> nn.RNN:
        """See :meth:`from_torch`; raise ValueError where ``nn.RNN`` has no such nonlinearity."""
        if self.nonlinearity not in TORCH_NONLINEARITIES:
            raise ValueError(
                f"nonlinearity must be 'tanh' or 'relu' for torch.nn.RNN, got {self.nonlinearity!r}"
            )
        return super().to_torch()


class _GatedStack(GatedFunctions, _DropIn):
    """What `FusedGRU` and `FusedLSTM` have in common."""

    def _more_repr(self) -> list[str]:
        return self._other_functions() + (["recompute=True"] if self.recompute else [])

    def to_torch(self) -> Any:
        """See :meth:`from_torch`; raise ValueError where torch's module has no such functions."""
        if self._functions_are_torchs():
            return super().to_torch()
        raise ValueError(
            f"nonlinearity must be 'tanh' and gate_nonlinearity 'sigmoid' for "
            f"torch.nn.{self._torch_class.__name__}, "
            f"got {self.nonlinearity!r} and {self.gate_nonlinearity!r}"
        )

    def _check_leaving(self) -> None:
        if not self._functions_are_torchs():
            raise NotImplementedError(
                f"a {type(self).__name__} with other functions than tanh and sigmoid cannot leave "
                "PyTorch as TorchScript or ONNX, which have no operator for it; torch.export keeps "
                "the kernels"
            )

    def _trace_layers(
        self,
        sequence: Tensor,
        states: State,
        weights: list[list[Tensor]],
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return export.trace_gated_layers(self, sequence, states, weights, batch_sizes)


class FusedGRU(export.GRUScriptMethods, _GatedStack):
    r"""Multi-layer gated recurrent unit (Cho et al., 2014); a drop-in for :class:`torch.nn.GRU`.

    Each layer and direction computes, for every time step,

    .. math::

        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) n_t + z_t h_{t-1}

    Arguments, parameter names, initialisation, ``state_dict`` and results are those of
    ``torch.nn.GRU``, and what `FusedRNN` says of its differences from torch holds here too. On
    CUDA there is no kernel for it yet: the layer runs in plain PyTorch there, with one warning.

    Args:
        input_size: number of features I of the input.
        hidden_size: number of features H of the hidden state.
        num_layers: number of stacked layers L.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: as in `FusedRNN`, as are dropout, bidirectional, device and dtype.
        dropout: probability of dropping each output of every layer but the last, in training.
        bidirectional: whether a second direction runs from the last time step to the first (D = 2).
        device: where the parameters are created.
        dtype: data type of the parameters.
        nonlinearity: of n_t: ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"hard_sigmoid"`` or
            ``"identity"``.
        gate_nonlinearity: of r_t and z_t, one of the same.
        recompute: whether the backward pass computes the gates once more, where the forward pass
            would save five values of each unit and time step for it. Same bits.
        proj_size: refused as ``torch.nn.GRU`` refuses it; only an LSTM has projections.

    Inputs, outputs, errors: those of `FusedRNN`.

    Parameters of layer k (direction 1 has the suffix ``_reverse``): ``weight_ih_l{k}`` of shape
    ``(3 * H, I)``, or ``(3 * H, D * H)`` above the first layer, ``weight_hh_l{k}`` ``(3 * H, H)``,
    ``bias_ih_l{k}`` and ``bias_hh_l{k}`` ``(3 * H,)``, with r, z and n in this order; all drawn
    uniformly from :math:`(-1/\sqrt{H}, 1/\sqrt{H})`.

    Example:
        >>> import torch
        >>> gru = FusedGRU(input_size=3, hidden_size=5, num_layers=2, bidirectional=True)
        >>> output, h_n = gru(torch.zeros(7, 2, 3))  # 7 time steps, 2 samples, 3 features
        >>> output.shape, h_n.shape
        (torch.Size([7, 2, 10]), torch.Size([4, 2, 5]))
        >>> same = torch.nn.GRU(3, 5, num_layers=2, bidirectional=True)
        >>> same.load_state_dict(gru.state_dict())
        <All keys matched successfully>

    """

    _torch_class = nn.GRU

    _kind = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        nonlinearity: str = "tanh",
        gate_nonlinearity: str = "sigmoid",
        recompute: bool = False,
        proj_size: None = None,
    ) -> None:
        _refuse_proj_size(proj_size)
        check_dtype(dtype)
        super().__init__(
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            *(device, dtype),
            cell=cell_named(self._kind),
        )
        self._choose_functions(nonlinearity, gate_nonlinearity)
        self.recompute = check_bool("recompute", recompute)


class FusedLSTM(export.LSTMScriptMethods, HiddenAndCellState, _GatedStack):
    r"""Multi-layer long short-term memory; a drop-in for :class:`torch.nn.LSTM`.

    Each layer and direction computes, for every time step,

    .. math::

        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t c_{t-1} + i_t g_t \\
        h_t &= o_t \tanh(c_t)

    (Hochreiter & Schmidhuber, 1997, with the forget gate of Gers et al., 2000.) Arguments,
    parameter names, initialisation, ``state_dict`` and results are those of ``torch.nn.LSTM``, and
    what `FusedRNN` says of its differences from torch holds here too. On CUDA there is no kernel
    for it yet: the layer runs in plain PyTorch there, with one warning.

    Args:
        input_size: number of features I of the input.
        hidden_size: number of features H of the hidden and of the cell state.
        num_layers: number of stacked layers L.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: as in `FusedRNN`, as are dropout, bidirectional, device and dtype.
        dropout: probability of dropping each output of every layer but the last, in training.
        bidirectional: whether a second direction runs from the last time step to the first (D = 2).
        proj_size: 0; there are no projections of h_t here.
        device: where the parameters are created.
        dtype: data type of the parameters.
        nonlinearity: of g_t, and of c_t in h_t: ``"tanh"``, ``"relu"``, ``"sigmoid"``,
            ``"hard_sigmoid"`` or ``"identity"``.
        gate_nonlinearity: of i_t, f_t and o_t, one of the same.
        recompute: whether the backward pass computes the gates once more, where the forward pass
            would save six values of each unit and time step for it. Same bits.

    Inputs:
        input: as in `FusedRNN`.
        hx: ``(h_0, c_0)``, each ``(L * D, B, H)``, or ``(L * D, H)`` if unbatched; zeros by
            default.

    Outputs:
        output: the last layer's hidden state at every step, as in `FusedRNN`.
        (h_n, c_n): the final states of every layer and direction, each shaped as those in ``hx``.

    Parameters of layer k (direction 1 has the suffix ``_reverse``): ``weight_ih_l{k}`` of shape
    ``(4 * H, I)``, or ``(4 * H, D * H)`` above the first layer, ``weight_hh_l{k}`` ``(4 * H, H)``,
    ``bias_ih_l{k}`` and ``bias_hh_l{k}`` ``(4 * H,)``, with i, f, g and o in this order; all drawn
    uniformly from :math:`(-1/\sqrt{H}, 1/\sqrt{H})`.

    Raises:
        TypeError: as in `FusedRNN`; or ``hx`` is not a pair of tensors.
        ValueError: as in `FusedRNN`; or ``proj_size`` is not 0.
        RuntimeError: as in `FusedRNN`.

    Example:
        >>> import torch
        >>> lstm = FusedLSTM(input_size=3, hidden_size=5)
        >>> output, (h_n, c_n) = lstm(torch.zeros(7, 2, 3))  # 7 steps, 2 samples, 3 features
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]), torch.Size([1, 2, 5]))

    """

    _torch_class = nn.LSTM

    _kind = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        nonlinearity: str = "tanh",
        gate_nonlinearity: str = "sigmoid",
        recompute: bool = False,
    ) -> None:
        if proj_size != 0:
            raise ValueError(
                f"proj_size: expected 0, got {proj_size!r}: a FusedLSTM does not project its "
                "hidden state; torch.nn.LSTM does, and the instruments take it as it is"
            )
        check_dtype(dtype)
        super().__init__(
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            *(device, dtype),
            cell=cell_named(self._kind),
        )
        self._choose_functions(nonlinearity, gate_nonlinearity)
        self.recompute = check_bool("recompute", recompute)

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """Return the shape of c in ``hx``, which is that of h."""
        return self.get_expected_hidden_size(input, batch_sizes)
