"""Reports: what the page says is what the records hold; nothing damaged or foreign stops it."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import TreeBuilder

import pytest
import torch
from hydra import compose, initialize_config_dir
from markdown_it import MarkdownIt

from experiments import figures, report, view
from experiments.command import as_value, command, overrides
from experiments.composition import CONFIGURATION
from experiments.config import RunConfig
from experiments.expectations import QUANTITIES
from experiments.models import TORCHS
from experiments.probes import PROBES
from experiments.record import Record, Result
from experiments.report.__main__ import main
from experiments.report.arms import flat
from experiments.report.page import as_markdown
from experiments.report.reading import gather
from experiments.report.result_tables import interval
from experiments.report.summary import speeds
from experiments.study import ExecutionConfig, Member, Study, StudyConfig, parse_study
from experiments.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert('label')</script> & \"co\""
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Reads a page into elements; one that is not closed in order fails."""

    def __init__(self, path):
        super().__init__()
        self.builder = TreeBuilder()
        self.builder.start("page", {})
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.handle_endtag("page")
        self.root = self.builder.close()

    def handle_starttag(self, tag, attrs):
        self.builder.start(tag, dict(attrs))
        if tag in VOID:
            self.builder.end(tag)

    def handle_endtag(self, tag):
        assert self.builder.end(tag).tag == tag

    def handle_data(self, data):
        self.builder.data(data)

    def table(self, title):
        """Return the lines of every table of a title, as mappings from heading to text."""
        lines = []
        for box in self.root.findall(f".//div[@aria-label='{title}']"):
            headings = [text_of(th) for th in box.iter("th")]
            for body in box.iter("tbody"):
                row = next(body.iter("tr"))
                lines.append(dict(zip(headings, map(text_of, row.iter("td")), strict=True)))
        return lines

    def pairs(self, place="."):
        """Return terms and what is said of them, below an element."""
        terms, texts = (map(text_of, self.root.findall(f"{place}//{tag}")) for tag in ("dt", "dd"))
        return dict(zip(terms, texts, strict=True))

    def problems(self):
        return self.pairs(".//section[@id='problems']")


def text_of(element):
    return " ".join(" ".join(element.itertext()).split())


def run_of(core="rnn", seed=0, horizon=8, *, label=None, probes=(), **changes):
    every = {name: {"every": 10} for name in probes}
    values = {
        "model": {"core": core, "hidden_size": 8},
        "task": {"name": "adding", "test_size": 32},
        "remedy": {"clipping": {"norm": 1.0}},
        "optimizer": {"name": "adam"},
        "probe": {**every, **({"lyapunov": {"every": 10, "exponents": 4}} if probes else {})},
        "training": {"steps": 20, "batch_size": 8},
        "evaluation": {"probe_size": 4, "train_size": 16, "horizons": [5]},
        "horizon": horizon,
        "seed": seed,
        **changes,
    }
    run = RunConfig.parse(values)
    return run if label is None else replace(run, label=label)


def record_of(run, error=0.01, ratio=-1.0, seconds=2.0, **changes):
    """Return a record as a run of the adding task leaves it, with these numbers."""
    result = Result(
        hidden_size=8,
        parameters=100,
        steps=run.training.steps,
        solved_at=None,
        task="adding",
        metric="MSE",
        know_nothing_loss=1 / 6,
        know_nothing_error=1 / 6,
        dependency=run.horizon - 1,
        test_error=error,
        test_metric=error,
        error_over_know_nothing=6 * error,
        train_error=error,
        verdict="solved" if error < 1 / 60 else "failed",
    )
    adjoint = {"state_norm": [10**ratio, 1.0], "hidden_norm": [1, 1], "log10_ratio": ratio}
    probes = {"adjoint": {"initial": adjoint, "trained": adjoint}}
    clock = {"seconds": seconds, "processor_seconds": seconds}
    provenance = {**clock, "started": "2026-01-02T03:04:05+00:00", "torch": "9.9"}
    record = Record(
        run.identity, run.label, "finished", None, run.plain(), result, probes, provenance
    )
    return replace(record, **changes)


def save(root, *records):
    folders = []
    for record in records:
        folder = root / "records" / f"run-{record.identity}"
        folder.mkdir(parents=True)
        record.save(folder)
        folders.append(folder)
    return folders


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(figures, "drawn", lambda *arguments: iter(()))


def made(*folders, output=None):
    path, table = report.write([Path(folder) for folder in folders], output)
    with table.open(newline="", encoding="utf-8") as file:
        return Page(path), list(csv.DictReader(file))


@pytest.fixture(scope="module")
def hydra():
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGURATION)):
        yield


# ---- a study that was run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study whose runs were made, one arm with a hostile label."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("study")
    members = []
    for core, label in (("fused_rnn", EVIL), ("rnn", "rnn"), ("gru", "gru")):
        for horizon in (8, 12):
            for seed in (0, 1) if core != "gru" else (0,):
                run = run_of(core, seed, horizon, label=label, probes=sorted(PROBES))
                folder = root / "runs" / "records" / run.folder_name
                with pytest.MonkeyPatch.context() as alone:  # on the machine
                    alone.setattr(time, "process_time", time.perf_counter)
                    train(run, folder)
                members.append(Member(label, run, None, folder))
    torch.set_num_threads(threads)
    expected = {
        "source": "a page",
        "signatures": [
            {"arm": "rnn", "horizon": 8, "log10_ratio": [-9, 0], "test_metric": [5, 6]},
            {"arm": "nobody", "learned": [0, 1]},
        ],
        "published": [
            {"arm": "gru", "test_metric": 0.164, "source": "Bai 2018", "settings": "equal size"}
        ],
    }
    config = StudyConfig(name=EVIL, about="Does it work?")
    folder = root / "study"
    folder.mkdir()
    view.save(
        Study(config, ExecutionConfig(), tuple(members), root, expected), folder, "python <it>"
    )
    return folder


@pytest.fixture(scope="module")
def page(study):
    return made(study)


def test_the_page_says_what_was_asked_where_and_with_what(page):
    root = page[0].root
    assert text_of(next(root.iter("title"))) == text_of(next(root.iter("h1"))) == EVIL
    assert "Does it work?" in text_of(root)
    assert "python <it>" in text_of(root)
    named = page[0].pairs()
    assert named["PyTorch"] == torch.__version__
    assert {"machine", "backend", "Python", "device", "threads", "precision"} <= named.keys()
    said = [text_of(li) for li in root.iter("li") if "times as fast as rnn" in text_of(li)]
    assert len(said) == 2
    assert all("end to end" in each and "median over 2 seed(s)" in each for each in said)


def test_what_a_label_holds_is_text_and_nothing_is_loaded_from_outside(page):
    root = page[0].root
    (script,) = root.iter("script")
    assert "alert" not in text_of(script)
    assert EVIL in {line["arm"] for line in page[0].table("Results")}
    for tag in ("img", "link", "a", "script", "iframe"):
        for each in root.iter(tag):
            for name in ("src", "href"):
                assert each.get(name, "#").startswith(("data:", "#"))
    assert "url(" not in text_of(next(root.iter("style")))


def test_the_table_has_the_mean_and_its_interval_over_seeds(page, study):
    lines = page[0].table("Results")
    assert len(lines) == 6
    for row in view.load(study).rows:
        (line,) = (e for e in lines if (e["arm"], e["T"]) == (row.label, str(row.horizon)))
        values = torch.tensor(row.values("test_metric"), dtype=torch.float64)
        assert line["test MSE, mean"] == f"{float(values.mean()):.3g}"
        assert line["seeds"] == str(len(values))
        assert line["log10 ratio, initial"] == f"{row.mean_log10_ratio():.1f}"
        if len(values) == 1:
            assert line["95 % interval"] == ""
        else:  # Student's t of one degree of freedom: 12.7062
            half = 12.7062 * float(values.std()) / math.sqrt(2)
            low, high = map(float, line["95 % interval"].split(" to "))
            assert [low, high] == pytest.approx(
                [float(values.mean()) - half, float(values.mean()) + half], 1e-2
            )


def test_every_figure_that_the_records_allow_is_there_and_says_of_which_runs(page):
    drawn = list(page[0].root.iter("figure"))
    names = {re.sub(r"(_\d+)+$", "", figure.get("data-name")) for figure in drawn}
    expected = """
        adjoint_profile adjoint_heatmap lag_contribution loss_curves cliff share_solved quality
        solved_by_ratio recurrent_weights lyapunov_spectrum jacobian saturation gradient_norms
        remedy_bars speed_against_accuracy
    """
    assert names == set(expected.split())
    for figure in drawn:
        (image,) = figure.iter("img")
        caption = text_of(next(figure.iter("figcaption")))
        assert image.get("alt") == caption
        assert "T = " in caption
        assert "seed" in caption
    assert page[0].problems() == {}


def test_expected_and_published_numbers_stand_beside_those_measured(page):
    lines = page[0].table("Expected and published")
    short = {(e["arm"], e["quantity"]): (e["expected"], e["verdict"]) for e in lines}
    assert short == {
        ("rnn", QUANTITIES["log10_ratio"]): ("-9..0", "met"),
        ("rnn", QUANTITIES["test_metric"]): ("5..6", "not met"),
        ("nobody", QUANTITIES["learned"]): ("0..1", "not measured"),
        ("gru", QUANTITIES["test_metric"]): ("0.164", "published"),
    }
    published = [line for line in lines if line["arm"] == "gru"]
    assert {line["T"] for line in published} == {"8", "12"}
    for line in published:
        assert (line["source"], line["settings"]) == ("Bai 2018", "equal size")
        assert float(line["measured"]) > 0


def test_the_command_under_a_row_makes_its_runs(page, study, hydra):
    commands = page[0].root.findall(".//div[@aria-label='Results']//tbody//code")
    assert len(commands) == 6
    found = set()
    for each in commands:
        words = shlex.split(text_of(each))
        assert words[:3] == ["python", "-m", "experiments.run"]
        study_of = parse_study(compose("config", words[3:]), words[3:])
        found |= {member.run.identity for member in study_of.members}
    assert found == {entry.record.identity for entry in view.load(study).entries}


def test_the_csv_has_a_line_per_run_with_every_value(page, study):
    _, lines = page
    entries = {entry.record.identity: entry for entry in view.load(study).entries}
    assert {line["identity"] for line in lines} == set(entries)
    assert len(lines) == len(entries)
    for line in lines:
        entry = entries[line["identity"]]
        for key, value in flat(entry.record.config).items():
            shown = line[f"config.{key}"]
            if isinstance(value, str):
                assert shown == value
            else:
                assert json.loads(shown or "null") == value
        assert float(line["result.test_error"]) == entry.record.result.test_error
        for stage in ("initial", "trained"):
            ratio = entry.record.probes["adjoint"][stage]["log10_ratio"]
            assert float(line[f"log10_ratio.{stage}"]) == ratio
        assert (line["label"], line["folder"]) == (entry.label, str(entry.folder))


def test_other_lengths_and_the_gap_to_training_are_tables_of_their_own(page):
    lines = page[0].table("Trained at one length, tested at others")
    found = {(line["trained at T"], line["tested at T"]) for line in lines}
    assert found == {("8", "5"), ("8", "8"), ("12", "5"), ("12", "12")}
    assert len(page[0].table("Training and test error")) == 6


# ---- sets of records -----------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_any_folder_will_do_and_a_run_in_several_counts_once(study, tmp_path):
    records = study.parent / "runs" / "records"
    copy = shutil.copytree(records, tmp_path / "copy")
    one = next(copy.iterdir())
    for folders, count in (([study.parent], 10), ([copy, study, records], 10), ([one], 1)):
        page, lines = made(*folders, output=tmp_path / "page.html")
        assert len(lines) == count
        assert f"{count} runs, {count} with a record" in text_of(page.root)
    assert not list(copy.rglob("*.html"))
    made(one)
    assert {path.name for path in one.glob("report.*")} == {"report.html", "report.csv"}


@pytest.mark.usefixtures("no_figures")
def test_runs_of_one_label_and_other_settings_are_not_taken_together(tmp_path):
    long = {"steps": 40, "batch_size": 8}
    save(
        tmp_path,
        record_of(run_of(seed=0), 0.01),
        record_of(run_of(seed=1), 0.03),
        record_of(run_of(seed=0, training=long), 0.1),
        record_of(run_of(seed=0, remedy={}), 0.2),
    )
    page, _ = made(tmp_path)
    lines = {line["arm"]: line for line in page.table("Results")}
    clip, steps = "remedy.clipping.norm", "training.steps"
    assert {name: line["test MSE, mean"] for name, line in lines.items()} == {
        f"rnn ({steps}=20, {clip}=1.0)": "0.02",
        f"rnn ({steps}=40, {clip}=1.0)": "0.1",
        f"rnn ({steps}=20, without {clip})": "0.2",
    }
    assert lines[f"rnn ({steps}=20, {clip}=1.0)"]["verdicts"] == "solved 1, failed 1"


@pytest.mark.usefixtures("no_figures")
def test_diverged_and_failed_runs_are_counted_and_listed(tmp_path):
    good = record_of(run_of(seed=0))
    lost = record_of(run_of(seed=1), status="diverged", reason="step 3 is not finite")
    none = dict.fromkeys(("test_error", "test_metric", "error_over_know_nothing", "train_error"))
    lost = replace(lost, result=replace(lost.result, verdict="diverged", **none))
    bad = replace(record_of(run_of(seed=2)), status="failed", reason=EVIL, result=None, probes={})
    save(tmp_path, good, lost, bad)
    page, lines = made(tmp_path)
    (row,) = page.table("Results")
    assert (row["seeds"], row["verdicts"]) == ("3", "solved 1, diverged 1, error 1")
    assert (row["test MSE, mean"], row["95 % interval"]) == ("0.01", "")
    (problem,) = page.problems().items()
    assert problem[0].startswith("rnn, T=8, seed 2")
    assert problem[1] == EVIL
    assert sorted((line["status"], line["reason"]) for line in lines) == [
        ("diverged", "step 3 is not finite"),
        ("failed", EVIL),
        ("finished", ""),
    ]


def test_an_interval_is_students_t():
    # 1, 2, 3, 4: mean 2.5, s 1.29099, t(3) 3.18245
    low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert (low, high) == pytest.approx((2.5 - 2.054260, 2.5 + 2.054260), abs=1e-5)
    assert interval([1.0]) is None


@pytest.mark.usefixtures("no_figures")
def test_a_ratio_that_is_exactly_zero_is_not_called_missing(tmp_path):
    zero = {"state_norm": [0.0, 1.0], "hidden_norm": [0.0, 1.0], "log10_ratio": None}
    record = record_of(run_of())
    save(tmp_path, replace(record, probes={"adjoint": {"initial": zero, "trained": None}}))
    (row,) = made(tmp_path)[0].table("Results")
    assert (row["log10 ratio, initial"], row["trained"]) == ("exactly 0", "")


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("fused", TORCHS)
def test_speed_is_compared_between_runs_that_are_otherwise_equal(fused, tmp_path):
    cores = (fused, TORCHS[fused])

    def both(seconds, **changes):
        return [
            record_of(run_of(c, **changes), seconds=s) for c, s in zip(cores, seconds, strict=False)
        ]

    other = record_of(run_of(cores[1], horizon=12), seconds=9.0)
    elsewhere = record_of(run_of(fused, horizon=12), seconds=1.0)
    elsewhere.provenance["torch"] = "1.0"
    beside_others = both((1, 90), seed=2)
    beside_others[1].provenance["processor_seconds"] = 60.0
    save(tmp_path, *both((1, 3)), *both((2, 4), seed=1), *beside_others, other, elsewhere)
    found = gather([tmp_path])
    (said,) = speeds(found.entries)
    # Medians of 1, 2 and of 3, 4 seconds for 20 steps.
    assert f"T = 8, H = 8: {fused} trains 2.33 times as fast as {cores[1]}, " in said
    assert "(75.00 against 175.00 ms per step, median over 2 seed(s)" in said


@pytest.mark.usefixtures("no_figures")
def test_signatures_of_other_settings_are_not_compared(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    values = json.loads((folder / "study.json").read_text())
    values["expected"]["settings"] = {"training.steps": 1500}
    records = study.parent / "runs" / "records"
    for run in values["runs"]:
        run["folder"] = str(records / Path(run["folder"]).name)
    (folder / "study.json").write_text(json.dumps(values))
    lines = made(folder)[0].table("Expected and published")
    verdicts = {line["arm"]: line["verdict"] for line in lines}
    assert verdicts["rnn"] == "not measured: these runs have other settings"
    assert verdicts["gru"] == "published"


# ---- Markdown ------------------------------------------------------------------------------------


def rendered(markdown, path):
    path.write_text(MARKDOWN.render(markdown), encoding="utf-8")
    return Page(path).root


MARKDOWN = MarkdownIt("commonmark", {"xhtmlOut": False}).enable("table")


def test_markdown_shows_what_the_page_shows(study, page, tmp_path):
    output, _ = report.write([study], tmp_path / "found.md")
    root = rendered(output.read_text(encoding="utf-8"), tmp_path / "rendered.html")
    assert not list(root.iter("script"))
    assert EVIL in text_of(root)
    assert "Signatures expected of this study: 1 of 2 met; not met: rnn, T = 8, " in text_of(root)
    tables = [
        [
            [text_of(cell) for cell in line.iter("td")]
            for line in next(each.iter("tbody")).iter("tr")
        ]
        for each in root.iter("table")
    ]
    titles = (
        "Results",
        "Trained at one length, tested at others",
        "Training and test error",
        "Expected and published",
    )
    assert tables == [[list(line.values()) for line in page[0].table(title)] for title in titles]
    sources = [image.get("src") for image in root.iter("img")]
    assert sources == [f"found/adding_{name}" for name in ("ladder.svg", "loss_curves.svg")]
    assert all((tmp_path / source).stat().st_size > 0 for source in sources)


def test_text_is_text_in_markdown(tmp_path):
    for text in (EVIL, "1. x", "- x", "+", "a|b", "`code` _x_ **y** [l](u) ~~z~~", "&amp; \\ $x$"):
        (item,) = rendered(f"* {as_markdown(text)}", tmp_path / "page.html").iter("li")
        assert (item.text, len(item)) == (text, 0)


# ---- what is damaged or foreign ------------------------------------------------------------------

DAMAGES = {
    "not JSON": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "bytes": lambda text: "\udcff\udcfe",
    "another version": lambda text: text.replace('"version": 1', '"version": 7'),
    "no steps": lambda text: text.replace('"steps": 20,\n  "solved_at"', '"solved_at"'),
    "steps 0": lambda text: text.replace('"steps": 20,\n  "solved_at"', '"steps":0,\n"solved_at"'),
    "identity": lambda text: re.sub(r'"identity": "\w+"', '"identity": 5', text),
    "config": lambda text: text.replace('"config": {', '"config": 3, "other": {'),
    "model": lambda text: text.replace('"core": "rnn"', '"core": null'),
    "horizon": lambda text: text.replace('"horizon": 8,', '"horizon": "long",'),
    "metric": lambda text: text.replace('"metric": "MSE"', '"metric": 3'),
    "status": lambda text: text.replace('"status": "finished"', '"status": "well"'),
    "seconds": lambda text: text.replace('"seconds": 2.0', '"seconds": "two"'),
}


@pytest.mark.usefixtures("no_figures")
def test_damaged_records_are_listed_with_their_reasons_and_the_others_are_shown(tmp_path, capsys):
    save(tmp_path, record_of(run_of(seed=0)))
    names = []
    for seed, (damage, change) in enumerate(DAMAGES.items(), start=1):
        (folder,) = save(tmp_path, record_of(run_of(seed=seed)))
        path = folder / "record.json"
        changed = change(path.read_text())
        assert changed != path.read_text(), damage
        path.write_bytes(changed.encode("utf-8", "surrogateescape"))
        names.append(folder.name)
    assert main([str(tmp_path)]) == 0
    page = Page(tmp_path / "report.html")
    assert len(page.table("Results")) == 1
    listed = ["".join(problem) for problem in page.problems().items()]
    assert len(listed) == len(names)
    assert all(any(name in each for each in listed) for name in names)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_figures")
def test_a_foreign_folder_and_a_damaged_study_are_listed(tmp_path):
    save(tmp_path, record_of(run_of()))
    for name, content in (
        ("other/config.json", "{}"),
        ("text/config.json", "["),
        ("study/study.json", '{"version": 1, "runs": 3}'),
        ("list/study.json", "[]"),
        ("failed/failure.json", '{"reason": "model must be one of"}'),
        ("strange/failure.json", "3"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    problems = made(tmp_path)[0].problems()
    assert len(problems) == 6
    assert problems[str(tmp_path / "failed")] == "model must be one of"


def test_a_damaged_log_costs_its_curves_alone(study, tmp_path, monkeypatch):
    three = ("loss_curves", "adjoint_profiles", "adjoint_heatmaps")
    monkeypatch.setattr(figures, "EVERY", three)
    records = tmp_path / "records"
    for folder in sorted((study.parent / "runs" / "records").glob("*T8-rnn*")):
        shutil.copytree(folder, records / folder.name)
    log = next(iter(records.iterdir())) / "metrics.jsonl"
    log.write_text("{}\n[1]\n3\nnot JSON\n")
    page, _ = made(tmp_path)
    (problem,) = page.problems().items()
    assert problem[0].startswith("log of rnn")
    drawn = {figure.get("data-name") for figure in page.root.iter("figure")}
    assert drawn == {"loss_curves", "adjoint_profile", "adjoint_heatmap_1"}


def test_a_figure_that_cannot_be_drawn_is_listed(tmp_path):
    foreign = {"adjoint": {"initial": {"state_norm": "many", "log10_ratio": -1.0}}}
    save(tmp_path, replace(record_of(run_of()), probes=foreign))
    problems = made(tmp_path)[0].problems()
    assert any("figure adjoint_profiles of adding" in name for name in problems)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_errors_are_one_line_and_exit_status_1(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    save(tmp_path / "good", record_of(run_of()))
    good = str(tmp_path / "good")
    for arguments, words in (
        ([str(tmp_path / "empty")], "no records in"),
        ([good, str(tmp_path / "absent")], "absent is missing"),
        ([str(tmp_path / "file")], "file is not a folder"),
        ([good, "--output", str(tmp_path / "absent" / "page.html")], "absent"),
        ([good, "--output", str(tmp_path / "empty")], "empty"),
        ([good, "--output", str(tmp_path / "page.csv")], "must not be called"),
    ):
        assert main(arguments) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert words in printed
        assert printed.count("\n") == 1


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_module_is_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("experiments.report", run_name="__main__")
    assert end.value.code == 1
    assert capsys.readouterr() == ("", f"error: no records in {tmp_path}\n")


# ---- the command ---------------------------------------------------------------------------------

CONFIGS = {
    "plain": {},
    "ReLU": {"model": {"core": "fused_rnn", "nonlinearity": "relu", "num_layers": 2}},
    "matched": {"model": {"core": "lstm", "match_parameters": True, "bidirectional": True}},
    "residual": {"model": {"core": "leaky", "leak": 0.25}, "remedy": {}},
    "two remedies": {
        "remedy": {"gate_bias": {"value": "chrono"}, "clipping": {"norm": None, "value": 0.5}},
        "model": {"core": "gru"},
    },
    "initialisation": {
        "remedy": {"initialisation": {"recurrent": "gaussian", "gain": 1.25, "input_std": 1e-5}}
    },
    "omega": {"remedy": {"clipping": {"norm": 1}, "omega": {"form": "code"}}},
    "optimizer": {
        "optimizer": {"name": "sgd", "momentum": 0.9, "samples": 100, "schedule": "cosine"}
    },
    "Nesterov": {"optimizer": {"name": "sgd", "momentum": 0.5, "nesterov": True}},
    "RMSprop": {"optimizer": {"name": "rmsprop", "smoothing": 0.9}},
    "task": {"task": {"name": "temporal_order", "symbols": 3}, "evaluation": {}, "horizon": 30},
    "digits": {"task": {"name": "digits", "form": "noise_padded"}, "evaluation": {}, "horizon": 20},
    "latch": {"task": {"name": "latch", "noise": 1e-7}},
    "numerics": {"precision": "float64", "threads": 2},
    "stop": {
        "evaluation": {"every": 5, "horizons": [4, 6]},
        "training": {"stop_when_solved": True, "accumulation": 2},
    },
    "probes": {"probe": {"jacobian": {"lags": [1, 2]}, "saturation": {"every": 3}, "spectrum": {}}},
    "no probe": {"probe": {}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_of_a_record_makes_the_same_run(name, hydra):
    run = run_of(seed=3, **{"horizon": 9, **CONFIGS[name]})
    words = shlex.split(command(json.loads(json.dumps(run.plain())), [run.horizon, 31], [3, 5]))[3:]
    study = parse_study(compose("config", words), words)
    assert next(member.run.identity for member in study.members) == run.identity
    found = [(member.run.horizon, member.run.seed) for member in study.members]
    assert found == [(run.horizon, 3), (run.horizon, 5), (31, 3), (31, 5)]


def test_the_command_says_only_what_differs(hydra):
    standard = ["experiment=single", "model=gru", "task=adding", "horizons=[50]", "seeds=[0,1]"]
    (member, *_) = parse_study(compose("config", standard), standard).members
    assert overrides(member.run.plain(), [50], [0, 1]) == standard


@pytest.mark.parametrize(
    "value",
    [
        *("\\", "=", "é", "$", "%", "\t", "'", '"', ".", "1", "1e5", "true", "null"),
        *("a b", "it's", "a\\'b", "x\\", "${oc.env:HOME}", "\\${a}", "a,b", "[x]", "{y}", "a:b"),
        *("~/x", "/data/mnist"),
    ],
)
def test_a_value_passes_hydra_unchanged(value, hydra):
    config = compose("config", ["experiment=single", "task=mnist", f"task.root={as_value(value)}"])
    assert config.task.root == value


# ---- the browser ---------------------------------------------------------------------------------

CHECK = """
<script>
addEventListener("load", () => {
  const table = document.querySelector("table");
  const column = (index) => [...table.tBodies].map((b) => b.rows[0].cells[index].textContent);
  const names = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const found = { names, before: column(0), states: [], sorted: {} };
  for (const name of ["test MSE, mean", "arm", "T"]) {
    const index = names.indexOf(name), heading = table.tHead.rows[0].cells[index];
    found.sorted[name] = [1, 2].map(() => {
      heading.querySelector("button").click();
      found.states.push(table.querySelectorAll("[aria-sort]").length, heading.ariaSort);
      return column(index);
    });
  }
  found.images = [...document.images].map((i) => [i.complete, i.naturalWidth, i.clientHeight]);
  found.loaded = performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 5));
  found.violations = window.violations;
  const frames = [...document.querySelectorAll(".box")];
  found.wide = document.documentElement.scrollWidth > innerWidth;
  found.commands = [...table.tBodies].every((b) => b.querySelector("details code"));
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
});
</script>
"""
LISTEN = """
<script>
window.violations = [];
addEventListener("securitypolicyviolation", (e) => window.violations.push(e.blockedURI));
addEventListener("error", (e) => window.violations.push(String(e.message)), true);
</script>
"""


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium (Debian: apt-get install chromium)")
    return found


def seen_by(browser, path, tmp_path, *options):
    """Return what the script found in a page."""
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", *options]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000"]
    done = subprocess.run([*words, path.as_uri()], capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1]))


def test_it_opens_in_a_browser_loads_nothing_and_its_tables_sort(browser, page, study, tmp_path):
    html = (study / "report.html").read_text(encoding="utf-8")
    assert "<style>" in html
    copy = tmp_path / "page.html"
    html = html.replace("<style>", f"{LISTEN}<style>", 1).replace("</body>", f"{CHECK}</body>", 1)
    copy.write_text(html)
    found = seen_by(browser, copy, tmp_path, "--window-size=1280,900")
    assert found["violations"] == []
    assert set(found["loaded"]) <= {"data:"}
    assert len(found["images"]) == len(list(page[0].root.iter("figure")))
    assert all(ok and width > 100 and height > 100 for ok, width, height in found["images"])
    assert not found["wide"]
    assert found["commands"]
    up, down = found["sorted"]["test MSE, mean"]
    errors = [line["test MSE, mean"] for line in page[0].table("Results")]
    assert up == sorted(errors, key=float)
    assert [float(x) for x in down] == sorted(map(float, up), reverse=True)
    up, down = found["sorted"]["T"]
    assert up == ["8"] * 3 + ["12"] * 3
    assert down == ["12"] * 3 + ["8"] * 3
    names = found["sorted"]["arm"][0]
    assert names.index("gru") < names.index("rnn")
    assert found["states"] == [1, "ascending", 1, "descending"] * 3


def test_a_phone_shows_the_page_without_scrolling_sideways(browser, study, tmp_path):
    # A window of Chromium's is never this narrow; a frame is.
    shutil.copy(study / "report.html", tmp_path / "page.html")
    outer = tmp_path / "phone.html"
    outer.write_text("""<iframe src="page.html" style="width:360px;height:800px"></iframe>
<script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  const result = document.createElement("pre");
  result.id = "found";
  const box = page.querySelector(".box");
  result.textContent = JSON.stringify({
    width: page.documentElement.clientWidth, whole: page.documentElement.scrollWidth,
    box: box.clientWidth, table: box.scrollWidth,
  });
  document.body.append(result);
});
</script>""")
    sizes = seen_by(browser, outer, tmp_path, "--allow-file-access-from-files")
    assert sizes["whole"] <= sizes["width"] <= 360
    assert sizes["box"] < sizes["table"]
