"""Instruments: measurements of how gradients flow through recurrent layers."""

from rnn_cuda.instruments._recording import AdjointRecord
from rnn_cuda.instruments.adjoint import lag_contribution, memory_horizon, total_adjoint
from rnn_cuda.instruments.gradient_flow import GradientFlow
from rnn_cuda.instruments.jacobian import jacobian_norm, jacobian_singular_values
from rnn_cuda.instruments.lyapunov import lyapunov_exponents, relaxation_time
from rnn_cuda.instruments.regularisers import gradient_flossing, omega
from rnn_cuda.instruments.saturation import Saturation, gate_activations, saturation
from rnn_cuda.instruments.spectrum import RecurrentSpectrum, recurrent_spectrum

__all__ = [
    "AdjointRecord",
    "GradientFlow",
    "RecurrentSpectrum",
    "Saturation",
    "gate_activations",
    "gradient_flossing",
    "jacobian_norm",
    "jacobian_singular_values",
    "lag_contribution",
    "lyapunov_exponents",
    "memory_horizon",
    "omega",
    "recurrent_spectrum",
    "relaxation_time",
    "saturation",
    "total_adjoint",
]
