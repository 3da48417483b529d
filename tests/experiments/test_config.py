"""What a run is: one identity however it is spelled, another for every value that counts."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.composition import CONFIGURATION
from experiments.config import RunConfig, TrainingConfig
from experiments.expectations import parse_expected
from experiments.fields import ConfigError
from experiments.models import CORES
from experiments.optimizers import CONFIGS
from experiments.study import StudyConfig, parse_study, resolved
from tests.experiments.small_studies import choices, composed, study_of
from tests.idx_files import write_mnist

ADDING = {"model": {"core": "rnn"}, "task": {"name": "adding"}}


def identity(**values) -> str:
    return RunConfig.parse({**ADDING, **values}).identity


# Identity


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"core": "rnn", "hidden_size": 64, "nonlinearity": "tanh", "name": "elman"}},
        {"task": {"name": "adding", "test_size": 2000}, "horizon": 50, "seed": 0},
        {"optimizer": {"name": "adam", "learning_rate": 0.003, "beta1": 0.9}},
        {"training": {"steps": 1500}, "evaluation": {"every": None, "horizons": []}},
        {"remedy": {}, "probe": None, "threads": 1, "device": "cpu"},
    ],
)
def test_a_run_is_the_same_however_it_is_spelled(values):
    assert identity(**values) == identity()


def test_equal_numbers_and_a_model_put_together_from_parts_are_the_same():
    rate = [identity(optimizer={"name": "sgd", "learning_rate": x}) for x in (1, 1.0)]
    assert rate[0] == rate[1]
    irnn = {"recurrent": "identity", "zero_bias": True}
    by_name, by_parts = (
        study_of("contrast_horizons=[]", "horizons=[10]", "seeds=[0]", *words).members[0].run
        for words in (
            ["model=irnn"],
            [
                "model=fused_rnn",
                "model.nonlinearity=relu",
                "remedy=[clipping,irnn]",
                "remedy.initialisation.input_std=null",
            ],
        )
    )
    assert by_name.identity == by_parts.identity
    assert by_name.plain()["remedy"]["initialisation"].items() >= irnn.items()


OTHERS = [
    {"model": {"core": "fused_rnn"}},
    {"model": {"core": "rnn", "hidden_size": 65}},
    {"model": {"core": "rnn", "match_parameters": True}},
    {"model": {"core": "rnn", "num_layers": 2}},
    {"model": {"core": "rnn", "bidirectional": True}},
    {"model": {"core": "rnn", "nonlinearity": "relu"}},
    {"task": {"name": "multiplication"}},
    {"task": {"name": "adding", "test_size": 2001}},
    {"horizon": 51},
    {"seed": 1},
    {"precision": "float64"},
    {"threads": 2},
    {"remedy": {"clipping": {"norm": 1.0}}},
    {"remedy": {"clipping": {"norm": 2.0}}},
    {"probe": {"adjoint": {}}},
    {"probe": {"adjoint": {"every": 10}}},
    {"optimizer": {"name": "sgd"}},
    {"optimizer": {"name": "adam", "learning_rate": 0.004}},
    {"optimizer": {"name": "adam", "schedule": "cosine"}},
    {"optimizer": {"name": "adam", "warmup": 1}},
    {"training": {"steps": 1501}},
    {"training": {"batch_size": 65}},
    {"training": {"accumulation": 2}},
    {"training": {"stop_when_solved": True}, "evaluation": {"every": 7}},
    {"evaluation": {"every": 7}},
    {"evaluation": {"seed": 1}},
    {"evaluation": {"probe_size": 63}},
    {"evaluation": {"train_size": 63}},
    {"evaluation": {"horizons": [7]}},
]


def test_every_value_that_counts_makes_another_run():
    assert len({identity(**values) for values in ({}, *OTHERS)}) == 1 + len(OTHERS)


def test_mnist_counts_by_what_is_in_its_files_and_not_by_where_they_are(tmp_path):
    def of(folder, **images):
        write_mnist(tmp_path / folder, **images)
        return identity(task={"name": "mnist", "root": str(tmp_path / folder)}, horizon=28)

    assert of("a") == of("b/MNIST/raw", compressed=True)
    assert of("a") != of("c", train=50)


def test_a_folder_ends_with_the_identity_and_plain_values_make_the_run_again():
    run = RunConfig.parse({**ADDING, "remedy": {"clipping": {"norm": 1}}, "seed": 3})
    assert run.folder_name == f"adding-T50-rnn-s3-{run.identity}"
    again = RunConfig.parse(run.plain())
    assert (again.identity, again.plain()) == (run.identity, run.plain())
    assert run.at(seed=4).at(seed=3).identity == run.identity
    assert run.at(horizon=9).identity == RunConfig.parse({**run.plain(), "horizon": 9}).identity


# Choices


@pytest.mark.parametrize("name", choices("model"))
def test_every_model_parses_and_shows_every_key_of_its_core(name):
    shown = OmegaConf.to_container(OmegaConf.load(CONFIGURATION / "model" / f"{name}.yaml"))
    shown.pop("contrasts")
    run = RunConfig.parse({**ADDING, "model": shown})
    assert run.label == shown.pop("name") == name
    assert {remedy.name for remedy in run.remedies} == set(shown.pop("remedy", ()))
    assert set(shown) - {"core"} == {field.name for field in fields(CORES[shown["core"]].Config)}


@pytest.mark.parametrize("name", choices("optimizer"))
def test_every_optimizer_parses_and_shows_every_key(name):
    shown = dict(composed(f"optimizer={name}")["optimizer"])
    config = CONFIGS[shown.pop("name")]
    assert set(shown) == {field.name for field in fields(config)}
    config.parse(shown)


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_makes_a_study_in_every_budget(name, tmp_path):
    words = [f"experiment={name}"]
    if "task: mnist\n" in (CONFIGURATION / "experiment" / f"{name}.yaml").read_text():
        write_mnist(tmp_path)
        words.append(f"task.root={tmp_path}")
    with initialize_config_dir(str(CONFIGURATION), version_base="1.3"):
        config = compose("config", words)
        study = parse_study(config, words)
    assert study.config.name == name
    assert study.config.about != "-"
    labels = {member.label for member in study.members}
    assert set(config["arms"]) <= labels
    for expectation in parse_expected(study.expected):
        assert labels & set(expectation.labels), expectation
    for budget in config["budgets"]:
        OmegaConf.update(config, "budget", budget)
        values = resolved(config)
        TrainingConfig.parse(values["training"])
        horizons = StudyConfig.parse({key: values[key] for key in ("horizons", "seeds")}).horizons
        for horizon in () if budget == "mnist" else horizons:
            study.reference.run.task.check_horizon("horizons", horizon)
    if name not in ("smoke", "single"):
        assert set(config["budgets"]) >= {"smoke", "fast", "full"}


def test_the_main_job_is_the_horizon_ladder_as_specified():
    study = study_of()
    ladder = [member.run for member in study.members if member.contrast_of is None]
    assert [run.horizon for run in ladder] == [T for T in (10, 20, 30, 50, 100) for _ in range(3)]
    run = ladder[0]
    assert (run.core.name, run.task.name, run.optimizer) == ("fused_rnn", "adding", "adam")
    assert (run.core.config.hidden_size, run.optimizer_config.learning_rate) == (64, 3e-3)
    assert (run.training.steps, run.training.batch_size) == (1500, 64)
    assert run.plain()["remedy"] == {"clipping": {"norm": 1.0, "value": None}}
    contrast = next(m for m in study.members if m.label == "ReLU + identity")
    assert (contrast.run.horizon, contrast.contrast_of) == (50, "fused_rnn")
    assert contrast.run.core.config.nonlinearity == "relu"


# Errors: the key, what was expected, what came, the nearest right name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=[99999999999999999999]", "seeds must be a non-empty list of integers from 0 to 42"),
        ("seeds=[]", "without repeats; got []"),
        ("seeds=[0,0]", "without repeats; got [0, 0]"),
        ("seeds=3", "seeds must be a non-empty list"),
        ("horizons=[10,ten]", "got [10, 'ten']"),
        ("horizons=[1]", "horizons must be at least 2 for task adding; got 1"),
        ("contrast_horizons=[1]", "contrast_horizons must be at least 2 for task adding; got 1"),
        ("evaluation.horizons=[1]", "evaluation.horizons must be at least 2 for task adding"),
        ("optimizer.name=adamw2", "optimizer.name must be one of sgd, adam, adamw, rmsprop; got"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate must be a positive number; got -1"),
        ("optimizer.learning_rate=inf", "got inf"),
        ("optimizer.learning_rate=fast", "got 'fast'"),
        ("remedy.clipping.norm=0", "remedy.clipping.norm must be a positive number, or null"),
        ("training.steps=1.5", "training.steps must be an integer of at least 1; got 1.5"),
        ("training.steps=true", "got True"),
        ("training.stop_when_solved=true", "needs evaluation.every"),
        ("evaluation.seed=1000001", "must not be that of the training data, 1000000 + seed; got"),
        ("evaluation.probe_size=0", "evaluation.probe_size must be an integer of at least 1"),
        ("workers=0", "workers must be an integer of at least 1, or null; got 0"),
        ("retry=1", "retry must be true or false; got 1"),
        ("launcher=slrm", "got 'slrm'; did you mean slurm?"),
        ("device=tpu7", "device must be cpu, cuda or cuda:N; got 'tpu7'"),
        ("device=cuda:99", "'cuda:99', but torch sees"),
        ("precision=fp8", "precision must be one of float32, float64, bfloat16; got 'fp8'"),
        ("budget=fst", "budget must be one of full, fast, smoke; got 'fst'; did you mean fast?"),
        ("output.root=null", "output.root must be a non-empty string; got None"),
        ("+output.rot=x", "unknown key output.rot; known here: root; did you mean output.root?"),
        ("+seed=3", "did you mean seeds?"),
        ("name=''", "name must be a non-empty string"),
        ("model.name=null", "model.name must be a non-empty string; got None"),
        ("model.core=transformer", "model.core must be one of"),
        (
            "model.nonlinearity=gelu",
            "must be one of tanh, relu, sigmoid, identity, softplus; got 'gelu'",
        ),
        ("model.match_parameters=1", "model.match_parameters must be true or false; got 1"),
        ("model.contrasts=orthogonal", "model.contrasts must be a list; got 'orthogonal'"),
        ("model.contrasts=[{nonlinearity: relu}]", "model.contrasts[0] must be a mapping with a"),
        ("model.contrasts=[{label: a}, {label: a}]", "labels without repeats; got ['a', 'a']"),
        ("model.contrasts=[{label: a, core: gru}]", "must keep the model's name and core"),
        ("model.contrasts=[{label: a, hiddn: 3}]", "unknown key model.hiddn"),
        ("+model.gate_bias=1", "unknown key model.gate_bias"),
        ("+training.step=3", "unknown key training.step; .*did you mean training.steps?"),
        ("+trainning=3", "unknown key trainning; .*did you mean training?"),
        ("~task.name", "task.name is missing"),
        ("~model", "model must be a mapping with a core; got None"),
        ("+expected.signatures=3", "expected.signatures must be a list; got 3"),
        ("+expected.settings=3", "expected.settings must be a mapping; got 3"),
        ("+expected.published=[{arm: a, test_metric: x}]", "test_metric must be a number; got 'x'"),
        ("+expected.signatures=[{arm: a, learned: 1}]", "must be an interval [low, high]; got 1"),
        ("+expected.signatures=[{arm: a, lerned: 1}]", "did you mean expected.signatures[0].lea"),
        ("training.steps=???", "Missing mandatory value: steps; full_key: training.steps"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_key(override, message):
    if override.startswith("+expected"):
        override = f"+{override}"  # the study has some
    with pytest.raises(ConfigError) as raised:
        study_of(override)
    for part in message.split(".*"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "rnn"}, "model must be a mapping with a core; got 'rnn'"),
        ({"remedy": {"cliping": {}}}, "unknown remedy cliping; .*did you mean clipping?"),
        ({"remedy": ["clipping"]}, "remedy must be a mapping from names to options"),
        ({"probe": {"adjoint": 3}}, "probe.adjoint must be a mapping of its options; got 3"),
        (
            {"optimizer": {"name": "sgd", "nesterov": True}},
            "optimizer.nesterov=true needs an optimizer.momentum above 0; got 0",
        ),
        ({"training": None}, "training must be a mapping; got None"),
        ({"horizons": [3]}, "unknown key horizons; .*did you mean horizon?"),
    ],
)
def test_a_run_that_is_described_wrongly_is_refused(values, message):
    with pytest.raises(ConfigError) as raised:
        RunConfig.parse({**ADDING, **values})
    for part in message.split(".*"):
        assert part in str(raised.value)
