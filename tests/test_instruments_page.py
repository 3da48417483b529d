"""The page on the instruments: its examples run as printed, and it names every function."""

import re
from pathlib import Path

import pytest

from benchmarks import instruments as benchmark
from rnn_cuda import instruments
from rnn_cuda.instruments import plots

PAGE = (Path(__file__).parents[1] / "docs" / "instruments.md").read_text()
EXAMPLES = re.findall(r"^##+ ([^\n]+)\n(?:(?!^##).)*?```python\n(.*?)```", PAGE, re.M | re.S)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_an_example_runs_as_printed(title, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "example"}
    exec(compile(code, f"instruments.md, {title}", "exec"), scope)
    if title == "Gradient flow":
        assert scope["norm"].shape == scope["cell"].shape == scope["both"].shape == (50, 16)
        assert scope["vectors"].shape == (50, 16, 32)
    if "figure" in scope:
        axes = scope["figure"].axes[0]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(scope["norms"])
        assert len(axes.collections) == 3  # a band each
        assert {path.name for path in Path("figures").iterdir()} == {"profile.png", "profile.svg"}


def test_every_example_of_the_page_is_run():
    assert len(EXAMPLES) == PAGE.count("```python") > 0


def test_every_function_is_on_the_page():
    names = [name for name in instruments.__all__ + plots.__all__ if name[0].islower()]
    names = [name for name in names if name not in ("as_text", "legend", "save")]
    assert [name for name in names if f"`{name}`" not in PAGE] == []


def test_the_command_of_the_page_measures_every_module():
    printed = str(benchmark.recording_table(((4, 2, 3, 5),), rounds=1))
    assert all(name in printed for name in ("FusedRNN", "RNN", "LSTM", "GRU", "4, 2, 3, 5"))
