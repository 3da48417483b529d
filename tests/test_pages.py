"""README and docs: examples and commands run as they stand there, and what they name exists."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from benchmarks.instruments import recording_table
from rnn_cuda import backend, instruments
from rnn_cuda.instruments import plots
from tests.differentiation_table import TABLE, outcomes, render
from tests.experiments.small_studies import study_of
from tests.idx_files import write_mnist

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


# ---- README --------------------------------------------------------------------------------------


def test_the_readmes_examples_run_as_printed_one_after_the_other():
    scope = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(example, "README.md", "exec"), scope)
    assert scope["output"].shape == (100, 32, 128)
    assert scope["h_n"].shape == (4, 32, 64)
    assert scope["x"].grad.isfinite().all()
    assert scope["flow"].joint_adjoint_norm["l1"].shape == (100, 32)


def test_every_local_link_and_figure_of_the_readme_exists():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert "docs/limitations.md" in targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_experiment_command_is_a_study(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path))
    pages = (README, (ROOT / "docs" / "laboratory.md").read_text(encoding="utf-8"))
    commands = [
        shlex.split(command)
        for page in pages
        for command in re.findall(r"python -m experiments\.run(.*?)(?:\s+#|\n|$)", page)
    ]
    assert len(commands) >= 10
    studies = set()
    for words in commands:
        overrides = [word for word in words if "=" in word]
        # Of what a sweep is over, each by itself.
        choices = [
            [f"experiment={name}" for name in glob_of(w)]
            if "=glob(" in w
            else (w.split(",") if "[" not in w else [w])
            for w in overrides
        ]
        for first, *others in choices:
            key = first.partition("=")[0]
            for choice in (first, *(f"{key}={o.rpartition('=')[2]}" for o in others)):
                rest = [o[0] for o in choices if o[0] != first]
                studies.add(tuple(sorted([*rest, choice])))
    for words in studies:
        assert study_of(*words).members


def glob_of(override):
    """Return the studies that a glob is over, as Hydra reads it."""
    names = [path.stem for path in sorted((ROOT / "hydra_conf" / "experiment").glob("*.yaml"))]
    return OverridesParser.create().parse_override(override).value().filter(names)


# ---- differentiation, instruments ----------------------------------------------------------------

PAGES = {
    page: (ROOT / "docs" / f"{page}.md").read_text() for page in ("differentiation", "instruments")
}
EXAMPLES = [
    (f"{name}.md, {title}", code)
    for name, page in PAGES.items()
    for title, code in re.findall(
        r"^##+ ([^\n]+)\n(?:(?!^##).)*?```python\n(.*?)```", page, re.M | re.S
    )
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_an_example_runs_as_printed(title, code, tmp_path, monkeypatch):
    if title.endswith("Compilers") and backend.requested() == "reference":
        pytest.skip("loads the kernels, and the reference is the active backend")
    monkeypatch.chdir(tmp_path)  # one saves a figure
    scope = {"__name__": "example"}
    exec(compile(code, title, "exec"), scope)
    if title == "instruments.md, Gradient flow":
        assert scope["norm"].shape == scope["cell"].shape == scope["both"].shape == (50, 16)
        assert scope["vectors"].shape == (50, 16, 32)
    if "figure" in scope:
        axes = scope["figure"].axes[0]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(scope["norms"])
        assert len(axes.collections) == 3  # a band each
        assert {path.name for path in Path("figures").iterdir()} == {"profile.png", "profile.svg"}


def test_every_example_of_these_pages_is_run():
    assert len(EXAMPLES) == sum(page.count("```python") for page in PAGES.values()) > 6


def test_every_instrument_that_is_a_function_is_on_its_page():
    names = [name for name in instruments.__all__ + plots.__all__ if name[0].islower()]
    names = [name for name in names if name not in ("as_text", "legend", "save")]
    assert [name for name in names if f"`{name}`" not in PAGES["instruments"]] == []


def test_the_command_for_the_cost_of_recording_measures_every_module():
    printed = str(recording_table(((4, 2, 3, 5),), rounds=1))
    assert all(name in printed for name in ("FusedRNN", "RNN", "LSTM", "GRU", "4, 2, 3, 5"))


@pytest.mark.slow
@pytest.mark.skipif(backend.requested() == "reference", reason="the table is the native backend's")
def test_everything_in_the_table_works_here_and_the_table_on_disk_says_what_the_script_finds():
    found = outcomes()
    for name, row in found.items():
        assert row["`FusedRNN`, CPU"] == "yes", name
    if TABLE.read_text().splitlines()[2] == render(found).splitlines()[2]:  # the same torch
        assert TABLE.read_text() == render(found)


# ---- the tutorial notebook -----------------------------------------------------------------------

NOTEBOOK = ROOT / "docs" / "notebooks" / "see_a_gradient_vanish.ipynb"


def outputs_of(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    return outputs


def last_numbers(text, words):
    """Return the last number of each line that has these words in it, by its first column."""
    lines = [line for line in text.splitlines() if words in line]
    return {line.split("  ")[0]: float(line.split()[-1]) for line in lines}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs_from_a_kernel_of_its_own_and_shows_its_figures():
    nbformat, nbclient, _ = map(pytest.importorskip, ("nbformat", "nbclient", "ipykernel"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 300_000
    assert not [o for o in outputs_of(notebook) if o.get("name") == "stderr"]

    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    # A cell that raises is an error here.
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    outputs = outputs_of(notebook)
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    # What its sentences say: two models vanish, two do not; the gated one learns all the same.
    ratios = last_numbers(text, "first step over last:")
    assert ratios["tanh RNN"] < 1e-15
    assert ratios["GRU"] < 1e-15
    assert min(ratios["IRNN"], ratios["LSTM, forget bias 3"]) > 1e-2
    errors = last_numbers(text, "knowing nothing:")
    assert errors["fused_rnn"] > 0.5
    assert errors["gru"] < 0.1
