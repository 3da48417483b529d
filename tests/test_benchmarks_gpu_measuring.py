"""The benchmark on a GPU, rehearsed with stand-ins: cases, ratios, budget, and who is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.gpu import bench, measure, timing
from benchmarks.gpu.cases import (
    FLASH,
    GRID,
    LARGE,
    MIDDLE,
    MODES,
    PACKED,
    REGIMES,
    SMALL,
    STACKED,
    GpuCase,
    all_cases,
    rehearsal_cases,
)
from benchmarks.gpu.context import Context, StageError
from benchmarks.gpu.problems import CONTENDERS, FlashRNN, OurRNN, TorchRNN, tf32_allowed
from benchmarks.gpu.worker import LONGEST, SHORTEST, seconds_for_each
from benchmarks.timing import MIN_ROUNDS, Contestant, interleave
from tests.gpu_stand_ins import timing_of

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = GpuCase(Case("small", 5, 3, 2, 4, "train"))


# ---- cases ---------------------------------------------------------------------------------------


def test_every_shape_that_has_a_target_is_timed_in_every_dtype_that_it_is_set_for():
    timed = {
        (c.regime, c.case.shape, c.case.dtype, c.case.mode, c.case.packed, c.case.num_layers)
        for c in all_cases()
    }
    full, half = ("float32", "bfloat16"), ("bfloat16",)
    for regime, shapes, dtypes, packed, layers in [
        ("small", SMALL, (*full, "float16"), False, 1),
        ("middle", MIDDLE, full, False, 1),
        ("fp16", MIDDLE[:3], ("float16",), False, 1),
        ("large", LARGE, half, False, 1),
        ("packed", PACKED, full, True, 1),
        ("stacked", STACKED, full, False, 2),
        ("flashrnn", FLASH, half, False, 1),
    ]:
        for shape in shapes:
            for dtype in dtypes:
                for mode in MODES:
                    assert (regime, shape, dtype, mode, packed, layers) in timed


def test_the_grid_has_forty_different_shapes_that_fit_time_and_memory():
    assert len(set(GRID)) == 40
    for T, B, I, H in GRID:
        assert 2 * T * B * H * (I + H) < 1e12
        assert 4 * T * B * (I + H) < 4e9
    dtypes = {case.case.dtype for case in all_cases() if case.regime == "grid"}
    assert dtypes == {"float32", "bfloat16", "float16"}


def test_a_label_names_one_case_and_a_case_survives_json():
    cases = all_cases()
    assert len({case.label for case in cases}) == len(cases)
    for case in cases:
        assert GpuCase.from_json(json.loads(json.dumps(case.as_json()))) == case


def test_a_run_that_is_cut_short_has_seen_every_regime_with_a_target():
    first = {case.regime for case in all_cases()[:16]}
    assert first == {case.regime for case in all_cases() if case.target is not None}


def test_the_rehearsal_has_each_regime_once_and_tiny():
    cases = rehearsal_cases()
    assert sorted(case.regime for case in cases) == sorted(REGIMES)
    assert all(case.case.operations < 1e5 for case in cases)


# ---- the clock -----------------------------------------------------------------------------------


def test_rounds_are_interleaved_under_any_clock_and_the_ratio_is_that_of_each_round():
    turns: list[str] = []
    seconds = {"torch_rnn": iter([9, 9, *[2e-2, 4e-2, 9e-2, 4e-2, 4e-2]])}
    seconds["fused_rnn"] = iter([9, 9, *[1e-2, 1e-2, 3e-2, 4e-2, 1e-2]])

    def clock(run, repeats):
        return next(seconds[run()])

    contestants = {
        name: Contestant(lambda name=name: turns.append(name) or name) for name in seconds
    }
    samples, repeats = interleave(contestants, 0.0, clock)
    assert turns[4:] == ["torch_rnn", "fused_rnn"] * MIN_ROUNDS  # after two estimates of each
    assert set(repeats.values()) == {1}
    ratios = [a / b for a, b in zip(samples["torch_rnn"], samples["fused_rnn"], strict=True)]
    assert ratios == pytest.approx([2, 4, 3, 1, 4])


def test_ratios_to_other_peers_are_theirs_over_ours():
    samples = {"torch_rnn": [9.0] * 3, "fused_rnn": [1.0, 2.0, 4.0], "flashrnn": [3.0, 4.0, 4.0]}
    assert measure.ratios_to(samples, "fused_rnn") == {
        "flashrnn": {"q1": 1.5, "median": 2.0, "q3": 2.5}
    }


class FakeEvent:
    """Counts calls as a millisecond each."""

    calls = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.calls

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        assert end.waited
        return float(end.at - self.at)


def test_events_give_seconds_per_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)

    def run():
        FakeEvent.calls += 3

    assert timing.seconds_by_events(run, 4) == pytest.approx(3e-3)


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph: a replay calls what it is given."""

    replayed = staticmethod(lambda: None)

    def replay(self):
        FakeGraph.replayed()


class FakeStream:
    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def fake_cuda(monkeypatch):
    """Let graphs be captured on the CPU; return the fake graph's class."""
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: FakeStream())
    return FakeGraph


def test_a_graph_whose_replay_writes_nothing_is_not_timed(fake_cuda, monkeypatch):
    problem = measure.DeviceProblem(TINY, "cpu")
    work = OurRNN().work(problem)
    monkeypatch.setattr(measure, "Graph", timing.Graph)
    replays, refused = measure._captured({"fused_rnn": work}, problem, "fake")
    assert not replays
    assert refused["fused_rnn"].startswith("computes something else: output differs by nan")


def test_a_graph_whose_replay_writes_the_right_numbers_is_timed(fake_cuda, monkeypatch):
    problem = measure.DeviceProblem(TINY, "cpu")
    work = OurRNN().work(problem)
    captured = []

    def remembering():
        captured[:] = work()
        return captured

    def replay():
        for to, value in zip(captured, work(), strict=True):
            to.detach().copy_(value.detach())

    monkeypatch.setattr(fake_cuda, "replayed", staticmethod(replay))
    replays, refused = measure._captured({"fused_rnn": remembering}, problem, "fake")
    assert not refused
    assert list(replays) == ["fused_rnn"]


# ---- contestants ---------------------------------------------------------------------------------


class WrongRNN(OurRNN):
    """Forgets a bias."""

    def work(self, problem):
        problem = measure.DeviceProblem(TINY, "cpu")
        problem.weights["bias_hh_l0"].zero_()
        return super().work(problem)


class CrashingRNN(OurRNN):
    def work(self, problem):
        raise RuntimeError("no such kernel\nand a long trace")


def test_whoever_computes_something_else_or_fails_is_named_and_the_others_are_timed():
    case = replace(TINY, case=replace(TINY.case, contestants=("torch_rnn", "a", "b", "flashrnn")))
    contenders = {"torch_rnn": TorchRNN(), "a": WrongRNN(), "b": CrashingRNN()}
    found = measure.measure(case, "cpu", 0.0, contenders | {"flashrnn": FlashRNN()})
    assert found["eager"]["a"]["skipped"].startswith("computes something else: output differs by")
    assert found["eager"]["b"] == {"skipped": "failed: RuntimeError: no such kernel"}
    assert found["eager"]["flashrnn"] == {"skipped": "not installed: flashrnn"}
    assert found["eager"]["torch_rnn"]["rounds"] == MIN_ROUNDS
    assert found["graphed"]["torch_rnn"] == {"skipped": "a CUDA graph needs a GPU"}


def test_a_case_that_cannot_even_be_drawn_is_a_failure_and_no_crash(monkeypatch):
    def too_large(case, device):
        raise MemoryError("4 TiB")

    monkeypatch.setattr(measure, "DeviceProblem", too_large)
    found = measure.measure(TINY, "cpu", 0.0)
    assert found == {"case": TINY.as_json(), "failed": "failed: MemoryError: 4 TiB"}


@pytest.mark.parametrize("tf32", [False, True])
def test_both_sides_run_under_the_same_tf32_setting(tf32):
    before = torch.backends.cudnn.rnn.fp32_precision
    seen = []

    class Spy(OurRNN):
        def work(self, problem):
            work = super().work(problem)

            def spying():
                settings = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
                seen.extend(setting.fp32_precision == "tf32" for setting in settings)
                return work()

            return spying

    case = GpuCase(replace(TINY.case, contestants=("torch_rnn", "fused_rnn")), tf32=tf32)
    measure.measure(case, "cpu", 0.0, {"torch_rnn": Spy(), "fused_rnn": Spy()})
    assert set(seen) == {tf32}
    assert torch.backends.cudnn.rnn.fp32_precision == before


def test_tf32_goes_back_to_what_it_was():
    with tf32_allowed(True), tf32_allowed(False):
        assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_forward_pass_is_timed_in_evaluation_mode_and_the_step_in_training_mode():
    modules = []

    class Spy(TorchRNN):
        @staticmethod
        def kind(*args, **options):
            modules.append(torch.nn.RNN(*args, **options))
            return modules[-1]

    for mode in MODES:
        Spy().work(measure.DeviceProblem(GpuCase(replace(TINY.case, mode=mode)), "cpu"))
    assert [module.training for module in modules] == [False, True]


def test_flashrnn_gets_its_own_layout_and_its_input_product_is_inside(monkeypatch):
    """A stand-in for the package computes the recurrence as its documentation defines it."""

    def config(**fields):
        return SimpleNamespace(**fields)

    def flashrnn(Wx, R, b, *, function, config, dtype):
        T, B, gates, heads, H = Wx.shape
        assert (gates, heads, function, config.head_dim) == (1, 1, "elman", H)
        assert (config.input_shape, config.output_shape) == ("TBGHD", "STBHD")
        state, states = torch.zeros(B, H, dtype=Wx.dtype), []
        for t in range(T):
            state = torch.tanh(Wx[t, :, 0, 0] + state @ R[0, 0].T + b[0, 0])
            states.append(state)
        return torch.stack(states).view(1, T, B, 1, H), None

    module = SimpleNamespace(FlashRNNConfig=config, flashrnn=flashrnn)
    monkeypatch.setitem(sys.modules, "flashrnn", module)
    problem = measure.DeviceProblem(TINY, "cpu")
    assert problem.disagreement(CONTENDERS["flashrnn"].work(problem)()) is None


# ---- the budget ----------------------------------------------------------------------------------


def test_early_cases_get_more_time_than_late_ones_and_all_get_some():
    assert seconds_for_each(1000.0, 10) == LONGEST
    assert seconds_for_each(1.0, 1000) == SHORTEST
    assert seconds_for_each(100.0, 400) == pytest.approx(0.25)


CASES = [replace(TINY, case=replace(TINY.case, T=T)) for T in (1, 2, 3, 4)]


def worker(body: str):
    """Return a start function; `body` sees `cases`, `number` of this process, and `answer`."""
    started = []

    def start():
        started.append(None)
        program = (
            "import json, os, sys, time\n"
            "job = json.load(sys.stdin)\n"
            "cases = job['cases']\n"
            f"number = {len(started)}\n"
            "def answer(**value): print(json.dumps(value), flush=True)\n"
            f"{body}\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


ANSWER_ALL = """
answer(ready=True)
for i, case in enumerate(cases):
    answer(started=i)
    {at_second}
    answer(index=i, case=case, process=number)
"""


def run_with(at_second: str = "pass", seconds: float = 30.0, patience: float = 20.0):
    """Return results where the second case, T = 2, meets that line."""
    line = f"if case['case']['T'] == 2: {at_second}"
    start = worker(ANSWER_ALL.format(at_second=line))
    results = bench.run_cases(CASES, "cpu", seconds, start, patience)
    return [(r["case"]["case"]["T"], r.get("failed", r.get("process"))) for r in results]


def test_all_cases_are_measured_by_one_process_if_nothing_happens():
    assert run_with() == [(1, 1), (2, 1), (3, 1), (4, 1)]


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("os.abort()", "ended with signal 6"),
        ("raise SystemExit(3)", "ended with exit status 3"),
        ("answer(why='device lost'); raise SystemExit(1)", "ended with exit status 1: device lost"),
    ],
)
def test_a_case_that_its_process_does_not_survive_fails_and_a_new_one_does_the_rest(what, how):
    assert run_with(what) == [(1, 1), (2, how), (3, 2), (4, 2)]


def test_a_case_that_hangs_is_ended_and_a_new_process_does_the_rest():
    assert run_with("time.sleep(60)", patience=1.0) == [
        *((1, 1), (2, "hung: killed after 1 s"), (3, 2), (4, 2))
    ]


def test_when_the_time_is_over_what_was_measured_stays():
    begin = time.monotonic()
    assert run_with("time.sleep(60)", seconds=3.0) == [(1, 1)]
    assert time.monotonic() - begin < 10


def test_a_process_that_never_starts_is_no_fault_of_a_case():
    with pytest.raises(RuntimeError, match="ended with exit status 5"):
        list(bench.run_cases(CASES, "cpu", 30.0, worker("raise SystemExit(5)")))


def test_after_several_lost_processes_the_rest_is_not_tried():
    start = worker("answer(started=0); os.abort()")
    many = [replace(TINY, case=replace(TINY.case, T=T)) for T in range(1, 9)]
    assert len(list(bench.run_cases(many, "cpu", 60.0, start))) == bench.MOST_LOST_WORKERS


def test_the_worker_measures_and_answers_in_json():
    cases = [TINY, replace(TINY, case=replace(TINY.case, mode="forward"))]
    results = list(bench.run_cases(cases, "cpu", 60.0))
    assert [result["case"]["case"]["mode"] for result in results] == ["train", "forward"]
    assert all("ratio" in result["eager"]["fused_rnn"] for result in results)
    assert results[0]["plans"] == "no plan: not on a GPU"


# ---- the stage -----------------------------------------------------------------------------------


def test_the_stage_leaves_what_it_measured_and_lists_what_it_did_not(tmp_path, monkeypatch, capsys):
    first, second = rehearsal_cases()[:2]
    monkeypatch.setattr(bench, "run_cases", lambda *_: iter([timing_of(first, 2.0)]))
    bench.bench(Context(tmp_path, 60.0, "cpu"))
    lines = (tmp_path / "timings.jsonl").read_text().splitlines()
    assert [GpuCase.from_json(json.loads(line)["case"]) for line in lines] == [first]
    unmeasured = json.loads((tmp_path / "unmeasured.json").read_text())
    assert second.label in unmeasured
    assert first.label not in unmeasured
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"1 of {len(rehearsal_cases())} cases, geometric mean 2.00, 0 below 1"


@pytest.mark.parametrize(
    ("launch", "change", "is_fault"),
    [
        ("eager", {"fused_rnn": {"skipped": "computes something else"}}, True),
        ("graphed", {"fused_rnn": {"skipped": "failed: capture"}}, True),
        ("eager", {"flashrnn": {"skipped": "failed: capture"}}, False),
    ],
)
def test_the_stage_fails_where_fusedrnn_is_at_fault(
    tmp_path, monkeypatch, launch, change, is_fault
):
    cases = rehearsal_cases()
    result = timing_of(cases[0])
    result[launch] = {**result[launch], **change}
    good = timing_of(cases[1])
    monkeypatch.setattr(bench, "run_cases", lambda *_: iter([result, good]))
    if is_fault:
        with pytest.raises(StageError, match="wrong: "):
            bench.bench(Context(tmp_path, 60.0, "cpu"))
    else:
        bench.bench(Context(tmp_path, 60.0, "cpu"))


def test_what_torch_cannot_capture_either_is_no_fault_of_ours():
    result = timing_of(TINY)
    result["graphed"] = {
        name: {"skipped": "failed: capture"} for name in ("torch_rnn", "fused_rnn")
    }
    assert bench.summary_of([result], 1)[1] == []


def test_a_stage_that_timed_nothing_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "run_cases", lambda *_: iter([]))
    with pytest.raises(StageError, match="none of 9 cases was timed"):
        bench.bench(Context(tmp_path, 60.0, "cpu"))
