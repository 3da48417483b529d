"""Hold the largest singular value of the recurrent weights at a bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from experiments.fields import Config, ConfigError, integer, positive
from experiments.models import RECURRENT, SequenceModel
from experiments.remedies._remedy import Order, Problem, Remedy


@dataclass(frozen=True)
class SpectralNormConfig(Config):
    """Options of ``remedy=[spectral_norm]``.

    Attributes:
        bound: the largest singular value of each block of U.
        iterations: of the power method, each time that U is computed in training.
    """

    bound: float = positive(1.0)
    iterations: int = integer(1, at_least=1)


class SpectralNorm(Remedy):
    """Spectral normalisation (Miyato et al. 2018) of U: ``bound * U / sigma_max(U)``.

    By torch's own parametrization, one for each gate's block of U, since each is a map of its own.
    A negative control: at a bound of 1 no gradient explodes in an Elman layer, and all vanish.
    """

    name = "spectral_norm"
    Config = SpectralNormConfig
    order = Order.CONSTRAINTS
    layers = RECURRENT

    def change(self, model: SequenceModel, problem: Problem) -> None:
        """Parametrize U of every layer and direction."""
        core = model.core
        if parametrize.is_parametrized(core):
            raise ConfigError(
                "remedy.spectral_norm applies to plain weights; got those of "
                "remedy.orthogonal_parametrization, whose singular values are all 1"
            )
        for name in [n for n, _ in core.named_parameters() if n.startswith("weight_hh")]:
            map_ = BlockwiseSpectralNorm(
                core.get_parameter(name).detach(), self.config.bound, self.config.iterations
            )
            parametrize.register_parametrization(core, name, map_)


class BlockwiseSpectralNorm(nn.Module):
    """torch's parametrization for each of the square blocks of ``(gates * H, H)``."""

    def __init__(self, weight: Tensor, bound: float, iterations: int) -> None:
        super().__init__()
        self.bound = bound
        self.maps = nn.ModuleList()
        for block in weight.split(weight.shape[1]):
            # torch builds its map for a parameter of a module; this one serves for nothing else.
            holder = nn.Module()
            holder.weight = nn.Parameter(block.clone())
            parametrizations.spectral_norm(holder, "weight", iterations)
            self.maps.append(holder.get_submodule("parametrizations.weight.0"))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight whose blocks have ``bound`` as their largest singular value."""
        blocks = weight.split(weight.shape[1])
        return torch.cat(
            [self.bound * map_(block) for map_, block in zip(self.maps, blocks, strict=True)]
        )

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what is trained, for a weight to begin with: itself."""
        return weight
