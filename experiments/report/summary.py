"""What a report says of all runs together: how much faster one core trains, and where they ran."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import median

from experiments.console import as_line
from experiments.models import TORCHS
from experiments.record import Record
from experiments.report.arms import flat, plain
from experiments.view import Entry


def speeds(entries: Sequence[Entry]) -> list[str]:
    """Say how much faster each core of the fused kernel trains than torch's, both alike."""
    groups: dict[str, dict[str, dict[int, Record]]] = {}
    for entry in entries:
        record = entry.record
        if record is None or record.status != "finished":
            continue
        core = record.config["model"]["core"]
        torchs = TORCHS.get(core, core)
        if torchs not in TORCHS.values() or record.seconds_per_step is None:
            continue
        values = {**flat(record.config), "model.core": torchs, "seed": ""}
        machine = [record.provenance.get(name) for name in ("platform", "device_name", "torch")]
        key = json.dumps([values, machine], sort_keys=True)
        groups.setdefault(key, {}).setdefault(core, {})[record.config["seed"]] = record
    said = []
    for own in groups.values():
        if len(own) < 2:
            continue
        names = sorted(own, key=lambda core: core not in TORCHS)
        seeds = sorted(set.intersection(*map(set, own.values())))
        if not seeds:
            continue
        fused, torchs = (
            median(1e3 * own[core][seed].seconds_per_step for seed in seeds) for core in names
        )
        if fused > 0 and torchs > 0:
            record = own[names[0]][seeds[0]]
            said.append(
                f"{record.result.task}, T = {record.config['horizon']}, "
                f"H = {record.result.hidden_size}: {names[0]} trains {torchs / fused:.2f} times "
                f"as fast as {names[1]}, end to end ({fused:.2f} against {torchs:.2f} ms per step, "
                f"median over {len(seeds)} seed(s), all other settings equal)."
            )
    return said


def provenance(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return when, where and with what runs were made, every value that occurs."""
    names = {
        "rnn_cuda": "rnn_cuda",
        "torch": "PyTorch",
        "python": "Python",
        "hydra": "Hydra",
        "platform": "machine",
        "cpu_capability": "CPU capability",
        "device_name": "GPU",
        "git_commit": "commit",
        "backend": "backend",
    }
    found = []
    started = sorted(str(r.provenance["started"]) for r in records if r.provenance.get("started"))
    if started:
        ends = dict.fromkeys((started[0], started[-1]))
        found.append(("runs ended", " to ".join(ends)))
    for name, title in names.items():
        values = {}
        for record in records:
            value = record.provenance.get(name)
            if value in (None, "", [], {}):
                continue
            text = plain(value)
            if name == "backend" and isinstance(value, Mapping):
                text = "; ".join(f"{key}: {plain(item)}" for key, item in value.items())
            if name == "git_commit" and record.provenance.get("git_modified"):
                text += " (with changes not committed)"
            values[text] = None
        if values:
            found.append((title, as_line(" | ".join(values))))
    for name in ("device", "precision", "threads"):
        values = dict.fromkeys(plain(r.config[name]) for r in records if name in r.config)
        if values:
            found.append((name, ", ".join(values)))
    return found
