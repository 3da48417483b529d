"""Enough of SLURM's commands for submitit, made of processes of this machine.

`install` puts ``sbatch``, ``srun``, ``sacct``, ``scancel`` and ``scontrol`` into a folder; jobs and
their states are files beside them.
"""

import sys
from pathlib import Path

_COMMAND = """#!{python}
import sys
sys.path.insert(0, {tests!r})
from fake_slurm import {name}
{name}({folder!r}, sys.argv[1:])
"""


def install(folder):
    for name in ("sbatch", "srun", "sacct", "scancel", "scontrol"):
        path = folder / name
        tests = str(Path(__file__).parent)
        path.write_text(
            _COMMAND.format(python=sys.executable, tests=tests, name=name, folder=str(folder))
        )
        path.chmod(0o755)


def sbatch(folder, arguments):
    import re
    import subprocess

    text = Path(arguments[0]).read_text()
    Path(folder, "submission.sh").write_text(text)
    last = int(re.search(r"--array=0-(\d+)", text)[1])
    for index in range(last + 1):
        command = [sys.executable, __file__, folder, str(index)]
        subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    print("Submitted batch job 7")


def _run_task(folder, index):
    """What SLURM's daemon does: run the script of a job, again if it was requeued."""
    import os
    import subprocess

    job, requeue = Path(folder, f"7_{index}.state"), Path(folder, f"7_{index}.requeue")
    ids = {"SLURM_JOB_ID": str(100 + int(index)), "SLURM_ARRAY_JOB_ID": "7"}
    environment = {**os.environ, **ids, "SLURM_ARRAY_TASK_ID": index}
    while True:
        job.write_text("RUNNING")
        status = subprocess.call(["bash", str(Path(folder, "submission.sh"))], env=environment)
        if not requeue.exists():
            break
        requeue.unlink()
    job.write_text("COMPLETED" if status == 0 else "NODE_FAIL")


def srun(folder, arguments):
    import os

    with_value = ("--output", "--error")
    paths = []
    while arguments[0].startswith("--"):
        paths += [arguments[1]] if arguments[0] in with_value else []
        arguments = arguments[2 if arguments[0] in with_value else 1 :]
    for number, path in enumerate(paths, 1):
        name = path.replace("%A", "7").replace("%a", os.environ["SLURM_ARRAY_TASK_ID"])
        file = os.open(name.replace("%t", "0"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.execvp(arguments[0], arguments)


def sacct(folder, arguments):
    print("JobID|State|NodeList")
    for path in sorted(Path(folder).glob("*.state")):
        print(f"{path.stem}|{path.read_text()}|here")


def scontrol(folder, arguments):
    assert arguments[0] == "requeue"
    Path(folder, f"{arguments[1]}.requeue").touch()


def not_requeued():
    """Fail as submitit does in a job that ran out of time too often."""
    from submitit.core.utils import UncompletedJobError

    raise UncompletedJobError("Job not requeued because: timed-out too many times.")


def scancel(folder, arguments):
    raise NotImplementedError("no test cancels")


if __name__ == "__main__":
    _run_task(*sys.argv[1:])
