"""Bad arguments and bad input: torch.nn.RNN's exception types, and messages that name things."""

import enum
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rnn_cuda import FusedGRU, FusedLSTM, FusedRNN, FusedRNNCell
from rnn_cuda.residual import AntisymmetricRNN, LeakyRNN

# (arguments of the constructor, exception, pattern of our message); torch raises the same type.
BAD_ARGUMENTS = {
    "input_size zero": (
        {"input_size": 0},
        ValueError,
        "input_size .* greater than zero, got 0",
    ),
    "input_size negative": ({"input_size": -1}, ValueError, "input_size .*got -1"),
    "input_size float": (
        {"input_size": 3.0},
        TypeError,
        "input_size .* int, got: float",
    ),
    "hidden_size zero": (
        {"hidden_size": 0},
        ValueError,
        "hidden_size .* greater than zero, got 0",
    ),
    "hidden_size negative": ({"hidden_size": -2}, ValueError, "hidden_size .*got -2"),
    "hidden_size float": (
        {"hidden_size": 5.0},
        TypeError,
        "hidden_size .* int, got: float",
    ),
    "hidden_size bool": (
        {"hidden_size": True},
        TypeError,
        "hidden_size .* int, got: bool",
    ),
    "num_layers zero": (
        {"num_layers": 0},
        ValueError,
        "num_layers .* greater than zero, got 0",
    ),
    "num_layers negative": ({"num_layers": -1}, ValueError, "num_layers .*got -1"),
    "num_layers float": (
        {"num_layers": 1.0},
        TypeError,
        "num_layers .* int, got: float",
    ),
    "num_layers str": (
        {"num_layers": "2"},
        TypeError,
        "num_layers .* int, got: str",
    ),
    "nonlinearity unknown": (
        {"nonlinearity": "gelu"},
        ValueError,
        "Unknown nonlinearity 'gelu': expected one of 'tanh', 'relu', 'sigmoid', 'identity', "
        "'softplus'",
    ),
    "nonlinearity None": ({"nonlinearity": None}, ValueError, "Unknown nonlinearity None"),
    "bias int": ({"bias": 1}, TypeError, "bias .* bool, got: int"),
    "batch_first int": (
        {"batch_first": 1},
        TypeError,
        "batch_first .* bool, got: int",
    ),
    "dropout above 1": ({"dropout": 1.5}, ValueError, r"dropout .*\[0, 1\], got: 1.5"),
    "dropout negative": ({"dropout": -0.1}, ValueError, r"dropout .*\[0, 1\], got: -0.1"),
    "dropout nan": ({"dropout": float("nan")}, ValueError, r"dropout .*\[0, 1\], got: nan"),
    "dropout bool": ({"dropout": True}, ValueError, r"dropout .*\[0, 1\], got: True"),
    "dropout str": ({"dropout": "0.5"}, ValueError, r"dropout .*\[0, 1\], got: '0.5'"),
    "dropout None": ({"dropout": None}, TypeError, r"dropout .*\[0, 1\], got: NoneType"),
    "proj_size": ({"proj_size": 2}, ValueError, "proj_size .*only supported for LSTM"),
    "unknown argument": ({"projection": 2}, TypeError, "projection"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_argument_raises_torchs_type_and_names_it(case):
    options, error, message = case
    arguments = {"input_size": 3, "hidden_size": 5, "num_layers": 2, **options}

    with pytest.raises(error):
        nn.RNN(**arguments)
    with pytest.raises(error, match=message):
        FusedRNN(**arguments)


@pytest.mark.parametrize(("value", "got"), [("False", "str"), (2, "2"), (None, "NoneType")])
def test_bidirectional_that_is_no_truth_value_is_a_type_error(value, got):
    # nn.RNN takes all of these for truth values.
    with pytest.raises(TypeError, match=f"bidirectional should be of type bool, got: {got}"):
        FusedRNN(3, 5, bidirectional=value)


INTEGERS = {
    "numpy.int64": np.int64(2),
    "numpy.uint8": np.uint8(2),
    "array": np.array(2),
    "tensor": torch.tensor(2),
    "IntEnum": enum.IntEnum("Size", {"TWO": 2}).TWO,
}
TRUTH_VALUES = {
    "numpy.bool": np.bool_(True),
    "array": np.array(True),
    "tensor": torch.tensor(True),
}


@pytest.mark.parametrize("cls", [FusedRNN, LeakyRNN, AntisymmetricRNN])
@pytest.mark.parametrize("value", INTEGERS.values(), ids=INTEGERS)
def test_integers_of_every_kind_are_integers(value, cls):
    # nn.RNN takes all of these as num_layers, but the first four not as a size.
    rnn = cls(input_size=value, hidden_size=value, num_layers=value)

    for name in ("input_size", "hidden_size", "num_layers"):
        assert type(getattr(rnn, name)) is int
    assert repr(rnn).startswith(f"{cls.__name__}(2, 2, num_layers=2")
    assert rnn(_zeros(4, 1, 2))[1].shape == (2, 1, 2)
    torch.testing.assert_close(pickle.loads(pickle.dumps(rnn)).state_dict(), rnn.state_dict())


@pytest.mark.parametrize("argument", ["bias", "batch_first", "bidirectional"])
@pytest.mark.parametrize("value", TRUTH_VALUES.values(), ids=TRUTH_VALUES)
def test_truth_values_of_every_kind_are_truth_values(value, argument):
    rnn = FusedRNN(3, 5, **{argument: value})

    assert getattr(rnn, argument) is True
    assert rnn.state_dict().keys() == FusedRNN(3, 5, **{argument: True}).state_dict().keys()
    rnn(_zeros(4, 2, 3))


def test_zero_and_one_still_stand_for_bidirectional():
    assert FusedRNN(3, 5, bidirectional=1).bidirectional is True
    assert FusedRNN(3, 5, bidirectional=np.int64(0)).bidirectional is False


@pytest.mark.parametrize(
    "value",
    [
        np.float64(2),
        np.array([2, 2]),
        np.bool_(True),
        torch.tensor(2.0),
        torch.tensor(True),
        2 + 0j,
    ],
    ids=str,
)
def test_what_is_no_integer_is_a_type_error_that_names_the_argument(value):
    for argument in ("input_size", "hidden_size", "num_layers"):
        with pytest.raises(TypeError, match=f"{argument} should be of type int, got: "):
            FusedRNN(**{"input_size": 3, "hidden_size": 5, argument: value})


@pytest.mark.parametrize("value", [np.int64(1), np.array([True]), torch.tensor(1)], ids=str)
def test_what_is_no_truth_value_is_a_type_error_that_names_the_argument(value):
    for argument in ("bias", "batch_first"):
        with pytest.raises(TypeError, match=f"{argument} should be of type bool, got: "):
            FusedRNN(3, 5, **{argument: value})


def test_numbers_of_numpy_are_numbers():
    assert type(FusedRNN(3, 5, 2, dropout=np.float32(0.5)).dropout) is float
    assert type(LeakyRNN(3, 5, leak=np.float32(0.5)).leak) is float
    assert type(AntisymmetricRNN(3, 5, step_size=np.float16(0.5)).step_size) is float
    with pytest.raises(ValueError, match=r"dropout .*\[0, 1\], got: tensor"):  # as nn.RNN
        FusedRNN(3, 5, 2, dropout=torch.tensor(0.5))


def test_a_nonlinearity_may_be_a_member_of_an_enumeration():
    class Name(str, enum.Enum):  # noqa: UP042 (whose str() is not its value)
        RELU = "relu"

    rnn = FusedRNN(3, 5, nonlinearity=Name.RELU)

    assert type(rnn.nonlinearity) is str
    assert rnn.mode == "RNN_RELU"


def test_a_dtype_of_python_stands_for_torchs():
    assert FusedRNN(3, 5, dtype=float).weight_hh_l0.dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"dtype: expected one of .*got torch\.int64"):
        FusedRNN(3, 5, dtype=int)


@pytest.mark.parametrize("dtype", ["float32", np.float32])
def test_a_dtype_that_is_none_of_torchs_is_a_type_error(dtype):
    with pytest.raises(TypeError):
        nn.RNN(3, 5, dtype=dtype)
    for cls in (FusedRNN, FusedRNNCell):
        with pytest.raises(TypeError, match=r"dtype should be a torch\.dtype, got: "):
            cls(3, 5, dtype=dtype)


@pytest.mark.parametrize("arguments", [(), (3,)], ids=str)
def test_sizes_are_required(arguments):
    with pytest.raises(TypeError, match="hidden_size"):
        FusedRNN(*arguments)


def _zeros(*shape, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


def _packed(features: int = 3, **options) -> PackedSequence:
    return pack_padded_sequence(_zeros(4, 2, features, **options), [3, 4], enforce_sorted=False)


# (input, hx, exception, pattern of our message) for a module with I = 3, H = 5, L = 2, D = 1.
BAD_INPUT = {
    "1-D": (_zeros(3), None, ValueError, "input to be 2D or 3D, got 1D"),
    "4-D": (_zeros(1, 4, 2, 3), None, ValueError, "input to be 2D or 3D, got 4D"),
    "features": (_zeros(4, 2, 7), None, RuntimeError, r"input.*Expected 3, got 7"),
    "features, unbatched": (
        _zeros(4, 7),
        None,
        RuntimeError,
        r"input.*Expected 3, got 7",
    ),
    "features, packed": (_packed(7), None, RuntimeError, r"input.*Expected 3, got 7"),
    "length 0": (
        _zeros(0, 2, 3),
        None,
        RuntimeError,
        "sequence length .* larger than 0",
    ),
    "length 0, unbatched": (
        _zeros(0, 3),
        None,
        RuntimeError,
        "sequence length .* larger than 0",
    ),
    "float64 input": (
        _zeros(4, 2, 3, dtype=torch.float64),
        None,
        ValueError,
        r"input dtype \(torch.float64\) does not match weight dtype \(torch.float32\)",
    ),
    "integer input": (
        _zeros(4, 2, 3, dtype=torch.int64),
        None,
        ValueError,
        r"input dtype \(torch.int64\) does not match weight dtype \(torch.float32\)",
    ),
    "float64 packed": (
        _packed(dtype=torch.float64),
        None,
        ValueError,
        r"input dtype \(torch.float64\) does not match weight dtype \(torch.float32\)",
    ),
    "input on another device": (
        _zeros(4, 2, 3, device="meta"),
        None,
        RuntimeError,
        "Input and parameter .*same device: expected input on cpu, got meta",
    ),
    "packed data 3-D": (
        PackedSequence(_zeros(4, 1, 3), torch.tensor([4])),
        None,
        RuntimeError,
        r"input.data must have 2 dimensions, .*got 3",
    ),
    "hx batch": (
        _zeros(4, 2, 3),
        _zeros(2, 3, 5),
        RuntimeError,
        r"Expected hidden size \(2, 2, 5\) of hx for batched input, .*got \(2, 3, 5\)",
    ),
    "hx layers": (
        _zeros(4, 2, 3),
        _zeros(1, 2, 5),
        RuntimeError,
        r"Expected hidden size \(2, 2, 5\) of hx .*got \(1, 2, 5\)",
    ),
    "hx hidden size": (
        _zeros(4, 2, 3),
        _zeros(2, 2, 6),
        RuntimeError,
        r"Expected hidden size \(2, 2, 5\) of hx .*got \(2, 2, 6\)",
    ),
    "hx unbatched, input batched": (
        _zeros(4, 2, 3),
        _zeros(2, 5),
        RuntimeError,
        r"Expected hidden size \(2, 2, 5\) of hx for batched input, .*got \(2, 5\)",
    ),
    "hx batched, input unbatched": (
        _zeros(4, 3),
        _zeros(2, 1, 5),
        RuntimeError,
        r"Expected hidden size \(2, 5\) of hx for unbatched input, .*got \(2, 1, 5\)",
    ),
    "hx batch, packed": (
        _packed(),
        _zeros(2, 1, 5),
        RuntimeError,
        r"Expected hidden size \(2, 2, 5\) of hx .*got \(2, 1, 5\)",
    ),
    "hx 2-D, packed": (
        _packed(),
        _zeros(2, 5),
        RuntimeError,
        r"Expected hidden size \(2, 2, 5\) of hx .*got \(2, 5\)",
    ),
    "hx float64": (
        _zeros(4, 2, 3),
        _zeros(2, 2, 5, dtype=torch.float64),
        RuntimeError,
        "same dtype: expected hx of torch.float32, got torch.float64",
    ),
    "hx on another device": (
        _zeros(4, 2, 3),
        _zeros(2, 2, 5, device="meta"),
        RuntimeError,
        "Input and hidden .*same device: expected hx on cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_raises_torchs_type_and_says_what_was_expected(case):
    input, hx, error, message = case

    with pytest.raises(error):
        nn.RNN(3, 5, 2)(input, hx)
    for kind in (FusedRNN, FusedGRU):
        with pytest.raises(error, match=message):
            kind(3, 5, 2)(input, hx)
    with pytest.raises(error, match=message.replace("hx", r"hx\[0\]")):
        FusedLSTM(3, 5, 2)(input, None if hx is None else (hx, hx))


@pytest.mark.parametrize(
    ("hx", "message"),
    [
        (_zeros(1, 2, 5), r"hx should be a tuple \(h_0, c_0\) of Tensors, got: Tensor"),
        ((_zeros(1, 2, 5),), r"hx should be a tuple \(h_0, c_0\) of Tensors, got 1 items"),
        ((_zeros(1, 2, 5), None), r"hx\[1\] should be a Tensor, got: NoneType"),
    ],
)
def test_what_is_no_pair_of_states_is_a_type_error(hx, message):
    with pytest.raises(TypeError, match=message):
        FusedLSTM(3, 5)(_zeros(4, 2, 3), hx)


def test_a_bad_cell_state_is_named():
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 2, 5\) of hx\[1\]"):
        FusedLSTM(3, 5)(_zeros(4, 2, 3), (_zeros(1, 2, 5), _zeros(1, 1, 5)))
    with pytest.raises(RuntimeError, match=r"expected hx\[1\] of torch.float32, got torch.float64"):
        FusedLSTM(3, 5)(_zeros(4, 2, 3), (_zeros(1, 2, 5), _zeros(1, 2, 5).double()))


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (FusedGRU, {"proj_size": 2}, ValueError, "proj_size argument is only supported for LSTM"),
        (FusedLSTM, {"proj_size": 2}, ValueError, "proj_size: expected 0, got 2"),
        (FusedGRU, {"recompute": 1}, TypeError, "recompute should be of type bool, got: int"),
        (FusedLSTM, {"recompute": None}, TypeError, "recompute should be of type bool"),
        (FusedLSTM, {"dtype": torch.int64}, RuntimeError, "dtype: expected one of"),
        (FusedGRU, {"nonlinearity": "softplus"}, ValueError, "Unknown nonlinearity 'softplus'"),
    ],
)
def test_bad_arguments_of_gated_layers_are_named(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(3, 5, **options)


@pytest.mark.parametrize(
    ("input", "hx", "message"),
    [
        ([[0.0]], None, "input should be a Tensor or a PackedSequence, got: list"),
        (None, None, "input should be a Tensor or a PackedSequence, got: NoneType"),
        (_zeros(4, 2, 1), [0.0], "hx should be a Tensor, got: list"),
        # What an LSTM takes.
        (_zeros(4, 2, 1), (_zeros(1, 2, 5), _zeros(1, 2, 5)), "hx should be a Tensor, got: tuple"),
    ],
    ids=["list", "None", "hx list", "hx tuple"],
)
def test_what_is_no_tensor_is_a_type_error(input, hx, message):
    # nn.RNN happens to raise AttributeError.
    with pytest.raises(TypeError, match=message):
        FusedRNN(1, 5)(input, hx)


def test_packed_states_for_too_many_samples_are_refused():
    # nn.RNN drops the surplus without a word.
    with pytest.raises(
        RuntimeError, match=r"Expected hidden size \(1, 2, 5\) of hx .*got \(1, 3, 5\)"
    ):
        FusedRNN(3, 5)(_packed(), _zeros(1, 3, 5))


def test_packed_rows_that_belong_to_no_step_are_refused():
    # nn.RNN drops the surplus without a word.
    packed = PackedSequence(_zeros(8, 3), torch.tensor([3, 3]))

    with pytest.raises(ValueError, match=r"batch_sizes.* 8 rows of input, got a sum of 6"):
        FusedRNN(3, 5)(packed)


def test_packed_sequence_without_steps_is_refused():
    packed = PackedSequence(_zeros(0, 3), torch.empty(0, dtype=torch.int64))

    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        FusedRNN(3, 5)(packed)


def test_mixed_dtypes_of_parameters_are_refused():
    rnn = FusedRNN(3, 5)
    rnn.weight_hh_l0.data = rnn.weight_hh_l0.data.double()

    with pytest.raises(ValueError, match=r"weight_hh.*float64"):
        rnn(_zeros(4, 2, 3))


def test_float64_input_under_autocast_needs_float64_parameters():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(
            ValueError, match=r"input dtype \(torch.float64\) .* weight dtype \(torch.bfloat16\)"
        ),
    ):
        FusedRNN(3, 5)(_zeros(4, 2, 3, dtype=torch.float64))
