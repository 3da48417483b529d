"""One case: who takes part, who is refused, and for what."""

import contextlib
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import machine, measure, quality, timing
from benchmarks.cases import (
    GRID_SHAPES,
    RANDOM_SHAPES,
    SUITES,
    TITLES,
    Case,
    cases_of,
    target_of,
)
from benchmarks.contestants import CONTESTANTS
from benchmarks.contestants.torch_modules import TorchLayer
from benchmarks.problem import Problem, tf32_allowed

TINY = Case("grid", 5, 3, 2, 4, "train")

pytestmark = pytest.mark.usefixtures("one_thread")


class WrongRNN(TorchLayer):
    """Forgets a bias."""

    def prepare(self, problem):
        bias = problem.weights["bias_hh_l0"]
        problem.weights["bias_hh_l0"] = torch.zeros_like(bias)
        work = super().prepare(problem)
        problem.weights["bias_hh_l0"] = bias
        return work


class CrashingRNN(TorchLayer):
    """Cannot be prepared."""

    def prepare(self, problem):
        raise RuntimeError("no such device\nand a long trace")


class AbsentRNN(TorchLayer):
    """Is not installed."""

    needs = ("no_such_package_for_sure",)


def test_whoever_computes_something_else_is_refused_and_the_others_are_timed():
    kinds = {"wrong": WrongRNN, "crashing": CrashingRNN, "absent": AbsentRNN}
    others = {name: kind(name, "elman") for name, kind in kinds.items()}
    case = replace(TINY, suite="accuracy", contestants=("torch_rnn", "fused_rnn", *others))
    result = measure.measure(case, case.contestants, 0.0, contestants={**CONTESTANTS, **others})
    found = result["contestants"]
    assert found["wrong"]["skipped"].startswith("computes something else: output differs by")
    assert found["crashing"] == {"skipped": "failed: RuntimeError: no such device"}
    assert found["absent"] == {"skipped": "not installed: no_such_package_for_sure"}
    assert found["fused_rnn"]["rounds"] == found["torch_rnn"]["rounds"] == timing.MIN_ROUNDS
    assert found["fused_rnn"]["ratio"]["low"] <= found["fused_rnn"]["ratio"]["high"]
    assert list(found["fused_rnn"]["errors"]) == Problem(case).names()
    assert all(1e-9 < error < 1e-5 for error in found["torch_rnn"]["errors"].values())
    assert result["tokens"] == 15


def test_results_may_be_twice_as_wrong_as_torchs_and_no_more():
    problem = Problem(TINY)
    wrong = [tensor * (1 + 3e-4) for tensor in problem.expected]
    assert "differs by 3.0e-04 of its norm" in problem.disagreement(wrong)
    problem.torch_errors = [1.1e-4] * len(wrong)  # as of a sum that nearly cancels
    assert problem.disagreement(wrong) is None
    problem.torch_errors[2] = 0.9e-4
    assert problem.disagreement(wrong).startswith(f"{problem.names()[2]} differs by")
    assert "1 results, expected 5" in problem.disagreement(wrong[:1])


@pytest.mark.parametrize("mode", ["forward", "train", "hvp"])
@pytest.mark.parametrize(
    "name", sorted(CONTESTANTS.keys() - {"fused_rnn_dense", "flashrnn", "compiled_loop"})
)
def test_contestants_compute_what_torchs_layer_of_their_cell_computes(name, mode, monkeypatch):
    for key, value in machine.thread_environment(1).items():
        monkeypatch.setenv(key, value)
    contestant = CONTESTANTS[name]
    case = replace(TINY, mode=mode, I=64, cell=contestant.cell)
    case = replace(case, nonlinearity="relu" if case.cell == "elman" else "tanh")
    if reason := contestant.missing("cpu") or contestant.refuses(case):
        pytest.skip(reason)
    assert contestant.computes(case)
    problem = Problem(case)
    work = contestant.prepare(problem)
    assert problem.disagreement(work.as_tensors(work.run())) is None


@pytest.mark.parametrize(
    "options",
    [
        {"packed": True},
        {"bidirectional": True, "num_layers": 2},
        {"batch_first": True},
        {"dtype": "bfloat16"},
        {"input_scale": 1e-40, "bias_scale": 0.0, "suite": "accuracy"},
    ],
)
def test_variants_agree_with_their_oracle(options):
    problem = Problem(replace(TINY, **options))
    assert problem.disagreement(CONTESTANTS["fused_rnn"].prepare(problem).run()) is None


def test_only_models_of_another_cell_and_dense_sequences_go_unchecked():
    unchecked = {name for name, each in CONTESTANTS.items() if not each.computes(TINY)}
    assert {name for name in unchecked if CONTESTANTS[name].cell == "elman"} == {"fused_rnn_dense"}
    lstm = replace(TINY, cell="lstm")
    assert CONTESTANTS["torch_lstm"].computes(lstm)
    assert not CONTESTANTS["torch_rnn"].computes(lstm)
    CONTESTANTS["torch_lstm"].prepare(Problem(TINY)).run()  # with weights of its own


@pytest.mark.parametrize("allowed", [True, False])
def test_both_sides_run_under_the_same_tf32_setting_which_then_goes_back(allowed):
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    with contextlib.suppress(KeyError), tf32_allowed(allowed):
        assert [switch.allow_tf32 for switch in switches] == [allowed, allowed]
        raise KeyError
    assert [switch.allow_tf32 for switch in switches] == before


# ---- cases ---------------------------------------------------------------------------------------


def test_the_grids_span_the_stated_sizes_within_their_bounds():
    for axis, most in enumerate((4096, 256, 1024, 2048)):
        sizes = [shape[axis] for shape in GRID_SHAPES]
        assert (min(sizes), max(sizes)) == (1, most)
        assert 1 <= min(shape[axis] for shape in RANDOM_SHAPES) < 4
        limit = min(most, 1024) if axis else most
        assert 0.7 * limit < max(shape[axis] for shape in RANDOM_SHAPES) <= limit
    assert len(set(GRID_SHAPES)) == len(GRID_SHAPES) >= 60
    assert len(set(RANDOM_SHAPES)) == 100
    for T, B, I, H in GRID_SHAPES:
        # Everyone keeps the input and its gradient; torch about five sequences of states.
        held = 4 * (2 * T * B * (I + 5 * H) + 4 * H * (I + H))
        assert 2 * T * B * H * (I + H) <= 1e11
        assert held <= 2 * 2**30


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_names_of_their_own_known_contestants_and_titles(device):
    cases = cases_of(SUITES[device])
    assert len({case.name for case in cases}) == len(cases)
    assert set(TITLES) >= {case.suite for case in cases}
    for case in cases:
        assert Case.from_json(asdict(case)) == case
        assert {case.baseline, case.ours} <= set(case.contestants) <= set(CONTESTANTS)
    quick = cases_of(SUITES[device], quick=True)
    kinds, quick_kinds = ({(c.suite, c.mode, c.label) for c in some} for some in (cases, quick))
    assert quick_kinds == kinds
    assert all(case.operations(case.T * case.B) < 1e7 for case in quick)


def test_a_run_on_a_gpu_that_is_cut_short_has_seen_every_regime():
    suites = SUITES["cuda"]
    assert [case.suite for case in cases_of(suites)[: 2 * len(suites)]] == [*suites, *suites]
    assert {case.suite for case in cases_of(suites) if target_of(case, None)} < set(suites)
    gated = [case for case in cases_of(["gated"]) if case.shape == (512, 1, 64, 256)]
    targets = {(case.cell, case.mode): target_of(case, 2) for case in gated}
    assert (targets["gru", "train"], targets["lstm", "forward"]) == (23, 1.45)


def test_operations_are_those_of_the_definition():
    case = Case("grid", 10, 4, 3, 8, "train")
    # h U^T forward, delta U backward, dU; W x, dW.
    assert case.operations(40) == 2 * 40 * 8 * (8 + 8 + 8 + 3 + 3)
    stacked = replace(case, mode="forward", num_layers=2, bidirectional=True)
    assert stacked.operations(30) == 4 * 2 * 30 * 64 + 2 * 2 * 30 * 8 * (3 + 16)
    assert replace(case, cell="lstm").operations(40) == 4 * case.operations(40)


def test_the_rate_of_multiply_adds_is_above_that_of_a_product():
    rate = quality.multiply_add_rate()
    a = torch.randn(256, 256)
    assert rate * timing.seconds_by_clock(lambda: a @ a, 20) > 0.9 * 2 * 256**3
