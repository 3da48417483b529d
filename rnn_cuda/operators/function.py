"""What the autograd kernels of the operators have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from rnn_cuda._dynamo import untraced


def plain_eager_mode() -> bool:
    """Whether what runs now is eager code, under no transform of torch.func and no forward mode.

    Then only reverse mode can follow, and `OperatorFunction.call` replaces the dispatcher, whose
    Python round trip takes longer than a small RNN.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def needs_graph(tensors: Sequence[Tensor | None]) -> bool:
    """Whether reverse mode has to follow what is computed from these."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


class OperatorFunction(_SingleLevelFunction):
    """The autograd kernel of a native operator: its derivative in both modes, of every order.

    A plain ``torch.autograd.Function`` would not do, because torch.compile takes none that has a
    rule for forward mode; nor ``torch.library.register_autograd``, which knows no forward mode
    (tangents silently become zero) and no ``torch.func``. As the kernel of the dispatch key
    Autograd, a Function serves one level of ``torch.func`` at a time, as those of PyTorch's own
    operators do.

    ``apply`` sees only tensors that are arguments themselves. So lists are laid flat for it, and
    the rules get ``(*tensors, options, outputs)`` as inputs, as `flat` divides the arguments.
    """

    operator: ClassVar[str]

    # Part of the key of compiled autograd's cache, which a plain Function has.
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    def __init_subclass__(cls) -> None:
        """Hide ``backward`` from Dynamo. The other rules run within the kernel, which is hidden."""
        if "backward" in vars(cls):
            cls.backward = staticmethod(untraced(cls.backward))

    @staticmethod
    def flat(*args: Any, **node_options: Any) -> tuple[Sequence[Tensor | None], Any]:
        """Divide the operator's arguments into differentiable tensors and the rest.

        ``node_options`` are for the node alone, not for the operator.
        """
        raise NotImplementedError

    @classmethod
    def autograd_kernel(cls, *args: Any) -> Any:
        """Run the operator at one level of ``torch.func``, if any."""
        with enable_single_level_autograd_function():
            return cls.differentiable(*args)

    @classmethod
    @untraced
    def call(cls, *args: Any, **node_options: Any) -> Any:
        """Call the operator, in `plain_eager_mode`; ``node_options`` as in `flat`."""
        if torch.is_grad_enabled() and needs_graph(cls.flat(*args)[0]):
            # As the dispatcher does with tensors that were leaked out of a torch.func transform.
            return cls.differentiable(*map(_unwrapped, args), **node_options)
        return cls.below_autograd(*args)

    @classmethod
    def differentiable(cls, *args: Any, **node_options: Any) -> Any:
        """Run the operator with a node for its derivative."""
        tensors, options = cls.flat(*args, **node_options)
        outputs = cls.below_autograd(*args)
        is_list = isinstance(outputs, list)
        if is_list and not outputs:
            return outputs
        # In a tuple the outputs are hidden from apply(), which takes tensors for inputs.
        hidden = (tuple(outputs) if is_list else outputs,)
        results = cls.apply(*tensors, options, hidden)  # pyright: ignore[reportAttributeAccessIssue]
        return list(results) if is_list else results

    @classmethod
    def below_autograd(cls, *args: Any) -> Any:
        """Call the native kernel, or the next level of torch.func if any.

        Not from `forward`: there, both modes of differentiation are off, and the next level wants
        the caller's.
        """
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.rnn_cuda, cls.operator)(*args)

    @staticmethod
    def forward(*args: Any) -> Any:
        """Return the outputs that `differentiable` has computed."""
        return args[-1][0]


def _unwrapped(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return unwrap_if_dead(argument)
    if isinstance(argument, list):
        return [_unwrapped(each) for each in argument]
    return argument


def differentiable_again(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Let outer forward-mode transforms differentiate a rule ``jvp(ctx, saved, *tangents)``.

    PyTorch calls the rule with forward mode off, so that the outer tangents silently become zero
    (pytorch issue 197867). With forward mode on, the saved tensors must first lose the tangents
    that the rule itself is here to propagate.
    """

    @functools.wraps(jvp)
    def rule(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            *inputs, output = ctx.saved_tensors  # the inputs as in apply, as far as they go
            primals = [
                tensor if tangent is None else forward_ad.unpack_dual(tensor, level=0).primal
                for tensor, tangent in zip(inputs, tangents, strict=False)
            ]
            return jvp(ctx, (*primals, output), *tangents)

    return rule


def tangent_of(output: Tensor) -> Tensor:
    """Return the tangent of a dual tensor, zeros if it has none."""
    primal, tangent = forward_ad.unpack_dual(output, level=0)
    return torch.zeros_like(primal) if tangent is None else tangent
