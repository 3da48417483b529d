"""Probes: what they measure against the library or autograd, and that they change no run."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from omegaconf import OmegaConf
from torch.func import functional_call

from experiments import checkpoint
from experiments.batches import on_device
from experiments.config import RunConfig
from experiments.fields import ConfigError
from experiments.models import CORES
from experiments.probes import PROBES, Probe, ProbeConfig
from experiments.record import read_metrics
from experiments.train import train
from rnn_cuda.instruments import (
    gate_activations,
    jacobian_singular_values,
    lyapunov_exponents,
    recurrent_spectrum,
)
from tests.experiments.processes import assert_same, printed_by
from tests.experiments.small_studies import ROOT, example, listing_also

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN, GATED = ["fused_rnn", "rnn"], ["fused_lstm", "lstm", "fused_gru", "gru"]
REFUSED = {("lag_contribution", "antisymmetric"): "AntisymmetricRNN"}
NAMES = ("adjoint", "jacobian", "lag_contribution", "lyapunov", "saturation", "spectrum")
T, B, H = 6, 3, 4
STEP = {"leaky": {"leak": 0.3}, "antisymmetric": {"step_size": 0.2, "diffusion": 0.1}}


def run_of(core="fused_rnn", *probes, model=None, options=None, **rest):
    chosen = {"lyapunov": {"exponents": 3}, **(options or {})}
    return RunConfig.parse(
        {
            "model": {"core": core, "hidden_size": H, **STEP.get(core, {}), **(model or {})},
            "task": {"name": "adding", "test_size": 8},
            "horizon": T,
            "probe": {name: chosen.get(name, {}) for name in probes},
            "training": {"steps": 25, "batch_size": B},
            "evaluation": {"probe_size": B, "train_size": B},
            "precision": "float64",
            **rest,
        }
    )


def measured(run, seed=0):
    """Model, batch, and what the run's only probe measures; weights that saturate a little."""
    model = run.build_model()
    with torch.no_grad():
        for parameter in model.core.parameters():
            parameter.mul_(2)
    x, target = on_device(run, run.task.sample(B, T, torch.Generator().manual_seed(seed)))
    torch.manual_seed(seed)
    values = run.probes[0].measure(model.eval(), run.task, x, target)
    json.dumps(values, allow_nan=False)
    return model, x, target, values


def states_of(core, x):
    """The state after each step, a tuple of (B, H) each, by single calls."""
    state, states = None, []
    for x_t in x:
        _, state = core(x_t.unsqueeze(0), state)
        states.append(tuple(s[0] for s in (state if isinstance(state, tuple) else (state,))))
    return states


# ---- choices -------------------------------------------------------------------------------------


def test_every_probe_has_a_choice_that_shows_its_defaults_and_is_on_the_page():
    page = (ROOT / "docs/remedies.md").read_text(encoding="utf-8")
    for name, kind in PROBES.items():
        path = ROOT / f"hydra_conf/probe/{name}.yaml"
        assert path.read_text(encoding="utf-8").startswith(f"# @package probe.{name}\n")
        shown = OmegaConf.to_container(OmegaConf.load(path))
        assert kind.Config.parse(shown) == kind.Config()
        assert shown.keys() == asdict(kind.Config()).keys()
        assert f"| `{name}` |" in page
    choices = {path.stem for path in (ROOT / "hydra_conf/probe").iterdir()}
    assert choices == set(PROBES) == set(NAMES)


@pytest.mark.parametrize("core", sorted(CORES))
@pytest.mark.parametrize("name", NAMES)
def test_a_probe_measures_a_core_or_is_refused_before_the_run(name, core):
    if (name, core) in REFUSED:
        message = rf"probe\.{name} measures .*; got {REFUSED[name, core]}$"
        with pytest.raises(ConfigError, match=message):
            run_of(core, name)
        return
    model = {"num_layers": 2, "bidirectional": True}
    assert measured(run_of(core, name, model=model, precision="float32"))[-1]


def test_a_remedy_decides_what_a_probe_gets():
    with pytest.raises(ConfigError, match=r"lag_contribution measures .*; got AntisymmetricRNN"):
        run_of("fused_rnn", "lag_contribution", remedy={"antisymmetric": {}})
    with pytest.raises(ConfigError, match=r"at most 4, the size of the state of this GRU; got 5"):
        run_of(
            "gru",
            "lyapunov",
            options={"lyapunov": {"exponents": 5}},
            remedy={"orthogonal_parametrization": {}},
        )
    run_of("lstm", "lyapunov", options={"lyapunov": {"exponents": 8}})


@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_is_dead_is_measured_in_strict_json(name):
    """Closed ReLUs: singular values, adjoints and exponents that are exactly zero or -inf."""
    run = run_of("rnn", name, model={"nonlinearity": "relu"})
    model = run.build_model().eval()
    model.core.bias_ih_l0.data.fill_(-100.0)
    x, target = on_device(run, run.task.sample(B, T, torch.Generator()))
    json.dumps(run.probes[0].measure(model, run.task, x, target), allow_nan=False)


# ---- values --------------------------------------------------------------------------------------


def test_jacobians_are_the_librarys_on_some_sequences():
    options = {"jacobian": {"lags": [1, 4, 9], "sequences": 2, "values": 3}}
    run = run_of("lstm", "jacobian", options=options)
    model, x, _, values = measured(run)
    assert values["lags"] == [1, 4, T]
    assert values["ranks"] == [1, 5, 8]  # evenly
    expected = jacobian_singular_values(model.core, x[:, :2], [1, 4, T]).mean(1)
    assert values["log10_values"] == expected[:, [0, 4, 7]].tolist()


def test_exponents_are_the_librarys_on_some_sequences():
    options = {"lyapunov": {"exponents": 4, "warmup": 0.5, "sequences": 2}}
    model, x, _, values = measured(run_of("gru", "lyapunov", options=options))
    torch.manual_seed(0)
    expected = lyapunov_exponents(model.core, x[:, :2], 4, warmup=3).mean(0)
    assert values["exponents"] == expected.tolist()
    assert values["relaxation_time"] == pytest.approx(-1 / expected[0].item())


@pytest.mark.parametrize("core", sorted(CORES))
def test_saturation_counts_what_the_states_and_the_librarys_gates_are(core):
    run = run_of(core, "saturation", options={"saturation": {"threshold": 0.5, "bins": 10}})
    model, x, _, values = measured(run)
    h = torch.stack([state[0] for state in states_of(model.core, x)]).detach()
    expected = {"hidden": (h, "share", "mean_derivative")}
    if core in GATED:
        expected["hidden"] = (h, "share")
        gates = gate_activations(model.core, x)
        expected |= {name: (gate, "share", "mean_derivative") for name, gate in gates.items()}
        values |= values.pop("gates")
    elif core not in PLAIN:
        before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
        f = (h - 0.7 * before) / 0.3 if core == "leaky" else (h - before) / 0.2
        expected = {"hidden": (h,), "activation": (f, "share", "mean_derivative")}
    assert values.keys() == expected.keys()
    for name, (of, *numbers) in expected.items():
        found = values[name]
        assert found["counts"] == torch.histc(of, 10, found["low"], found["high"]).tolist()
        assert sum(found["counts"]) == of.numel()
        assert found.keys() - {"low", "high", "counts"} == set(numbers)
        is_tanh = name in ("hidden", "activation", "cell", "new")
        share = (of.abs() > 0.5) if is_tanh else (of < 0.25) | (of > 0.75)
        derivative = 1 - of * of if is_tanh else of * (1 - of)
        for number, each in (("share", share.double()), ("mean_derivative", derivative)):
            if number in numbers:
                assert found[number] == pytest.approx(each.mean().item())


@pytest.mark.parametrize("core", sorted(CORES))
def test_the_spectrum_is_the_librarys_and_the_first_adjoint_autograds(core):
    run = run_of(core, "spectrum")
    model, x, target, values = measured(run)
    U = model.core.weight_hh_l0.detach()
    if core == "antisymmetric":
        U = U - U.T - 0.1 * torch.eye(H, dtype=U.dtype)
    expected = {name: value.tolist() for name, value in recurrent_spectrum(U)._asdict().items()}
    assert values["matrices"]["l0"] == expected
    first = [s.detach().unsqueeze(0).requires_grad_() for s in states_of(model.core, x[:1])[0]]
    output, _ = model.core(x[1:], tuple(first) if "lstm" in core else first[0])
    loss = run.task.loss(model.readout(output[-1]), target) * B
    norm = torch.cat(torch.autograd.grad(loss, first), -1).norm(dim=-1).mean().item()
    assert values["first_adjoint"] == pytest.approx(norm, rel=1e-9)
    bound = expected["largest_singular_value"][0]
    assert values["margin"] == (pytest.approx(1 - bound) if core in PLAIN else None)


def test_the_spectrum_covers_layers_directions_and_a_parametrized_u():
    run = run_of(
        "lstm",
        "spectrum",
        model={"num_layers": 2, "bidirectional": True},
        remedy={"orthogonal_parametrization": {}},
    )
    model = run.build_model().eval()
    x, target = on_device(run, run.task.sample(B, T, torch.Generator()))
    values = run.probes[0].measure(model, run.task, x, target)["matrices"]
    assert list(values) == ["l0", "l0_reverse", "l1", "l1_reverse"]
    for spectrum in values.values():
        assert spectrum["spectral_radius"] == pytest.approx([1.0] * 4)
        assert max(spectrum["orthogonality_error"]) < 1e-10
    assert run_of("fused_rnn", "spectrum", model={"nonlinearity": "sigmoid"}).probes


@pytest.mark.parametrize("core", sorted(set(CORES) - {"antisymmetric"}))
def test_the_contribution_of_a_step_is_the_gradient_of_its_own_u(core):
    run = run_of(core, "lag_contribution")
    model, x, target, values = measured(run)
    U = model.core.weight_hh_l0.detach()
    norms = torch.zeros(T, B)
    for sample in range(B):
        each, state = [U.clone().requires_grad_() for _ in range(T)], None
        for t in range(T):
            row = x[t : t + 1, sample : sample + 1]
            output, state = functional_call(model.core, {"weight_hh_l0": each[t]}, (row, state))
        loss = run.task.loss(model.readout(output[-1]), target[sample : sample + 1])
        norms[:, sample] = torch.stack([g.norm() for g in torch.autograd.grad(loss, each)])
    mean = norms.mean(1).tolist()
    assert values["contribution"] == pytest.approx(mean, rel=1e-5)
    assert values["contribution"][0] == 0
    assert values["log10_ratio"] == pytest.approx(math.log10(mean[1] / mean[-1]), abs=1e-5)


# ---- in a run ------------------------------------------------------------------------------------


class Meddling(Probe):
    """Does to a model and to the random state what no probe should."""

    name = "meddling"
    Config = ProbeConfig

    def measure(self, model, task, x_TBI, target):
        torch.rand(3)
        model.train()
        loss = task.loss(model(x_TBI), target)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad)
        return {"loss": loss.item()}


@pytest.mark.parametrize(
    ("core", "remedy"),
    [
        ("fused_rnn", {"spectral_norm": {}, "truncated_bptt": {"segment": 4}, "omega": {}}),
        ("lstm", {"orthogonal_parametrization": {}, "clipping": {"norm": 0.1}}),
        ("gru", {"spectral_norm": {}}),
        ("leaky", {"spectral_norm": {}}),
    ],
)
def test_a_run_with_probes_is_the_run_without_to_the_bit(core, remedy, tmp_path):
    settings = {"remedy": remedy, "precision": "float32"}
    options = {name: {"every": 10} for name in NAMES}
    options["lyapunov"]["exponents"] = 3
    probed = run_of(core, *NAMES, options=options, **settings)
    meddled = replace(probed, probes=(Meddling(ProbeConfig(every=10)),))
    results = []
    for run in (run_of(core, **settings), probed, meddled):
        folder = tmp_path / run.folder_name
        record = train(run, folder)
        state = checkpoint.load(folder)
        rows = read_metrics(folder)
        steps = [row["step"] for row in rows if "probe" in row]
        assert sorted(steps) == sorted([0, 10, 20, 25] * len(run.probes))
        assert record.probes.keys() == {probe.name for probe in run.probes}
        metrics = [row for row in rows if "probe" not in row]
        results.append(
            (metrics, asdict(record.result), state["model"], state["data"], state["random"])
        )
    for found in results[1:]:
        assert_same(found, results[0])


def test_truncation_is_of_training_and_not_of_what_probes_see():
    whole = run_of("fused_rnn", "adjoint")
    cut = run_of("fused_rnn", "adjoint", remedy={"truncated_bptt": {"segment": 2}})
    assert measured(cut)[-1] == measured(whole)[-1]


def test_a_probe_is_added_with_one_file_as_the_page_says(tmp_path):
    name, source, shown = example("probes", "probe")
    (tmp_path / f"{name}.py").write_text(source)
    program = listing_also("experiments.probes", tmp_path) + (
        "import experiments.config as config\n"
        "config.build_probes = package.build_probes\n"
        "from experiments.train import train\n"
        "from pathlib import Path\n"
        "run = config.RunConfig.parse(dict(model=dict(core='rnn'),\n"
        "    task=dict(name='adding', test_size=4), evaluation=dict(train_size=4),\n"
        f"    training=dict(steps=1), horizon=5, probe={{{name!r}: {dict(shown)!r}}}))\n"
        f"record = train(run, Path({str(tmp_path)!r}) / run.folder_name)\n"
        f"print(sorted(record.probes[{name!r}]['trained']))\n"
    )
    names = [name for name, _ in run_of("rnn").build_model().named_parameters()]
    assert printed_by(program) == f"{sorted(names)}\n"
