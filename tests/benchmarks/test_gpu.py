"""The run on a GPU with stand-ins: its order, limits, and how a stage ended."""

import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

import benchmarks.gpu.__main__ as gpu
from benchmarks import machine, tables
from benchmarks.cases import Case
from benchmarks.gpu import build, profile_step
from benchmarks.gpu.__main__ import Stage
from benchmarks.machine import REPOSITORY
from benchmarks.measure import plans_of
from benchmarks.timing import summarise
from rnn_cuda.build import BuildError


@pytest.mark.parametrize(
    ("program", "options", "status", "note"),
    [
        ("print('a'); print('3 passed'); print()", {"must_print": r"\d pas"}, "passed", "3 passed"),
        ("print('3 skipped')", {"must_print": r"\d+ passed"}, "failed", "nothing like"),
        ("print('why'); exit(1)", {}, "failed", "exit status 1; last line: why"),
        ("import os; os.abort()", {}, "failed", "last line: no output"),
        ("print('Device not supported'); exit(1)", {}, "skipped", "not supported"),
        ("print('== ERROR SUMMARY: 3'); print('ok'); exit(9)", {}, "failed", "ERROR SUMMARY: 3"),
        ("import time; time.sleep(60)", {"limit": 1.0}, "failed", "killed, if not before at 1 s"),
        ("import os; print(os.environ['RNN_CUDA_BACKEND'])", {}, "passed", "native"),
        ("", {"command": ["no-such-tool"]}, "skipped", "there is no no-such-tool here"),
    ],
)
def test_how_a_stage_ended_is_told(tmp_path, program, options, status, note):
    stage = Stage(**{"command": [sys.executable, "-c", program], "limit": 20.0, **options})
    found = gpu.run_stage("a", stage, tmp_path, 20.0)
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

CHECKS = ("check one_sm", "check cluster", "check grid", "check streamed")
SANITIZERS = ("memcheck", "synccheck", "initcheck", "racecheck")
ALL = ("extension", "checker", *CHECKS, "tests", "flashrnn", "bench", *SANITIZERS, "profile", "ncu")


def test_commands_are_those_that_the_tools_expect(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/cuda/{name}")
    found = gpu.stages(tmp_path, "cuda")
    assert tuple(found) == ALL
    optional = {name for name, stage in found.items() if not stage.required}
    assert optional == {"flashrnn", "racecheck", "profile", "ncu"}
    assert found["memcheck"].command[0] == "/cuda/compute-sanitizer"
    assert found["memcheck"].command[5:7] == ["--tool", "memcheck"]
    ncu = found["ncu"].command
    assert ncu[ncu.index("--clock-control") + 1] == "none"
    assert found["check grid"].command[1:] == ["--problems", "400", "--residency", "grid"]
    assert found["tests"].must_print == r"\d+ passed"
    assert set(gpu.stages(tmp_path, "cpu")) == {"extension", "tests", "bench", "profile"}


def test_a_run_goes_on_after_a_failure_and_says_in_the_end_what_became_of_all(
    tmp_path, monkeypatch, capsys
):
    programs = {"extension": "print('fine')", "tests": "exit(1)", "bench": "print('fast')"}
    commands = {name: [sys.executable, "-c", program] for name, program in programs.items()}
    stages = {name: Stage(command, 30.0) for name, command in commands.items()}
    stages["profile"] = Stage(commands["tests"], 1e9, required=False)  # no time for it
    monkeypatch.setattr(gpu, "stages", lambda folder, device: stages)
    about = {"card": "Fake 9000", "date": "2026-01-31T10:00", "cpu": "x"}
    monkeypatch.setattr(machine, "describe", lambda device: about)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main([]) == 1
    lines = (tmp_path / "fake-9000-2026-01-31-1000" / "stages.txt").read_text().splitlines()
    found = ["extension passed", "tests failed", "bench passed", "profile skipped", "FAILED"]
    assert [" ".join(line.split()[:2]) for line in lines] == found
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED"
    assert gpu.main(["--stage", "bench"]) == 0
    # A required stage that is not reached has failed.
    assert gpu.main(["--stage", "bench", "--seconds", "1"]) == 1


def test_the_steps_to_profile_run(capsys):
    profile_step.main("cpu", "--torch-profiler")
    assert "layer_forward" in capsys.readouterr().out


def test_a_cards_results_are_shown_with_plan_and_target():
    case = Case("middle", 512, 32, 512, 512, "train", dtype="bfloat16")
    times = summarise({"torch_rnn": [5e-3], "fused_rnn": [1e-3]}, "torch_rnn")
    timing = {"case": asdict(case), "tokens": 512 * 32, "plans": plans_of(case, "H200")}
    about = {name: {"title": name, "missing": None, "version": None} for name in times}
    found = tables.empty_results(device="cuda", quick=False, contestants=about)
    found["timings"].append({**timing, "contestants": times})
    table = tables.suite_table(found, "middle")
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["target"], row["ratio"][:4], row["plan"][:7]) == ("4.00", "5.00", "cluster")
    assert row["planned"].endswith(" us")


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
import benchmarks.gpu.__main__, benchmarks.gpu.profile_step, benchmarks.run
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
        build.build_checker(tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/objects-*/*")}
    assert len(kept) == len(build.sources()) - 1
    (tmp_path / "nvcc.mended").touch()
    assert build.build_checker(tmp_path / "out").is_file()
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert len(list(tmp_path.glob("out/objects-*/*"))) == len(kept) + 1
