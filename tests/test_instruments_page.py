"""The page on the instruments: its examples run as printed, and it names every function."""

import re
from pathlib import Path

import pytest

from rnn_cuda import instruments

PAGE = (Path(__file__).parents[1] / "docs" / "instruments.md").read_text()
EXAMPLES = re.findall(r"^##+ ([^\n]+)\n(?:(?!^##).)*?```python\n(.*?)```", PAGE, re.M | re.S)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_an_example_runs_as_printed(title, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one saves a figure
    exec(compile(code, f"instruments.md, {title}", "exec"), {"__name__": "example"})


def test_every_example_of_the_page_is_run():
    assert len(EXAMPLES) == PAGE.count("```python") > 0


def test_every_function_is_on_the_page():
    names = [name for name in instruments.__all__ if name[0].islower()]
    assert [name for name in names if f"`{name}`" not in PAGE] == []
