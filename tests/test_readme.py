"""What the README promises can be run as it stands there."""

import re
import shlex
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.experiments.small_studies import study_of
from tests.idx_files import write_mnist

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_examples_run_as_printed_one_after_the_other():
    scope = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(example, "README.md", "exec"), scope)
    assert scope["output"].shape == (100, 32, 128)
    assert scope["h_n"].shape == (4, 32, 64)
    assert scope["x"].grad.isfinite().all()
    assert scope["flow"].joint_adjoint_norm["l1"].shape == (100, 32)


def test_every_local_link_and_figure_exists():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert missing == []


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
