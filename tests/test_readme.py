"""What the README promises can be run as it stands there."""

import re
import shlex
from pathlib import Path

from tests.experiments.studies import study_of

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


def test_every_experiment_command_is_a_study():
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
        choices = [w.split(",") if "[" not in w else [w] for w in overrides]
        for first, *others in choices:
            key = first.partition("=")[0]
            for choice in (first, *(f"{key}={other}" for other in others)):
                rest = [o[0] for o in choices if o[0] != first]
                studies.add(tuple(sorted([*rest, choice])))
    for words in studies:
        assert study_of(*words).members
