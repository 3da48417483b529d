"""Code that Dynamo must not trace.

A compiled function may contain what ``torch.compile`` cannot trace. That part runs as plain Python,
and Dynamo then looks at every Python function called from it. Among them are functions that
PyTorch's dispatcher and autograd engine call: kernels, fake kernels, vmap rules, backward passes.
These act on dispatch keys, transforms and autograd's state, which Dynamo does not model: it fails
on them, or splits each into graphs of a few operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """Let Dynamo run ``function``, and all that it calls, as plain Python; return it.

    Only calls from plain Python are meant: a function that is being traced still inlines it.
    """
    # torch.compiler.disable would do, but it imports all of Dynamo, which takes seconds, and wraps
    # the function, which takes time in every call. A mark on the code object costs nothing.
    try:
        eval_frame: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)  # of the function, of what it calls
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    except AttributeError:  # these names are private, and another PyTorch may not have them
        return cast(_Function, torch.compiler.disable(function))
    return function
