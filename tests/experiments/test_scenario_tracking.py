"""A digit that is hidden for some frames: its places, its baselines, what a model says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage

from experiments import use as commanded
from experiments.fields import ConfigError
from experiments.looks import Animation, Drawing
from experiments.tasks import build_task
from experiments.train import load_run
from tests.experiments.scenario_checks import check_scenario, generator, run_of, trained, use

OPTIONS = {"name": "tracking", "test_size": 40}


def in_pixels(answer: torch.Tensor, side: int = 16) -> np.ndarray:
    """Return row and column: an answer of -1 and 1 is the outer edge of the first and last."""
    return ((answer.double() + 1) / 2 * side - 0.5).numpy()


def test_it_is_a_scenario(tmp_path):
    check_scenario({**OPTIONS, "side": 12, "seen": 3, "after": 1}, 4, tmp_path)


def test_the_target_is_the_centre_of_mass_of_a_digit_that_goes_on_while_it_is_hidden():
    """The same videos with another part hidden show where it was."""
    task, other = (
        build_task({**OPTIONS, "distractors": 0, "seen": seen, "after": after})
        for seen, after in ((4, 3), (13, 2))
    )
    assert task.name == "synthetic_tracking"
    for draw in ("sample", "test_set"):
        size = (30,) if draw == "sample" else ()
        x_TBI, target = getattr(task, draw)(*size, 9, generator())
        other_TBI, _ = getattr(other, draw)(*size, 1, generator())
        assert x_TBI.shape == other_TBI.shape == (16, target.shape[1], 256)
        assert not x_TBI[4:13].any()
        assert torch.equal(x_TBI[:4], other_TBI[:4])
        shown = torch.cat((other_TBI[:13], x_TBI[13:])).view(*x_TBI.shape[:2], 16, 16).numpy()
        for video in range(10):
            centres = [ndimage.center_of_mass(frame) for frame in shown[:, video]]
            assert in_pixels(target[:, video]) == pytest.approx(np.array(centres), abs=1e-3)


def test_others_are_dimmer_than_the_target_and_stay_when_it_is_hidden():
    task = build_task({**OPTIONS, "distractors": 2, "dimmed": 0.4})
    alone = build_task({**OPTIONS, "distractors": 0})
    (x_TBI, target), (alone_TBI, places) = (t.test_set(6, generator(3)) for t in (task, alone))
    assert torch.equal(target, places)
    hidden = x_TBI[10:16]
    assert 0.3 < hidden.max() <= 0.4
    assert (hidden.flatten(2).amax(-1) > 0).all()
    assert torch.equal(x_TBI.where(x_TBI > 0.4, 0), alone_TBI.where(alone_TBI > 0.4, 0))


def test_the_test_error_is_the_distance_while_hidden_and_training_is_on_every_frame():
    task = build_task({**OPTIONS, "seen": 3, "after": 2})
    _, target = task.sample(7, 4, generator())
    said = target + torch.randn(target.shape, generator=generator(1))
    distance = np.linalg.norm(in_pixels(said) - in_pixels(target), axis=-1)
    assert task.error(said, target).item() == pytest.approx(distance[3:7].mean(), rel=1e-6)
    assert task.scored(target) == 4 * 7
    assert task.loss(said, target).item() == pytest.approx(
        ((said - target) ** 2).mean().item(), rel=1e-6
    )
    assert (task.reads, task.metric) == ("every", "pixel error")


def test_knowing_nothing_is_the_mean_place_in_training():
    task = build_task({**OPTIONS, "test_size": 2000, "distractors": 0})
    _, target = task.sample(2000, 2, generator(5))
    mean = target.mean((0, 1))
    loss = (target - mean).square().mean().item()
    assert task.know_nothing_loss(2) == pytest.approx(loss, rel=0.03)
    _, held_out = task.test_set(2, generator(6))
    distance = np.linalg.norm(in_pixels(held_out) - in_pixels(mean), axis=-1).mean()
    assert task.know_nothing_error(2) == pytest.approx(distance, rel=0.03)


def test_baselines_go_on_from_the_last_two_frames():
    """A bright pixel that a detector finds exactly, and a dim one that it does not see."""
    task = build_task({**OPTIONS, "seen": 2, "after": 0, "side": 16})
    frames = torch.zeros(5, 2, 16, 16)
    places = torch.zeros(5, 2, 2)
    # The middle of an 8 x 8 sprite goes from 3.5 to 11.5: the first never gets there; the second
    # is in row 4 and column 10, then 11, where it would leave at 12, and comes back.
    ways = [[(5, 5), (6, 6), (7, 7), (8, 8), (9, 9)], [(4, 10), (4, 11), (4, 11), (4, 10), (4, 9)]]
    for video, way in enumerate(ways):
        for step, place in enumerate(way):
            places[step, video] = torch.tensor(place)
            if step < 2:
                frames[(step, video, *place)] = 1
                frames[step, video, 15, 0] = 0.5  # as bright as a distractor can be
    target = (places - 7.5) / 8
    found = task.baselines(frames.flatten(-2), target, 3)
    straight = (0.5 + 1.5 + 2.5) / 6  # at the wall, 11.5, instead of 11, 10 and 9
    assert found == {
        "constant velocity": pytest.approx(straight, abs=1e-5),
        "constant velocity from true places": pytest.approx(straight, abs=1e-5),
        "constant velocity and bounces": pytest.approx(0, abs=1e-5),
    }
    # The detector alone is misled by what is shown.
    frames[1, 0] = frames[0, 0]
    misled = task.baselines(frames.flatten(-2), target, 3)
    of_first = np.sqrt(2) * (2 + 3 + 4) / 6
    assert misled["constant velocity"] == pytest.approx(straight + of_first, abs=1e-5)
    assert misled["constant velocity from true places"] == pytest.approx(straight, abs=1e-5)


def test_errors_are_measured_by_how_long_the_target_is_hidden():
    task = build_task({**OPTIONS, "seen": 3, "after": 2})
    x_TBI, target = task.test_set(6, generator())
    said = target + torch.randn(target.shape, generator=generator(1))
    found = task.measures(lambda x: said, x_TBI, target, 6)
    distance = np.linalg.norm(in_pixels(said) - in_pixels(target), axis=-1).mean(1)
    expected = {
        "pixel error, seen": distance[:3].mean(),
        "pixel error, hidden for 1": distance[3],
        "pixel error, hidden for 2": distance[4],
        "pixel error, hidden for 5": distance[7],
        "pixel error, after": distance[9:].mean(),
    }
    assert found == pytest.approx(expected, rel=1e-5)
    alone = build_task({**OPTIONS, "seen": 3, "after": 0})
    assert list(alone.measures(lambda x: said[:9], x_TBI, target[:9], 6)) == list(expected)[:-1]


GREEN, PINK, ORANGE = (0, 190, 90), (255, 60, 160), (255, 140, 0)


def cross(picture: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    """Return row and column, in pixels of the frame, of the cross of a colour."""
    found = np.argwhere((picture == colour).all(-1))
    return (found.mean(0) + 0.5 - 2) / 8 - 0.5


def test_looks_show_both_paths_and_when_the_target_is_hidden():
    options = {**OPTIONS, "seen": 3, "after": 2}
    task, model = build_task(options), run_of(options, 4).build_model()
    with torch.no_grad():
        model.readout.weight.zero_()
        model.readout.bias.copy_(torch.tensor([-0.5, 0.25]))  # pixels 3.5 and 9.5
    animation, drawing = task.looks(model, 4, generator(7))
    assert isinstance(animation, Animation)
    assert isinstance(drawing, Drawing)
    assert (animation.name, drawing.name) == ("synthetic_tracking", "synthetic_tracking_paths")
    _, target = task._videos(3, 4, generator(7), is_held_out=True)
    for step, picture in enumerate(animation.frames):
        assert (picture[0, 0] == ORANGE).all() == (3 <= step < 7)
        first = picture[:, : 16 * 8 + 4]
        assert cross(first, PINK) == pytest.approx((3.5, 9.5), abs=0.01)
        true = in_pixels(target[step, 0])
        if np.abs(true - (3.5, 9.5)).max() > 1.5:  # the pink one hides nothing of it
            assert cross(first, GREEN) == pytest.approx(true, abs=0.1)
    figure = drawing.figure
    assert isinstance(figure, Figure)
    assert "synthetic" in figure.get_suptitle()
    paths = figure.axes[4].lines  # of the first video
    assert [line.get_linestyle() for line in paths] == ["-", "--", "-"] * 2
    y = np.concatenate([paths[0].get_ydata(), paths[1].get_ydata()[1:-1], paths[2].get_ydata()])
    assert y == pytest.approx(in_pixels(target[:, 0])[:, 0], abs=1e-4)


def test_a_trained_model_follows_a_target_in_a_video_that_is_given(tmp_path, capsys):
    folder = trained(run_of(OPTIONS, 6), tmp_path)
    out, video = tmp_path / "out.gif", tmp_path / "video.npy"
    clip = np.random.default_rng(0).integers(0, 256, (7, 32, 32), dtype=np.uint8)
    np.save(video, clip)
    assert commanded.main([str(folder), "--video", str(video), "--output", str(out)]) == 0
    printed = np.array([line.split() for line in capsys.readouterr().out.splitlines()], float)
    assert printed[:, 0].tolist() == list(range(7))
    _, model = load_run(folder)
    x_TBI = torch.tensor(clip.reshape(7, 16, 2, 16, 2).mean((2, 4)) / 255).flatten(1).float()
    with torch.no_grad():
        said = model(x_TBI.unsqueeze(1))[:, 0]
    assert printed[:, 2:0:-1] == pytest.approx(in_pixels(said, 32), abs=0.006)
    with Image.open(out) as gif:
        assert (gif.n_frames, gif.size) == (7, (16 * 8 + 4, 16 * 8 + 4))
    # One of its own, with the true place.
    out.unlink()
    assert commanded.main([str(folder), "--seed", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10 + 6 + 5
    assert not out.exists()
    assert commanded.main([str(folder), "--seed", "3", "--output", str(out)]) == 0
    with Image.open(out) as gif:
        gif.seek(10)
        shown = np.asarray(gif.convert("RGB")).astype(int)
    assert np.abs(shown[0, 0] - ORANGE).max() < 12
    assert (np.abs(shown - GREEN).max(-1) < 12).any()


def test_what_cannot_be_followed_is_said(tmp_path):
    bad = tmp_path / "bad.npy"
    np.save(bad, np.zeros((4, 16, 15), np.uint8))
    for words, message in (
        (["--output", "out.txt"], "--output must be .* ends with .gif; got out.txt"),
        (["--seed", "-1"], r"--seed must be from 0 to 2\*\*63 - 1; got -1"),
        (["--video", str(tmp_path / "x.npy")], "--video: .*x.npy: cannot be read"),
        (["--video", str(bad)], r"--video: .*bad.npy: expected the shape .*got \[4, 16, 15\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            use(run_of(OPTIONS, 6), *words)
    with pytest.raises(ConfigError, match=r"^task\.side must be larger than .*got 7$"):
        build_task({**OPTIONS, "side": 7})
    with pytest.raises(ConfigError, match=r"^task\.dimmed must be a number between 0 and 1; got 1"):
        build_task({**OPTIONS, "dimmed": 1})
