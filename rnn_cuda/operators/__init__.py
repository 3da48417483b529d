"""The native operators, and all that PyTorch has to know about them besides their kernels.

    layer_forward       one layer, in one or both directions of time
    layer_gradients     its backward pass
    linear_recurrence   the derivative of both, and its own

Each has a file with its derivative in both modes, its fake kernel (shapes without data, for
``torch.compile`` and ``torch.export``), its rule for ``torch.vmap`` and its FLOP count. The schemas
are in ``csrc/operators.cpp``, the kernels in the file of that name in each device's folder.
"""

from __future__ import annotations

import functools

import torch
from torch.utils.flop_counter import register_flop_formula

from rnn_cuda import _expanded_weights
from rnn_cuda._dynamo import untraced
from rnn_cuda.operators import layer_forward, layer_gradients, linear_recurrence

_library = torch.library.Library("rnn_cuda", "IMPL")


@functools.cache
def register() -> None:
    """Register derivatives and the like; to be called once, when the native library is loaded.

    Whatever PyTorch is to call while a model runs goes through `untraced`.
    """
    for module, function in (
        (layer_forward, layer_forward.LayerForward),
        (layer_gradients, layer_gradients.LayerGradients),
        (linear_recurrence, linear_recurrence.LinearRecurrence),
    ):
        name = function.operator
        qualified = f"rnn_cuda::{name}"
        torch.library.register_fake(qualified, untraced(module.fake))
        _library.impl(name, untraced(function.autograd_kernel), "Autograd")
        register_flop_formula(getattr(torch.ops.rnn_cuda, name), get_raw=True)(module.flops)
    for module in (layer_forward, linear_recurrence):
        name = module.__name__.rpartition(".")[2]
        torch.library.register_vmap(f"rnn_cuda::{name}", untraced(module.vmap_rule))
    # Its parts are mapped one by one. ("Batched" is what is_grads_batched uses.)
    for key in ("FuncTorchBatched", "Batched"):
        _library.impl("layer_gradients", untraced(layer_gradients.gradients_by_parts), key)
    _expanded_weights.register()
