"""What is measured of a model while it is trained: instruments of the library, one file each.

Each module of this package whose name does not begin with an underscore is one probe; a new file is
found by listing the folder. ``hydra_conf/probe/`` holds the choices.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from experiments import registry
from experiments.fields import parse_named
from experiments.probes._probe import Probe, ProbeConfig, ProbeError, as_json, log10_or_none

__all__ = [
    "PROBES",
    "Probe",
    "ProbeConfig",
    "ProbeError",
    "as_json",
    "build_probes",
    "log10_or_none",
]

PROBES = registry.find(sys.modules[__name__], Probe)


def build_probes(config: Mapping[str, Any]) -> list[Probe]:
    """Build the probes that ``config`` names, each with its options.

    Raises:
        ConfigError: an unknown probe or option, or a value out of range.
    """
    configs = parse_named(config, {name: kind.Config for name, kind in PROBES.items()}, "probe")
    return [PROBES[name](configs[name]) for name in sorted(configs)]
