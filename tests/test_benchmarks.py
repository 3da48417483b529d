"""The benchmark: its arithmetic, whom it refuses, what it writes, and that it runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    accuracy,
    figures,
    floor,
    machine,
    memory,
    native_rates,
    report,
    results,
    streaming,
    workers,
)
from benchmarks.cases import (
    GRID_SHAPES,
    SUITES,
    TABLE_SHAPES,
    TIMED_SUITES,
    Case,
    timed_cases,
)
from benchmarks.gates import gate_table
from benchmarks.measure import measure
from benchmarks.peers import PEERS, Prepared, make_peers
from benchmarks.peers.torch_modules import TorchRNN
from benchmarks.problems import Problem, relative_error
from benchmarks.reading import number
from benchmarks.tables import all_tables
from benchmarks.tables_grid import is_slower
from benchmarks.timing import (
    MIN_ROUNDS,
    SHORTEST_SAMPLE,
    Contestant,
    Quartiles,
    geometric_mean,
    interleave,
    summarise,
)

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = Case("grid", 5, 3, 2, 4, "forward")

pytestmark = pytest.mark.usefixtures("one_thread")


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_streaming_times_two_models_that_write_the_same(monkeypatch):
    written = {}

    def timed(contestants, seconds):
        written.update({name: each.run() for name, each in contestants.items()})
        return {"fused_rnn": [0.5], "rnn": [1.0]}, {}

    monkeypatch.setattr(streaming, "interleave", timed)
    fused, plain, ratio = streaming.compared(8, 3, 0.0)
    assert (fused, plain) == (6 * streaming.WRITTEN, 3 * streaming.WRITTEN)
    assert ratio["median"] == 2.0
    assert written["fused_rnn"].shape == (streaming.WRITTEN, 3)
    assert torch.equal(written["fused_rnn"], written["rnn"])


# Arithmetic on made-up samples


def test_a_ratio_is_the_median_over_rounds_not_the_ratio_of_medians():
    samples = {"unit": [1.0, 2.0, 9.0], "other": [1.0, 1.0, 3.0]}  # ratios 1, 2, 3
    summary = summarise(samples, "unit")
    assert summary["other"]["ratio"] == {"q1": 1.5, "median": 2.0, "q3": 2.5}
    assert summary["other"]["seconds"]["median"] == 1.0
    assert summary["unit"]["ratio"]["median"] == 1.0


def test_one_disturbed_round_does_not_move_the_ratio():
    calm = {"unit": [2.0] * 7, "other": [1.0] * 7}
    disturbed = {"unit": [2.0] * 7, "other": [1.0] * 6 + [50.0]}
    assert summarise(disturbed, "unit")["other"]["ratio"]["median"] == 2.0
    assert summarise(calm, "unit")["other"]["ratio"] == Quartiles(2.0, 2.0, 2.0).as_json()


def test_without_the_baseline_there_are_times_and_no_ratios():
    assert "ratio" not in summarise({"other": [1.0, 2.0]}, "unit")["other"]


def test_a_ratio_and_its_inverse_cancel_in_the_geometric_mean():
    assert math.isclose(geometric_mean([4.0, 0.25, 1.0]), 1.0)


def test_rounds_are_interleaved_and_short_calls_repeated():
    calls: list[str] = []
    contestants = {
        name: Contestant(lambda name=name: calls.append(name), runtime=name) for name in "ab"
    }
    samples, repeats = interleave(contestants, seconds=0.0)
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys(
        "ab", MIN_ROUNDS
    )
    assert all(count > 1 for count in repeats.values())
    turns = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    assert "".join(turns).endswith("ab" * MIN_ROUNDS)


def test_a_sample_of_repeated_calls_is_long_enough_for_the_clock():
    samples, repeats = interleave({"a": Contestant(lambda: sum(range(2000)))}, seconds=0.0)
    # The estimate of one call that decides on the repeats is itself a measurement.
    assert samples["a"][0] * repeats["a"] > SHORTEST_SAMPLE / 10


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0123, "0.012"),
        (0.5, "0.50"),
        (9.87, "9.87"),
        (45.67, "45.7"),
        (321.4, "321"),
    ],
)
def test_numbers_are_shown_with_three_digits(value, text):
    assert number(value) == text


# Who is refused


class WrongRNN(TorchRNN):
    """Forgets a bias."""

    name = "wrong"

    def prepare(self, problem: Problem) -> Prepared:
        problem.weights["bias_hh_l0"] = torch.zeros_like(problem.weights["bias_hh_l0"])
        return super().prepare(problem)


class CrashingRNN(TorchRNN):
    """Cannot be prepared."""

    name = "crashing"

    def prepare(self, problem: Problem) -> Prepared:
        raise RuntimeError("no such device\nand a long trace")


def test_a_peer_that_computes_something_else_is_refused_and_the_others_are_timed():
    peers = {"torch_rnn": TorchRNN(1), "wrong": WrongRNN(1), "crashing": CrashingRNN(1)}
    found = measure(replace(TINY, mode="train"), peers, seconds=0.0)["contestants"]
    assert found["wrong"]["skipped"].startswith("computes something else: output differs by")
    assert found["crashing"] == {"skipped": "failed: RuntimeError: no such device"}
    assert found["torch_rnn"]["rounds"] == MIN_ROUNDS


def test_results_may_be_twice_as_wrong_as_torchs_and_no_more():
    problem = Problem(replace(TINY, mode="train"))
    wrong = [tensor * (1 + 3e-4) for tensor in problem.expected]
    assert "differs by 3.0e-04 of its norm" in problem.disagreement(wrong)
    problem.own_errors = [1.1e-4] * len(wrong)  # as of a sum that nearly cancels
    assert problem.disagreement(wrong) is None
    problem.own_errors[2] = 0.9e-4
    assert problem.disagreement(wrong).startswith(f"{problem.result_names()[2]} differs by")


@pytest.mark.parametrize("mode", ["forward", "train", "hvp"])
@pytest.mark.parametrize("name", ["fused_rnn", "rnn_cell_loop", "elman_rnn", "operator"])
def test_torch_contestants_compute_what_torch_nn_rnn_computes(name, mode):
    peer = make_peers([name], 1)[name]
    if reason := peer.missing():
        pytest.skip(reason)
    problem = Problem(replace(TINY, mode=mode, I=64))
    prepared = peer.prepare(problem)
    assert problem.disagreement(prepared.as_tensors(prepared.run())) is None


@pytest.mark.parametrize("name", ["jax", "onnxruntime", "keras"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_other_packages_compute_what_torch_nn_rnn_computes(name, mode, monkeypatch):
    for key, value in machine.thread_environment(1).items():
        monkeypatch.setenv(key, value)
    peer, case = make_peers([name], 1)[name], replace(TINY, mode=mode, I=64, nonlinearity="relu")
    if reason := peer.missing() or peer.refuses(case):
        pytest.skip(reason)
    problem = Problem(case)
    prepared = peer.prepare(problem)
    assert problem.disagreement(prepared.as_tensors(prepared.run())) is None


@pytest.mark.parametrize(
    "options",
    [
        {"packed": True},
        {"bidirectional": True, "num_layers": 2},
        {"batch_first": True},
        {"nonlinearity": "sigmoid"},
        {"dtype": "bfloat16"},
        {"dtype": "float64"},
    ],
)
def test_variants_agree_with_their_oracle(options):
    peer = make_peers(["fused_rnn"], 1)["fused_rnn"]
    problem = Problem(replace(TINY, mode="train", **options))
    assert problem.disagreement(peer.prepare(problem).run()) is None


def test_only_contestants_of_their_own_numbers_go_unchecked():
    unchecked = {name for name, peer in PEERS.items() if not peer.same_numbers}
    assert unchecked == {"torch_lstm", "torch_gru", "fused_rnn_dense", "fused_rnn_tanh"}


def test_missing_packages_are_named():
    class Absent(TorchRNN):
        needs = ("no_such_package_for_sure",)

    assert Absent(1).missing() == "not installed: no_such_package_for_sure"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "tabel"), "unknown suite 'tabel'; choose from table, grid, variants"),
        (("--peers", "tensorflow"), "unknown peer 'tensorflow'; choose from torch_rnn, fused_rnn"),
        (("--threads", "two"), "--threads takes whole numbers and commas, got 'two'"),
        (("--threads", "0"), "--threads takes positive numbers, got 0"),
        (("--render", "nowhere.json"), "there is no file nowhere.json"),
    ],
)
def test_a_wrong_option_is_answered_with_the_choices(arguments, message, capsys):
    from benchmarks.run import main

    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


# Cases


def test_the_grid_spans_the_stated_sizes_within_its_bounds():
    for axis, most in enumerate((4096, 256, 1024, 2048)):
        sizes = [shape[axis] for shape in GRID_SHAPES]
        assert (min(sizes), max(sizes)) == (1, most)
    assert len(set(GRID_SHAPES)) == len(GRID_SHAPES) >= 60
    for shape in GRID_SHAPES:
        case = Case("grid", *shape, "train")
        # Everyone keeps the input and its gradient; torch about five sequences of states.
        held = 4 * (2 * case.T * case.B * (case.I + 5 * case.H) + 4 * case.H * (case.I + case.H))
        assert case.operations <= 1e11, shape
        assert held <= 2 * 2**30, shape


@pytest.mark.parametrize("suite", TIMED_SUITES)
def test_cases_survive_json_and_name_contestants_that_exist(suite):
    for case in timed_cases(suite):
        assert Case.from_json(json.loads(json.dumps(case.as_json()))) == case
        assert set(case.contestants) <= set(PEERS)
        assert case.baseline in case.contestants


@pytest.mark.parametrize("suite", TIMED_SUITES)
def test_quick_cases_are_tiny_and_of_every_kind(suite):
    quick = timed_cases(suite, quick=True)
    assert {(c.mode, c.label) for c in quick} == {(c.mode, c.label) for c in timed_cases(suite)}
    assert all(case.operations < 1e6 for case in quick)


# Accuracy, memory, floor, machine


def test_a_relative_error_is_norm_wise_and_a_zero_has_to_be_met():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf


def test_the_accuracy_gate_binds_only_where_torch_passes_it():
    assert accuracy.passes({"torch_rnn": {"output": 1e-3}, "fused_rnn": {"output": 1e-2}})
    assert accuracy.passes({"torch_rnn": {"output": 1e-7}, "fused_rnn": {"output": 2e-6}})
    assert not accuracy.passes({"torch_rnn": {"output": 1e-7}, "fused_rnn": {"output": 3e-6}})
    assert not accuracy.passes({"torch_rnn": {"output": 0.0}, "fused_rnn": {"output": math.nan}})


def test_accuracy_covers_the_table_a_long_sequence_and_adversarial_data():
    cases = accuracy.accuracy_cases()
    shapes = {(c.T, c.B, c.I, c.H) for c in cases if c.name == "random"}
    assert shapes == {*TABLE_SHAPES, (4096, 16, 8, 64)}
    assert {c.input_scale for c in cases} == {1.0, 1e-40, 1e30, 0.0}


def test_errors_of_torch_in_float32_are_those_of_float32():
    (case,) = [c for c in accuracy.accuracy_cases(quick=True) if c.H == 16]
    found = accuracy.errors(case)
    assert set(found["errors"]["torch_rnn"]) == set(accuracy.QUANTITIES)
    assert all(1e-9 < error < 1e-5 for error in found["errors"]["torch_rnn"].values())


def test_peak_memory_counts_what_a_training_step_holds():
    case = Case("memory", 512, 32, 4, 128, "train")  # a unit of 8 MiB
    found = memory.peak_of(case, "torch_rnn", 1)
    # At the least the states themselves; torch keeps about five such sequences.
    assert 1 < found["bytes"] / memory.unit(case) < 12


def test_the_memory_gate_binds_only_large_points_of_ours():
    def point(contestant: str, T: int, units: float) -> dict:
        case = Case("memory", T, 64, 10, 128, "train")
        size = int(units * memory.unit(case))
        return {"case": case.as_json(), "contestant": contestant, "threads": 1, "bytes": size}

    assert memory.gate_failures([point("fused_rnn", 64, 3.0), point("torch_rnn", 4096, 5.0)]) == []
    assert memory.gate_failures([point("fused_rnn", 4096, 1.1)]) == []
    assert memory.gate_failures([point("fused_rnn", 4096, 1.3)]) == ["T = 4096, 1 thread(s): 1.30"]


def test_the_floor_is_the_sum_of_its_parts_and_grows_with_the_work():
    short, long = (
        floor.floor_of(Case("table", T, 8, 16, 32, "train"), threads=1) for T in (50, 5000)
    )
    for parts in (short, long):
        total = sum(parts[name] for name in ("recurrent", "products", "bytes", "barriers"))
        assert math.isclose(parts["seconds"], total)
        assert parts["barriers"] == 0
    assert long["recurrent"] > 50 * short["recurrent"]


def test_a_barrier_that_does_not_compile_is_reported_as_not_measured(monkeypatch):
    monkeypatch.setattr(native_rates, "_BARRIER_PROGRAM", "this is not C++")
    native_rates.barrier_seconds.cache_clear()
    seconds, why = native_rates.barrier_seconds(2)
    native_rates.barrier_seconds.cache_clear()
    assert seconds is None
    assert why.startswith("not measured")


def test_a_busy_machine_is_remarked_on():
    quiet = {"others": 0.0, "stolen": 0.01}
    assert machine.disturbances([quiet, None], [1e-3, 1.05e-3]) == []
    words = machine.disturbances([quiet, {"others": 0.7, "stolen": 0.4}], [1e-3, 1.5e-3])
    assert len(words) == 3
    assert "in 1 of 2 measurements other processes used more than 0.1 cores" in words[0]
    assert "1.50 times its shortest time" in words[2]


def test_the_name_of_a_results_folder_says_processor_and_date():
    about = {"cpu": "Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz", "date": "2026-01-31T10:00:00"}
    assert machine.folder_name(about) == "intel-xeon-e5-2690-v4-2026-01-31"


# Workers


def test_a_crash_costs_one_case_and_the_rest_is_still_measured(monkeypatch):
    jobs = []

    def answers(job):
        jobs.append(job["cases"])
        for index, case in enumerate(job["cases"]):
            yield {"started": index}
            if case == "crash":
                raise workers.WorkerError("the measuring process ended with signal 11")
            yield {"index": index, "case": case}

    monkeypatch.setattr(workers, "_answers", answers)
    found = list(workers.run_cases({"threads": 1}, ["a", "crash", "b"]))
    assert [result["case"] for result in found] == ["a", "crash", "b"]
    assert "signal 11" in found[1]["failed"]
    assert jobs == [["a", "crash", "b"], ["b"]]


# Reports


def made_up_results() -> dict:
    """Results of a run that never was: FusedRNN takes half of torch.nn.RNN's time."""
    suites = ["table", "grid", "scaling", "accuracy", "memory"]
    factors = {"torch_rnn": 1.0, "fused_rnn": 0.5, "jax": 0.8, "torch_lstm": 3.0}
    timings = []
    for threads in (1, 2):
        for suite in suites[:3]:
            for case in timed_cases(suite):
                base = 1e-4 + case.operations / (5e10 * threads)
                samples = {
                    name: [base * factor] * 5
                    for name, factor in factors.items()
                    if name in case.contestants
                }
                contestants = summarise(samples, "torch_rnn")
                contestants |= {
                    name: {"skipped": "has no gradients"}
                    for name in case.contestants
                    if name not in factors
                }
                timings.append(
                    {
                        "case": case.as_json(),
                        "threads": threads,
                        "tokens": case.T * case.B,
                        "contestants": contestants,
                        "load": {"others": 0.0, "stolen": 0.0},
                        "calibration": 1e-3,
                        "floor": {"seconds": base / 4, "at_peak": base / 5, "barrier": 1e-7},
                    }
                )
    error = dict.fromkeys(accuracy.QUANTITIES, 1e-7)
    point = {"case": memory.training_cases()[-1].as_json(), "threads": 1}
    return {
        "schema": results.SCHEMA,
        "complete": True,
        "command": "python -m benchmarks.run",
        "machine": {**machine.describe(), "git_commit": "0" * 40, "git_modified": False},
        "suites": suites,
        "threads": [1, 2],
        "seconds": 2.0,
        "quick": False,
        "backend": "native",
        "peers": {
            name: {"title": peer.title, "missing": None, "version": None}
            for name, peer in PEERS.items()
        },
        "timings": timings,
        "accuracy": [
            {
                "case": accuracy.accuracy_cases()[0].as_json(),
                "errors": {"torch_rnn": error, "fused_rnn": {**error, "input": math.inf}},
                "passed": False,
            }
        ],
        "memory": [
            {**point, "contestant": "fused_rnn", "bytes": 140_000_000},
            {**point, "contestant": "torch_rnn", "skipped": "failed: MemoryError"},
        ],
    }


def test_results_survive_json_and_say_none_where_there_is_no_number(tmp_path):
    found = made_up_results()
    results.save(found, tmp_path)
    loaded = results.load(tmp_path / results.FILE)
    assert loaded["accuracy"][0]["errors"]["fused_rnn"]["input"] is None
    before, after = (r["timings"][0]["contestants"]["fused_rnn"] for r in (found, loaded))
    assert after["seconds"] == pytest.approx(before["seconds"], rel=1e-5)
    assert results.as_text(loaded) == results.as_text(found)
    assert report.markdown(loaded) == report.markdown(found)


def test_a_file_that_holds_no_results_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"other\.json holds no results"):
        results.load(path)


def test_gates_follow_from_the_numbers():
    rows = {row[0]: row[1:] for row in gate_table(made_up_results()).rows}
    assert rows["ahead of every peer that could be timed"][0] == "yes"
    # A ratio of 2 everywhere reaches few targets: those of at most 2 / 0.9.
    holds, words = rows["targets reached within 10%"]
    assert (holds, words.partition(" do not")[0]) == ("NO", "26 of 36")
    assert rows["on the grid no slower than torch.nn.RNN by more than 2%"][0] == "yes"
    assert rows["errors at most 2e-06 wherever torch.nn.RNN's are"][0] == "NO"
    assert rows["peak memory of a training step at most 1.2 x T*B*H*4 bytes"][0] == "yes"


def test_a_target_is_possible_if_the_multiply_adds_alone_leave_time_for_it():
    found = made_up_results()
    possible = "the same of those that this machine's multiply-adds alone leave time for"

    def gate(ratio_at_peak: float) -> tuple[str, ...]:
        for timing in found["timings"]:
            unit = timing["contestants"]["torch_rnn"]["seconds"]["median"]
            timing["floor"]["at_peak"] = unit / ratio_at_peak
        rows = {row[0]: row[1:] for row in gate_table(found).rows}
        assert rows["targets reached within 10%"] == of_all
        return rows.get(possible, ())

    # The least target is 1.3, once, of which nine tenths count; the made-up ratio is 2.
    of_all = {row[0]: row[1:] for row in gate_table(found).rows}["targets reached within 10%"]
    assert of_all[0] == "NO"
    assert gate(ratio_at_peak=100) == of_all
    assert gate(ratio_at_peak=1.2) == ("yes", "all 1")
    assert gate(ratio_at_peak=1.1) == ()


def test_the_rate_of_multiply_adds_is_above_that_of_any_product():
    rate, why = native_rates.multiply_add_rate()
    assert why is None
    assert rate * floor.product_seconds(64, 64, 64) > 0.9 * 2 * 64**3


def test_slower_is_what_matters_only():
    def timing(unit: float, ours: float) -> dict:
        return {"contestants": summarise({"torch_rnn": [unit], "fused_rnn": [ours]}, "torch_rnn")}

    assert is_slower(timing(1e-3, 1.1e-3))
    assert not is_slower(timing(1e-3, 1.01e-3))
    assert not is_slower(timing(20e-6, 40e-6))
    assert is_slower(timing(40e-6, 60e-6))


def test_tables_show_every_suite_and_why_someone_is_missing():
    tables = {table.title: table for table in all_tables(made_up_results())}
    main = tables["FusedRNN against torch.nn.RNN"]
    assert len(main.rows) == 36
    first = dict(zip(main.columns, main.rows[0], strict=True))
    assert first["ratio (quartiles)"] == "2.00 (2.00 to 2.00)"
    assert (first["target"], first["time / floor"]) == ("2.00", "2.00")
    assert first["share of peak"] == "0.40"
    assert "ONNX Runtime: has no gradients" in tables["Everyone against torch.nn.RNN"].note
    assert len(tables["Grid of shapes"].rows) == len(GRID_SHAPES)
    assert "Grid of shapes: slower than torch.nn.RNN" not in tables
    assert all(len(row) == len(t.columns) for t in tables.values() for row in t.rows)


def test_torchs_best_number_of_threads_is_the_other_unit():
    found = made_up_results()
    # At two threads torch takes ten times as long, as it does when they get in each other's way.
    for timing in found["timings"]:
        if timing["threads"] == 2:
            timing["contestants"]["torch_rnn"]["seconds"]["median"] *= 10
    main = all_tables(found)[1]
    row = next(
        row
        for row in (dict(zip(main.columns, cells, strict=True)) for cells in main.rows)
        if row["threads"] == "2"
    )
    case = Case("table", *TABLE_SHAPES[0], "forward")
    one, two = (1e-4 + case.operations / (5e10 * threads) for threads in (1, 2))
    assert row["over torch's best"] == number(one / (0.5 * two))


def test_figures_are_made_without_a_display(tmp_path):
    drawn = figures.draw(made_up_results(), tmp_path)
    assert drawn == ["ratio_by_shape.png", "time_per_step.png"]
    for name in drawn:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / name).with_suffix(".svg").read_text()


def test_an_unfinished_or_disturbed_run_says_so():
    found = made_up_results()
    found["complete"] = False
    found["timings"][0]["load"]["others"] = 1.0
    case = found["timings"][1]["case"]
    found["timings"][1] = {"case": case, "threads": 1, "failed": "signal 11"}
    text = report.markdown(found)
    assert "the run was ended before it finished" in text
    assert "other processes used more than 0.1 cores" in text
    assert "signal 11" in text


# Whole runs


def test_a_quick_run_measures_writes_and_can_be_rendered_again(tmp_path):
    done = benchmark(
        *("--quick", "--suite", "grid,accuracy", "--threads", "1", "--output", str(tmp_path))
    )
    assert done.returncode == 0, done.stderr
    assert "Grid of shapes, summary" in done.stdout
    found = results.load(tmp_path / results.FILE)
    assert found["complete"]
    assert len(found["timings"]) == len(timed_cases("grid", quick=True))
    assert all("ratio" in t["contestants"]["fused_rnn"] for t in found["timings"])
    assert len(found["accuracy"]) == len(accuracy.accuracy_cases(quick=True))
    text = (tmp_path / "results.md").read_text()
    assert str(tmp_path) not in text + (tmp_path / results.FILE).read_text()

    (tmp_path / "results.md").unlink()
    page = tmp_path / "docs" / "results.md"
    again = benchmark("--render", str(tmp_path / results.FILE), "--page", str(page))
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "results.md").read_text() == text == page.read_text()


def test_every_suite_is_described():
    assert set(TIMED_SUITES) | {"accuracy", "memory"} == set(SUITES)
