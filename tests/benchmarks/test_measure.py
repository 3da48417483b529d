"""One case: who takes part, who is refused, and for what."""

import contextlib
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import machine, measure, quality, timing
from benchmarks.cases import GPU_GRID_SHAPES, GRID_SHAPES, SUITES, TITLES, Case, cases_of, target_of
from benchmarks.contestants import CONTESTANTS
from benchmarks.contestants.torch_modules import TorchRNN
from benchmarks.problem import Problem, tf32_allowed

TINY = Case("grid", 5, 3, 2, 4, "train")

pytestmark = pytest.mark.usefixtures("one_thread")


class WrongRNN(TorchRNN):
    """Forgets a bias."""

    def prepare(self, problem):
        bias = problem.weights["bias_hh_l0"]
        problem.weights["bias_hh_l0"] = torch.zeros_like(bias)
        work = super().prepare(problem)
        problem.weights["bias_hh_l0"] = bias
        return work


class CrashingRNN(TorchRNN):
    """Cannot be prepared."""

    def prepare(self, problem):
        raise RuntimeError("no such device\nand a long trace")


class AbsentRNN(TorchRNN):
    """Is not installed."""

    needs = ("no_such_package_for_sure",)


def test_whoever_computes_something_else_is_refused_and_the_others_are_timed():
    others = {"wrong": WrongRNN(), "crashing": CrashingRNN(), "absent": AbsentRNN()}
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
    "name",
    [
        *("fused_rnn", "rnn_cell_loop", "fused_rnn_cell_loop", "elman_rnn", "operator"),
        *("jax", "onnxruntime", "keras"),
    ],
)
def test_contestants_compute_what_torch_nn_rnn_computes(name, mode, monkeypatch):
    for key, value in machine.thread_environment(1).items():
        monkeypatch.setenv(key, value)
    contestant, case = CONTESTANTS[name], replace(TINY, mode=mode, I=64, nonlinearity="relu")
    if reason := contestant.missing("cpu") or contestant.refuses(case):
        pytest.skip(reason)
    problem = Problem(case)
    work = contestant.prepare(problem)
    assert problem.disagreement(work.as_tensors(work.run())) is None


@pytest.mark.parametrize(
    "options",
    [
        {"packed": True},
        {"bidirectional": True, "num_layers": 2},
        {"batch_first": True},
        {"nonlinearity": "sigmoid"},
        {"dtype": "bfloat16"},
        {"input_scale": 1e-40, "bias_scale": 0.0, "suite": "accuracy"},
    ],
)
def test_variants_agree_with_their_oracle(options):
    problem = Problem(replace(TINY, **options))
    assert problem.disagreement(CONTESTANTS["fused_rnn"].prepare(problem).run()) is None


def test_only_contestants_of_their_own_numbers_go_unchecked():
    unchecked = {name for name, contestant in CONTESTANTS.items() if not contestant.same_numbers}
    assert unchecked == {"torch_lstm", "torch_gru", "fused_rnn_dense", "fused_rnn_tanh"}


# ---- as on a GPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize("replays", [True, False])
def test_a_graph_is_timed_only_if_its_replay_writes_the_right_numbers(monkeypatch, replays):
    def captured(work):
        results = [r.detach().fill_(float("nan")) for r in work.run()]

        def replay():
            for result, value in zip(results, work.run() if replays else results, strict=True):
                result.detach().copy_(value)
            return results

        return replace(work, run=replay)

    monkeypatch.setattr(measure, "captured", captured)
    monkeypatch.setattr(measure, "seconds_by_events", timing.seconds_by_clock)
    monkeypatch.setattr(measure, "Problem", lambda case, device: Problem(case))
    monkeypatch.setattr(measure, "plans_of", lambda case: "no plan")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    result = measure.measure(replace(TINY, suite="small"), CONTESTANTS, 0.0, "cuda")
    assert "seconds" in result["contestants"]["fused_rnn"]
    graphed = result["graphed"]["fused_rnn"]
    assert ("seconds" in graphed) == replays
    wrong = "computes something else: output differs by nan"
    assert replays or graphed["skipped"].startswith(wrong)


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
    assert len(set(GRID_SHAPES)) == len(GRID_SHAPES) >= 60
    assert len(set(GPU_GRID_SHAPES)) == len(GPU_GRID_SHAPES) >= 40
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
    assert all(sum(case.operations()) < 1e7 for case in quick)


def test_a_run_on_a_gpu_that_is_cut_short_has_seen_every_regime_with_a_target():
    first = cases_of(SUITES["cuda"])[:16]
    with_target = {c.suite for c in cases_of(SUITES["cuda"]) if target_of(c, None)}
    assert {case.suite for case in first} == with_target
    assert [case.mode for case in first] == ["train", "forward"] * 8


def test_operations_are_those_of_the_definition():
    case = Case("grid", 10, 4, 3, 8, "train")
    recurrent, others = case.operations()
    assert recurrent == 2 * 2 * 40 * 8 * 8  # h U^T forward, delta U backward
    assert others == 2 * 40 * 8 * (3 + 8 + 3)  # W x; dU; dW
    stacked = replace(case, mode="forward", num_layers=2, bidirectional=True)
    assert stacked.operations(30) == (4 * 2 * 30 * 64, 2 * 2 * 30 * 8 * (3 + 16))


def test_the_rate_of_multiply_adds_is_above_that_of_a_product():
    rate = quality.multiply_add_rate()
    a = torch.randn(256, 256)
    assert rate * timing.seconds_by_clock(lambda: a @ a, 20) > 0.9 * 2 * 256**3
