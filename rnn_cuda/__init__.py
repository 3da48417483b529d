"""Elman RNNs that are fast and hide nothing: fused kernels, a drop-in module, any derivative."""

from rnn_cuda import functional, init, instruments, reference, remedies
from rnn_cuda.cell import FusedRNNCell
from rnn_cuda.convert import replace_rnn
from rnn_cuda.cuda_plan import plan, plan_override
from rnn_cuda.modules import FusedRNN
from rnn_cuda.residual import AntisymmetricRNN, LeakyRNN

__version__ = "0.1.0"

__all__ = [
    "AntisymmetricRNN",
    "FusedRNN",
    "FusedRNNCell",
    "LeakyRNN",
    "functional",
    "init",
    "instruments",
    "plan",
    "plan_override",
    "reference",
    "remedies",
    "replace_rnn",
]
