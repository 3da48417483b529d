"""Models: drawn from the seed alone, the same on both layers, of equal parameters on request."""

from __future__ import annotations

import re
import shutil
from functools import cache

import pytest
import torch

from experiments import checkpoint
from experiments.composition import CONFIGURATION
from experiments.config import RunConfig
from experiments.kernel_check import compared_with_torch
from experiments.models import CORES, TORCHS
from experiments.probes.adjoint import Adjoint
from experiments.record import Record, read_metrics
from experiments.study import resolved
from experiments.tables import ROUNDING
from tests.experiments.processes import assert_same, make, printed_by, small
from tests.experiments.small_studies import ROOT, choices, composed, listing_also, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def choice_of(name: str) -> dict:
    model = resolved(composed(f"model={name}"))["model"]
    return {key: value for key, value in model.items() if key != "contrasts"}


def run_of(name: str, seed: int = 0, remedy=None, **changes) -> RunConfig:
    task = {"name": "adding", "test_size": 8}
    model = {**choice_of(name), **changes}
    return RunConfig.parse(
        {"model": model, "task": task, "horizon": 40, "seed": seed, "remedy": remedy}
    )


@pytest.mark.parametrize("name", choices("model"))
def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    one, two, other = (list(run_of(name, seed).build_model().parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", sorted(CORES))
def test_every_core_trains_in_bfloat16(name, tmp_path):
    values = small(model={"core": name}, precision="bfloat16", probe={"adjoint": {}})
    assert Record.load(make(values, tmp_path)).status == "finished"
    assert torch.backends.mkldnn.enabled


CHRONO = {"gate_bias": {"value": "chrono"}}
ORTHOGONAL = {"initialisation": {"recurrent": "orthogonal"}}
DEEP = {"num_layers": 2, "bidirectional": True}


@pytest.mark.parametrize(
    ("fused", "changes", "remedy"),
    [
        *((core, DEEP, None) for core in TORCHS),
        *((core, {}, ORTHOGONAL) for core in TORCHS),
        ("fused_rnn", {"nonlinearity": "relu"}, {"initialisation": {"recurrent": "identity"}}),
        ("fused_lstm", {}, {"gate_bias": {"value": 1.0}}),
        ("fused_lstm", {}, CHRONO),
        ("fused_gru", {}, CHRONO),
    ],
)
def test_a_fused_core_and_torchs_are_the_same_model(fused, changes, remedy):
    """Same seed: equal weights; predictions, gradients, adjoints equal within float32 rounding."""
    found = []
    for core in (fused, TORCHS[fused]):
        run = run_of(core, remedy=remedy, **changes)
        model = run.build_model()
        x_TBI, target = run.task.sample(32, run.horizon, torch.Generator().manual_seed(0))
        parameters = dict(model.named_parameters())
        prediction = model(x_TBI)
        gradients = torch.autograd.grad(run.task.loss(prediction, target), parameters.values())
        profile = Adjoint(Adjoint.Config()).measure(model, run.task, x_TBI, target)["state_norm"]
        found.append((type(model.core), parameters, prediction, gradients, torch.tensor(profile)))
    (layer, ours, *values), (other, theirs, *others) = found
    assert layer is not other
    assert_same(ours, theirs)
    torch.testing.assert_close(values[0], others[0], rtol=1e-5, atol=1e-6)
    for gradient, its in zip(values[1], others[1], strict=True):
        torch.testing.assert_close(gradient, its, rtol=1e-4, atol=1e-6 * its.abs().max().item())
    torch.testing.assert_close(values[2], others[2], rtol=1e-4, atol=0)


@pytest.mark.parametrize("core", TORCHS)
@pytest.mark.parametrize(
    ("precision", "rtol", "atol"), [("float32", 2e-4, 1e-6), ("float64", 1e-12, 1e-14)]
)
def test_a_fused_core_trains_as_torchs_does(core, precision, rtol, atol, tmp_path):
    """Eleven steps: the losses, and the weights that they end with."""
    losses, weights = [], []
    for name in (core, TORCHS[core]):
        model = {"core": name, "hidden_size": 33}
        optimizer = {"name": "sgd", "learning_rate": 0.1}
        folder = make(
            small(model=model, precision=precision, horizon=40, optimizer=optimizer), tmp_path
        )
        losses.append(torch.tensor([row["loss"] for row in read_metrics(folder) if "loss" in row]))
        weights.append(checkpoint.load(folder)["model"])
    assert len(losses[0]) == 11
    assert losses[0].std() > 0
    torch.testing.assert_close(*losses, rtol=rtol, atol=0)
    torch.testing.assert_close(*weights, rtol=rtol, atol=atol)


def test_the_kernel_is_put_beside_each_layer_of_torch_that_it_replaces(tmp_path):
    arms = ["'model=rnn'", "'model.nonlinearity=sigmoid'", "'model=fused_gru'", "'model=irnn'",
            "'model=gru_chrono','model.core=fused_gru'", "'model=fused_lstm'"]  # fmt: skip
    words = ",".join(f"arm{index}: [{changes}]" for index, changes in enumerate(arms))
    study = tiny(tmp_path, f"+arms={{{words}}}", "horizons=[6,8,10]", "contrast_horizons=[]")
    checks = compared_with_torch(study)
    assert [check["torch"] for check in checks] == ["GRU", "RNN", "LSTM"]
    assert {check["horizon"] for check in checks} == {8}
    for check in checks:
        assert max(check["relative_difference"].values()) < ROUNDING
        assert min(check["fused_milliseconds"], check["torch_milliseconds"]) > 0
    leaky = tiny(tmp_path, "remedy=[leaky]", "contrast_horizons=[]")
    assert compared_with_torch(leaky) == []
    assert [c["torch"] for c in compared_with_torch(tiny(tmp_path))] == ["RNN"]


@pytest.mark.parametrize("name", choices("model"))
def test_matched_parameters_come_as_close_as_a_hidden_size_can(name):
    target = run_of("rnn").build_model().num_parameters
    model = run_of(name, match_parameters=True).build_model()
    size = model.core.hidden_size
    counts = {
        n: run_of(name, hidden_size=n).build_model().num_parameters
        for n in (size - 1, size, size + 1)
    }
    assert model.num_parameters == counts[size]
    assert min(counts, key=lambda n: abs(counts[n] - target)) == size
    assert abs(counts[size] - target) / target < 0.05


def test_a_model_and_a_study_are_added_as_the_page_says(tmp_path):
    page = (ROOT / "docs" / "laboratory.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    model, study = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "cores").mkdir()
    (tmp_path / "cores" / "slow.py").write_text(source)
    shutil.copytree(CONFIGURATION, tmp_path / "conf")
    (tmp_path / "conf" / "model" / "slow.yaml").write_text(model)
    (tmp_path / "conf" / "experiment" / "slow_or_fast.yaml").write_text(study)
    program = listing_also("experiments.models", tmp_path / "cores") + (
        "from hydra import compose, initialize_config_dir\n"
        "from experiments.study import parse_study\n"
        "from experiments.train import train\n"
        f"words = ['experiment=slow_or_fast', 'budget=smoke', 'output.root={tmp_path}']\n"
        f"with initialize_config_dir({str(tmp_path / 'conf')!r}, version_base='1.3'):\n"
        "    study = parse_study(compose('config', words), words)\n"
        "for member in study.members:\n"
        "    print(member.label, member.run.core.name, train(member.run, member.folder).status)\n"
    )
    made = printed_by(program)
    assert made == "slow slow finished\nfast slow finished\ngru gru finished\n"
