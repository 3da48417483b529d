"""Recurrent layers that are fast and hide nothing: fused kernels, drop-ins, any derivative."""

from rnn_cuda import functional, init, instruments, reference, remedies
from rnn_cuda.cell import FusedGRUCell, FusedLSTMCell, FusedRNNCell
from rnn_cuda.convert import replace_rnn
from rnn_cuda.cuda_plan import plan, plan_override
from rnn_cuda.modules import FusedGRU, FusedLSTM, FusedRNN
from rnn_cuda.residual import AntisymmetricRNN, LeakyRNN

__version__ = "0.1.0"

__all__ = [
    "AntisymmetricRNN",
    "FusedGRU",
    "FusedGRUCell",
    "FusedLSTM",
    "FusedLSTMCell",
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
