r"""Searches hyperparameters with Optuna, over any keys of the configuration.

    python -m experiments.search horizons=[30] training.steps=600 search.n_trials=30 \
        'search.space={optimizer.learning_rate: {low: 1e-4, high: 1e-1, log: true},
                       model.hidden_size: {low: 16, high: 128}, model: [fused_rnn, gru]}'

A *trial* is a study: the runs of one model at ``horizons`` from ``seeds`` (one of each, unless told
otherwise). Its value, to be small, is the mean test error over that of knowing nothing. What the
runs log every ``evaluation.every`` steps goes to the pruner; a pruned run stops, with a checkpoint.

The same command goes on until there are ``n_trials``. A trial whose process died is taken over, and
its run goes on from its checkpoint. Any number of processes may work on one search: start the
command again beside itself. It leaves ``search.json`` in ``runs/searches/NAME-IDENTITY``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from rich.console import Console

from experiments import extras, interrupts
from experiments.command import as_value
from experiments.composition import CONFIGURATION, composed, explained, override_key
from experiments.console import as_text, new_console, new_table, say
from experiments.execution import job_of, make
from experiments.fields import (
    Config,
    ConfigError,
    check_keys,
    choice,
    integer,
    mapping,
    seed,
    text,
)
from experiments.record import RECORD, Rows, write_json
from experiments.study import Member, Study, parse_study

if TYPE_CHECKING:
    import optuna

DEFAULTS = (
    "~experiment",
    "horizons=[50]",
    "seeds=[0]",
    "contrast_horizons=[]",
    "evaluation.every=100",
)
"""Overrides of a search that are not given: what is searched is one run, not a ladder of them."""

SHOWN = 10
"""Trials of the table."""

SUMMARY = "search.json"


@dataclass(frozen=True)
class SearchConfig(Config):
    """How a search goes.

    Attributes:
        name: of its folder.
        space: from keys of the configuration to a list of values, or ``{low, high, log, step}``;
            if all are integers, so is what is drawn.
        n_trials: how many there will be, those that were pruned or failed among them.
        seed: of the sampler.
        sampler, pruner: Optuna's.
        startup_trials: so many trials are drawn at random and not pruned.
        storage: ``sqlite``, or ``journal`` where the folder is on a network's file system.
    """

    name: str = text("search")
    space: Mapping[str, Any] = mapping()
    n_trials: int = integer(20, at_least=1)
    seed: int = seed(0)
    sampler: str = choice("tpe", ("tpe", "random"))
    pruner: str = choice("median", ("median", "none"))
    startup_trials: int = integer(5, at_least=0)
    storage: str = choice("sqlite", ("sqlite", "journal"))


class Search:
    """A search: what is searched, and its trials in Optuna's storage.

    Args:
        config: how it goes.
        overrides: what all trials share, as for ``experiments.run``.

    Raises:
        ConfigError: names the key, what was expected and what came.
    """

    def __init__(self, config: SearchConfig, overrides: Sequence[str]) -> None:
        self.config = config
        given = {override_key(override) for override in overrides}
        self.overrides = [*(d for d in DEFAULTS if override_key(d) not in given), *overrides]
        self.distributions = {
            key: _distribution(f"search.space[{key!r}]", values, key in given)
            for key, values in config.space.items()
        }
        if not self.distributions:
            raise ConfigError("search.space must name a key and its values; got none")
        base = self.study({})
        for key, distribution in self.distributions.items():
            for value in getattr(distribution, "choices", None) or (distribution.low,):
                self.study({key: value})  # refuses a wrong key or choice before anything runs
        if config.pruner != "none" and base.reference.run.evaluation.every is None:
            raise ConfigError(
                "search.pruner needs evaluation.every, the steps between two looks at the held-out "
                "data; got null"
            )
        self.root = base.root
        definition = {
            "runs": [member.run.identity for member in base.members],
            **{k: v for k, v in asdict(config).items() if k not in ("name", "n_trials")},
        }
        digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = base.root / "runs" / "searches" / f"{config.name}-{digest}"

    def changes(self, params: Mapping[str, Any]) -> list[str]:
        """Return the overrides of a trial that no other has."""
        return [
            f"{key}={value if isinstance(value, str) else as_value(value)}"
            for key, value in params.items()
        ]

    def study(self, params: Mapping[str, Any]) -> Study:
        """Return the runs of a trial.

        Raises:
            ConfigError: no run can be made with these values.
        """
        overrides = [*self.overrides, *self.changes(params)]
        study = parse_study(composed(overrides), overrides)
        labels = {member.label for member in study.members}
        if len(labels) > 1:
            raise ConfigError(
                "a search needs a study of one model; this one compares "
                f"{', '.join(sorted(labels))}: leave experiment= out, or arms={{}}"
            )
        if study.execution.launcher != "processes":
            raise ConfigError(
                "a search makes its runs in its own process; for several, start the same command "
                f"several times; got launcher={study.execution.launcher}"
            )
        return study

    def command(self, params: Mapping[str, Any]) -> str:
        """Return the command that shows the runs of a trial."""
        words = [*self.overrides, *self.changes(params)]
        return shlex.join(["python", "-m", "experiments.run", *words])


def _distribution(key: str, values: Any, is_given: bool) -> Any:
    """Return what Optuna draws a hyperparameter from; choices as words of a command line."""
    from optuna import distributions

    if is_given:
        raise ConfigError(f"{key} is searched; it cannot be given too")
    if isinstance(values, list) and values:
        return distributions.CategoricalDistribution([as_value(value) for value in values])
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values):
        raise ConfigError(f"{key} must be a list of values, or have low and high; got {values!r}")
    check_keys(values, ("low", "high", "log", "step"), f"{key}.")
    numbers = [values[name] for name in ("low", "high", "step") if name in values]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise ConfigError(f"{key} must have numbers as low, high and step; got {values!r}")
    is_integer = all(isinstance(number, int) for number in numbers)
    kind = distributions.IntDistribution if is_integer else distributions.FloatDistribution
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _sampler(config: SearchConfig, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler that draws the trial of a number.

    So a trial depends on its number and on the trials before, whichever process asks, and whether
    or not one was killed before.
    """
    from optuna import samplers

    # Odd factor: seeds of searches that lie side by side give no trial in common.
    seed = (config.seed * 1_000_003 + number) % 2**32
    if config.sampler == "random":
        return samplers.RandomSampler(seed)
    return samplers.TPESampler(n_startup_trials=config.startup_trials, seed=seed)


def _draw(trial: optuna.Trial, key: str, distribution: Any) -> None:
    if hasattr(distribution, "choices"):
        trial.suggest_categorical(key, distribution.choices)
    else:
        suggest = trial.suggest_int if isinstance(distribution.low, int) else trial.suggest_float
        suggest(
            key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )


class _Trials:
    """Gives this process a trial at a time: one that was left by a dead process, or a new one.

    Attributes:
        study: Optuna's.
    """

    def __init__(self, search: Search) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search, config = search, search.config
        self._lock: IO[str] | None = None
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if config.pruner == "median":
            pruner = optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials)
        with self._locked():
            self._storage = self._open()
            self.study = optuna.create_study(
                study_name=config.name, storage=self._storage, pruner=pruner, load_if_exists=True
            )

    def _open(self) -> optuna.storages.BaseStorage:
        from optuna.storages import JournalStorage, get_storage
        from optuna.storages.journal import JournalFileBackend

        folder = self._search.folder.resolve()
        if self._search.config.storage == "sqlite":
            return get_storage(f"sqlite:///{folder}/trials.sqlite")
        return JournalStorage(JournalFileBackend(str(folder / "trials.log")))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold a lock on the search, which ends with the process at the latest."""
        with (self._search.folder / "search.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def next(self) -> optuna.Trial | None:
        """Return a trial with its parameters drawn; ``None`` if there are ``n_trials``."""
        import optuna

        with self._locked():
            trials = self.study.get_trials(deepcopy=False)
            running = optuna.trial.TrialState.RUNNING
            left = [trial.number for trial in trials if trial.state == running]
            # The next number is nobody's yet.
            new = [len(trials)] if len(trials) < self._search.config.n_trials else []
            number = next((number for number in (*left, *new) if self._take(number)), None)
            if number is None:
                return None
            self.study.sampler = _sampler(self._search.config, number)
            if number == len(trials):
                trial = self.study.ask()
            else:
                study = self._storage.get_study_id_from_name(self._search.config.name)
                its = self._storage.get_trial_id_from_study_id_trial_number(study, number)
                trial = optuna.Trial(self.study, its)
            for key, distribution in self._search.distributions.items():
                _draw(trial, key, distribution)
            return trial

    def _take(self, number: int) -> bool:
        path = self._search.folder / "locks" / str(number)
        path.parent.mkdir(exist_ok=True)
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self.close()
        self._lock = file
        return True

    def close(self) -> None:
        """Give back the last trial's lock."""
        if self._lock is not None:
            self._lock.close()


class SearchError(RuntimeError):
    """A run that ended without a record, for reasons that have nothing to do with its values."""


class _Watch:
    """Follows a run's log; reports to Optuna, and notices when the run is to be pruned.

    Args:
        trial: Optuna's.
        member: the run.
        shares: what came of the trial's runs before this one.
        steps: training steps of those.
    """

    def __init__(
        self, trial: optuna.Trial, member: Member, shares: Sequence[float], steps: int
    ) -> None:
        self._trial, self._run = trial, member.run
        self._shares, self._steps = shares, steps
        self._nothing = member.run.task.know_nothing_error(member.run.horizon)
        so_far = trial.study.get_trials(deepcopy=False)[trial.number]
        self._reported = set(so_far.intermediate_values)
        self.is_pruned = False

    def __call__(self, rows: Rows) -> None:
        """Report evaluations; one that an earlier process has reported is not reported twice."""
        for row in rows:
            if row.get("test_error") is None or row["step"] == self._run.training.steps:
                continue
            step = self._steps + row["step"]
            if step not in self._reported:
                share = row["test_error"] / self._nothing
                self._trial.report(sum([*self._shares, share]) / (len(self._shares) + 1), step)
                self._reported.add(step)
            # Optuna judges by the last report; that of an earlier process may lie further on.
            if step == max(self._reported) and self._trial.should_prune():
                self.is_pruned = True


def make_trials(
    search: Search, trials: _Trials, console: Console, is_asked_to_end: Callable[[], bool]
) -> None:
    """Make trials until there are as many as there will be, or it is asked to end.

    Raises:
        SearchError: a run could not be made, because of a full disk or a damaged folder.
    """
    from optuna.trial import TrialState

    while not is_asked_to_end() and (trial := trials.next()) is not None:
        try:
            value, state = _make_trial(trial, search.study(trial.params), is_asked_to_end)
        except ConfigError as error:
            trial.set_user_attr("reason", str(error))
            value, state = None, TrialState.FAIL
        if state == TrialState.RUNNING:
            return
        trials.study.tell(trial, value, state)
        words = "" if value is None else f" {value:.4f}"
        changes = ", ".join(search.changes(trial.params))
        say(console, f"  trial {trial.number}: {state.name.lower()}{words}, {changes}")


def _make_trial(
    trial: optuna.Trial, study: Study, is_asked_to_end: Callable[[], bool]
) -> tuple[float | None, Any]:
    """Make the runs of a trial; return its value and state, ``RUNNING`` if it was asked to end."""
    from optuna.trial import TrialState

    trial.set_user_attr("runs", [member.folder.name for member in study.members])
    shares: list[float] = []
    steps = 0
    for member in study.members:
        watch = _Watch(trial, member, shares, steps)

        def is_over(watch: _Watch = watch) -> bool:
            return watch.is_pruned or is_asked_to_end()

        job = job_of(member, study.execution)
        while (outcome := make(job, lambda step, loss: None, is_over, watch)).state == "elsewhere":
            # Another trial, or a study, makes the same run; its record serves this one too.
            if is_asked_to_end():
                return None, TrialState.RUNNING
            time.sleep(0.5)
        if outcome.state == "interrupted":
            return None, TrialState.PRUNED if watch.is_pruned else TrialState.RUNNING
        if not (member.folder / RECORD).exists():
            raise SearchError(outcome.reason)
        record = member.record()
        assert record is not None
        if record.status == "failed":
            trial.set_user_attr("reason", record.reason)
            return None, TrialState.FAIL
        share = record.result.error_over_know_nothing
        # A run that diverged is worse than any other.
        shares.append(math.inf if share is None else share)
        steps += member.run.training.steps
    return sum(shares) / len(shares), TrialState.COMPLETE


def summary(search: Search, study: optuna.Study) -> dict[str, Any]:
    """Return what ``search.json`` holds: all trials, and the best with its command."""
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value,
            "params": trial.params,
            "reason": trial.user_attrs.get("reason"),
            "runs": trial.user_attrs.get("runs", []),
        }
        for trial in study.get_trials()
    ]
    ranked = _ranked(trials)
    best = {**ranked[0], "command": search.command(ranked[0]["params"])} if ranked else None
    config = asdict(search.config)
    return {"search": config, "overrides": search.overrides, "trials": trials, "best": best}


def _ranked(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the trials that are complete, the best first."""
    complete = [trial for trial in trials if trial["state"] == "complete"]
    return sorted(complete, key=lambda trial: (trial["value"], trial["number"]))


def say_summary(console: Console, values: Mapping[str, Any]) -> None:
    """Print a table of the best trials, and the command of the best."""
    trials = values["trials"]
    counts = Counter(trial["state"] for trial in trials)
    words = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    table = new_table(f"{values['search']['name']}: {words}", "value: error over know-nothing")
    keys = list(values["search"]["space"])
    for name in ("trial", "value", *keys):
        table.add_column(as_text(name))
    for trial in _ranked(trials)[:SHOWN]:
        shown = [trial["params"][key] for key in keys]
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown]
        row = [str(trial["number"]), f"{trial['value']:.4f}", *cells]
        table.add_row(*(as_text(cell) for cell in row))
    console.print(table)
    for trial in trials:
        if trial["reason"]:
            say(console, f"trial {trial['number']} failed: {trial['reason']}")
    if values["best"] is not None:
        say(console, f"The best again: {values['best']['command']}")


def parse(arguments: Sequence[str]) -> Search:
    """Make a search from what a command line says; Hydra must be initialised.

    Raises:
        ConfigError: names the key, what was expected and what came.
    """
    extras.require("optuna", "experiments.search")
    own, others = [], []
    for argument in arguments:
        (own if override_key(argument).startswith("search.") else others).append(argument)
    try:
        parsed = OverridesParser.create().parse_overrides(own)
    except HydraException as error:
        raise ConfigError(explained(error)) from error
    values = {each.key_or_group.removeprefix("search."): each.value() for each in parsed}
    return Search(SearchConfig.parse(values, "search."), others)


def main(arguments: Sequence[str], console: Console | None = None) -> None:
    """Search, and leave ``search.json``."""
    if not arguments or arguments[0] in ("-h", "--help"):
        raise SystemExit(__doc__)
    console = new_console() if console is None else console
    with initialize_config_dir(str(CONFIGURATION), version_base="1.3"):
        try:
            search = parse(arguments)
            search.folder.mkdir(parents=True, exist_ok=True)
            say(console, f"{search.config.n_trials} trials in {search.folder}")
            with interrupts.noticed() as is_asked_to_end, closing(_Trials(search)) as trials:
                make_trials(search, trials, console, is_asked_to_end)
                is_ended = is_asked_to_end()
        except (ConfigError, SearchError) as error:
            raise SystemExit(f"error: {error}") from None
        values = summary(search, trials.study)
    write_json(search.folder / SUMMARY, values)
    say_summary(console, values)
    if is_ended:
        raise SystemExit("interrupted; the same command goes on from here")


if __name__ == "__main__":
    main(sys.argv[1:])
