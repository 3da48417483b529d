"""What the README promises can be run as it stands there."""

import re
from pathlib import Path

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


def test_every_experiment_command_names_options_that_exist():
    commands = re.findall(r"python -m experiments\.run (.*?)(?:\s+#|\n|$)", README)
    assert len(commands) >= 4
    for command in commands:
        for assignment in (word for word in command.split() if "=" in word):
            group, names = assignment.split("=")
            for name in names.split(","):
                assert (ROOT / "hydra_conf" / group / f"{name}.yaml").is_file(), assignment
