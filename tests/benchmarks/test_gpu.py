"""The run on a GPU with stand-ins: its order, limits, and what a failure takes with it."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import benchmarks.gpu.__main__ as gpu
from benchmarks import report
from benchmarks.cases import Case
from benchmarks.gates import gate_table
from benchmarks.gpu import build, floor
from benchmarks.gpu.stages import SECONDS, Runner, Stage
from benchmarks.machine import REPOSITORY
from benchmarks.measure import plans_of
from benchmarks.tables import number, speed_table
from benchmarks.timing import summarise
from rnn_cuda.build import find_cxx
from tests.emulated_programs import EMULATOR


def run_one(folder, *programs, limit=30.0, seconds=60.0, **options):
    commands = tuple((sys.executable, "-c", program) for program in programs)
    return Runner(seconds, folder, log=str).run(Stage("a", commands, limit, **options))


@pytest.mark.parametrize(
    ("program", "options", "status", "note"),
    [
        (
            "print('a'); print('3 passed'); print()",
            {"must_print": r"\d passed"},
            "passed",
            "3 passed",
        ),
        ("print('3 skipped')", {"must_print": r"\d+ passed"}, "failed", "nothing like"),
        ("print('why'); exit(1)", {}, "failed", "exit status 1; last line: why"),
        ("import os; os.abort()", {}, "failed", "signal 6; last line: no output"),
        ("print('==ERROR== x')", {"must_not_print": "==ERROR=="}, "failed", "==ERROR== x"),
        ("print('not supported'); exit(1)", {"cannot_run": "not supported"}, "skipped", "not supp"),
        ("print('== ERROR SUMMARY: 3'); print('ok'); exit(9)", {}, "failed", "ERROR SUMMARY: 3"),
        ("import time; time.sleep(60)", {"limit": 1.0}, "failed", "ended after 1 s"),
        ("import os; print(os.environ['A'])", {"environment": {"A": "b"}}, "passed", "b"),
        (f"print({SECONDS} in (19, 20))", {"seconds": 20.0, "limit": 90.0}, "passed", "True"),
        ("print(1)", {"limit": 50.0, "seconds": 3.0}, "failed", "no time left"),
        ("print(1)", {"seconds": 3.0, "required": False}, "skipped", "no time left"),
    ],
)
def test_how_a_stage_ended_is_told(tmp_path, program, options, status, note):
    outcome = run_one(tmp_path, program, **options)
    assert outcome.status == status
    assert note in outcome.note


def test_commands_of_a_stage_are_tried_in_turn_until_one_passes(tmp_path):
    absent = Stage("a", ((str(tmp_path / "absent"),),), 30.0)
    assert "No such file" in Runner(60.0, tmp_path, log=str).run(absent).note
    outcome = run_one(tmp_path, "print('broken'); exit(3)", "print('12 us')")
    assert outcome.status == "passed"
    assert outcome.note == "12 us; not exit status 3; last line: broken"
    assert (tmp_path / "a.txt").read_text() == "12 us\n"
    assert "broken" in (tmp_path / "log.txt").read_text()


def test_a_stage_is_ended_at_its_limit_with_everything_that_it_started(tmp_path):
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    program = f"""
import subprocess, sys, time, pathlib
process = subprocess.Popen([sys.executable, '-c', {child!r}])
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(process.pid))
time.sleep(60)
"""
    assert run_one(tmp_path, program, limit=2.0).seconds < 15
    status = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    for _ in range(50):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("what the stage started is still there")


# ---- order ---------------------------------------------------------------------------------------


class FakeRunner(Runner):
    """Runs nothing; the stages named fail."""

    def __init__(self, folder, *failing):
        super().__init__(gpu.TOTAL, folder, log=str)
        self.failing, self.stages = failing, {}

    def _try(self, stage, end):
        self.stages[stage.name] = stage
        return ("failed" if stage.name in self.failing else "passed"), ""


@pytest.fixture
def ran(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/cuda/{name}")
    monkeypatch.setattr(gpu.CONTESTANTS["flashrnn"], "missing", lambda device: None)

    def ran(*failing):
        runner = FakeRunner(tmp_path, *failing)
        gpu.run_stages(runner, gpu.STAGES, tmp_path, "cuda")
        return runner

    return ran


def test_a_whole_run_goes_through_every_stage_in_order_and_never_falls_back(ran):
    runner = ran()
    assert tuple(runner.stages) == gpu.STAGES
    assert {s.environment["RNN_CUDA_BACKEND"] for s in runner.stages.values()} == {"native"}
    memcheck, ncu = (runner.stages[name].commands[0] for name in ("memcheck", "profile"))
    assert memcheck[:3] == ("/cuda/compute-sanitizer", "--tool", "memcheck")
    assert ncu[ncu.index("--clock-control") + 1] == "none"


@pytest.mark.parametrize(
    ("broken", "lost"),
    [
        ("info", set(gpu.STAGES) - {"info"}),
        ("extension", {"tests", "bench", "profile"}),
        ("programs", {"check", "floor", *gpu.SANITIZERS}),
        *((name, set()) for name in ("check", "tests", "bench", "memcheck", "racecheck")),
    ],
)
def test_a_failure_takes_with_it_only_what_needs_what_it_makes(ran, broken, lost):
    runner = ran(broken)
    skipped = {name for name, outcome in runner.outcomes.items() if outcome.status == "skipped"}
    assert skipped == lost
    assert tuple(name for name in runner.outcomes if ":" not in name) == gpu.STAGES
    assert runner.passed == (broken == "racecheck")


def test_when_the_checker_fails_the_run_says_why_and_goes_on(ran):
    stages = ran("check", "check:grid", "check:grid:bfloat16").stages
    parts = [name for name in stages if ":" in name]
    assert parts == [
        *(f"check:{residency}" for residency in gpu.RESIDENCIES),
        *(f"check:grid:{dtype}" for dtype in ("float32", "bfloat16", "float16")),
        *("memcheck:grid:bfloat16", "synccheck:grid:bfloat16"),
    ]
    assert not any(stages[name].required for name in parts)
    words = "--problems 40 --residency grid --dtype bfloat16 --small"
    assert stages[parts[5]].commands[0][1:] == tuple(words.split())
    assert list(stages)[3 : 5 + len(parts)] == ["check", *parts, "tests"]


# ---- whole runs ----------------------------------------------------------------------------------


def test_a_run_leaves_results_and_log_named_after_card_and_date(tmp_path, monkeypatch, capsys):
    def stage_of(name, work, device, commit):
        about = json.dumps({"card": "Fake 9000", "date": "2026-01-31T10:00", "cpu": "x"})
        program = f"open({str(work / 'info.json')!r}, 'w').write({about!r})\n"
        program += f"print('{name} fine'); exit({int(name == 'tests')})"
        return Stage(name, ((sys.executable, "-c", program),), 30.0)

    monkeypatch.setattr(gpu, "stage_of", stage_of)
    monkeypatch.setattr(gpu, "RUNS_FOLDER", tmp_path / "runs")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main(["--stage", "info,tests"]) == 1
    folder = tmp_path / "out" / "fake-9000-2026-01-31"
    assert {"results.json", "results.md", "log.txt"} <= {path.name for path in folder.iterdir()}
    assert "| tests | FAILED |" in (folder / "results.md").read_text()
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAILED in")
    assert gpu.main(["--render", str(folder / "results.json")]) == 0


def test_a_cards_results_are_shown_with_plan_target_and_floor_and_gated():
    case = Case("middle", 512, 32, 512, 512, "train", dtype="bfloat16")
    times = summarise({"torch_rnn": [5e-3], "fused_rnn": [1e-3]}, "torch_rnn")
    timing = {"case": case.as_json(), "tokens": 512 * 32, "plans": plans_of(case, "H200")}
    timing |= {"contestants": times, "graphed": times}
    lines = floor.pass_lines(case, timing["plans"])
    assert lines["forward"].startswith("512 32 512 512 1 2 1 1 ")  # bfloat16, cluster, tensor core
    assert lines["backward"].startswith("512 32 0 512 1 2 1 1 ")  # no input product
    rates = {"bfloat16": 5e14, "copy": 3e12}
    floors = {case.name: floor.floor_of(case, timing, 2e-4, rates, 132)}
    recurrent, others = case.operations()
    share = timing["plans"]["forward"]["blocks"] * timing["plans"]["forward"]["batch_tiles"] / 132
    expected = 2e-4 + recurrent / (5e14 * share) + max(others / 5e14, 8 * 2 * 512**2 * 32 / 3e12)
    assert floors[case.name]["seconds"] == pytest.approx(expected)
    about = {name: {"title": name, "missing": None, "version": None} for name in times}
    found = report.empty_results(device="cuda", quick=False, contestants=about)
    found |= {"timings": [timing], "floor": {"cases": floors}, "unmeasured": ["another"]}
    table = speed_table(found, "middle")
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["target"], row["in graphs"], row["plan"][:7]) == ("4.00", "5.00", "cluster")
    assert (row["planned"][-2:], row["time / floor"]) == ("us", number(1e-3 / expected))
    holds = {words[0]: words[1] for words in gate_table(found).rows}
    assert holds["ratio / target at least 1"] == holds["no ratio below 1"] == "yes"
    assert (holds["within 2 times the floor"], holds["everything measured"]) == ("NO", "NO")


def test_nothing_but_torch_numpy_ninja_and_pytest_is_needed():
    files = [str(path.relative_to(REPOSITORY)) for path in gpu.gpu_test_files()]
    assert files
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"rich", "matplotlib", "hydra", "omegaconf", "sklearn",
                                      "scipy", "onnx", "onnxruntime", "onnxscript", "expecttest"}}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import benchmarks.gpu.__main__, benchmarks.gpu.floor, benchmarks.gpu.profile_step, benchmarks.run
import pytest
sys.exit(pytest.main(["-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", *{files}]))
"""
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- programs ------------------------------------------------------------------------------------


def test_a_build_that_is_cut_short_goes_on_where_it_was(tmp_path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"""#!{sys.executable}
import sys, pathlib
if 'planner' in str(sys.argv) and not pathlib.Path(__file__ + '.mended').exists():
    sys.exit('error: nothing')
pathlib.Path(sys.argv[-1]).write_text('x')
""")
    nvcc.chmod(0o755)
    cuda = type("Cuda", (), {"nvcc": nvcc, "version": "13", "arch_flags": lambda self: []})()
    monkeypatch.setattr(build, "find_cuda", lambda: (cuda, ""))
    with pytest.raises(build.ProgramError, match=r"planner\.cpp does not compile:(.|\n)*nothing"):
        build.build_program("checker", tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/objects").iterdir()}
    assert len(kept) == len(build.sources_of("checker")) - 1
    (tmp_path / "nvcc.mended").touch()
    assert build.build_program("checker", tmp_path / "out").is_file()
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert len(list((tmp_path / "out/objects").iterdir())) == len(kept) + 1


@pytest.mark.slow
@pytest.mark.skipif(build.find_cuda()[0] is None, reason="there is no nvcc")
def test_the_floor_compiles_and_links(tmp_path):
    program = build.build_program("floor", tmp_path, ["sm_80", "sm_90"])
    # Without a card it says so and does not crash; with one there is a time.
    assert len(floor.run_program([str(program)], ["10 4 3 40 1 0 0 0 1 1 4 4 2 1"], 60.0)) == 1


@pytest.mark.slow
def test_the_empty_kernel_exchanges_every_word_on_the_emulator(tmp_path):
    program = tmp_path / "floor"
    sources = [*build.sources_of("floor"), *sorted(EMULATOR.glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", "-DRNN_CUDA_EMULATED", "-Wno-unknown-pragmas"]
    flags += [f"-I{folder}" for folder in (REPOSITORY / "csrc", EMULATOR.parent)]
    command = [str(find_cxx()), "-x", "c++", *flags, *map(str, sources), "-o", str(program)]
    subprocess.run([*command, "-rdynamic", "-pthread", "-ldl"], check=True)
    # T B I H directions dtype residency arithmetic fuse_input blocks columns engine_columns
    # row_warps depth_split: each exchange, odd sizes, several batch tiles, both directions.
    lines = ["6 5 3 40 1 0 0 0 1 1 4 4 2 2", "6 9 3 70 2 0 1 0 0 3 4 4 2 2"]
    lines += ["7 9 3 100 2 2 2 1 0 2 8 8 2 1", "5 9 0 64 1 0 2 0 0 4 4 4 1 4"]
    lines += ["1 9 3 64 1 0 1 0 0 4 4 4 1 4"]
    streamed = "5 9 3 64 1 0 3 0 0 4 4 4 1 4"
    for schedule in ("ascending", "descending", "random:3", "starving:5"):
        command = ["env", f"RNN_CUDA_EMULATOR_SCHEDULE={schedule}", str(program)]
        answers = floor.run_program(command, [*lines, streamed, "hello"], 60.0)
        assert all(isinstance(answers[line], float) for line in lines), answers
        assert (answers[streamed], answers["hello"]) == (
            "no persistent kernel",
            "expected 14 numbers",
        )


def test_the_floors_input_numbers_the_enumerations_as_the_headers_do():
    for names, file, enumeration in [
        (floor._DTYPES, "recurrence.h", "ScalarType"),
        (floor._RESIDENCIES, "cuda/plan.h", "Residency"),
        (floor._ARITHMETICS, "cuda/plan.h", "Arithmetic"),
    ]:
        text = (REPOSITORY / "csrc" / file).read_text()
        body = re.search(rf"enum class {enumeration} {{(.*?)}}", text, re.DOTALL)
        theirs = [n.strip().lower() for n in re.sub(r"//[^\n]*", "", body[1]).split(",")]
        ours = [name.replace("_", "") for name in sorted(names, key=lambda n: names[n])]
        assert ours == [n.replace("tensorcoretf32", "tf32") for n in theirs if n]
