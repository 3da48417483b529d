"""Whole runs: what they leave, that they repeat and can be compared, what a kill leaves."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import yaml
from experiments.compare import ComparisonError, common_horizon, compare, load_runs, main
from experiments.expected import Expected, expected
from experiments.settings import validated
from hydra import compose, initialize_config_dir
from PIL import Image
from rich.console import Console

from experiments import figures, initialisation, report, results
from experiments.run import CONFIGURATION, run_study
from experiments.run_folder import OWNER, FolderTakenError, claim

REPOSITORY = Path(__file__).resolve().parents[1]


def smoke(*overrides: str) -> dict:
    with initialize_config_dir(str(CONFIGURATION), version_base="1.3"):
        return validated(compose("config", ["experiment=smoke", *overrides]))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


TINY = (
    "experiment=smoke", "training.steps=2", "task.test_size=8", "horizons=[10]",
    "contrast_horizons=[]",
)  # fmt: skip


def started(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        command("experiments.run", *arguments),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict, str]:
    """A finished smoke run: its folder, what the call returned, what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "fused"
    console = quiet()
    found = run_study(smoke("seeds=[0,1]"), folder, console)
    return folder, found, console.file.getvalue()


def numbers(found: dict) -> list:
    """Return every measured number of a run that a clock has no part in."""
    return [
        [
            arm["title"],
            run["seed"],
            run["test_error"],
            run["initial"]["state_norm"],
            run["trained"]["state_norm"],
        ]
        for arm in found["arms"]
        for run in arm["runs"]
    ]


# A run and what it leaves


def test_a_run_leaves_results_tables_figures_and_its_own_description(finished):
    folder, found, _ = finished
    stored = results.load_results(folder)
    assert stored["complete"] is True
    assert numbers(stored) == numbers(found)
    assert not (folder / results.PARTIAL).exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == stored["config"]
    for name in ("ladder", "loss_curves"):
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 300
            assert image.convert("L").getextrema() == (0, 255)
        assert (folder / f"{name}.svg").read_text().rstrip().endswith("</svg>")


def test_a_run_says_what_it_ran_on(finished):
    _, found, _ = finished
    machine = found["provenance"]
    assert {
        "torch",
        "rnn_cuda",
        "python",
        "cpu_capability",
        "git_commit",
        "started",
        "workers",
    } <= set(machine)
    assert machine["backend"]["requested"] in ("auto", "native", "reference")
    assert found["config"]["seeds"] == [0, 1]
    for arm in found["arms"]:
        assert [run["seed"] for run in arm["runs"]] == [0, 1]
        assert all(set(run["backend"].values()) <= {"native", "reference"} for run in arm["runs"])
        assert all(run["backend"] for run in arm["runs"])
        assert arm["parameters"] == 16 * (2 + 16 + 2) + 17


def test_curves_and_profiles_are_complete(finished):
    folder, found, _ = finished
    with (folder / "curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == len(found["arms"]) * 2 * 40
    assert all(float(row["loss"]) > 0 and float(row["gradient_norm"]) > 0 for row in curves)
    with (folder / "profiles.csv").open() as file:
        profiles = [row for row in csv.DictReader(file) if row["arm"] == "T=10"]
    assert [int(row["lag"]) for row in profiles[:10]] == list(range(10))
    arm = next(arm for arm in found["arms"] if arm["title"] == "T=10")
    initial = arm["runs"][0]["initial"]
    assert [float(row["state_norm"]) for row in profiles[:10]] == initial["state_norm"][::-1]


def test_the_same_seed_gives_the_same_numbers_whatever_the_number_of_workers(finished, tmp_path):
    _, found, _ = finished
    again = run_study(smoke("seeds=[0,1]", "workers=2"), tmp_path / "again", quiet())
    assert again["provenance"]["workers"] == 2
    assert numbers(again) == numbers(found)
    other = run_study(smoke("seeds=[2]", "contrast_horizons=[]"), tmp_path / "other", quiet())
    assert numbers(other)[0][2:] != numbers(found)[0][2:]


def test_the_printed_report_is_the_stored_one_and_has_every_arm(finished):
    folder, found, printed = finished
    stored = (folder / "report.txt").read_text()
    for arm in found["arms"]:
        assert arm["title"] in stored
    assert found["conclusions"] == report.conclusions(found)
    for statement in found["conclusions"]:
        assert " ".join(statement.split()) in " ".join(stored.split())
        assert " ".join(statement.split()) in " ".join(printed.split())


def test_the_kernel_was_put_beside_torch(finished):
    check = finished[1]["kernel_check"]
    assert max(check["relative_difference"].values()) < 1e-4
    assert check["fused_milliseconds"] > 0
    assert check["torch_milliseconds"] > 0


def test_a_folder_with_a_run_in_it_is_not_written_over(finished):
    folder, _, _ = finished
    with pytest.raises(FolderTakenError, match=r"already holds a run \(results\.json\)"):
        run_study(smoke(), folder, quiet())


# Names and labels are text

TEXTS = [
    "relu [/b]",
    "relu $x_$",
    "[scaled]",
    ":smile: [red]漢字 😀[/]",
    "_a\nb\x1b[31m\udc80",
    "x" * 200,
]


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> tuple[Path, dict, str]:
    """A finished run whose every name needs care, with warnings as errors."""
    config = smoke("training.steps=2", "horizons=[10]", "contrast_horizons=[10]")
    config["name"], config["model"]["name"] = "v[x]2", "_m [/i] $y_$"
    config["model"]["contrasts"] = [{"label": text} for text in TEXTS]
    folder = tmp_path_factory.mktemp("[named] :smile:") / ("a" * 60) / "v[x]2 b [/b]"
    console = quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run_study(config, folder, console)
    return folder, found, console.file.getvalue()


def test_names_and_labels_are_reported_as_they_are(named):
    folder, found, printed = named
    stored = (folder / "report.txt").read_text()
    assert [arm["label"] for arm in found["arms"][1:]] == TEXTS
    assert results.load_results(folder)["arms"] == json.loads(json.dumps(found["arms"]))
    for text in TEXTS[:4]:
        assert f" T=10 {text} " in stored  # in the table
        assert f"Contrast at T = 10, {text} (" in stored
        assert f"T=10 {text}, seed 0" in printed
    assert r"T = 10, _a\nb\x1b[31m\udc80 (" in stored
    assert f"T = 10, {TEXTS[-1]} (" in stored
    assert "\x1b" not in stored + printed
    assert "_m [/i] $y_$ on adding" in stored
    assert "v[x]2: _m [/i] $y_$ on adding" in printed


def test_the_folder_that_is_printed_exists(named):
    folder, _, printed = named
    last = printed.splitlines()[-1]
    assert last == f"Results, curves and figures: {folder}"
    assert len(str(folder)) > 80  # wider than the console


def test_tables_hold_labels_as_they_are(named):
    with (named[0] / "curves.csv").open(newline="", encoding="utf-8") as file:
        arms = dict.fromkeys(row["arm"] for row in csv.DictReader(file))
    as_stored = [text.replace("\udc80", r"\udc80") for text in TEXTS]
    assert list(arms) == ["T=10", *(f"T=10 {text}" for text in as_stored)]


def test_a_comparison_has_names_as_they_are(named, tmp_path):
    for number, name in enumerate(("[/b] $x_$", "_y :smile:")):
        found = json.loads((named[0] / results.RESULTS).read_text())
        found["config"]["model"]["name"] = name
        folder = tmp_path / f"{number}_[b]"
        folder.mkdir()
        (folder / OWNER).touch()
        results.write_json(folder / results.RESULTS, found)
    (tmp_path / "2_[z] $").mkdir()
    (tmp_path / "2_[z] $" / OWNER).touch()
    console = quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(tmp_path, console)
    for text in ((tmp_path / "comparison.txt").read_text(), console.file.getvalue()):
        assert " 10  [/b] $x_$ " in text
        assert "_y :smile:: gradient" in text
    assert f"\nComparison: {tmp_path}\n" in console.file.getvalue()


def test_a_run_that_diverged_in_every_seed_is_drawn_and_compared(tmp_path):
    for number in range(2):
        folder = tmp_path / f"{number}_x"
        config = smoke(
            "training.steps=60", "training.optimizer=sgd", "training.learning_rate=1e30",
            "training.clip_norm=null", "model.nonlinearity=relu", "horizons=[10]",
            "contrast_horizons=[]",
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = run_study(config, folder, quiet())
        assert found["arms"][0]["diverged"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(tmp_path, quiet())["failed"] == {}


# Results come first


class FullDisk(io.StringIO):
    """A place to print to, until there are conclusions."""

    def write(self, text: str) -> int:
        if "conclude" in text:
            raise OSError("no space left")
        return super().write(text)


def test_what_cannot_be_drawn_or_printed_costs_no_results(tmp_path, monkeypatch):
    config = smoke("training.steps=2", "horizons=[10]", "contrast_horizons=[]")
    with pytest.raises(report.PresentationError, match=r"results are in .*OSError: no space left"):
        run_study(config, tmp_path / "printing", Console(file=FullDisk(), width=80))
    assert (tmp_path / "printing" / "ladder.png").exists()

    def fail(*_):
        assert (tmp_path / "drawing" / results.RESULTS).exists()
        raise ValueError("no ink")

    monkeypatch.setattr(figures, "draw_run", fail)
    console = quiet()
    with pytest.raises(report.PresentationError, match="ValueError: no ink"):
        run_study(config, tmp_path / "drawing", console)
    assert "What to conclude" in console.file.getvalue()
    for name in ("printing", "drawing"):
        assert results.load_results(tmp_path / name)["complete"] is True
        assert not (tmp_path / name / results.PARTIAL).exists()
        assert "What to conclude" in (tmp_path / name / "report.txt").read_text()


def test_a_comparison_that_cannot_be_drawn_is_written_and_printed(multirun, monkeypatch):
    def fail(*_):
        raise ValueError("no ink")

    monkeypatch.setattr(figures, "draw_comparison", fail)
    console = quiet()
    with pytest.raises(report.PresentationError, match="ValueError: no ink"):
        compare(multirun, console)
    assert json.loads((multirun / "comparison.json").read_text())["rows"]
    for text in ((multirun / "comparison.txt").read_text(), console.file.getvalue()):
        assert "2 runs on adding" in text


@pytest.mark.parametrize("model", ["rnn", "lstm", "gru", "irnn"])
def test_every_model_runs_the_same_study(model, tmp_path):
    found = run_study(smoke(f"model={model}", "horizons=[10]"), tmp_path, quiet())
    assert [arm["horizon"] for arm in found["arms"]] == [10, 12, *([12] if model == "rnn" else [])]
    assert (found["kernel_check"] is None) == (model != "irnn")
    assert found["arms"][0]["runs"][0]["initial"]["ratio_first_to_last"] > 0


def test_real_images_are_reported_as_accuracy_beside_chance(tmp_path):
    config = smoke(
        "task=noise_padded_digits", "training.steps=150", "training.batch_size=64", "horizons=[8]",
        "contrast_horizons=[]", "model=gru", "model.hidden_size=32",
    )  # fmt: skip
    found = run_study(config, tmp_path, quiet())
    run = found["arms"][0]["runs"][0]
    assert found["task"] == {"name": "noise_padded_digits", "metric": "accuracy"}
    assert run["test_metric"] == 1 - run["test_error"] > 0.5
    assert "knowing nothing: accuracy 0.103" in (tmp_path / "report.txt").read_text()


# The command line


def test_the_commands_of_the_readme_run_compare_and_compare_again(tmp_path):
    done = subprocess.run(
        command(
            "experiments.run", "-m", "experiment=smoke", "model=fused_rnn,rnn",
            f"output.root={tmp_path}",
        ),
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "multirun").glob("*/*")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "0_smoke_fused_rnn",
        "1_smoke_rnn",
    ]
    stored = json.loads((folder / "comparison.json").read_text())
    fused, plain = (
        [row for row in stored["rows"] if row["run"] == name] for name in ("fused_rnn", "rnn")
    )
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours["arm"] == theirs["arm"]
        assert ours["log10_ratio_initial"] == pytest.approx(theirs["log10_ratio_initial"], abs=1e-5)
        assert ours["test_metric"] == pytest.approx(theirs["test_metric"], rel=1e-2)
    assert "2 runs on adding" in done.stdout
    first = (folder / "comparison.txt").read_text()

    for name in ("comparison.json", "comparison.txt", "comparison.png", "comparison.svg"):
        (folder / name).unlink()
    assert compare(folder, quiet())["rows"] == stored["rows"]
    assert (folder / "comparison.txt").read_text() == first
    with Image.open(folder / "comparison.png") as image:
        assert min(image.size) > 300


def test_a_bad_value_ends_the_command_with_one_line(tmp_path):
    done = subprocess.run(
        command("experiments.run", "training.steps=0", f"output.root={tmp_path}"),
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == "error: training.steps must be an integer of at least 1; got 0"
    assert not list(tmp_path.glob("runs/*/*"))


def test_runs_that_the_clock_gives_one_name_have_folders_of_their_own(tmp_path):
    # A job array within a second: the year does not change as fast.
    name = f"hydra.run.dir='{tmp_path}/${{now:%Y}} [x]'"
    processes = [started(*TINY, f"seeds=[{seed}]", name) for seed in range(2)]
    printed = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert len(list(tmp_path.iterdir())) == 2
    for seed, text in enumerate(printed):
        folder = Path(text.splitlines()[-1].removeprefix("Results, curves and figures: "))
        assert folder.parent == tmp_path
        assert results.load_results(folder)["config"]["seeds"] == [seed]
        assert yaml.safe_load((folder / "config.yaml").read_text())["seeds"] == [seed]
        assert yaml.safe_load((folder / ".hydra/config.yaml").read_text())["seeds"] == [seed]
        assert f"seeds=[{seed}]" in yaml.safe_load((folder / ".hydra/overrides.yaml").read_text())
        described = yaml.safe_load((folder / ".hydra/hydra.yaml").read_text())
        assert described["hydra"]["runtime"]["output_dir"] == str(folder)
        with (folder / "curves.csv").open() as file:
            assert {row["seed"] for row in csv.DictReader(file)} == {str(seed)}


def state(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", [["hydra.run.dir"], ["-m", "hydra.sweep.dir"]])
def test_a_named_folder_with_a_run_in_it_is_refused_before_it_is_touched(kind, finished):
    *option, key = kind
    before = state(finished[0])
    done = subprocess.run(
        command("experiments.run", *option, *TINY, f"{key}={finished[0]}"),
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"error: {finished[0]} already holds a run (results.json); choose another folder"
    )
    assert state(finished[0]) == before


def test_a_table_at_initialisation_does_not_go_into_the_folder_of_a_run(finished, capsys):
    with pytest.raises(SystemExit):
        initialisation.main(["--folder", str(finished[0])])
    assert "already holds a run (results.json)" in capsys.readouterr().err


FAILING = """
from experiments import figures, run
from experiments.workers import WorkerError

run_arm, draw_run = run.run_arm, figures.draw_run

def failing_arm(config, arm, seed, report):
    if config["training"]["batch_size"] == 11:
        raise ValueError("eleven [/b]")
    if config["training"]["batch_size"] == 12:
        raise WorkerError("the process running job 0 died\\n  with its parent\\nand last words")
    return run_arm(config, arm, seed, report)

def failing_figure(found, *rest):
    if found["config"]["training"]["batch_size"] == 13:
        raise ValueError("no ink")
    draw_run(found, *rest)

figures.draw_run = failing_figure
run.run_arm = failing_arm
if __name__ == "__main__":
    run.main()
"""


def test_members_that_fail_are_listed_last_and_the_others_compared(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    done = subprocess.run(
        [
            sys.executable, str(script), "-m", *TINY, "training.batch_size=10,0,11,12,13",
            f'hydra.sweep.dir="{tmp_path}/${{now:%Y}} it\'s"',
        ],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    stored = json.loads((folder / "comparison.json").read_text())
    names = [f"{number}_smoke_fused_rnn" for number in range(5)]
    assert stored["runs"] == [names[0], names[4]]
    reasons = {
        names[1]: "ConfigError: training.batch_size must be an integer of at least 1; got 0",
        names[2]: "ValueError: eleven [/b]",
        names[3]: "WorkerError: the process running job 0 died ... and last words",
        names[4]: "PresentationError: the run is finished and its results are in",
    }
    assert list(stored["failed"]) == list(reasons)
    assert "no ink" in stored["failed"][names[4]]
    for text in (done.stdout, (folder / "comparison.txt").read_text()):
        heading, *listed = text.splitlines()[-5:]
        assert heading == "4 run(s) failed:"
        for line, (name, reason) in zip(listed, reasons.items(), strict=True):
            assert line.startswith(f"  {name}: {reason}")
    assert "ValueError: eleven" in (folder / names[2] / results.FAILURE).read_text()
    assert results.load_results(folder / names[4])["complete"] is True


def test_an_interrupt_ends_a_sweep_and_not_one_member(tmp_path):
    process = started(
        "-m", *TINY, "training.steps=0,1000000,1000001", f"hydra.sweep.dir={tmp_path}/sweep"
    )
    try:
        partial = tmp_path / "sweep" / "1_smoke_fused_rnn" / results.PARTIAL
        _wait_for(partial.exists, process)
        time.sleep(0.5)
        with pytest.raises(FolderTakenError, match=f"process {process.pid} .*is still running"):
            claim(tmp_path / "sweep")
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "interrupted" in output
    assert not list((tmp_path / "sweep").glob("2_*"))
    with pytest.raises(FolderTakenError, match="has ended"):
        claim(partial.parent)


def test_a_run_whose_figures_cannot_be_drawn_says_so_and_fails(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    done = subprocess.run(
        [
            sys.executable, str(script), *TINY, "training.batch_size=13",
            f"hydra.run.dir={tmp_path}/x",
        ],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: the run is finished and its results are in {tmp_path}/x")
    assert "ValueError: no ink" in done.stderr
    assert results.load_results(tmp_path / "x")["complete"] is True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_early_does_not_look_finished(how, tmp_path):
    process = started(
        "experiment=smoke", "workers=2", "horizons=[10,100]", "training.steps=1000000",
        f"output.root={tmp_path}",
    )  # fmt: skip
    try:
        _wait_for(lambda: len(_session(process.pid)) >= 3, process)
        time.sleep(0.5)
        os.kill(process.pid, how)
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0, output
        # The workers notice that nobody listens, at the latest when they next tell of progress.
        _wait_for(lambda: not _session(process.pid), None)
    finally:
        if _session(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert not (folder / results.RESULTS).exists()
    assert json.loads((folder / results.PARTIAL).read_text())["complete"] is False
    with pytest.raises(results.IncompleteRunError, match="ended before it finished"):
        results.load_results(folder)


def _session(leader: int) -> list[int]:
    """Return the processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may hold anything: state, parent, process group, session.
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended between the listing and the reading
        if int(session) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def _wait_for(condition, process: subprocess.Popen | None, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the run ended by itself:\n{process.communicate()[0]}")
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


# Comparison


@pytest.fixture
def multirun(finished, tmp_path) -> Path:
    """A folder as a multirun leaves it, with two copies of the finished run."""
    for number, name in enumerate(("fused_rnn", "other")):
        found = copy.deepcopy(json.loads((finished[0] / results.RESULTS).read_text()))
        found["config"]["model"]["name"] = name
        folder = tmp_path / f"{number}_smoke_{name}"
        (folder / ".hydra").mkdir(parents=True)
        results.write_json(folder / results.RESULTS, found)
    return tmp_path


def test_runs_of_one_model_are_told_apart(multirun):
    assert [run["label"] for run in load_runs(multirun)] == ["fused_rnn", "other"]
    path = multirun / "1_smoke_other" / results.RESULTS
    path.write_text(path.read_text().replace('"name": "other"', '"name": "fused_rnn"'))
    assert [run["label"] for run in load_runs(multirun)] == ["0_smoke_fused_rnn", "1_smoke_other"]
    assert common_horizon(load_runs(multirun)) == 12


def test_what_cannot_be_compared_is_refused_by_name(multirun, tmp_path):
    with pytest.raises(ComparisonError, match="is not a folder"):
        compare(tmp_path / "nowhere", quiet())
    with pytest.raises(ComparisonError, match=r"holds 0 run\(s\)"):
        compare(multirun / "0_smoke_fused_rnn", quiet())
    other = multirun / "1_smoke_other"
    found = json.loads((other / results.RESULTS).read_text())
    results.write_json(
        other / results.RESULTS, {**found, "task": {**found["task"], "name": "copy_memory"}}
    )
    with pytest.raises(
        ComparisonError, match="different tasks cannot be compared: adding, copy_memory"
    ):
        compare(multirun, quiet())
    (other / results.RESULTS).unlink()
    with pytest.raises(ComparisonError, match=r"holds 1 run\(s\) .*not finished: 1_smoke_other"):
        compare(multirun, quiet())


def test_the_finished_runs_of_a_sweep_are_compared_and_others_listed(multirun, monkeypatch, capsys):
    for name in ("2_smoke_a", "3_smoke_b"):
        (multirun / name / ".hydra").mkdir(parents=True)
    results.write_json(multirun / "3_smoke_b" / results.PARTIAL, {"complete": False})
    monkeypatch.setattr(sys, "argv", ["compare", str(multirun)])
    main()
    assert len(json.loads((multirun / "comparison.json").read_text())["runs"]) == 2
    heading, one, two = capsys.readouterr().out.splitlines()[-3:]
    assert heading == "2 run(s) failed:"
    assert one.startswith("  2_smoke_a: it holds no results.json")
    assert two.endswith("the run was ended before it finished")


# Conclusions, from numbers made up to have each outcome


def arm(
    horizon: int,
    log10_ratio: float | None,
    learned: list[bool],
    label: str = "",
    failed_share: float = 1.0,
) -> dict:
    shares = [0.05 if good else failed_share for good in learned]
    return {
        "title": f"T={horizon} {label}".strip(),
        "label": label,
        "horizon": horizon,
        "lags": horizon - 1,
        "is_contrast": bool(label),
        "solved": sum(learned),
        "learned": sum(learned),
        "diverged": 0,
        "majority_learned": sum(learned) * 2 > len(learned),
        "runs": [
            {
                "initial": {"log10_ratio": log10_ratio},
                "verdict": "solved" if good else "failed",
                "error_over_know_nothing": share,
                "test_metric": share / 6,
            }
            for good, share in zip(learned, shares, strict=True)
        ],
    }


YES, NO = [True] * 3, [False] * 3
TASK = {"name": "adding", "metric": "MSE"}


def said(arms: list[dict], check: dict | None = None) -> str:
    return "\n".join(report.conclusions({"task": TASK, "arms": arms, "kernel_check": check}))


def kernel(torch_milliseconds: float) -> dict:
    return {
        "horizon": 50,
        "relative_difference": {"prediction": 1e-7, "gradients": 2e-7, "adjoint_profile": 3e-7},
        "fused_milliseconds": 1.0,
        "torch_milliseconds": torch_milliseconds,
    }


def test_the_expected_outcome_is_told_with_its_numbers():
    text = said(
        [
            arm(11, -2.0, YES),
            arm(51, -10.0, NO),
            arm(51, -0.1, YES, "ReLU + identity"),
            arm(51, -1.6, NO, "orthogonal"),
        ],
        kernel(4.0),
    )
    assert "falls by 0.20 decades per time step back" in text
    assert "Learning ends between T = 11 (solved 3/3, initial ratio 1e-2.0)" in text
    assert "and T = 51 (failed 3/3, 1e-10.0)" in text
    assert "from which a run learned is 1e-2.0 (T = 11); all 3 runs that began below" in text
    assert "solved 3/3, MSE 0.0083, against failed 3/3, 0.17 on the ladder (1e-10.0)" in text
    assert "what fails on the ladder is the flow of gradient, not the code" in text
    assert "good gradient flow is not sufficient" in text
    assert "(4.0x)" in text
    assert "The fused kernel shows vanishing faster; it does not cure it." in text


def test_a_slower_kernel_is_not_called_faster():
    text = said([arm(11, -2.0, YES), arm(51, -10.0, NO)], kernel(0.5))
    assert "shows vanishing no faster, on this machine; it does not cure it" in text


UP = [arm(11, -2.0, YES), arm(51, -10.0, YES)]
EXPECTED = [arm(11, -2.0, YES), arm(51, -10.0, NO)]
DOWN = [arm(11, -2.0, NO), arm(51, -10.0, NO)]


def test_a_kernel_that_disagrees_with_torch_is_not_spoken_for():
    check = kernel(4.0)
    check["relative_difference"]["gradients"] = 0.02
    text = said(EXPECTED, check)
    assert "more than float32 rounding explains" in text
    assert "does not cure it" not in text


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        (DOWN, "Learning ends before the ladder begins: T = 11"),
        ([arm(11, -2.0, NO), arm(51, -9.0, YES)], "Learning ends before the ladder begins"),
        (UP, "Learning does not end on this ladder"),
        ([*EXPECTED, arm(71, -14.0, YES)], "but not for good: T = 71 learned again"),
        ([arm(11, 0.01, YES), arm(51, 0.1, YES)], "neither vanishes nor explodes"),
        ([arm(11, 2.0, YES), arm(51, 10.0, NO)], "explodes: at initialisation its norm grows by"),
        ([arm(11, None, NO)], "exactly zero"),
        ([*UP, arm(51, -0.1, NO, "x")], "The change does harm here"),
        ([*UP, arm(51, -0.1, YES, "x")], "Both learn"),
        ([*DOWN, arm(51, -0.1, NO, "x")], "nothing can be concluded"),
        ([*EXPECTED, arm(51, -9.9, NO, "x")], "did not mend the flow"),
        ([*EXPECTED, arm(51, -9.9, NO, "x", 0.5)], "did not mend the flow"),
        ([*EXPECTED, arm(51, -0.1, NO, "x", 0.5)], "every seed does better for it"),
        ([*EXPECTED, arm(51, -9.9, YES, "x")], "not because more gradient arrives"),
        ([arm(11, -2.0, YES), arm(51, -0.1, YES, "x")], "no rung at this horizon"),
    ],
)
def test_an_unexpected_outcome_is_told_as_such(arms, words):
    text = said(arms, kernel(4.0))
    assert words in text
    vanishes_after_learning = "falls by" in text and "Learning ends between" in text
    assert ("does not cure it" in text) == vanishes_after_learning


def test_earlier_numbers_are_shown_only_for_the_settings_they_were_measured_with():
    with initialize_config_dir(str(CONFIGURATION), version_base="1.3"):
        config = validated(compose("config", ["model=rnn"]))
    ladder_arm = {"model": config["model"], "horizon": 50, "hidden_size": 64}
    assert expected(config, ladder_arm).log10_ratio == "-10..-11.4"
    assert expected(config, {**ladder_arm, "horizon": 51}) == Expected()
    assert expected(config, {**ladder_arm, "hidden_size": 65}) == Expected()
    other = {**config, "training": {**config["training"], "steps": 1501}}
    assert expected(other, ladder_arm) == Expected()
    changed = {**config["model"], "recurrent_init": "identity"}
    assert expected(config, {**ladder_arm, "model": changed}) == Expected()
