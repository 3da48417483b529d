"""Runs as jobs of submitit: on this machine, and on what answers as SLURM does."""

import json
import os
import signal
import threading

import pytest

from experiments import extras, interrupts, slurm
from experiments.checkpoint import CHECKPOINT
from experiments.execution import execute
from experiments.fields import ConfigError
from experiments.record import METRICS, OWNER
from tests.experiments import fake_slurm
from tests.experiments.processes import assert_same, outcome, wait_for
from tests.experiments.small_studies import study_of

SMALL = ("experiment=smoke", "horizons=[8]", "contrast_horizons=[]", "model.hidden_size=8")
_has_submitit = pytest.mark.skipif(
    extras.find_spec("submitit") is None, reason='needs pip install -e ".[cluster]"'
)


def _study(root, *overrides):
    return study_of(*SMALL, f"output.root={root}", *overrides)


def _execute(study, is_asked_to_end=lambda: False):
    outcomes, progress = {}, []
    # As the command does. A process that a shell runs in the background ignores SIGINT unless it
    # has a handler of its own, and so do the jobs that it starts: none could be cancelled.
    with interrupts.noticed():
        execute(
            study,
            is_asked_to_end,
            lambda member, step, loss: progress.append((member, step)),
            lambda member, its: outcomes.setdefault(member.run.seed, its),
        )
    return outcomes, progress


@pytest.fixture
def often(monkeypatch):
    """Look at the jobs often: what has to come before a run ends then comes early in it."""
    monkeypatch.setattr(slurm, "_POLL_SECONDS", 0.05)


# Longer than it takes to notice that a run has begun.
LONG = ("training.steps=2000", "evaluation.every=500")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    study = _study(tmp_path_factory.mktemp("undisturbed"), *LONG)
    _execute(study)
    return outcome(study.reference.folder)


@pytest.mark.slow
@_has_submitit
def test_a_local_job_that_fails_stops_nothing_and_one_that_is_cancelled_goes_on_to_the_same_end(
    tmp_path, often, undisturbed
):
    options = ("launcher=submitit_local", "workers=1", "checkpoint_seconds=1000")
    study = _study(tmp_path, *LONG, *options, "seeds=[1,0]")
    damaged, cancelled = (member.folder for member in study.members)
    damaged.mkdir(parents=True)
    (damaged / CHECKPOINT).write_bytes(b"nothing that could be read")
    outcomes, _ = _execute(study, lambda: (cancelled / METRICS).exists())
    assert (outcomes[1].state, outcomes[0].state) == ("failed", "interrupted")
    assert "no checkpoint can be read" in outcomes[1].reason
    assert (cancelled / CHECKPOINT).exists()
    _execute(_study(tmp_path, *LONG))
    assert_same(outcome(cancelled), undisturbed)


def _owner(folder):
    """Return the process that trains a run, once it has begun."""
    wait_for((folder / METRICS).exists)
    return json.loads((folder / OWNER).read_text())["pid"]


def _preempt(folder):
    pid = _owner(folder)
    os.kill(pid, signal.SIGTERM)
    wait_for((folder / CHECKPOINT).exists)
    os.kill(pid, signal.SIGUSR2)


@pytest.mark.slow
@_has_submitit
def test_preempted_jobs_of_slurm_go_on_and_a_dead_one_is_a_failure(
    tmp_path, monkeypatch, often, undisturbed
):
    folder = tmp_path / "slurm"
    folder.mkdir()
    fake_slurm.install(folder)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr("submitit.SlurmJob._results_timeout_s", 0)
    options = ["slurm.partition=cpu", "slurm.mem_gb=2.5", "slurm.extra={account: me}"]
    options += ["launcher=slurm", "slurm.array_parallelism=7"]
    study = _study(tmp_path, *LONG, "seeds=[0,1]", *options)
    preempted, killed = study.members
    signals = [
        threading.Thread(target=_preempt, args=(preempted.folder,)),
        threading.Thread(target=lambda: os.kill(_owner(killed.folder), signal.SIGKILL)),
    ]
    for thread in signals:
        thread.start()
    outcomes, progress = _execute(study)
    for thread in signals:
        thread.join()
    script = (folder / "submission.sh").read_text()
    for flag in ("partition=cpu", "mem=2560M", "account=me", "array=0-1%2", "signal=USR2@90"):
        assert f"#SBATCH --{flag}\n" in script
    assert outcomes[0].state == "done"
    (error,) = tmp_path.glob("runs/jobs/*/7_0_0_log.err")
    assert error.read_text().count("Caught signal SIGUSR2") == 1
    assert outcomes[1].state == "failed"
    assert outcomes[1].reason.startswith("job 7_1: ended without a result (state NODE_FAIL)")
    assert not (killed.folder / "record.json").exists()
    assert max(step for member, step in progress if member is preempted) > 0
    assert_same(outcome(preempted.folder), undisturbed)


@_has_submitit
def test_a_job_that_was_not_requeued_is_a_failure_with_its_reason(tmp_path):
    """A call that fails outside of a run, as submitit's own do."""
    import submitit

    job = submitit.LocalExecutor(tmp_path).submit(fake_slurm.not_requeued)
    job.wait()
    failed = slurm._outcome(job)
    assert failed.state == "failed"
    assert "UncompletedJobError: Job not requeued because: timed-out too many times." in (
        failed.reason
    )


@_has_submitit
def test_without_slurm_and_with_an_option_that_submitit_lacks_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match='launcher=slurm: Could not detect "srun"'):
        _execute(_study(tmp_path, "launcher=slurm"))
    fake_slurm.install(tmp_path)
    with pytest.raises(ConfigError, match=r"Unavailable parameter.*acount.*account"):
        _execute(_study(tmp_path, "launcher=slurm", "slurm.extra={acount: me}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("slurm.timeout_min=0", "slurm.timeout_min must be an integer of at least 1; got 0"),
        ("+slurm.partitions=a", "unknown key slurm.partitions; .* did you mean slurm.partition?"),
        ("slurm.extra=3", "slurm.extra must be a mapping from names to values; got 3"),
        ("launcher=slurn", "launcher must be one of .*; got 'slurn'; did you mean slurm?"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        _study(tmp_path, override)


@pytest.mark.parametrize(
    ("override", "package", "extra"),
    [
        ("launcher=slurm", "submitit", "cluster"),
        ("launcher=submitit_local", "submitit", "cluster"),
        ("tensorboard=true", "tensorboard", "tensorboard"),
    ],
)
def test_without_its_package_nothing_runs(tmp_path, monkeypatch, override, package, extra):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        _study(tmp_path, override)
    assert str(error.value) == (
        f'{override} needs {package}, which is not installed: pip install -e ".[{extra}]"'
    )
