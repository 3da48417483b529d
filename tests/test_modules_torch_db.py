"""PyTorch's own samples and error cases for nn.RNN and nn.RNNCell, run on our modules.

They are in ``torch.testing._internal``, which needs the package expecttest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnn_cuda import FusedRNN, FusedRNNCell

pytest.importorskip("expecttest")
pytestmark = pytest.mark.usefixtures("one_thread")

OURS = {"nn.RNN": FusedRNN, "nn.RNNCell": FusedRNNCell}


def _module_info(name: str) -> Any:
    from torch.testing._internal.common_modules import module_db

    return next(info for info in module_db if info.name == name)


def _samples(name: str, training: bool = True) -> list[Any]:
    """Return ModuleInput objects in float64: arguments of the constructor and of forward."""
    info = _module_info(name)
    torch.manual_seed(0)
    arguments = {"device": "cpu", "dtype": torch.float64, "requires_grad": True}
    options = {"with_packed_sequence": True} if name == "nn.RNN" else {}
    return info.module_inputs_func(info, training=training, **arguments, **options)


def _construct(cls: type[nn.Module], sample: Any) -> nn.Module:
    torch.manual_seed(1)
    return cls(*sample.constructor_input.args, **sample.constructor_input.kwargs).double()


def _flat(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, Tensor):
        return (result,)
    output, h_n = result
    return (output.data if isinstance(output, PackedSequence) else output, h_n)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", OURS)
def test_samples_give_torchs_results(name, training):
    samples = _samples(name, training)
    assert samples
    for sample in samples:
        ours, theirs = (_construct(c, sample) for c in (OURS[name], _module_info(name).module_cls))
        arguments = sample.forward_input.args
        actual = _flat(ours.train(training)(*arguments))
        expected = _flat(theirs.train(training)(*arguments))

        torch.testing.assert_close(actual, expected, msg=lambda m, s=sample: f"{s}: {m}")


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("name", OURS)
def test_samples_have_right_derivatives(name, order):
    check = {"first": torch.autograd.gradcheck, "second": torch.autograd.gradgradcheck}[order]
    # Every third sample: the kinds of input come round with a period of four, so all are met.
    for sample in _samples(name)[::3]:
        module = _construct(OURS[name], sample)
        arguments = sample.forward_input.args
        inputs = [a.data if isinstance(a, PackedSequence) else a for a in arguments]
        inputs = [a.detach().requires_grad_() for a in inputs]

        def run(*values, module=module, arguments=arguments):
            given, weights = values[: len(arguments)], values[len(arguments) :]
            first = arguments[0]
            if isinstance(first, PackedSequence):
                given = (first._replace(data=given[0]), *given[1:])
            names = [name for name, _ in module.named_parameters()]
            parameters = dict(zip(names, weights, strict=True))
            return _flat(torch.func.functional_call(module, parameters, given))

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
