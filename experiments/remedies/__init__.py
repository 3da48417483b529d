"""What helps against vanishing gradients, or is said to: one file each, any number at once.

Each module of this package whose name does not begin with an underscore is one remedy; a new file
is found by listing the folder. ``hydra_conf/remedy/`` holds the choices.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from experiments import registry
from experiments.fields import parse_named
from experiments.remedies._remedy import Order, Problem, Remedy

__all__ = ["REMEDIES", "Order", "Problem", "Remedy", "build_remedies"]

REMEDIES = registry.find(sys.modules[__name__], Remedy)


def build_remedies(config: Mapping[str, Any], key: str = "remedy") -> list[Remedy]:
    """Build the remedies that ``config`` names, each with its options, in the order they apply.

    Raises:
        ConfigError: an unknown remedy or option, or a value out of range.
    """
    configs = parse_named(config, {name: kind.Config for name, kind in REMEDIES.items()}, key)
    remedies = [REMEDIES[name](options) for name, options in configs.items()]
    return sorted(remedies, key=lambda remedy: (remedy.order, remedy.name))
