"""The one call on a GPU, rehearsed with stand-ins: its stages, their limits and their order."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.gpu import checks, profiling
from benchmarks.gpu.context import Context, SkippedError, StageError
from benchmarks.gpu.session import SANITIZERS, STAGES, Session, dtypes_of
from benchmarks.gpu.stages import SECONDS, SKIPPED, Outcome, Runner, Stage, line_of
from tests.gpu_stand_ins import python, stand_in

REPOSITORY = Path(__file__).resolve().parents[1]


def runner_in(folder: Path, seconds: float = 60.0) -> Runner:
    return Runner(seconds, folder / "log.txt", say=lambda text: None)


# ---- stages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "status", "note"),
    [
        ("print('a'); print('12 passed'); print()", "passed", "12 passed"),
        ("print('why not'); raise SystemExit(1)", "failed", "exit status 1; last line: why not"),
        (f"print('no such tool'); raise SystemExit({SKIPPED})", "skipped", "no such tool"),
        ("import os; os.abort()", "failed", "signal 6; last line: said nothing"),
    ],
)
def test_a_stage_says_how_it_ended_and_its_last_line(tmp_path, program, status, note):
    outcome = runner_in(tmp_path).run(Stage("a", python(program), 30.0))
    assert (outcome.status, outcome.note) == (status, note)


def test_a_stage_is_ended_at_its_limit_with_everything_that_it_started(tmp_path):
    file = tmp_path / "pid"
    child = "import time; time.sleep(60)"
    program = (
        "import subprocess, sys, time, pathlib\n"
        f"process = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"pathlib.Path({str(file)!r}).write_text(str(process.pid))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(60)"
    )
    outcome = runner_in(tmp_path).run(Stage("a", python(program), 2.0))
    assert outcome.status == "failed"
    assert outcome.note == "ended after 2 s; last line: waiting"
    assert outcome.seconds < 10
    assert not _is_alive(int(file.read_text()))


def _is_alive(pid: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":  # dead, and its new parent slow to notice
            return False
        time.sleep(0.1)
    return True


def test_a_stage_that_ignores_being_asked_to_end_is_ended_all_the_same(tmp_path):
    program = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\n"
        "time.sleep(60)"
    )
    outcome = runner_in(tmp_path).run(Stage("a", python(program), 2.0))
    assert outcome.status == "failed"
    assert outcome.seconds < 15


def test_no_stage_outlives_the_run(tmp_path):
    runner = runner_in(tmp_path, seconds=10.0)
    program = f"import time; print('{SECONDS}', flush=True); time.sleep(60)"
    first = runner.run(Stage("long", python(program), 100.0))
    assert first.seconds < 15
    assert first.note == "ended after 10 s; last line: 10"  # a stage is told its real limit


def test_a_stage_for_which_no_time_is_left_is_not_started_and_fails_if_it_must_pass(tmp_path):
    now = 0.0
    runner = Runner(100.0, tmp_path / "log.txt", say=lambda text: None, clock=lambda: now)
    now = 97.0
    must, may = (Stage(name, python("print(1)"), 50.0, name == "must") for name in ("must", "may"))
    assert [(o.status, o.note) for o in map(runner.run, (must, may))] == [
        ("failed", "no time left"),
        ("skipped", "no time left"),
    ]
    assert not runner.passed


@pytest.mark.parametrize(
    ("status", "required", "passes"),
    [("failed", True, False), ("failed", False, True), ("skipped", True, True)],
)
def test_a_run_fails_with_a_required_stage_alone(tmp_path, status, required, passes):
    runner = runner_in(tmp_path)
    code = {"failed": 1, "skipped": SKIPPED}[status]
    stage = Stage("a", python(f"raise SystemExit({code})"), 30.0, required)
    outcome = runner.run(stage)
    assert runner.passed is passes
    assert ("a lead" in line_of(outcome)) == (status == "failed" and not required)


def test_the_log_keeps_the_output_of_every_stage_and_the_terminal_the_end_of_a_failed_one(tmp_path):
    said: list[str] = []
    runner = Runner(60.0, tmp_path / "log.txt", say=said.append)
    runner.run(Stage("good", python("print('fine')"), 30.0))
    runner.run(Stage("bad", python("print('the reason'); print('x'); raise SystemExit(2)"), 30.0))
    log = (tmp_path / "log.txt").read_text()
    assert log.index("=== good") < log.index("fine") < log.index("=== bad")
    assert any("the reason" in text for text in said)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_a_stage_gets_the_environment_that_it_asks_for(tmp_path):
    program = "import os; print(os.environ['RNN_CUDA_BACKEND'])"
    stage = Stage("a", python(program), 30.0, environment={"RNN_CUDA_BACKEND": "native"})
    assert runner_in(tmp_path).run(stage).note == "native"


# ---- sessions ------------------------------------------------------------------------------------


class FakeRunner(Runner):
    """Runs nothing; fails the stages named."""

    def __init__(self, folder: Path, *failing: str) -> None:
        super().__init__(500.0, folder / "log.txt", say=lambda text: None)
        self.failing = failing
        self.stages: list[Stage] = []

    def run(self, stage: Stage) -> Outcome:
        self.stages.append(stage)
        status = "failed" if stage.name in self.failing else "passed"
        outcome = Outcome(stage.name, status, 1.0, "", stage.required)
        self.outcomes.append(outcome)
        return outcome

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self.stages]


def session_with(tmp_path, *failing: str, names=tuple(STAGES)) -> FakeRunner:
    runner = FakeRunner(tmp_path, *failing)
    Session(runner, tmp_path).run(names)
    return runner


def test_a_whole_run_goes_through_every_stage_in_order(tmp_path):
    assert session_with(tmp_path).names == list(STAGES)


def test_no_stage_on_a_gpu_may_fall_back(tmp_path):
    runner = session_with(tmp_path)
    assert {stage.environment["RNN_CUDA_BACKEND"] for stage in runner.stages} == {"native"}
    assert all(SECONDS in stage.command for stage in runner.stages)


@pytest.mark.parametrize("broken", ["info", "build"])
def test_without_a_card_or_kernels_the_run_ends_and_says_so(tmp_path, broken):
    runner = session_with(tmp_path, broken)
    assert runner.names[-1] == broken
    skipped = [o for o in runner.outcomes if o.status == "skipped"]
    assert {o.note for o in skipped} == {f"{broken} failed"}
    assert [o.name for o in runner.outcomes] == list(STAGES)
    assert not runner.passed


def test_when_the_checker_fails_the_time_goes_into_saying_why(tmp_path):
    runner = session_with(tmp_path, "check", "check:grid", "check:grid:bfloat16")
    assert runner.names[:3] == ["info", "build", "check"]
    assert runner.names[3:7] == [f"check:{r}" for r in ("one_sm", "cluster", "grid", "streamed")]
    assert runner.names[7:10] == [f"check:grid:{d}" for d in ("float32", "bfloat16", "float16")]
    assert runner.names[10:] == [f"{tool}:grid:bfloat16" for tool in SANITIZERS]
    # None of it is a verdict of its own, and nothing is measured with wrong kernels.
    assert not any(stage.required for stage in runner.stages[3:])
    skipped = {o.name: o.note for o in runner.outcomes if o.status == "skipped"}
    assert skipped["bench"] == "the checker failed"


def test_a_failure_that_no_part_shows_is_looked_at_as_a_whole(tmp_path):
    assert session_with(tmp_path, "check").names[7:] == list(SANITIZERS)


def test_a_later_failure_stops_nothing(tmp_path):
    runner = session_with(tmp_path, "tests", "memcheck")
    assert runner.names == list(STAGES)
    assert not runner.passed


def test_racecheck_gives_leads_and_no_verdict(tmp_path):
    assert session_with(tmp_path, "racecheck").passed
    assert not session_with(tmp_path, "synccheck").passed


def test_float64_has_no_persistent_kernel():
    assert "float64" in dtypes_of("streamed")
    assert "float64" not in dtypes_of("cluster")


# ---- checker, sanitizers, tests ------------------------------------------------------------------


def test_the_checkers_arguments():
    assert checks.checker_arguments() == ["--problems", "1500"]
    assert checks.checker_arguments("grid", "float16") == [
        *("--problems", "40", "--residency", "grid", "--dtype", "float16", "--small")
    ]


def test_the_sanitizers_command_lines():
    command = checks.sanitizer_command("compute-sanitizer", "memcheck", "checker", "one_sm")
    assert command[:5] == ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    assert command[command.index("--padding") + 1] == "64"
    assert command[command.index("checker") :] == [
        *("checker", "--problems", "40", "--residency", "one_sm", "--small")
    ]
    other = checks.sanitizer_command("compute-sanitizer", "initcheck", "checker")
    assert "--padding" not in other


@pytest.mark.parametrize(
    ("program", "error", "words"),
    [
        (
            "print('error at line 5')\nprint('========= ERROR SUMMARY: 3 errors')\n"
            "print('ok')\nraise SystemExit(9)",
            StageError,
            "exit status 9: ERROR SUMMARY: 3 errors",
        ),
        (
            "print('========= Error: Device not supported')\nraise SystemExit(1)",
            SkippedError,
            "not supported",
        ),
    ],
    ids=["found something", "does not work here"],
)
def test_a_sanitizers_findings_fail_and_its_absence_is_said(
    tmp_path, monkeypatch, program, error, words
):
    tool = stand_in(tmp_path, "compute-sanitizer", program)
    monkeypatch.setattr(checks, "find_tool", lambda name: tool)
    monkeypatch.setattr(checks, "build_program", lambda program, folder: tmp_path / "checker")
    with pytest.raises(error, match=words):
        checks.sanitize(Context(tmp_path, 30.0), "memcheck")
    monkeypatch.setattr(checks, "find_tool", lambda name: None)
    with pytest.raises(SkippedError, match="no compute-sanitizer"):
        checks.sanitize(Context(tmp_path, 30.0), "memcheck")


def test_the_gpu_tests_are_found_by_their_mark_and_no_other_file_is_imported():
    names = [path.name for path in checks.gpu_test_files(REPOSITORY / "tests")]
    assert "test_gpu.py" in names
    assert "test_functional.py" not in names
    command = checks.pytest_command([Path("tests/test_gpu.py")], Path("report.xml"))
    assert command[command.index("-q") + 1 : command.index("-q") + 3] == ["-m", "gpu"]
    assert command[-1] == "tests/test_gpu.py"


def junit(tmp_path, tests: int, failures: int, skipped: int) -> Path:
    path = tmp_path / "tests.xml"
    counts = f'tests="{tests}" failures="{failures}" errors="0" skipped="{skipped}"'
    path.write_text(f"<testsuites><testsuite {counts}/></testsuites>")
    return path


def test_gpu_tests_pass_only_if_some_ran_and_none_failed(tmp_path):
    assert checks.judge_tests(junit(tmp_path, 9, 0, 2), 0) == "7 passed, 0 failed, 2 skipped"
    with pytest.raises(StageError, match="6 passed, 1 failed"):
        checks.judge_tests(junit(tmp_path, 9, 1, 2), 1)
    all_skipped = junit(tmp_path, 9, 0, 9)
    with pytest.raises(StageError, match="0 passed"):
        checks.judge_tests(all_skipped, 0)
    with pytest.raises(SkippedError, match="need a GPU"):
        checks.judge_tests(all_skipped, 0, rehearsal=True)
    with pytest.raises(StageError, match="without a report"):
        checks.judge_tests(tmp_path / "none.xml", -11)


# ---- profile -------------------------------------------------------------------------------------


def test_a_profiler_that_does_not_work_here_is_followed_by_the_next(tmp_path, monkeypatch):
    broken = stand_in(tmp_path, "ncu", "print('==ERROR== LibraryNotLoaded')")
    good = stand_in(tmp_path, "nsys", "print('==PROF== /home/me'); print('walk_kernel 12 us')")
    tools = {"ncu": broken, "nsys": good}
    monkeypatch.setattr(profiling, "find_tool", tools.get)
    profiling.profile(Context(tmp_path, 60.0))
    assert (tmp_path / "profile.txt").read_text() == "nsys\nwalk_kernel 12 us\n"
    names = [name for name, _ in profiling.commands(Context(tmp_path, 60.0))]
    assert names == ["ncu", "nsys", "torch"]


def test_ncu_leaves_the_cards_clocks_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "find_tool", lambda name: name)
    command = dict(profiling.commands(Context(tmp_path, 60.0)))["ncu"]
    assert command[command.index("--clock-control") + 1] == "none"


def test_without_any_profiler_the_stage_is_skipped_with_the_reasons(tmp_path, monkeypatch):
    broken = stand_in(tmp_path, "ncu", "print('no permission'); raise SystemExit(3)")
    monkeypatch.setattr(profiling, "commands", lambda context: [("ncu", [broken])])
    with pytest.raises(SkippedError, match="ncu: no permission"):
        profiling.profile(Context(tmp_path, 60.0))
