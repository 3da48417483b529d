"""The laboratory's parts: configuration, models, training, gradient flow, results."""

from __future__ import annotations

import copy
import json
import math
import os
from itertools import product
from pathlib import Path

import pytest
import torch
from experiments.gradient_flow import adjoint_profile, first_to_last_ratio, log10_or_none
from experiments.ladder import DATA_STREAM, build_arms, verdict
from experiments.settings import ConfigError, validated
from experiments.training import train
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from experiments import results
from experiments.models import build_model, matched_hidden_size
from experiments.run import CONFIGURATION, check_horizon, worker_count
from experiments.tasks import build_task

MODELS = sorted(path.stem for path in (CONFIGURATION / "model").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONFIGURATION / "experiment").glob("*.yaml"))


def composed(*overrides: str):
    with initialize_config_dir(str(CONFIGURATION), version_base="1.3"):
        return compose("config", list(overrides))


def configuration(*overrides: str) -> dict:
    return validated(composed(*overrides))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Configuration


def test_the_configuration_groups_are_those_the_code_knows():
    assert {"fused_rnn", "rnn", "lstm", "gru", "irnn"} <= set(MODELS)
    assert {"horizon_ladder", "noise_padded_digits", "smoke"} <= set(EXPERIMENTS)


@pytest.mark.parametrize(("model", "experiment"), list(product(MODELS, EXPERIMENTS)))
def test_every_combination_composes(model, experiment):
    plain = configuration(f"model={model}", f"experiment={experiment}")
    assert plain["model"]["name"] == model
    assert plain["name"] == experiment
    assert len(build_arms(plain)) == len(plain["horizons"]) + len(plain["contrast_horizons"]) * len(
        plain["model"]["contrasts"]
    )


def test_the_main_job_is_the_horizon_ladder_as_specified():
    plain = configuration()
    assert plain["model"]["name"] == "fused_rnn"
    assert plain["task"]["name"] == "adding"
    assert plain["horizons"] == [10, 20, 30, 50, 100]
    assert plain["training"] == {
        "optimizer": "adam",
        "learning_rate": 3e-3,
        "clip_norm": 1.0,
        "batch_size": 64,
        "steps": 1500,
    }
    contrast = next(arm for arm in build_arms(plain) if arm.label == "ReLU + identity")
    assert (contrast.horizon, contrast.model["core"]) == (50, "fused_rnn")
    assert contrast.model["nonlinearity"] == "relu"
    assert contrast.model["recurrent_init"] == "identity"


def test_the_real_image_preset_brings_its_task():
    plain = configuration("experiment=noise_padded_digits")
    assert build_task(plain["task"]).name == "noise_padded_digits"
    assert plain["training"]["steps"] == 800
    assert (
        configuration("experiment=noise_padded_digits", "task=adding")["task"]["name"] == "adding"
    )


@pytest.mark.parametrize(
    ("override", "key", "came"),
    [
        ("seeds=[99999999999999999999]", "seeds", "[99999999999999999999]"),
        ("seeds=[]", "seeds", "[]"),
        ("seeds=[0,0]", "seeds", "[0, 0]"),
        ("seeds=3", "seeds", "3"),
        ("horizons=[10,ten]", "horizons", "ten"),
        ("horizons=[1]", "horizons", "1"),
        ("contrast_horizons=[-5]", "contrast_horizons", "-5"),
        ("training.optimizer=adamw2", "training.optimizer", "adamw2"),
        ("training.learning_rate=-1", "training.learning_rate", "-1"),
        ("training.learning_rate=.inf", "training.learning_rate", "inf"),
        ("training.learning_rate=fast", "training.learning_rate", "fast"),
        ("training.clip_norm=0", "training.clip_norm", "0"),
        ("training.batch_size=0", "training.batch_size", "0"),
        ("training.steps=1.5", "training.steps", "1.5"),
        ("training.steps=true", "training.steps", "True"),
        ("evaluation.probe_size=0", "evaluation.probe_size", "0"),
        ("workers=0", "workers", "0"),
        ("device=tpu7", "device", "tpu7"),
        ("device=cuda:99", "device", "cuda:99"),
        ("name=a/b", "name", "a/b"),
        ("model.core=transformer", "model.core", "transformer"),
        ("model.hidden_size=0", "model.hidden_size", "0"),
        ("model.nonlinearity=gelu", "model.nonlinearity", "gelu"),
        ("model.input_std=-0.1", "model.input_std", "-0.1"),
        ("model.match_parameters=1", "model.match_parameters", "1"),
        ("model.zero_bias=maybe", "model.zero_bias", "maybe"),
        ("model.contrasts=orthogonal", "model.contrasts", "orthogonal"),
        ("model.contrasts=[{recurrent_init: orthogonal}]", "model.contrasts[0]", "orthogonal"),
        ("model.contrasts=[{label: a}, {label: a}]", "model.contrasts", "['a', 'a']"),
        ("model.contrasts=[{label: a, hidden_size: 3}]", "model.contrasts[0].hidden_size", ""),
        ("+model.gate_bias=1", "model.gate_bias", ""),
        ("+training.step=3", "training.step", ""),
        ("+trainning=3", "trainning", ""),
        ("~training.steps", "training.steps", ""),
        ("task.name=addition", "task.name", "addition"),
        ("task.test_size=0", "task.test_size", "0"),
        ("+task.test_siz=1", "task.test_siz", "did you mean task.test_size?"),
        ("task.name=addding", "task.name", "did you mean adding?"),
        ("~task.name", "task.name", ""),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_key(override, key, came):
    with pytest.raises(ConfigError) as raised:
        configuration(override)
    assert key in str(raised.value)
    assert came in str(raised.value)


def test_keys_of_one_family_are_checked_for_that_family():
    with pytest.raises(ConfigError, match=r"model\.gate_bias must be a number, chrono, or null"):
        configuration("model=lstm", "model.gate_bias=open")
    with pytest.raises(ConfigError, match=r"model\.nonlinearity must be one of tanh, relu; got"):
        configuration("model=rnn", "model.nonlinearity=sigmoid")
    with pytest.raises(ConfigError, match=r"task\.test_fraction must be a number between 0 and 1"):
        configuration("experiment=noise_padded_digits", "task.test_fraction=1.5")


def test_a_missing_value_is_an_error_of_the_configuration():
    config = composed()
    OmegaConf.update(config, "training.steps", "???")
    with pytest.raises(ConfigError, match=r"training\.steps"):
        validated(config)


def test_worker_count_is_one_per_core_at_most_one_per_job():
    plain = configuration()
    assert 1 <= worker_count(plain, 1000) <= (os.cpu_count() or 1)
    assert worker_count(plain, 1) == 1
    assert worker_count({**plain, "workers": 5}, 3) == 3
    assert worker_count({**plain, "device": "cuda"}, 1000) == 1
    assert check_horizon(plain) == 50
    assert check_horizon({**plain, "contrast_horizons": []}) == 30


# Models


def adding():
    return build_task({"name": "adding", "test_size": 64})


def model_of(name: str, seed: int = 0, task=None, horizon: int = 12, **changes):
    config = {**configuration(f"model={name}")["model"], **changes}
    return build_model(config, task or adding(), horizon, seed)


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    one, two, other = (list(model_of(name, seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recurrent_init": "orthogonal"},
        {
            "nonlinearity": "relu",
            "recurrent_init": "identity",
            "input_std": 1e-3,
            "zero_bias": True,
        },
    ],
)
def test_fused_rnn_and_rnn_are_the_same_model(changes):
    """Same seed: equal weights; predictions, gradients, adjoints equal within float32 rounding."""
    task, horizon = adding(), 40
    fused, plain = (model_of(name, horizon=horizon, **changes) for name in ("fused_rnn", "rnn"))
    assert type(fused.core) is not type(plain.core)
    for (name, ours), (other, theirs) in zip(
        fused.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)
    x_TBI, target = task.sample(32, horizon, generator())
    torch.testing.assert_close(fused(x_TBI), plain(x_TBI), rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(task.loss(model(x_TBI), target), list(model.parameters()))
        for model in (fused, plain)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())
    profiles = [adjoint_profile(model, task, x_TBI, target).state for model in (fused, plain)]
    torch.testing.assert_close(*profiles, rtol=1e-4, atol=0)


def test_irnn_starts_as_the_paper_says():
    core = model_of("irnn", input_std=1e-3).core
    assert core.nonlinearity == "relu"
    assert torch.equal(core.weight_hh_l0, torch.eye(64))
    assert not core.bias_ih_l0.any()
    assert not core.bias_hh_l0.any()
    assert core.weight_ih_l0.std().item() == pytest.approx(1e-3, rel=0.3)


def test_orthogonal_changes_the_recurrent_weights_alone():
    orthogonal, default = model_of("rnn", recurrent_init="orthogonal"), model_of("rnn")
    U = orthogonal.core.weight_hh_l0
    torch.testing.assert_close(U @ U.T, torch.eye(64), rtol=0, atol=1e-5)
    others = [n for n, _ in default.named_parameters() if n != "core.weight_hh_l0"]
    state, default_state = orthogonal.state_dict(), default.state_dict()
    assert all(torch.equal(state[n], default_state[n]) for n in others)


def test_gate_biases_are_those_of_the_gate_that_keeps_the_state():
    lstm = model_of("lstm", gate_bias=1.0).core
    assert ((lstm.bias_ih_l0 + lstm.bias_hh_l0)[64:128] == 1).all()
    # An open forget gate and a shut input gate keep c; that is what makes it the forget gate.
    with torch.no_grad():
        lstm.bias_ih_l0[64:128], lstm.bias_ih_l0[:64] = 50.0, -50.0
        c = torch.randn(1, 3, 64)
        _, (_, kept) = lstm(torch.rand(1, 3, 2), (torch.zeros(1, 3, 64), c))
        torch.testing.assert_close(kept, c)
        gru = model_of("gru", gate_bias=50.0).core
        h = torch.rand(1, 3, 64)
        torch.testing.assert_close(gru(torch.rand(1, 3, 2), h)[1], h)


def test_chrono_biases_span_the_horizon():
    core = model_of("lstm", gate_bias="chrono", horizon=100).core
    bias = core.bias_ih_l0 + core.bias_hh_l0
    assert bias[64:128].min() >= 0
    assert math.log(50) < bias[64:128].max() <= math.log(99)
    assert torch.equal(bias[:64], -bias[64:128])


@pytest.mark.parametrize("name", MODELS)
def test_matched_parameters_come_as_close_as_a_hidden_size_can(name):
    target = model_of("rnn").num_parameters
    config = configuration(f"model={name}", "model.match_parameters=true")["model"]
    size = matched_hidden_size(config, adding())
    counts = {n: model_of(name, hidden_size=n).num_parameters for n in (size - 1, size, size + 1)}
    assert model_of(name, match_parameters=True).num_parameters == counts[size]
    assert min(counts, key=lambda n: abs(counts[n] - target)) == size
    assert abs(counts[size] - target) / target < 0.05


# Gradient flow


def test_the_adjoint_profile_of_an_rnn_is_the_chain_rule_and_not_its_direct_part():
    """Against a_t = g_t + U^T ((1 - h_{t+1}^2) a_{t+1}), written out in float64."""
    task = build_task({"name": "copy_memory", "test_size": 8})
    model = model_of("rnn", task=task, hidden_size=10).double()
    x_TBI, target = task.sample(4, 6, generator())
    x_TBI = x_TBI.double()
    T, B = x_TBI.shape[:2]
    core = model.core
    with torch.no_grad():
        h, states = x_TBI.new_zeros(B, 10), []
        for x_BI in x_TBI:
            z = (
                x_BI @ core.weight_ih_l0.T
                + core.bias_ih_l0
                + h @ core.weight_hh_l0.T
                + core.bias_hh_l0
            )
            h = torch.tanh(z)
            states.append(h)
        # d(cross-entropy)/d(logits) = softmax - one-hot; each sample's loss is a mean over T steps.
        error = torch.softmax(model.readout(torch.stack(states)), -1)
        error -= nn.functional.one_hot(target, task.output_size)
        direct = error @ model.readout.weight / T
        total = [direct[-1]]
        for t in range(T - 2, -1, -1):
            delta = (1 - states[t + 1] ** 2) * total[0]
            total.insert(0, direct[t] + delta @ core.weight_hh_l0)
        expected = torch.stack(total).norm(dim=-1)
    profile = adjoint_profile(model, task, x_TBI, target)
    torch.testing.assert_close(profile.state, expected, rtol=1e-10, atol=0)
    assert torch.equal(profile.hidden, profile.state)
    # A profile of the direct part alone, the gradient of the output tensor, would be seen.
    assert not torch.allclose(direct.norm(dim=-1)[:-1], expected[:-1], rtol=0.01)


def test_the_adjoint_of_an_lstm_is_that_of_the_joint_state():
    """Against central differences of the loss in (h_t, c_t), in float64."""
    task = adding()
    model = model_of("lstm", hidden_size=3).double()
    x_TBI, target = task.sample(1, 6, generator())
    x_TBI, target = x_TBI.double(), target.double()
    profile = adjoint_profile(model, task, x_TBI, target)
    at, eps = 3, 1e-6
    with torch.no_grad():
        _, state = model.core(x_TBI[: at + 1])

        def loss_from(h, c):
            _, (h_n, _) = model.core(x_TBI[at + 1 :], (h, c))
            return task.loss(model.readout(h_n[-1]), target).item()

        slopes = []
        for part, unit in product((0, 1), range(3)):
            values = []
            for sign in (1, -1):
                moved = [tensor.clone() for tensor in state]
                moved[part][0, 0, unit] += sign * eps
                values.append(loss_from(*moved))
            slopes.append((values[0] - values[1]) / (2 * eps))
    slopes = torch.tensor(slopes, dtype=torch.float64)
    torch.testing.assert_close(profile.state[at, 0], slopes.norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(profile.hidden[at, 0], slopes[:3].norm(), rtol=1e-6, atol=0)
    assert profile.state[at, 0] > 1.01 * profile.hidden[at, 0]


def test_profiles_reach_below_the_squares_of_float32_and_zeros_stay_zeros():
    task = adding()
    model = model_of("rnn", hidden_size=4)
    with torch.no_grad():
        model.core.weight_hh_l0.copy_(1e-3 * torch.eye(4))
    x_TBI, target = task.sample(2, 30, generator())
    profile = adjoint_profile(model, task, x_TBI, target).mean_state()
    assert any(0 < norm < 1e-23 for norm in profile)  # a float32 square of these is zero
    assert profile[0] == 0.0
    assert first_to_last_ratio(profile) == 0.0
    assert log10_or_none(0.0) is None
    assert log10_or_none(1e-300) == pytest.approx(-300)
    assert math.isnan(first_to_last_ratio([1.0, 0.0]))


# Training


def settings(**changes) -> dict:
    return {**configuration()["training"], "steps": 60, "batch_size": 16, **changes}


def test_training_records_losses_and_gradient_norms_before_clipping():
    told = []
    task, model = adding(), model_of("rnn", hidden_size=8)
    start = copy.deepcopy(model)
    curve = train(
        model, task, 10, settings(clip_norm=1e-3), generator(5), lambda *a: told.append(a)
    )
    assert curve.loss.shape == curve.gradient_norm.shape == (60,)
    assert curve.diverged_at is None
    assert curve.gradient_norm.max() > 1e-3
    assert [step for step, _ in told] == [50, 60]
    assert told[-1][1] == curve.loss[-1].item()
    # The first entries are those of the untrained model on the generator's first batch.
    x_TBI, target = task.sample(16, 10, generator(5))
    loss = task.loss(start(x_TBI), target)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in start.parameters()]).norm()
    assert curve.loss[0].item() == pytest.approx(loss.item())
    assert curve.gradient_norm[0].item() == pytest.approx(norm.item(), rel=1e-5)


def test_clipping_bounds_the_step():
    moved = {}
    for clip_norm in (None, 1e-2):
        task, model = adding(), model_of("rnn", hidden_size=8)
        start = copy.deepcopy(model)
        options = settings(optimizer="sgd", learning_rate=1.0, steps=1, clip_norm=clip_norm)
        curve = train(model, task, 10, options, generator())
        change = [a - b for a, b in zip(model.parameters(), start.parameters(), strict=True)]
        moved[clip_norm] = torch.stack([c.detach().norm() for c in change]).norm().item()
    assert moved[1e-2] == pytest.approx(1e-2, rel=1e-3)
    assert moved[None] == pytest.approx(curve.gradient_norm[0].item(), rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd"])
def test_every_optimizer_lowers_the_loss(optimizer):
    rate = 0.05 if optimizer == "sgd" else 3e-3
    options = settings(optimizer=optimizer, learning_rate=rate, steps=200)
    loss = train(model_of("fused_rnn", hidden_size=16), adding(), 4, options, generator()).loss
    assert loss[-50:].mean() < 0.8 * loss[:10].mean()


def test_divergence_is_noticed_and_dated():
    model = model_of("rnn", hidden_size=8, nonlinearity="relu")
    options = settings(optimizer="sgd", learning_rate=1e30, clip_norm=None, steps=500)
    curve = train(model, adding(), 10, options, generator())
    assert curve.diverged_at is not None
    assert curve.loss[: curve.diverged_at].isfinite().all()
    assert len(curve.loss) < 500
    assert verdict(math.nan, curve.diverged_at) == "diverged"


def test_verdicts_are_taken_on_the_share_of_the_know_nothing_error():
    assert [verdict(s, None) for s in (0.099, 0.1, 0.249, 0.25, 1.1)] == [
        "solved",
        "learned",
        "learned",
        "failed",
        "failed",
    ]


def test_training_data_do_not_repeat_the_draws_of_the_weights():
    assert DATA_STREAM > 0
    weights = torch.empty(16).uniform_(generator=generator(0))
    data = torch.rand(16, generator=generator(DATA_STREAM))
    assert not torch.equal(weights, data)


# Results


def test_results_are_strict_json_and_written_whole(tmp_path: Path):
    results.write_json(tmp_path / "a.json", {"x": [math.nan, math.inf, 1.5], "y": (0.0,)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, None, 1.5], "y": [0.0]}

    def rows():
        yield (1, 2)
        raise RuntimeError("ended in the middle")

    with pytest.raises(RuntimeError):
        results.write_csv(tmp_path / "b.csv", ("p", "q"), rows())
    assert not (tmp_path / "b.csv").exists()


def test_only_a_finished_run_can_be_loaded(tmp_path: Path):
    with pytest.raises(results.IncompleteRunError, match=r"no results\.json"):
        results.load_results(tmp_path)
    results.write_json(tmp_path / results.PARTIAL, {"complete": False})
    with pytest.raises(results.IncompleteRunError, match="ended before it finished"):
        results.load_results(tmp_path)
