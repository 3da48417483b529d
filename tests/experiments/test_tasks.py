"""Tasks: what they show, what they ask for, what ignorance costs, and how they are configured."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from experiments import tasks as package
from experiments.composition import CONFIGURATION
from experiments.fields import Config, ConfigError, choice, fraction, integer, number
from experiments.record import Record
from experiments.tasks import TASKS, build_task, shown_metric
from tests.experiments.processes import printed_by
from tests.experiments.scenario_checks import UNSCORED, check_data, generator, run_of, trained
from tests.experiments.small_studies import choices, composed, listing_also, study_of
from tests.idx_files import idx_bytes, mnist_like, write_mnist

CHOICES = choices("task")


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("mnist")
    write_mnist(root)
    return str(root)


def task_of(options: dict, mnist_root: str):
    return build_task({"root": mnist_root, **options} if options["name"] == "mnist" else options)


# Oracles: the answer worked out from the input alone, step by step and written for this file.
# Where a task has noise, they are for noise = 0.


def sum_of_marked(x_TBI: Tensor, horizon: int) -> Tensor:
    return (x_TBI[..., 0] * x_TBI[..., 1]).sum(0).unsqueeze(-1)


def product_of_marked(x_TBI: Tensor, horizon: int) -> Tensor:
    return x_TBI[..., 0].where(x_TBI[..., 1] == 1, 1).prod(0).unsqueeze(-1)


def repeated(x_TBI: Tensor, pattern: int, blank: int) -> Tensor:
    shown = x_TBI.argmax(-1)
    answer = torch.full_like(shown, blank)
    for i in range(pattern):
        answer[len(shown) - pattern + i] = shown[i]
    return answer


def order_of_cues(x_TBI: Tensor, horizon: int) -> Tensor:
    orders = []
    for symbols in x_TBI.argmax(-1).T.tolist():
        cues = "".join(str(symbol) for symbol in symbols if symbol < 2)
        orders.append(int("0" + cues, base=2))
    return torch.tensor(orders)


def bit_before(x_TBI: Tensor, horizon: int) -> Tensor:
    answer = torch.full_like(x_TBI, UNSCORED)
    for t in range(horizon, len(x_TBI)):
        answer[t] = x_TBI[t - horizon]
    return answer


def xor_with_bit_before(x_TBI: Tensor, horizon: int) -> Tensor:
    before = bit_before(x_TBI, horizon)
    return torch.logical_xor(before, x_TBI).float().where(before != UNSCORED, UNSCORED)


def decided(choices: Tensor, x_TBI: Tensor) -> Tensor:
    """The choice at every step without fixation cue."""
    response = x_TBI[..., 0].round() == 0
    return choices.expand(len(x_TBI), -1).where(response, UNSCORED)


def larger_channel(x_TBI: Tensor, horizon: int) -> Tensor:
    difference = (x_TBI[..., 1] - x_TBI[..., 2]).sum(0)
    return decided((difference < 0).long(), x_TBI)


def larger_in_context(x_TBI: Tensor, horizon: int) -> Tensor:
    evidence = x_TBI[..., 3:].sum(0)
    motion, colour = evidence[:, 0] < evidence[:, 1], evidence[:, 2] < evidence[:, 3]
    is_motion = x_TBI[..., 1].sum(0) > 0
    return decided(motion.where(is_motion, colour).long(), x_TBI)


def lower_first(x_TBI: Tensor, horizon: int) -> Tensor:
    f1, f2 = x_TBI[5], x_TBI[5 + 25 + horizon]
    return decided((f1[:, 1] < f2[:, 1]).long(), x_TBI)


def is_other(x_TBI: Tensor, horizon: int) -> Tensor:
    sample, test = x_TBI[15 : 15 + 25, :, 1:], x_TBI[40 + horizon : 40 + horizon + 25, :, 1:]
    return decided(((sample - test).abs().amax((0, 2)) > 0.01).long(), x_TBI)


def first_sign(x_TBI: Tensor, horizon: int) -> Tensor:
    return (x_TBI[0] > 0).float()


def named_image(options: dict, x_TBI: Tensor, horizon: int) -> Tensor:
    """Looks the image up among all there are."""
    if options["name"] == "mnist":
        parts = [mnist_like(60, 0), mnist_like(20, 1)]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        images = images / 255
    else:
        from sklearn.datasets import load_digits

        images, labels = (torch.as_tensor(load_digits()[key]) for key in ("images", "target"))
        images = images / 16
    images = images.float().flatten(1)
    side = math.isqrt(images.shape[1])
    if options["form"] == "permuted":
        order = torch.randperm(side * side, generator=generator(options["permutation_seed"]))
        images = images[:, order]
    shown = x_TBI.transpose(0, 1).flatten(1)[:, : side * side]
    keys = [image.numpy().tobytes() for image in images]
    known = dict(zip(keys, labels.tolist(), strict=True))
    answer = torch.tensor([known[image.numpy().tobytes()] for image in shown.contiguous()])
    if options["question"] == "odd":
        return (answer % 2).float().unsqueeze(-1)
    return answer


@dataclass(frozen=True)
class Case:
    """A task, its horizons with the number of steps of each, and what it should ask for."""

    options: dict
    steps: dict[int, int]
    oracle: Callable[[Tensor, int], Tensor]
    many: int = 8000

    def __str__(self) -> str:
        return "-".join(str(value) for value in self.options.values())


TRIAL = {"noise": 0.0}
MEMORIZATION = {"name": "noiseless_memorization"}
CASES = [
    Case({"name": "adding"}, {2: 2, 9: 9, 40: 40}, sum_of_marked, many=20_000),
    Case({"name": "multiplication"}, {10: 10, 40: 40}, product_of_marked, many=20_000),
    Case({"name": "copy_memory"}, {1: 21, 30: 50}, lambda x, _: repeated(x, 10, 8)),
    Case(MEMORIZATION, {1: 11, 30: 40}, lambda x, _: repeated(x, 5, 2)),
    Case(
        {**MEMORIZATION, "symbols": 5, "pattern": 10},
        {1: 21, 30: 50},
        lambda x, _: repeated(x, 10, 5),
    ),
    Case({"name": "temporal_order"}, {10: 10, 50: 50, 57: 57}, order_of_cues),
    Case({"name": "temporal_order", "symbols": 3}, {10: 10, 57: 57}, order_of_cues),
    Case({"name": "delayed_recall", "length": 40}, {1: 40, 39: 40}, bit_before),
    Case({"name": "temporal_xor", "length": 40}, {1: 40, 39: 40}, xor_with_bit_before),
    Case({"name": "latch"}, {4: 4, 50: 50}, first_sign),
    Case({"name": "perceptual_decision", **TRIAL}, {1: 21, 5: 25}, larger_channel),
    Case({"name": "context_integration", **TRIAL}, {1: 21, 3: 23}, larger_in_context),
    Case({"name": "parametric_working_memory", **TRIAL}, {1: 71, 20: 90}, lower_first),
    Case({"name": "delayed_match_to_sample", **TRIAL}, {1: 111, 20: 130}, is_other, many=4000),
]
# Every form of both data sets, and every form with both questions.
IMAGE_CASES = []
for index, (data, side) in enumerate((("digits", 8), ("mnist", 28))):
    for form in ("rows", "pixels", "permuted", "noise_padded"):
        question = ("class", "odd")[(index + (form in ("pixels", "noise_padded"))) % 2]
        options = {"name": data, "form": form, "question": question, "permutation_seed": 3}
        length = side * side if form in ("pixels", "permuted") else side
        steps = {length: length, **({length + 9: length + 9} if form == "noise_padded" else {})}
        IMAGE_CASES.append(Case(options, steps, partial(named_image, options), many=4000))

every_case = pytest.mark.parametrize("case", CASES + IMAGE_CASES, ids=str)


def test_every_task_is_tested_here_or_has_a_file():
    here = {case.options["name"] for case in CASES + IMAGE_CASES}
    files = {path.stem for path in Path(__file__).parent.glob("test_scenario_*.py")}
    assert here | {name.removeprefix("test_scenario_") for name in files} == set(TASKS)


@every_case
def test_batches_are_what_the_task_states_and_horizons_out_of_range_are_refused(case, mnist_root):
    task = task_of(case.options, mnist_root)
    for horizon, steps in case.steps.items():
        assert len(check_data(task, horizon)[0]) == steps
    low, high = task.minimum_horizon, task.maximum_horizon
    assert low == min(case.steps)
    task.sample(200, low, generator())
    task.check_horizon("horizons", low)
    refused = rf"^horizons must be .*{low}.* for task {task.name}; got {low - 1}$"
    with pytest.raises(ConfigError, match=refused):
        task.check_horizon("horizons", low - 1)
    if high is None:
        task.check_horizon("horizons", 10_000)
    else:
        assert high == max(case.steps)
        task.check_horizon("horizons", high)
        with pytest.raises(ConfigError, match=rf"{high}.*; got {high + 1}$"):
            task.check_horizon("horizons", high + 1)


@every_case
def test_the_input_determines_the_answer(case, mnist_root):
    task = task_of(case.options, mnist_root)
    for horizon in case.steps:
        for x_TBI, target in (
            task.sample(300, horizon, generator(1)),
            task.test_set(horizon, generator(2)),
        ):
            torch.testing.assert_close(case.oracle(x_TBI, horizon), target, rtol=1e-6, atol=0)
    if case in IMAGE_CASES:
        name, form, question, _ = case.options.values()
        odd = "_odd" if question == "odd" else ""
        assert task.name == f"{form}_{name}{odd}".removeprefix("rows_")


@every_case
def test_the_right_answer_has_no_error_and_a_wrong_one_has_one(case, mnist_root):
    task = task_of(case.options, mnist_root)
    _, target = task.sample(50, max(case.steps), generator())
    if target.dtype == torch.long:
        certain = 1e3 * torch.nn.functional.one_hot(target.clamp(min=0), task.output_size)
        right, wrong = certain.double(), certain.double().roll(1, dims=-1)
    elif task.metric == "accuracy":
        right = 1e3 * (2 * target - 1).double()
        wrong = -right
    else:
        right, wrong = target.double(), target.double() + 1
    target = target.double() if target.is_floating_point() else target
    assert task.loss(right, target).item() == 0
    assert task.error(right, target).item() == 0
    assert task.loss(wrong, target).item() >= 1
    assert task.error(wrong, target).item() >= 1


@every_case
def test_knowing_nothing_costs_what_the_best_answer_that_ignores_the_input_costs(case, mnist_root):
    """The best one: at each step the mean, or the shares of the classes, over many samples."""
    task = task_of(case.options, mnist_root)
    horizon = max(case.steps)
    _, target = task.sample(case.many, horizon, generator(9))
    _, test_target = task.test_set(horizon, generator(10))

    def ignorant(target: Tensor) -> Tensor:
        """Return the best prediction that is the same for all samples."""
        if target.dtype == torch.long:
            is_class = torch.nn.functional.one_hot(target.clamp(min=0), task.output_size)
            best = is_class.double().mean(-2, keepdim=True).log().clamp(min=-1e3)
            return best.expand(is_class.shape)
        best = target.double().mean(-2, keepdim=True)
        return (torch.logit(best) if task.metric == "accuracy" else best).expand(target.shape)

    def of(measure: Callable, target: Tensor) -> float:
        return measure(ignorant(target).nan_to_num(), target).item()

    assert of(task.loss, target) == pytest.approx(task.know_nothing_loss(horizon), rel=0.03)
    stated = task.know_nothing_error(horizon)
    if case in IMAGE_CASES:
        # Judged on the images that there are, every one of them.
        assert of(task.error, test_target) == pytest.approx(stated, rel=1e-12)
    else:
        assert of(task.error, target) == pytest.approx(stated, rel=0.03)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_dependency_is_the_longest_lag_that_matters(case, mnist_root):
    """Inputs further back than it can be another sample's; one step more, and answers change."""
    task = task_of(case.options, mnist_root)
    for horizon, steps in case.steps.items():
        x_TBI, target = task.sample(2000, horizon, generator(1))
        other, _ = task.sample(2000, horizon, generator(2))
        first = steps - 1 - task.dependency(horizon)

        def last_answers(replaced: int, horizon=horizon, x_TBI=x_TBI, other=other) -> Tensor:
            mixed = torch.cat((other[:replaced], x_TBI[replaced:]))
            answers = case.oracle(mixed, horizon)
            return answers if task.reads == "last" else answers[-1]

        expected = target if task.reads == "last" else target[-1]
        torch.testing.assert_close(last_answers(first), expected, rtol=1e-6, atol=0)
        assert not torch.equal(last_answers(first + 1), expected)


@every_case
def test_a_model_trains_on_it(case, mnist_root, tmp_path):
    settings = task_of(case.options, mnist_root).settings
    record = Record.load(trained(run_of(settings, min(case.steps)), tmp_path))
    assert record.status == "finished"
    assert math.isfinite(record.result.test_error)


# Each task's own traits


def digest(*tensors: Tensor) -> str:
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        hasher.update(tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]


DRAWN = [
    ({"name": "adding"}, "c4f783fc514cb1bc"),
    ({"name": "multiplication"}, "6ada38ab1ff9b821"),
    ({"name": "copy_memory"}, "7e9fb7844d941087"),
    ({"name": "noiseless_memorization"}, "d5160cb89cf68805"),
    ({"name": "noiseless_memorization", "symbols": 3, "pattern": 4}, "18b8a6846faef19c"),
    ({"name": "temporal_order"}, "89f89e9ccdbba2f6"),
    ({"name": "temporal_order", "symbols": 3}, "04f57fcaa0998c30"),
    ({"name": "delayed_recall", "length": 40}, "c8579407268c3059"),
    ({"name": "temporal_xor", "length": 40}, "25248c737e62767b"),
]


@pytest.mark.parametrize(("options", "expected"), DRAWN)
def test_a_task_draws_what_it_drew(options, expected):
    """To the bit: else records of before and of now would not be of one task.

    What was drawn when these hashes were taken was checked: where marks, cues and delimiters are,
    and that everything else is blank.
    """
    task, drawn = build_task({"test_size": 50, **options}), []
    for horizon, seed in product((10, 33), (0, 12345)):
        drawn += task.sample(17, horizon, generator(seed))
        drawn += task.test_set(horizon, generator(seed))
    assert digest(*drawn) == expected


def test_images_are_drawn_as_they_were_and_held_out_ones_are_no_others():
    # Rows and labels by hash, the noise by what it is: its last bits depend on the processor.
    images = {}
    for options, seed in (({}, 0), ({}, 12345), ({"test_fraction": 0.3, "split_seed": 7}, 1)):
        task = build_task({"name": "digits", "form": "noise_padded", **options})
        x_TBI, target = task.sample(17, 8 if options else 20, generator(seed))
        test_x, test_target = task.test_set(8, generator(seed))
        images[seed] = digest(x_TBI[:8], target), digest(test_x, test_target)
        after_choice = generator(seed)
        torch.randint(0, 1437, (17,), generator=after_choice)
        assert torch.equal(x_TBI[8:], torch.randn(x_TBI[8:].shape, generator=after_choice))
        drawn, held_out = (
            {row.numpy().tobytes() for row in x.transpose(0, 1)}
            for x in (task.sample(2000, 8, generator())[0], test_x)
        )
        assert not drawn & held_out
    assert shown_metric(task, 0.25) == 0.75
    assert images == {
        0: ("a01969259c37556c", "103bfdd5d2855a72"),
        12345: ("88d89a8c20b4fc63", "103bfdd5d2855a72"),
        1: ("abbbcec86452ce6f", "dfab2221515aa414"),
    }


def test_latch_shows_its_class_and_then_noise_alone():
    task = build_task({"name": "latch", "class_steps": 5, "noise": 0.7})
    x_TBI, target = task.sample(4000, 50, generator())
    assert torch.equal(x_TBI[:5, :, 0], (2 * target[:, 0] - 1).expand(5, -1))
    noise = x_TBI[5:, :, 0]
    assert noise.std().item() == pytest.approx(0.7, rel=0.02)
    correlation = (noise * (2 * target[:, 0] - 1)).mean(1)
    assert correlation.abs().max() < 5 * 0.7 / math.sqrt(4000)


EPOCHS = {  # milliseconds, None for the horizon
    "perceptual_decision": (100, None, 300),
    "context_integration": (100, None, 300),
    "parametric_working_memory": (100, 500, None, 500, 300),
    "delayed_match_to_sample": (300, 500, None, 500, 900),
}


@pytest.mark.parametrize("name", EPOCHS)
def test_trials_have_their_epochs_their_fixation_and_their_noise(name):
    horizon = 10
    for dt, silent in product((20, 50), (True, False)):
        task = build_task({"name": name, "dt": dt, **({"noise": 0.0} if silent else {})})
        durations = [horizon if ms is None else ms // dt for ms in EPOCHS[name]]
        x_TBI, target = task.sample(2000, horizon, generator())
        response = sum(durations[:-1])
        assert len(x_TBI) == sum(durations)
        assert (target[:response] == UNSCORED).all()
        assert (target[response:] == target[-1]).all()
        fixation, stimulus = x_TBI[..., 0], x_TBI[..., 1:]
        for quiet in (fixation - 1)[:response], fixation[response:], stimulus[: durations[0]]:
            if silent:
                assert not quiet.any()
            else:
                assert quiet.std().item() == pytest.approx(0.01 * math.sqrt(200 / dt), rel=0.03)
                assert quiet.mean().item() == pytest.approx(0, abs=0.001)
        if not silent:
            continue
        # What is shown is constant within an epoch, and there is nothing but noise in a delay.
        starts = [sum(durations[:i]) for i in range(len(durations))]
        for start, duration in zip(starts, durations, strict=True):
            assert (stimulus[start : start + duration] == stimulus[start]).all()
        assert stimulus[starts[1]].any()
        assert not stimulus[response:].any()
        if len(durations) == 5:
            assert not stimulus[starts[2]].any()
            assert stimulus[starts[3]].any()


def test_evidence_is_of_the_published_coherences():
    for name, coherences, channels in (
        ("perceptual_decision", [0.01, 0.032, 0.064, 0.128, 0.256, 0.512], (1,)),
        ("context_integration", [0.05, 0.15, 0.5], (3, 5)),
    ):
        x_BI = build_task({"name": name, "noise": 0}).sample(9000, 2, generator())[0][5]
        for first in channels:
            larger, smaller = x_BI[:, first : first + 2].sort(-1, descending=True).values.unbind(-1)
            torch.testing.assert_close(larger + smaller, torch.ones(9000))
            shown, counts = (larger - smaller).mul(1e3).round().unique(return_counts=True)
            assert shown.tolist() == [1e3 * c for c in coherences]
            assert (counts / 9000 * len(coherences) - 1).abs().max() < 0.1


def test_the_modality_out_of_context_says_nothing_about_the_answer():
    x_TBI, target = build_task({"name": "context_integration", "noise": 0}).sample(
        9000, 2, generator()
    )
    x_BI, answer = x_TBI[5], target[-1]
    assert (x_BI[:, 1] + x_BI[:, 2] == 1).all()
    is_motion = x_BI[:, 1] == 1
    motion, colour = ((x_BI[:, i] < x_BI[:, i + 1]).long() for i in (3, 5))
    for counts, ignored in ((is_motion, colour), (~is_motion, motion)):
        assert counts.double().mean().item() == pytest.approx(0.5, abs=0.02)
        assert (ignored == answer)[counts].double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_an_ideal_observer_of_noisy_evidence_errs_as_often_as_the_noise_says():
    """Its error at coherence c over n steps is Phi(-c sqrt(n) / (sqrt(2) s)), s per channel."""
    n = 8
    task = build_task({"name": "perceptual_decision", "noise": 0.05})
    x_TBI, target = task.sample(40_000, n, generator())
    errors = (larger_channel(x_TBI, n)[-1] != target[-1]).double().mean().item()
    s = 0.05 * math.sqrt(10)
    normal = torch.distributions.Normal(0.0, 1.0)
    coherences = torch.tensor([0.01, 0.032, 0.064, 0.128, 0.256, 0.512])
    # The oracle sums all steps of the trial, the silent ones too.
    expected = normal.cdf(-coherences * n / (math.sqrt(2 * len(x_TBI)) * s)).mean().item()
    assert errors == pytest.approx(expected, rel=0.03)


def test_working_memory_cannot_be_answered_from_one_frequency():
    x_TBI, target = build_task({"name": "parametric_working_memory", "noise": 0}).sample(
        9000, 3, generator()
    )
    rising, falling = x_TBI[..., 1], x_TBI[..., 2]
    hertz = 10 + 24 * (rising - 0.4) / 0.8
    torch.testing.assert_close((rising + falling)[5:30], torch.full((25, 9000), 1.6))
    f1, f2 = hertz[5].round(), hertz[33].round()
    pairs = {frozenset(pair) for pair in zip(f1.tolist(), f2.tolist(), strict=True)}
    assert pairs == {frozenset((low, low + 8.0)) for low in (10, 14, 18, 22, 26)}
    for frequency in (18, 22, 26):
        asked = target[-1][f1 == frequency]
        assert asked.double().mean().item() == pytest.approx(0.5, abs=0.06)


def test_a_match_is_of_any_direction_and_so_is_a_difference():
    x_TBI, target = build_task({"name": "delayed_match_to_sample", "noise": 0}).sample(
        9000, 3, generator()
    )
    ring = 2 * math.pi / 16 * torch.arange(16)
    curves = 0.5 + 0.5 * torch.cos(ring - ring.unsqueeze(-1))  # [direction, channel]
    sample, test = (torch.cdist(x_TBI[t, :, 1:], curves) for t in (15, 43))
    assert sample.min(-1).values.max() < 1e-3
    assert test.min(-1).values.max() < 1e-3
    turned = (test.argmin(-1) - sample.argmin(-1)) % 16
    assert torch.equal(turned != 0, target[-1] == 1)
    assert (sample.argmin(-1).bincount() / 9000 * 16 - 1).abs().max() < 0.2
    assert (turned[turned > 0].bincount()[1:] / (9000 / 2) * 15 - 1).abs().max() < 0.25


# Images


@pytest.mark.parametrize(
    ("folder", "compressed"), [(".", False), (".", True), ("MNIST/raw", True), ("raw", False)]
)
def test_mnist_is_read_from_its_files_compressed_or_not_also_where_torchvision_puts_them(
    folder, compressed, tmp_path
):
    write_mnist(tmp_path / folder, compressed)
    task = build_task({"name": "mnist", "root": str(tmp_path)})
    x_TBI, target = task.test_set(28, generator())
    images, labels = mnist_like(20, seed=1)
    torch.testing.assert_close(x_TBI, (images / 255).transpose(0, 1), rtol=0, atol=0)
    assert torch.equal(target, labels.long())
    drawn, _ = task.sample(500, 28, generator())
    train = {image.numpy().tobytes() for image in mnist_like(60, seed=0)[0] / 255}
    assert {image.contiguous().numpy().tobytes() for image in drawn.transpose(0, 1)} == train


IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def corrupt(content: bytes) -> bytes:
    packed = gzip.compress(content)
    return packed[:200] + b"?" + packed[201:]


def of(data: Tensor) -> Callable[[bytes], bytes]:
    return lambda _: idx_bytes(data)


@pytest.mark.parametrize(
    ("file", "change", "fault"),
    [
        (IMAGES, None, "missing; neither it nor .*gz is in"),
        (LABELS, None, "missing; neither it nor .*gz is in"),
        (IMAGES, lambda b: b[:-1], "truncated; .* 20 x 28 x 28, so 15696 bytes"),
        (IMAGES, lambda b: b[:10], "truncated; expected a header of 16 .*got 10"),
        (IMAGES, lambda b: b"", "wrong magic number; .* got an empty file"),
        (IMAGES, lambda b: b + b"x", "too long; .* 15696 bytes were expected"),
        (IMAGES, lambda b: b"<!DOCTYPE html>", "wrong magic number; .* 00000803"),
        (IMAGES, lambda b: b[:2] + bytes([13]) + b[3:], "got 00000d03"),
        (LABELS, of(mnist_like(20, 1)[0]), "expected 00000801"),
        (LABELS, of(mnist_like(19, 0)[1]), "19 labels, but .* holds 20 images"),
        (LABELS, of(mnist_like(20, 0)[1] + 3), "expected labels from 0 to 9, got 12"),
        (IMAGES, of(torch.zeros(20, 32, 32, dtype=torch.uint8)), "got 32 x 32"),
        (IMAGES, of(torch.zeros(0, 28, 28, dtype=torch.uint8)), "holds nothing"),
        (IMAGES, lambda b: gzip.compress(b)[:-20], "truncated or corrupt gzip"),
        (IMAGES, lambda b: gzip.compress(b)[:3], "truncated or corrupt gzip"),
        (IMAGES, corrupt, "truncated or corrupt gzip"),
    ],
)
def test_a_broken_file_is_refused_by_its_name_and_its_fault(file, change, fault, tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"^task\.root .*: .*{file}.*{fault}"):
        build_task({"name": "mnist", "root": str(tmp_path)})


def test_mnist_needs_a_folder(tmp_path):
    (tmp_path / "file").touch()
    words = r"^task\.root \(MNIST_ROOT .*\) must be the folder .*: .*{}: expected a folder, got {}"
    for name, got in (("nowhere", "nothing"), ("file", "a file")):
        with pytest.raises(ConfigError, match=words.format(name, got)):
            build_task({"name": "mnist", "root": str(tmp_path / name)})


# Configuration


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_composes_into_the_task_it_names(name, mnist_root):
    overrides = [f"task={name}"]
    if name == "mnist":
        overrides.append(f"task.root={mnist_root}")
    horizon = {"digits": 8, "mnist": 28}.get(name, 20)
    study = study_of(*overrides, f"horizons=[{horizon}]", f"contrast_horizons=[{horizon}]")
    task = study.reference.run.task
    assert task.name.removeprefix("synthetic_") == name
    assert build_task(task.settings).settings == task.settings


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_yaml_file_of_a_task_shows_every_key_with_its_default(name):
    shown = dict(composed(f"task={name}")["task"])
    defaults = {field.name: field.default for field in fields(TASKS[name].Config)}
    assert shown == {"name": name, **defaults}


def test_a_task_is_found_by_its_file_alone(tmp_path):
    """As a newcomer adds one, with the example of the page."""
    page = (CONFIGURATION.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    source = page.partition("```python\n")[2].partition("```")[0]
    shown = OmegaConf.create(page.partition("```yaml\n")[2].partition("```")[0])
    program = listing_also("experiments.tasks", tmp_path) + (
        f"task = package.build_task({dict(shown)!r})\nprint(task.name, task.settings)\n"
    )
    (tmp_path / "first_bit.py").write_text(source)
    assert printed_by(program) == f"first_bit {dict(shown)!r}\n"
    (tmp_path / "first_bit.py").write_text(source.replace('"first_bit"', '"other"'))
    assert "must define one subclass of Task, with name = 'first_bit'" in printed_by(program)
    assert set(TASKS) == {path.stem for path in Path(package.__file__).parent.glob("[!_]*.py")}


def test_the_page_names_every_task_and_what_knowing_nothing_costs():
    page = (CONFIGURATION.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in CHOICES)
    cost = build_task({"name": "multiplication"}).know_nothing_error(10)
    assert cost == pytest.approx(7 / 144, rel=1e-12)


NAMES = ("adding", "temporal_order", "latch", "delayed_match_to_sample", "digits", "mnist")
adding, order, latch, match, digits, mnist = (partial(dict, name=name) for name in NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "task.name is missing from the configuration"),
        (None, "task.name is missing from the configuration"),
        ({"name": "ading"}, "task.name must be one of .*; got 'ading'; did you mean adding?"),
        ({"name": ["adding"]}, "task.name must be one of adding, .*; got ['adding']"),
        ({"name": None}, "task.name must be one of adding, .*; got None"),
        (adding(size=1), "unknown key task.size; known here: test_size"),
        (adding(testsize=1), "unknown key task.testsize; .*; did you mean task.test_size?"),
        (adding(test_size=0), "task.test_size must be an integer of at least 1; got 0"),
        (adding(test_size=2.0), "task.test_size must be an integer of at least 1; got 2.0"),
        (adding(test_size=True), "task.test_size must be an integer of at least 1; got True"),
        (adding(test_size="many"), "task.test_size must be an integer of at least 1; got 'many'"),
        (adding(test_size=None), "task.test_size must be an integer of at least 1; got None"),
        (order(symbols=4), "task.symbols must be one of 2, 3; got 4"),
        (order(symbols="2"), "task.symbols must be one of 2, 3; got '2'"),
        (latch(noise=-0.1), "task.noise must be a number of at least 0; got -0.1"),
        (latch(noise=math.nan), "task.noise must be a number of at least 0; got nan"),
        (latch(noise=math.inf), "task.noise must be a number of at least 0; got inf"),
        (latch(noise=10**400), "task.noise must be a number of at least 0; got 1000"),
        (latch(noise=False), "task.noise must be a number of at least 0; got False"),
        (match(dt=101), "task.dt must be an integer from 1 to 100; got 101"),
        (digits(form="pixel"), "task.form must be .*; got 'pixel'; did you mean pixels?"),
        (digits(form="noise-padded"), "got 'noise-padded'; did you mean noise_padded?"),
        (digits(question="even"), "task.question must be one of class, odd; got 'even'"),
        (digits(test_fraction=1), "task.test_fraction must be a number between 0 and 1; got 1"),
        (digits(test_fraction=0.001), "task.test_fraction must leave .*; got 0.001 (The test_size"),
        (digits(test_fraction=0.9999), "task.test_fraction must leave .*train set will be empty"),
        (digits(split_seed=2**32), "task.split_seed must be an integer from 0 to 4294967295; got"),
        (mnist(root=3), "task.root must be a non-empty string; got 3"),
        (mnist(root=""), "task.root must be a non-empty string; got ''"),
    ],
)
def test_a_bad_option_is_refused_by_the_name_of_its_key(options, message):
    with pytest.raises(ConfigError) as raised:
        build_task(options)
    assert all(part in str(raised.value) for part in message.split(".*"))


def test_a_run_is_refused_before_it_starts_where_its_task_cannot_be_had(tmp_path):
    nowhere = f"task.root={tmp_path / 'nowhere'}"
    for overrides, message in (
        (["task=digits"], r"^horizons must be 8 for task digits; got 10$"),
        (["task=delayed_recall", "task.length=50"], "^horizons must be from 1 to 49 for task dela"),
        (["task=mnist", nowhere], r"^task\.root .*: expected a folder, got nothing"),
        (
            ["experiment=noise_padded_digits", "task=temporal_order"],
            "^horizons must be at least 10 for task temporal_order",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            study_of(*overrides)


def test_a_configuration_is_checked_however_it_is_made():
    @dataclass(frozen=True)
    class Example(Config):
        steps: int = integer(3, at_least=1, at_most=5)
        rate: float = number(0.5, at_least=0)
        share: float = fraction(0.5)
        kind: str = choice("plain", ("plain", "fancy"))

    for wrong in ({"steps": 6}, {"rate": "x"}, {"share": 0.0}, {"kind": "fanci"}):
        with pytest.raises(ConfigError, match=rf"^{next(iter(wrong))} must be "):
            Example(**wrong)
        with pytest.raises(ConfigError, match=rf"^a\.{next(iter(wrong))} must be "):
            Example.parse(wrong, "a.")
    # However a number is spelled, it is one value.
    assert repr(Example.parse({"rate": 1})) == repr(Example.parse({"rate": 1.0}))
    with pytest.raises(AttributeError):
        Example().steps = 4
