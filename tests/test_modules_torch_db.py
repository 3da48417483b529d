"""PyTorch's own samples and error cases for its recurrent modules, run on ours.

They are in ``torch.testing._internal``, which needs the package expecttest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import rnn_cuda
from tests.layers import flat_results

pytest.importorskip("expecttest")
pytestmark = pytest.mark.usefixtures("one_thread")

OURS = {
    f"nn.{name}": getattr(rnn_cuda, f"Fused{name}")
    for name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
}


def _module_info(name: str) -> Any:
    from torch.testing._internal.common_modules import module_db

    return next(info for info in module_db if info.name == name)


def _samples(name: str, training: bool = True) -> list[Any]:
    """Return ModuleInput objects in float64: arguments of the constructor and of forward."""
    info = _module_info(name)
    torch.manual_seed(0)
    arguments = {"device": "cpu", "dtype": torch.float64, "requires_grad": True}
    options = {} if name.endswith("Cell") else {"with_packed_sequence": True}
    samples = info.module_inputs_func(info, training=training, **arguments, **options)
    return [s for s in samples if not s.constructor_input.kwargs.get("proj_size")]  # refused


def _construct(cls: type[nn.Module], sample: Any) -> nn.Module:
    torch.manual_seed(1)
    return cls(*sample.constructor_input.args, **sample.constructor_input.kwargs).double()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", OURS)
def test_samples_give_torchs_results(name, training):
    samples = _samples(name, training)
    assert samples
    for sample in samples:
        ours, theirs = (_construct(c, sample) for c in (OURS[name], _module_info(name).module_cls))
        arguments = sample.forward_input.args
        actual = flat_results(ours.train(training)(*arguments))
        expected = flat_results(theirs.train(training)(*arguments))

        torch.testing.assert_close(actual, expected, msg=lambda m, s=sample: f"{s}: {m}")


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("name", OURS)
def test_samples_have_right_derivatives(name, order):
    check = {"first": torch.autograd.gradcheck, "second": torch.autograd.gradgradcheck}[order]
    # Every third sample: the kinds of input come round with a period of four, so all are met.
    for sample in _samples(name)[::3]:
        module = _construct(OURS[name], sample)
        first, *rest = sample.forward_input.args
        inputs = [tensor.detach().requires_grad_() for tensor in flat_results((first, *rest))]

        def run(*values, module=module, first=first, rest=rest):
            count = len(flat_results((first, *rest)))
            given, weights = values[:count], values[count:]
            if isinstance(first, PackedSequence):
                given = (first._replace(data=given[0]), *given[1:])
            if rest and isinstance(rest[0], tuple):
                given = (given[0], given[1:])
            names = [name for name, _ in module.named_parameters()]
            parameters = dict(zip(names, weights, strict=True))
            return tuple(flat_results(torch.func.functional_call(module, parameters, given)))

        weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
        assert check(run, (*inputs, *weights), fast_mode=True)


@pytest.mark.parametrize("name", OURS)
def test_error_samples_give_torchs_errors(name):
    from torch.testing._internal.common_modules import ModuleErrorEnum

    info = _module_info(name)
    arguments = {"device": "cpu", "dtype": torch.float32, "requires_grad": False, "training": True}
    cases = info.module_error_inputs_func(info, **arguments)
    assert cases
    for case in cases:
        sample = case.module_error_input
        constructor = sample.constructor_input
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                OURS[name](*constructor.args, **constructor.kwargs)
        else:
            module = OURS[name](*constructor.args, **constructor.kwargs)
            with pytest.raises(case.error_type, match=case.error_regex):
                module(*sample.forward_input.args, **sample.forward_input.kwargs)
