"""Elman RNNs that are fast and hide nothing: fused kernels, a drop-in module, any derivative."""

from rnn_cuda import functional, reference
from rnn_cuda.cell import FusedRNNCell
from rnn_cuda.convert import replace_rnn
from rnn_cuda.modules import FusedRNN

__version__ = "0.1.0"

__all__ = ["FusedRNN", "FusedRNNCell", "functional", "reference", "replace_rnn"]
