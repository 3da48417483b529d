"""Probes: what they measure against autograd or the library, and that they change no run."""

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
from rnn_cuda.instruments import lyapunov_exponents
from tests.experiments.processes import printed_by
from tests.experiments.small_studies import ROOT, example, listing_also

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN, GATED = ["fused_rnn", "rnn"], ["lstm", "gru"]
REFUSED = {
    "adjoint": {},
    "jacobian": {},
    "lag_contribution": {"antisymmetric": "AntisymmetricRNN"},
    "lyapunov": {},
    "saturation": {},
    "spectrum": {},
}
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


def steps_of(core, x):
    """State after each step, by single calls."""
    state, states = None, []
    for x_t in x:
        _, state = core(x_t.unsqueeze(0), state)
        states.append(state)
    return states


def loss_of(run, model, state, target):
    h_n = state[0] if isinstance(state, tuple) else state
    return run.task.loss(model.readout(h_n[-1]), target)


# ---- choices -------------------------------------------------------------------------------------


def test_every_probe_has_a_choice_that_shows_its_defaults():
    for name, kind in PROBES.items():
        path = ROOT / f"hydra_conf/probe/{name}.yaml"
        assert path.read_text(encoding="utf-8").startswith(f"# @package probe.{name}\n")
        shown = OmegaConf.to_container(OmegaConf.load(path))
        assert kind.Config.parse(shown) == kind.Config()
        assert shown.keys() == asdict(kind.Config()).keys()
    choices = {path.stem for path in (ROOT / "hydra_conf/probe").iterdir()}
    assert choices == set(PROBES) == set(REFUSED)


@pytest.mark.parametrize("core", sorted(CORES))
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_probe_measures_a_core_or_is_refused_before_the_run(name, core):
    if core in REFUSED[name]:
        message = rf"probe\.{name} measures .*; got {REFUSED[name][core]}$"
        with pytest.raises(ConfigError, match=message):
            run_of(core, name)
        return
    for model in ({"num_layers": 2, "bidirectional": True}, {}):
        run = run_of(core, name, model=model, precision="float32")
        assert measured(run)[-1]


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


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_network_that_is_dead_is_measured_in_strict_json(name):
    """Closed ReLUs: singular values, adjoints and exponents that are exactly zero or -inf."""
    run = run_of("rnn", name, model={"nonlinearity": "relu"})
    model = run.build_model().eval()
    model.core.bias_ih_l0.data.fill_(-100.0)
    x, target = on_device(run, run.task.sample(B, T, torch.Generator()))
    json.dumps(run.probes[0].measure(model, run.task, x, target), allow_nan=False)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", sorted(CORES))
def test_jacobians_have_the_singular_values_of_autograds(core):
    options = {"jacobian": {"lags": [1, 4, 9], "sequences": 2, "values": 100}}
    run = run_of(core, "jacobian", options=options)
    model, x, _, values = measured(run)
    assert values["lags"] == [1, 4, T]
    for lag, logs in zip(values["lags"], values["log10_values"], strict=True):
        expected = []
        for sample in range(2):
            start = torch.zeros(H * (2 if core == "lstm" else 1), dtype=torch.float64)

            def after(state, rows):
                given = state.view(-1, 1, 1, H)
                h0 = tuple(given) if core == "lstm" else given[0]
                _, end = model.core(rows, h0)
                return torch.cat(end).flatten() if core == "lstm" else end.flatten()

            if lag < T:
                start = after(start, x[: T - lag, sample : sample + 1]).detach()
            rows = x[T - lag :, sample : sample + 1]
            jacobian = torch.autograd.functional.jacobian(lambda s, r=rows: after(s, r), start)
            expected.append(torch.linalg.svdvals(jacobian).log10())
        mean = torch.stack(expected).mean(0)
        assert values["ranks"] == list(range(1, len(mean) + 1))
        torch.testing.assert_close(torch.tensor(logs, dtype=torch.float64), mean, rtol=0, atol=1e-6)


def test_a_few_of_the_singular_values_are_picked_evenly():
    options = {"jacobian": {"values": 3}}
    run = run_of("fused_rnn", "jacobian", options=options, model={"hidden_size": 9})
    values = measured(run)[-1]
    assert values["ranks"] == [1, 5, 9]
    assert [len(logs) for logs in values["log10_values"]] == [3, 3]


@pytest.mark.parametrize("core", PLAIN + GATED)
def test_exponents_are_the_librarys_on_some_sequences(core):
    options = {"lyapunov": {"exponents": 4, "warmup": 0.5, "sequences": 2}}
    run = run_of(core, "lyapunov", options=options)
    model, x, _, values = measured(run)
    torch.manual_seed(0)
    expected = lyapunov_exponents(model.core, x[:, :2], 4, warmup=3).mean(0)
    assert values["exponents"] == expected.tolist()
    assert values["relaxation_time"] == pytest.approx(-1 / expected[0].item())


@pytest.mark.parametrize("core", sorted(CORES))
def test_saturation_counts_what_the_states_are(core):
    run = run_of(core, "saturation", options={"saturation": {"threshold": 0.5, "bins": 10}})
    model, x, _, values = measured(run)
    states = [s[0][0] if isinstance(s, tuple) else s[0] for s in steps_of(model.core, x)]
    h = torch.stack(states).detach()

    def is_histogram(found, of):
        assert found["counts"] == torch.histc(of, 10, found["low"], found["high"]).tolist()
        assert sum(found["counts"]) == of.numel()

    is_histogram(values["hidden"], h)
    if core in GATED:
        assert values["hidden"]["share"] == pytest.approx((h.abs() > 0.5).double().mean().item())
        assert "mean_derivative" not in values["hidden"]
        names = {"lstm": {"input", "forget", "cell", "output"}, "gru": {"reset", "update", "new"}}
        assert values["gates"].keys() == names[core]
        gate, W, U = (
            {"lstm": ("forget",), "gru": ("update",)}[core][0],
            *(
                getattr(model.core, f"weight_{kind}_l0").detach()[H : 2 * H]
                for kind in ("ih", "hh")
            ),
        )
        b = (model.core.bias_ih_l0 + model.core.bias_hh_l0).detach()[H : 2 * H]
        before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
        opened = torch.sigmoid(x @ W.T + before @ U.T + b)
        is_histogram(values["gates"][gate], opened)
        derivative = (opened * (1 - opened)).mean().item()
        assert values["gates"][gate]["mean_derivative"] == pytest.approx(derivative)
        return
    where = "hidden"
    if core not in PLAIN:
        where = "activation"
        before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
        h = (h - 0.7 * before) / 0.3 if core == "leaky" else (h - before) / 0.2
        is_histogram(values["activation"], h)
    assert values[where]["share"] == pytest.approx((h.abs() > 0.5).double().mean().item())
    assert values[where]["mean_derivative"] == pytest.approx((1 - h * h).mean().item())


@pytest.mark.parametrize("core", sorted(CORES))
def test_the_spectrum_is_that_of_each_block_and_the_first_adjoint_autograds(core):
    run = run_of(core, "spectrum")
    model, x, target, values = measured(run)
    U = model.core.weight_hh_l0.detach()
    if core == "antisymmetric":
        U = U - U.T - 0.1 * torch.eye(H, dtype=U.dtype)
    found = values["matrices"]["l0"]
    for index, block in enumerate(U.split(H)):
        singular = torch.linalg.svdvals(block)
        expected = {
            "spectral_radius": torch.linalg.eigvals(block).abs().max(),
            "largest_singular_value": singular[0],
            "smallest_singular_value": singular[-1],
            "orthogonality_error": (block.T @ block - torch.eye(H)).norm(),
        }
        for key, value in expected.items():
            assert found[key][index] == pytest.approx(value.item(), rel=1e-9)
    first = steps_of(model.core, x[:1])[0]
    parts = [p.detach().requires_grad_() for p in (first if core == "lstm" else (first,))]
    _, state = model.core(x[1:], tuple(parts) if core == "lstm" else parts[0])
    gradients = torch.autograd.grad(loss_of(run, model, state, target) * B, parts)
    norm = torch.cat(gradients, -1).norm(dim=-1).mean().item()
    assert values["first_adjoint"] == pytest.approx(norm, rel=1e-9)
    bound = torch.linalg.svdvals(U)[0].item()
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
        each = [U.clone().requires_grad_() for _ in range(T)]
        state = None
        for t in range(T):
            row = x[t : t + 1, sample : sample + 1]
            _, state = functional_call(model.core, {"weight_hh_l0": each[t]}, (row, state))
        gradients = torch.autograd.grad(
            loss_of(run, model, state, target[sample : sample + 1]), each
        )
        norms[:, sample] = torch.stack([gradient.norm() for gradient in gradients])
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
    names = [name for name in PROBES if core not in REFUSED[name]]
    probed = run_of(
        core,
        *names,
        options={
            name: {"every": 10, **({"exponents": 3} if name == "lyapunov" else {})}
            for name in names
        },
        **settings,
    )
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
        results.append((metrics, record.result, state["model"], state["data"], state["random"]))
    expected = results[0]
    for found in results[1:]:
        assert found[:2] == expected[:2]
        assert all(torch.equal(found[2][key], expected[2][key]) for key in expected[2])
        assert found[3]["used"] == expected[3]["used"]
        assert torch.equal(found[3]["generator"], expected[3]["generator"])
        assert torch.equal(found[4]["torch"], expected[4]["torch"])


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


def test_the_page_names_every_probe():
    page = (ROOT / "docs/remedies.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in PROBES)
