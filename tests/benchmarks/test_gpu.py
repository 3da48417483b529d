"""The run on a GPU with stand-ins: its order, limits, and what a failure takes with it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

import benchmarks.gpu.__main__ as gpu
from benchmarks import tables
from benchmarks.cases import Case
from benchmarks.gpu import build, floor
from benchmarks.gpu.__main__ import SECONDS, Stage
from benchmarks.machine import REPOSITORY
from benchmarks.measure import plans_of
from benchmarks.timing import summarise
from rnn_cuda.build import BuildError, find_cxx
from tests.native_programs import EMULATOR


@pytest.mark.parametrize(
    ("program", "options", "status", "note"),
    [
        ("print('a'); print('3 passed'); print()", {"must_print": r"\d pas"}, "passed", "3 passed"),
        ("print('3 skipped')", {"must_print": r"\d+ passed"}, "failed", "nothing like"),
        ("print('why'); exit(1)", {}, "failed", "exit status 1; last line: why"),
        ("import os; os.abort()", {}, "failed", "signal 6; last line: no output"),
        ("print('Device not supported'); exit(1)", {}, "skipped", "not supported"),
        ("print('== ERROR SUMMARY: 3'); print('ok'); exit(9)", {}, "failed", "ERROR SUMMARY: 3"),
        ("import time; time.sleep(60)", {"limit": 1.0}, "failed", "ended after 1 s"),
        ("import os; print(os.environ['RNN_CUDA_BACKEND'])", {}, "passed", "native"),
        (f"print({SECONDS})", {}, "passed", "20"),
        ("", {"command": ["no-such-tool"]}, "skipped", "there is no no-such-tool here"),
    ],
)
def test_how_a_stage_ended_is_told(tmp_path, program, options, status, note):
    stage = Stage(**{"command": [sys.executable, "-c", program], "limit": 20.0, **options})
    found = gpu.run_stage("a", stage, tmp_path, stage.limit)
    assert found[0] == status
    assert note in found[1]


def test_a_stage_is_ended_at_its_limit_with_everything_that_it_started(tmp_path):
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    program = f"""
import subprocess, sys, time, pathlib
process = subprocess.Popen([sys.executable, '-c', {child!r}])
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(process.pid))
time.sleep(60)
"""
    begin = time.monotonic()
    gpu.run_stage("a", Stage([sys.executable, "-c", program], 2.0), tmp_path, 2.0)
    assert time.monotonic() - begin < 15
    status = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    for _ in range(50):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("what the stage started is still there")


# ---- order ---------------------------------------------------------------------------------------

CHECKER = ("check one_sm", "check cluster", "check grid", "check streamed")
SANITIZERS = ("memcheck", "synccheck", "initcheck", "racecheck")
ALL = ("info", "extension", "programs", *CHECKER, "tests", "flashrnn", "bench", "floor")
ALL += (*SANITIZERS, "profile", "ncu")


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Return what becomes of each stage of a run in which some fail; nothing runs."""
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/cuda/{name}")

    def ran(*failing, seconds=gpu.TOTAL):
        run = lambda name, *_: ("failed" if name in failing else "passed", "")  # noqa: E731
        monkeypatch.setattr(gpu, "run_stage", run)
        outcomes = []
        gpu.run_stages(gpu.stages(tmp_path, "cuda"), tmp_path, seconds, outcomes)
        assert tuple(outcome["name"] for outcome in outcomes) == ALL
        return {outcome["name"]: outcome for outcome in outcomes}

    return ran


@pytest.mark.parametrize(
    ("broken", "lost"),
    [
        ("none", set()),
        ("info", set(ALL) - {"info"}),
        ("extension", {"tests", "bench", "profile", "ncu"}),
        ("programs", {*CHECKER, "floor", *SANITIZERS}),
        *((name, set()) for name in ("check grid", "tests", "bench", "memcheck", "racecheck")),
    ],
)
def test_a_failure_takes_with_it_only_what_needs_what_it_makes(ran, broken, lost):
    outcomes = ran(broken)
    assert {name for name in ALL if outcomes[name]["status"] == "skipped"} == lost
    required = [name for name in ALL if outcomes[name]["required"]]
    assert set(ALL) - set(required) == {"flashrnn", "floor", "racecheck", "profile", "ncu"}


def test_without_time_nothing_starts_and_a_required_stage_has_failed(ran):
    outcomes = ran(seconds=3.0)
    assert (outcomes["info"]["status"], outcomes["info"]["note"]) == ("failed", "no time left")
    assert "passed" not in {outcome["status"] for outcome in outcomes.values()}


def test_commands_are_those_that_the_tools_expect(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/cuda/{name}")
    found = gpu.stages(tmp_path, "cuda")
    assert found["memcheck"].command[0] == "/cuda/compute-sanitizer"
    assert found["memcheck"].command[5:7] == ["--tool", "memcheck"]
    ncu = found["ncu"].command
    assert ncu[ncu.index("--clock-control") + 1] == "none"
    assert found["check grid"].command[1:] == ["--problems", "400", "--residency", "grid"]
    assert found["tests"].must_print == r"\d+ passed"
    assert set(gpu.stages(tmp_path, "cpu")) == {"info", "extension", "tests", "bench", "profile"}


# ---- whole runs ----------------------------------------------------------------------------------


def test_a_run_leaves_results_and_log_named_after_card_and_date(tmp_path, monkeypatch, capsys):
    about = json.dumps({"card": "Fake 9000", "date": "2026-01-31T10:00", "cpu": "x"})
    programs = {"info": f"print({about!r}); print('x')", "tests": "print('fine'); exit(1)"}
    stages = {n: Stage([sys.executable, "-c", p], 30.0) for n, p in programs.items()}
    monkeypatch.setattr(gpu, "stages", lambda work, device: stages)
    monkeypatch.setattr(gpu, "RUNS_FOLDER", tmp_path / "runs")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main(["--stage", "info", "tests"]) == 1
    folder = tmp_path / "out" / "fake-9000-2026-01-31-1000"
    assert {"results.json", "results.md", "log.txt"} <= {path.name for path in folder.iterdir()}
    assert "| tests | FAILED  |" in (folder / "results.md").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED"
    assert gpu.main(["--stage", "info"]) == 0


def test_a_cards_results_are_shown_with_plan_target_and_floor_and_gated():
    case = Case("middle", 512, 32, 512, 512, "train", dtype="bfloat16")
    times = summarise({"torch_rnn": [5e-3], "fused_rnn": [1e-3]}, "torch_rnn")
    timing = {"case": asdict(case), "tokens": 512 * 32, "plans": plans_of(case, "H200")}
    timing |= {"contestants": times, "graphed": times}
    forward, backward = floor.lines_of(case, timing["plans"])
    decided = "residency=cluster,arithmetic=tensor_core,fuse_input="
    assert forward.startswith(f"512 32 512 512 1 bfloat16 0 {decided}")
    assert backward.startswith(f"512 32 0 512 1 bfloat16 0 {decided}0")  # no input product
    floors = {case.name: floor.floor_of(case, timing, 2e-4, {"bfloat16": 5e14}, 132)}
    recurrent, others = case.operations()
    share = timing["plans"]["forward"]["blocks"] * timing["plans"]["forward"]["batch_tiles"] / 132
    expected = 2e-4 + recurrent / (5e14 * share) + others / 5e14
    assert floors[case.name]["seconds"] == pytest.approx(expected)
    about = {name: {"title": name, "missing": None, "version": None} for name in times}
    found = tables.empty_results(device="cuda", quick=False, contestants=about)
    found |= {"timings": [timing], "floor": {"cases": floors}, "unmeasured": ["another"]}
    table = tables.suite_table(found, "middle")
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["target"], row["in graphs"], row["plan"][:7]) == ("4.00", "5.00", "cluster")
    assert (row["planned"][-2:], row["time / floor"]) == ("us", tables.number(1e-3 / expected))
    holds = {words[0]: words[1] for words in tables.gate_table(found).rows}
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
    with pytest.raises(BuildError, match=r"planner\.cpp does not compile:(.|\n)*nothing"):
        build.build_program("checker", tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/objects-*/*")}
    assert len(kept) == len(build.sources_of("checker")) - 1
    (tmp_path / "nvcc.mended").touch()
    assert build.build_program("checker", tmp_path / "out").is_file()
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert len(list(tmp_path.glob("out/objects-*/*"))) == len(kept) + 1


@pytest.mark.slow
@pytest.mark.skipif(build.find_cuda()[0] is None, reason="there is no nvcc")
def test_the_floor_compiles_and_links(tmp_path):
    program = build.build_program("floor", tmp_path, ["sm_80", "sm_90"])
    # Without a card it says so and does not crash; with one there is a time.
    assert len(floor.run_program([str(program)], ["10 4 3 40 1 float32 0"], 60.0)) == 1


@pytest.mark.slow
def test_the_empty_kernel_exchanges_every_word_on_the_emulator(tmp_path):
    program = tmp_path / "floor"
    sources = [*build.sources_of("floor"), *sorted(EMULATOR.glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", "-DRNN_CUDA_EMULATED", "-Wno-unknown-pragmas"]
    flags += [f"-I{folder}" for folder in (REPOSITORY / "csrc", EMULATOR.parent)]
    command = [str(find_cxx()), "-x", "c++", *flags, *map(str, sources), "-o", str(program)]
    subprocess.run([*command, "-rdynamic", "-pthread", "-ldl"], check=True)
    # Each exchange, odd sizes, several batch tiles, both directions.
    fma, bf16 = "engine_columns=4,columns=4", "engine_columns=8,columns=8"
    lines = [
        f"6 5 3 40 1 float32 0 residency=one_sm,row_warps=2,depth_split=2,{fma}",
        f"6 9 3 70 2 float32 0 residency=cluster,blocks=3,row_warps=2,depth_split=2,{fma}",
        f"7 9 3 100 2 bfloat16 0 residency=grid,blocks=2,row_warps=2,{bf16}",
        f"5 9 0 64 1 float32 0 residency=grid,blocks=4,row_warps=1,depth_split=4,{fma}",
        f"1 9 3 64 1 float32 0 residency=cluster,blocks=4,row_warps=1,depth_split=4,{fma}",
        "6 5 3 40 1 float32 0",
    ]
    streamed = "5 9 3 64 1 float64 0"
    for schedule in ("ascending", "descending", "random:3", "starving:5"):
        command = ["env", f"RNN_CUDA_EMULATOR_SCHEDULE={schedule}", str(program)]
        answers = floor.run_program(command, [*lines, streamed, "hello"], 60.0)
        assert all(isinstance(answers[line], float) for line in lines), answers
        refused = answers[streamed], answers["hello"]
        assert refused == ("no persistent kernel", "expected seven words and a plan")
