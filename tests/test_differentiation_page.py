"""The page on differentiation: its examples run as printed, its table is what its script says."""

import re
from pathlib import Path

import pytest

from rnn_cuda import backend
from tests.differentiation_table import TABLE, outcomes, render

PAGE = Path(__file__).parents[1] / "docs" / "differentiation.md"
EXAMPLES = re.findall(
    r"^##+ ([^\n]+)\n(?:(?!^##).)*?```python\n(.*?)```", PAGE.read_text(), re.M | re.S
)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_an_example_runs_as_printed(title, code):
    if title == "Compilers" and backend.requested() == "reference":
        pytest.skip("loads the kernels, and the reference is the active backend")
    exec(compile(code, f"{PAGE.name}, {title}", "exec"), {"__name__": "example"})


def test_every_example_of_the_page_is_run():
    assert len(EXAMPLES) == PAGE.read_text().count("```python") == 6


@pytest.mark.slow
@pytest.mark.skipif(backend.requested() == "reference", reason="the table is the native backend's")
def test_everything_in_the_table_works_here_and_the_table_on_disk_says_what_the_script_finds():
    found = outcomes()
    for name, row in found.items():
        assert row["`FusedRNN`, CPU"] == "yes", name
    if TABLE.read_text().splitlines()[2] == render(found).splitlines()[2]:  # the same torch
        assert TABLE.read_text() == render(found)
