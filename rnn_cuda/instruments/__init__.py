"""Measurements of gradient flow in recurrent layers."""

from rnn_cuda.instruments._recording import AdjointRecord
from rnn_cuda.instruments.gradient_flow import GradientFlow

__all__ = ["AdjointRecord", "GradientFlow"]
