"""The tutorial notebook: it runs as it stands, from a kernel of its own, and shows its figures."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason='needs pip install -e ".[notebook]"')
nbclient = pytest.importorskip("nbclient", reason='needs pip install -e ".[notebook]"')
pytest.importorskip("ipykernel", reason='needs pip install -e ".[notebook]"')

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "see_a_gradient_vanish.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs_and_ends_in_its_figures():
    stored = nbformat.read(NOTEBOOK, as_version=4)
    notebook = nbformat.from_dict(stored)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    # A cell that raises is an error here.
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 4
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    ratios = {
        line.split("  ")[0]: float(line.split()[-1])
        for line in text.splitlines()
        if "first step over last:" in line
    }
    # What its sentences say: two models vanish, two do not; the gated one learns all the same.
    assert ratios["tanh RNN"] < 1e-15
    assert ratios["GRU"] < 1e-15
    assert min(ratios["IRNN"], ratios["LSTM, forget bias 3"]) > 1e-2
    errors = {
        line.split()[0]: float(line.split()[-1])
        for line in text.splitlines()
        if "knowing nothing:" in line
    }
    assert errors["fused_rnn"] > 0.5
    assert errors["gru"] < 0.1


def test_the_stored_notebook_shows_its_figures_and_stays_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]

    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert NOTEBOOK.stat().st_size < 300_000
    assert not [output for output in outputs if output.get("name") == "stderr"]
