"""Remedies in runs: what each does to weights and gradients, to what it applies, and all pairs."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import nn

from experiments import checkpoint
from experiments.batches import Batches, on_device
from experiments.config import RunConfig
from experiments.fields import ConfigError
from experiments.models import CORES, Core, CoreConfig
from experiments.record import METRICS
from experiments.remedies import REMEDIES, Problem
from experiments.train import Interrupted, train
from rnn_cuda.instruments import lyapunov_exponents, omega
from tests.experiments.processes import assert_same, outcome, printed_by
from tests.experiments.small_studies import ROOT, example, listing_also

pytestmark = pytest.mark.usefixtures("one_thread")

ELMAN, RESIDUAL = {"fused_rnn", "rnn"}, {"leaky", "antisymmetric"}
GATED = {"fused_lstm", "lstm", "fused_gru", "gru"}
ALL = ELMAN | RESIDUAL | GATED
APPLIES_TO = {
    "antisymmetric": ELMAN,
    "clipping": ALL,
    "flossing": ALL,
    "gate_bias": GATED,
    "initialisation": ALL,
    "leaky": ELMAN,
    "omega": ELMAN,
    "orthogonal_parametrization": ALL,
    "spectral_norm": ALL,
    "truncated_bptt": ALL,
}
# Each applies to some core by itself, but not together.
NEVER_TOGETHER = {
    frozenset(pair)
    for pair in (
        ("antisymmetric", "leaky"),
        ("antisymmetric", "omega"),
        ("leaky", "omega"),
        ("orthogonal_parametrization", "spectral_norm"),
    )
}
QUICK = {
    "clipping": {"norm": 0.1},
    "flossing": {"steps": 2, "exponents": 2, "batch_size": 2},
    "truncated_bptt": {"segment": 3},
}
T, B, H = 8, 4, 5
TWO_WAYS = {"num_layers": 2, "bidirectional": True}


def run_of(core="fused_rnn", *remedies, task="adding", horizon=T, model=None, options=None, **rest):
    """A small run with these remedies, under quick options unless there are others."""
    chosen = {name: (options or {}).get(name, QUICK.get(name, {})) for name in remedies}
    return RunConfig.parse(
        {
            "model": {"core": core, "hidden_size": H, **(model or {})},
            "task": {"name": task, "test_size": 8},
            "horizon": horizon,
            "remedy": chosen,
            "training": {"steps": 2, "batch_size": B, **rest.pop("training", {})},
            "evaluation": {"probe_size": B, "train_size": B},
            **rest,
        }
    )


def batch_of(run, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return on_device(run, run.task.sample(B, run.horizon, generator))


def trained(run, path):
    """Make a run below a folder; return its own folder and its record."""
    folder = path / run.folder_name
    return folder, train(run, folder)


def weights_after(run, path):
    return checkpoint.load(trained(run, path)[0])["model"]


# ---- choices -------------------------------------------------------------------------------------


def test_every_remedy_has_a_choice_that_shows_every_key_and_is_on_the_page():
    page = (ROOT / "docs/remedies.md").read_text(encoding="utf-8")
    seen = set()
    for path in (ROOT / "hydra_conf/remedy").glob("*.yaml"):
        name = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# @package remedy.")
        shown = OmegaConf.to_container(OmegaConf.load(path))
        assert set(shown) == {field.name for field in fields(REMEDIES[name].Config)}, path
        REMEDIES[name](REMEDIES[name].Config.parse(shown))
        assert f"| `{name}` |" in page
        assert f"`{path.stem}`" in page
        seen.add(name)
    assert seen == set(REMEDIES) == set(APPLIES_TO)


def test_choices_of_both_groups_compose_to_any_number():
    store = ConfigStore.instance()
    store.store("any_number", {"defaults": [{"remedy": []}, {"probe": []}, "_self_"]})
    overrides = [
        "remedy=[irnn,clipping,clipping_by_value,omega]",
        "probe=[adjoint,spectrum]",
        "remedy.omega.alpha=1",
        "probe.spectrum.every=5",
    ]
    with initialize_config_dir(str(ROOT / "hydra_conf"), version_base=None):
        values = OmegaConf.to_container(compose("any_number", overrides))
    run = RunConfig.parse({"model": {"core": "rnn"}, "task": {"name": "adding"}, **values})
    irnn = {"recurrent": "identity", "gain": 1.0, "input_std": 0.001, "zero_bias": True}
    assert run.plain()["remedy"] == {
        "initialisation": irnn,
        "clipping": {"norm": None, "value": 1.0},  # of two choices, the later
        "omega": {"alpha": 1.0, "form": "paper"},
    }
    assert run.plain()["probe"] == {"adjoint": {"every": None}, "spectrum": {"every": 5}}


# ---- to what they apply --------------------------------------------------------------------------


@pytest.mark.parametrize("core", sorted(CORES))
@pytest.mark.parametrize("name", sorted(APPLIES_TO))
def test_a_remedy_trains_the_cores_it_applies_to_and_refuses_the_others(name, core, tmp_path):
    model = TWO_WAYS
    if core not in APPLIES_TO[name]:
        its = run_of(core).build_model().core_name
        with pytest.raises(ConfigError, match=rf"remedy\.{name} applies to .*; got {its}$"):
            run_of(core, name)
        return
    if name == "truncated_bptt":
        message = r"remedy\.truncated_bptt applies to one direction, .*; got true"
        with pytest.raises(ConfigError, match=message):
            run_of(core, name, model=model)
        model = {"num_layers": 2}
    assert trained(run_of(core, name, model=model), tmp_path)[1].status == "finished"


@pytest.mark.parametrize("core", ["fused_rnn", "lstm"])
@pytest.mark.parametrize("name", sorted(APPLIES_TO)[:-1])
def test_two_remedies_train_together_or_are_refused(name, core, tmp_path):
    for pair in itertools.combinations(sorted(APPLIES_TO), 2):
        if pair[0] != name:
            continue
        if any(core not in APPLIES_TO[n] for n in pair) or frozenset(pair) in NEVER_TOGETHER:
            with pytest.raises(ConfigError, match=rf"({'|'.join(pair)}) applies to .*; got "):
                run_of(core, *pair)
        else:
            assert trained(run_of(core, *pair), tmp_path)[1].status == "finished", pair


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_all_remedies_of_an_elman_layer_train_together(precision, tmp_path):
    names = APPLIES_TO.keys() - {"leaky", "antisymmetric", "gate_bias", "spectral_norm"}
    run = run_of("fused_rnn", *names, model={"num_layers": 2}, precision=precision)
    assert trained(run, tmp_path)[1].status == "finished"


@pytest.mark.parametrize(
    ("core", "options", "message"),
    [
        ("lstm", {"initialisation": {"recurrent": "identity"}}, "recurrent=identity: .*LSTM"),
        ("rnn", {"initialisation": {"recurrent": "default", "gain": 2}}, "gain .* be 1; got 2"),
        ("rnn", {"flossing": {"exponents": 6}}, "at most 5, the size of the state of this RNN; g"),
        ("lstm", {"flossing": {"exponents": 11}}, "flossing.exponents must be at most 10, .*; got"),
        ("rnn", {"clipping": {}}, "clipping needs norm or value; got null for both"),
        ("rnn", {"clipping": {"norm": 1, "value": 1}}, "must not both be set; got 1.0 and 1.0"),
        ("rnn", {"leaky": {"leak": 1.1}}, "remedy.leaky.leak must be a positive number of at most"),
    ],
)
def test_an_option_that_no_model_can_have_is_refused(core, options, message):
    with pytest.raises(ConfigError, match=message):
        run_of(core, *options, options=options)


class OwnLayer(nn.Module):
    """A recurrence that nobody knows."""

    bidirectional, hidden_size = False, H

    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(2, H)

    def forward(self, x, state=None):
        states = [torch.zeros(x.shape[1], H) if state is None else state[0]]
        for x_t in x:
            states.append(self.cell(x_t, states[-1]))
        return torch.stack(states[1:]), states[-1].unsqueeze(0)


class OwnCore(Core):
    name = "own"

    def layer(self, input_size, hidden_size, **options):
        return OwnLayer()


def test_a_core_of_ones_own_takes_the_remedies_that_ask_nothing_of_it(tmp_path):
    run = replace(run_of("rnn", "clipping", "truncated_bptt"), core=OwnCore(CoreConfig()))
    assert trained(run.at(seed=1), tmp_path)[1].status == "finished"
    for name in APPLIES_TO.keys() - {"clipping", "truncated_bptt", "gate_bias"}:
        other = replace(run_of("rnn", name), core=OwnCore(CoreConfig()))
        with pytest.raises(ConfigError, match=rf"remedy\.{name} applies to .*; got OwnLayer"):
            other.at(seed=1)


def test_a_refusal_comes_with_the_configuration_and_leaves_the_random_state():
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match=r"remedy\.omega"):
        run_of("lstm", "omega")
    run_of("lstm", "initialisation", "spectral_norm").build_model()
    assert torch.equal(before, torch.get_rng_state())


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [2.0, "chrono"])
def test_the_gate_bias_is_set_after_biases_became_zero(value):
    options = {"gate_bias": {"value": value}, "initialisation": {"zero_bias": True}}
    core = run_of("gru", *options, options=options).build_model().core
    update = (core.bias_ih_l0 + core.bias_hh_l0)[H : 2 * H]
    if value == "chrono":  # log of U[1, dependency - 1]
        assert 0 <= update.min() < update.max() <= math.log(T - 2)
    else:
        assert (update == value).all()
    assert (core.bias_ih_l0[:H] == 0).all()


@pytest.mark.parametrize(
    ("recurrent", "expected"),
    [
        ("identity", lambda U: (U - 1.5 * torch.eye(50)).norm() == 0),
        ("orthogonal", lambda U: (U @ U.T - 1.5**2 * torch.eye(50)).norm() < 1e-4),
        ("gaussian", lambda U: 1.3 < U.std() * math.sqrt(50) < 1.7 and U.abs().max() > 0.5),
    ],
)
def test_an_initialisation_draws_u_w_and_b_and_no_more(recurrent, expected):
    options = {"recurrent": recurrent, "gain": 1.5, "input_std": 0.001, "zero_bias": True}
    size = {"hidden_size": 50}
    model = run_of(
        "rnn", "initialisation", model=size, options={"initialisation": options}
    ).build_model()
    plain = run_of("rnn", model=size).build_model()
    assert expected(model.core.weight_hh_l0.detach())
    assert 0.0007 < model.core.weight_ih_l0.std() < 0.0013
    assert not model.core.bias_ih_l0.any()
    assert not model.core.bias_hh_l0.any()
    assert torch.equal(model.readout.weight, plain.readout.weight)


def test_weights_are_drawn_alike_in_every_precision():
    for name in ("initialisation", "gate_bias", "spectral_norm"):
        single = run_of("lstm", name).build_model().state_dict()
        double = run_of("lstm", name, precision="float64").build_model().state_dict()
        for key in single:
            if "maps" not in key:  # what a constraint keeps is computed in the run's precision
                assert torch.equal(single[key].double(), double[key]), key


@pytest.mark.parametrize(
    ("core", "precision", "bound"),
    [
        (core, *(("float32", 1e-5), ("float64", 1e-13))[index % 2])
        for index, core in enumerate(sorted(CORES))
    ],
)
def test_orthogonal_weights_stay_orthogonal_and_learn_at_their_own_rate(
    core, precision, bound, tmp_path
):
    run = run_of(
        core,
        "orthogonal_parametrization",
        "initialisation",
        model={"num_layers": 2},
        precision=precision,
        training={"steps": 20},
        optimizer={"name": "adam", "learning_rate": 0.1, "orthogonal_factor": 0.5},
    )
    model = run.build_model()
    first = model.core.weight_hh_l0.detach().clone()
    state = checkpoint.load(trained(run, tmp_path)[0])
    model.load_state_dict(state["model"])
    for name in ("weight_hh_l0", "weight_hh_l1"):
        for block in getattr(model.core, name).detach().split(H):
            assert (block.T @ block - torch.eye(H)).abs().max() < bound
    assert (model.core.weight_hh_l0 - first).norm() > 0.1
    groups = state["optimizer"]["param_groups"]
    assert sorted((group["lr"], len(group["params"])) for group in groups)[0] == (0.05, 2)


def test_an_orthogonal_u_begins_as_drawn():
    choice = {"options": {"initialisation": {"recurrent": "orthogonal"}}, "precision": "float64"}
    drawn = run_of("gru", "initialisation", **choice).build_model()
    held = run_of("gru", "initialisation", "orthogonal_parametrization", **choice).build_model()
    difference = held.core.weight_hh_l0 - drawn.core.weight_hh_l0
    assert difference.abs().max() < 1e-6  # what was drawn is orthogonal in float32


@pytest.mark.parametrize("core", sorted(CORES))
def test_spectral_norm_holds_every_block_at_the_bound(core, tmp_path):
    run = run_of(
        core,
        "spectral_norm",
        options={"spectral_norm": {"bound": 0.7, "iterations": 5}},
        model={"num_layers": 2},
        training={"steps": 20},
        optimizer={"name": "sgd", "learning_rate": 0.1},
    )
    model = run.build_model()
    model.load_state_dict(weights_after(run, tmp_path))
    model.eval()
    for name in ("weight_hh_l0", "weight_hh_l1"):
        trained = model.core.get_parameter(f"parametrizations.{name}.original").detach()
        held = getattr(model.core, name).detach()
        for block, plain in zip(held.split(H), trained.split(H), strict=True):
            assert torch.linalg.matrix_norm(block, 2).item() == pytest.approx(0.7, rel=0.01)
            assert (block / plain).std() < 1e-5  # one factor for all entries


@pytest.mark.parametrize("name", sorted(RESIDUAL))
@pytest.mark.parametrize("core", sorted(ELMAN))
def test_another_recurrence_is_that_of_the_core_of_its_name(name, core):
    options = {"leaky": {"leak": 0.3}, "antisymmetric": {"step_size": 0.2, "diffusion": 0.1}}
    remedied = run_of(core, name, options=options, model={"bidirectional": True})
    plain = run_of(name, model={"bidirectional": True, **options[name]})
    x, _ = batch_of(plain)
    assert torch.equal(remedied.build_model()(x), plain.build_model()(x))


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_clipping_bounds_what_is_applied_and_not_what_is_recorded(accumulation, tmp_path):
    changes, lines = [], set()
    for options in ({}, {"clipping": {"norm": 1e-3}}, {"clipping": {"value": 1e-3}}):
        run = run_of(
            "gru",
            *options,
            options=options,
            precision="float64",
            training={"steps": 1, "accumulation": accumulation},
            optimizer={"name": "sgd", "learning_rate": 1.0},
        )
        before, after = run.build_model().state_dict(), weights_after(run, tmp_path)
        changes.append(torch.cat([(after[key] - before[key]).flatten() for key in before]))
        lines.add((tmp_path / run.folder_name / METRICS).read_text().splitlines()[0])
    assert len(lines) == 1
    free, by_norm, by_value = changes
    assert free.norm() > 0.01
    assert 0 < (free.abs() > 1e-3).sum() < len(free)
    # torch divides by the norm plus 1e-6
    torch.testing.assert_close(by_norm, free / free.norm() * 1e-3, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(by_value, free.clamp(-1e-3, 1e-3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("core", sorted(CORES))
@pytest.mark.parametrize("task", ["adding", "copy_memory"])
def test_truncation_cuts_the_state_and_nothing_else(core, task):
    run = run_of(core, "truncated_bptt", task=task, precision="float64", model={"num_layers": 2})
    model = run.build_model()
    x, target = batch_of(run)
    state, outputs = None, []
    for t in range(len(x)):  # one step at a time, and a cut before steps 3, 6, ...
        if t > 0 and t % 3 == 0:
            state = tuple(s.detach() for s in state) if "lstm" in core else state.detach()
        output, state = model.core(x[t : t + 1], state)
        outputs.append(output)
    h = torch.cat(outputs)
    by_hand = run.task.loss(model.readout(h[-1] if task == "adding" else h), target)
    expected = torch.autograd.grad(by_hand, list(model.parameters()))
    loss = run.task.loss(model(x), target)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, by_hand, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-14)
    model.eval()  # knows no cuts
    whole = torch.autograd.grad(run.task.loss(model(x), target), list(model.parameters()))
    assert max((a - b).abs().max() for a, b in zip(gradients, whole, strict=True)) > 1e-6


def omega_by_hand(run, model, x, target, form, cut):
    """The library's Omega of adjoints by autograd, through cells written out; and its gradients."""
    core, suffixes = model.core, ["", "_reverse"][: model.directions]
    f = {"tanh": torch.tanh, "relu": torch.relu}[core.nonlinearity]
    rows, places = x, {}
    for layer in range(core.num_layers):
        outputs, finals = [], []
        for suffix in suffixes:
            W, U, b, c = (
                getattr(core, f"{kind}_l{layer}{suffix}").detach()
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h, states = torch.zeros(B, H, dtype=torch.float64), [None] * len(x)
            for number, t in enumerate(reversed(range(len(x))) if suffix else range(len(x))):
                carried = h.detach() if cut and number % cut == 0 else h
                h = f(rows[t] @ W.T + b + carried @ U.T + c).requires_grad_()
                states[t] = h
            places[f"core.weight_hh_l{layer}{suffix}"] = U.clone().requires_grad_(), states
            finals.append(h)
            outputs.append(torch.stack(states))
        rows = torch.cat(outputs, -1)
    predicted = model.readout(torch.cat(finals, -1) if model.reads == "last" else rows)
    loss, total = run.task.loss(predicted, target), 0.0
    for U, states in places.values():
        adjoints = torch.autograd.grad(
            loss, states, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        h = torch.stack(states)
        total += omega(torch.stack(adjoints), h, U, nonlinearity=core.nonlinearity, form=form)
    gradients = torch.autograd.grad(total, [U for U, _ in places.values()])
    return total.item(), dict(zip(places, gradients, strict=True))


@pytest.mark.parametrize(
    ("core", "task", "model", "cut", "form"),
    [
        ("fused_rnn", "adding", {}, None, "paper"),
        ("rnn", "adding", {}, None, "code"),
        ("rnn", "copy_memory", {"nonlinearity": "relu"}, None, "paper"),
        ("fused_rnn", "copy_memory", {"bidirectional": True}, None, "paper"),
        ("fused_rnn", "adding", {"num_layers": 3, "bidirectional": True}, None, "paper"),
        ("rnn", "adding", {"num_layers": 2, "bidirectional": True}, None, "code"),
        ("fused_rnn", "adding", {"num_layers": 2}, 3, "paper"),
        ("rnn", "copy_memory", {"num_layers": 2}, 4, "paper"),
    ],
)
def test_omega_is_the_librarys_penalty_and_pulls_at_u_alone(core, task, model, cut, form):
    options = {"omega": {"alpha": 1.5, "form": form}}
    if cut:
        options["truncated_bptt"] = {"segment": cut}
    run = run_of(core, *options, task=task, model=model, options=options, precision="float64")
    network = run.build_model()
    x, target = batch_of(run)
    loss = run.task.loss(network(x), target)
    remedy = next(remedy for remedy in run.remedies if remedy.name == "omega")
    penalty = remedy.penalty(network, x, loss)
    assert network.states is None
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True, retain_graph=True)
    expected, at_u = omega_by_hand(run, network, x, target, form, cut)
    assert penalty.item() == pytest.approx(1.5 * expected, rel=1e-10)
    found = {name: g / 1.5 for name, g in zip(names, gradients, strict=True) if g is not None}
    assert found.keys() == at_u.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, at_u[name], rtol=1e-9, atol=1e-13)
    loss.backward()  # its graph is still there


def test_omega_sees_adjoints_that_float32_cannot_hold():
    """After 100 steps that shrink by 3 each, squares and then norms leave float32's range."""
    penalties = {}
    for precision in ("float32", "float64", "bfloat16"):
        run = run_of("fused_rnn", "omega", horizon=150, precision=precision)
        network = run.build_model()
        network.core.weight_hh_l0.data = 0.3 * torch.eye(H, dtype=network.core.weight_hh_l0.dtype)
        x, target = batch_of(run)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = run.task.loss(network(x), target)
            penalties[precision] = run.remedies[0].penalty(network, x, loss)
    # 150 steps with a gain near .3 or below
    assert 2 * 0.5 * 150 < penalties["float64"] < 2 * 150
    assert penalties["float32"].item() == pytest.approx(penalties["float64"].item(), rel=1e-5)
    assert penalties["bfloat16"].item() == pytest.approx(penalties["float64"].item(), rel=2e-2)


@pytest.mark.parametrize(
    ("core", "model", "others"),
    [
        ("fused_rnn", {"num_layers": 2}, ()),
        ("rnn", {"bidirectional": True}, ()),
        ("lstm", {}, ()),
        ("fused_lstm", {}, ()),
        ("gru", {}, ("orthogonal_parametrization",)),
        ("fused_gru", {}, ("orthogonal_parametrization",)),
    ],
)
def test_flossing_draws_the_exponents_towards_zero(core, model, others):
    options = {"flossing": {"steps": 30, "learning_rate": 1e-2, "exponents": 3, "batch_size": 4}}
    run = run_of(core, "flossing", *others, horizon=20, model=model, options=options)
    network = run.build_model()
    x, _ = batch_of(run)

    def distances():
        return [
            lyapunov_exponents(
                network.core, x, 3, layer=layer, reverse=reverse, generator=torch.Generator()
            )
            .square()
            .mean()
            for layer in range(network.core.num_layers)
            for reverse in (False, True)[: network.directions]
        ]

    before, readout = distances(), network.readout.weight.detach().clone()
    generator = torch.Generator().manual_seed(3)
    states = generator.get_state(), torch.get_rng_state()
    remedy = next(remedy for remedy in run.remedies if remedy.name == "flossing")
    remedy.prepare(network, Problem(run.task, run.horizon), generator)
    assert torch.equal(states[0], generator.get_state())  # training sees the same data
    assert torch.equal(states[1], torch.get_rng_state())
    assert all(new < 0.7 * old for new, old in zip(distances(), before, strict=True))
    assert torch.equal(readout, network.readout.weight)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_flossing_of_closed_relus_says_which_remedy_failed():
    run = run_of("rnn", "flossing", model={"nonlinearity": "relu"})
    network = run.build_model()
    nn.init.constant_(network.core.bias_ih_l0, -10.0)
    with pytest.raises(ConfigError, match=r"remedy\.flossing: count: expected at most 0"):
        run.remedies[0].prepare(network, Problem(run.task, T), torch.Generator())


# ---- in a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("core", "remedies", "stop"),
    [
        ("fused_rnn", ("spectral_norm", "flossing", "omega", "truncated_bptt", "clipping"), 0),
        ("lstm", ("orthogonal_parametrization", "flossing", "gate_bias", "initialisation"), 7),
        ("fused_lstm", ("orthogonal_parametrization", "flossing", "gate_bias"), 7),
        ("fused_gru", ("spectral_norm", "truncated_bptt"), 7),
        ("rnn", ("leaky", "orthogonal_parametrization", "truncated_bptt"), 0),
        ("fused_rnn", ("orthogonal_parametrization", "omega", "flossing"), 7),
    ],
)
def test_a_run_that_was_interrupted_ends_with_the_same_bits(core, remedies, stop, tmp_path):
    run = run_of(
        core,
        *remedies,
        training={"steps": 10},
        probe={"adjoint": {"every": 3}},
        optimizer={"name": "adam"},
    )
    looks = itertools.count()
    with pytest.raises(Interrupted):
        train(run, tmp_path / run.folder_name, is_asked_to_end=lambda: next(looks) == stop)
    broken, whole = trained(run, tmp_path)[0], trained(run, tmp_path / "whole")[0]
    assert_same(outcome(broken), outcome(whole))


def test_a_step_of_training_goes_down_loss_and_penalty_together(tmp_path):
    run = run_of(
        "fused_rnn",
        "omega",
        precision="float64",
        training={"steps": 1, "accumulation": 2},
        optimizer={"name": "sgd", "learning_rate": 0.5},
    )
    model = run.build_model()
    batches = Batches(run)
    for _ in range(2):
        x, target = batches.next()
        loss = run.task.loss(model(x), target)
        ((loss + run.remedies[0].penalty(model, x, loss)) / 2).backward()
    after = weights_after(run, tmp_path)
    for name, parameter in model.named_parameters():
        moved = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(after[name], moved, rtol=1e-10, atol=1e-13)


def test_flossing_comes_before_the_first_measurement_and_leaves_the_data(tmp_path):
    exponents, data = [], []
    for remedies in ((), ("flossing",)):
        run = run_of(
            "rnn",
            *remedies,
            options={"flossing": {"steps": 20, "learning_rate": 1e-2, "exponents": 3}},
            probe={"lyapunov": {"exponents": 1}},
        )
        folder, record = trained(run, tmp_path)
        exponents.append(record.probes["lyapunov"]["initial"]["exponents"][0])
        data.append(checkpoint.load(folder)["data"]["generator"])
    assert abs(exponents[1]) < 0.5 * abs(exponents[0])
    assert torch.equal(*data)


def test_a_remedy_is_added_with_one_file_as_the_page_says(tmp_path):
    name, source, shown = example("remedies", "remedy")
    (tmp_path / f"{name}.py").write_text(source)
    program = listing_also("experiments.remedies", tmp_path) + (
        "import experiments.config as config\n"
        "config.build_remedies = package.build_remedies\n"
        "def run(**remedy):\n"
        "    values = dict(model=dict(core='rnn'), task=dict(name='adding'), remedy=remedy)\n"
        "    return config.RunConfig.parse(values).build_model().core\n"
        f"plain, scaled = run(), run({name}={dict(shown)!r})\n"
        "print((scaled.weight_ih_l0 / plain.weight_ih_l0).unique().tolist())\n"
    )
    assert printed_by(program) == f"[{shown.factor}]\n"
