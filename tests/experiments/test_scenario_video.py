"""Videos of moving digits, Moving MNIST's file, and what a model says comes next."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor

from experiments import use as commanded
from experiments.fields import ConfigError
from experiments.looks import Animation, Picture
from experiments.tasks import build_task
from experiments.tasks._frames import film
from experiments.tasks._sprites import centre_of_mass, reflected, shrunk
from experiments.train import load_run
from tests.experiments.scenario_checks import check_scenario, generator, run_of, trained, use
from tests.idx_files import idx_bytes

SYNTHETIC = {"name": "video", "test_size": 30}
DIGITS = load_digits().images / 16
DIGITS /= DIGITS.max((1, 2), keepdims=True)


def centres(frames: np.ndarray) -> np.ndarray:
    """Return the centre of mass of each of ``[T, L, L]``, by scipy."""
    return np.array([ndimage.center_of_mass(frame) for frame in frames])


def is_bouncing(path: np.ndarray, reach: float) -> bool:
    """Return whether a corner's path is one of constant velocity between walls."""
    speed = np.abs(np.diff(path, axis=0)).max(0)
    for velocity in speed * np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)]):
        place, expected = path[0].copy(), []
        for _ in path:
            expected.append(place.copy())
            place += velocity
            for axis in np.flatnonzero((place < 0) | (place > reach)):
                wall = 0 if place[axis] < 0 else reach
                place[axis], velocity[axis] = 2 * wall - place[axis], -velocity[axis]
        if np.abs(np.array(expected) - path).max() < 1e-3:
            return True
    return False


def sources(frames: np.ndarray, images: np.ndarray) -> list[int]:
    """Return which of the images a video ``[T, L, L]`` can show, moved by scipy."""
    side, sprite = frames.shape[-1], images.shape[-1]
    found = []
    mass = images.sum((1, 2))
    for index in np.flatnonzero(np.abs(mass - frames[0].sum()) < 1e-3):
        canvas = np.zeros((side, side))
        canvas[:sprite, :sprite] = images[index]
        corners = centres(frames) - ndimage.center_of_mass(images[index])
        moved = [ndimage.shift(canvas, by, order=1, mode="grid-constant") for by in corners]
        if np.abs(np.array(moved) - frames).max() < 1e-3 and is_bouncing(corners, side - sprite):
            found.append(int(index))
    return found


def whole(task, x_TBI: Tensor, target: Tensor) -> np.ndarray:
    """Return the videos ``[B, T, L, L]``: what is shown, then what is asked."""
    given = task.config.given
    assert not x_TBI[given:].any()
    assert target[:given].isnan().all()
    frames = torch.cat((x_TBI[:given], target[given:]))
    return frames.unflatten(-1, (task.config.side,) * 2).transpose(0, 1).numpy()


def test_it_is_a_scenario(tmp_path):
    check_scenario({**SYNTHETIC, "side": 12, "given": 3}, 4, tmp_path)


def test_a_video_is_a_digit_that_bounces_and_those_of_the_test_are_held_out():
    task = build_task({**SYNTHETIC, "side": 14, "speed": 1.3})
    assert task.name == "synthetic_video"
    for batch, images in (
        (task.sample(12, 15, generator(1)), DIGITS[:1437]),
        (task.test_set(15, generator(2)), DIGITS[1437:]),
    ):
        videos = whole(task, *batch)
        assert all(sources(frames, images) for frames in videos[:12])
        moves = np.diff([centres(frames) for frames in videos], axis=1)
        assert np.hypot(*moves.transpose(2, 0, 1)).max(1) == pytest.approx(1.3, abs=1e-3)


def test_two_digits_are_drawn_with_the_brighter_pixel_on_top():
    frames = [
        build_task({**SYNTHETIC, "sprites": sprites}).test_set(5, generator(3))[0]
        for sprites in (1, 2)
    ]
    assert (frames[1] >= frames[0]).all()
    assert (frames[1] > frames[0]).any()
    assert frames[1].max() <= 1


def test_mnist_digits_are_reduced_by_area_and_its_test_digits_held_out(tmp_path):
    full = torch.full((5, 28, 28), 200, dtype=torch.uint8)
    dot = torch.zeros(5, 28, 28, dtype=torch.uint8)
    dot[:, :4, :4] = 200
    for part, images in (("train", full), ("t10k", dot)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
    task = build_task({**SYNTHETIC, "root": str(tmp_path), "sprite": 7})
    for batch, mass in ((task.sample(9, 2, generator()), 49), (task.test_set(2, generator()), 1)):
        shown = batch[0][: task.config.given]
        torch.testing.assert_close(shown.sum(-1), torch.full(shown.shape[:2], float(mass)))
    other = build_task({**SYNTHETIC, "sprite": 7})
    assert "root" not in task.identity
    assert task.identity != other.identity
    with pytest.raises(ConfigError, match=r"^task\.side must be larger than the sprites, 28 x 28"):
        build_task({**SYNTHETIC, "root": str(tmp_path)})


def test_area_reduction_and_reflection_are_what_they_say():
    images = torch.rand(3, 10, 15, generator=generator())
    fine = images.repeat_interleave(4, 1).repeat_interleave(4, 2)  # 40 x 60 = 4 * (10 x 15)
    expected = fine.unfold(1, 10, 10).unfold(2, 15, 15).mean((-2, -1))
    torch.testing.assert_close(shrunk(images, 4), expected)
    assert reflected(torch.tensor([-1.0, 0, 2, 3, 7, 9]), 3.0).tolist() == [1, 0, 2, 3, 1, 3]
    dark = torch.zeros(4, 6)
    assert centre_of_mass(dark).tolist() == [1.5, 2.5]


def test_knowing_nothing_is_the_mean_frame_of_training():
    task = build_task({**SYNTHETIC, "test_size": 3000})
    _, target = task.sample(3000, 2, generator(5))
    mean = target[10:].mean((0, 1))
    loss = (target[10:] - mean).square().mean().item()
    assert task.know_nothing_loss(2) == pytest.approx(loss, rel=0.02)
    _, held_out = task.test_set(2, generator(6))
    error = (held_out[10:] - mean).square().mean().item()
    assert task.know_nothing_error(2) == pytest.approx(error, rel=0.02)


def test_baselines_copy_the_last_frame_or_move_it_on():
    task = build_task({**SYNTHETIC, "given": 3, "side": 10})
    frames = torch.zeros(6, 2, 10, 10)
    for step in range(6):
        frames[step, 0, step + 2, 7 - step] = 1  # a pixel down and one to the left a step
        frames[step, 1, 4, min(step + 6, 9)] = 1  # is stopped where the frame ends
    x_TBI, target = task._asked(frames.flatten(-2))
    found = task.baselines(x_TBI, target, 3)
    # Two pixels are wrong in each of the three frames of the first; the other one gets to column 9
    # in the first frame that is asked, stays, and constant velocity loses it.
    assert found["copying the last frame"] == pytest.approx((6 + 6) / 600)
    assert found["constant velocity"] == pytest.approx((0 + 2) / 600)


def test_single_frames_are_measured_beside_copying():
    task = build_task({**SYNTHETIC, "given": 4})
    x_TBI, target = task.test_set(5, generator())
    found = task.measures(lambda x: x + 0.5, x_TBI, target, 5)
    for ahead in (1, 2, 5):
        true, last = target[3 + ahead], x_TBI[3]
        assert found[f"MSE {ahead} ahead"] == pytest.approx((true - 0.5).square().mean().item())
        name = f"MSE {ahead} ahead, copying the last frame"
        assert found[name] == pytest.approx((true - last).square().mean().item())
    assert len(found) == 6


def test_looks_show_truth_above_prediction_and_where_it_begins():
    task = build_task({**SYNTHETIC, "given": 3, "side": 9})
    model = run_of({**SYNTHETIC, "given": 3, "side": 9}, 2).build_model()
    animation, picture = task.looks(model, 2, generator(7))
    assert isinstance(animation, Animation)
    assert isinstance(picture, Picture)
    assert (animation.name, picture.name) == ("synthetic_video", "synthetic_video_sheet")
    frames_TBP = task._videos(4, 2, generator(7), is_held_out=True)
    with torch.no_grad():
        said = model(task._asked(frames_TBP)[0]).clamp(0, 1)
    size = 9 * 6 + 2
    for step, film_frame in enumerate(animation.frames):
        is_orange = (film_frame[0, 0] == (255, 140, 0)).all()
        assert is_orange == (step >= 3)
        for row, video in enumerate((frames_TBP, said if step >= 3 else 0 * said)):
            tile = film_frame[row * size + 2 : row * size + size : 6, size + 2 : 2 * size : 6, 0]
            expected = (255 * video[step, 1].view(9, 9)).round().numpy()
            assert (tile == expected).all()
    assert len(animation.frames) == 5
    small = 9 * 3 + 2
    assert picture.pixels.shape == (8 * small + 2, 5 * small + 2, 3)
    columns = (picture.pixels[0] == (255, 140, 0)).all(-1)
    assert np.flatnonzero(columns).tolist() == [3 * small, 3 * small + 1]


def test_crosses_are_where_they_should_be():
    marks = torch.tensor([[[0.0, 2.0]]]), (9, 8, 7)
    picture = film(torch.zeros(1, 1, 1, 4, 4), 10, (), [marks])[0]
    rows, columns = np.nonzero((picture == (9, 8, 7)).all(-1))
    assert (rows.mean() + 0.5 - 2, columns.mean() + 0.5 - 2) == (5, 25)


def moving_mnist(path, count: int = 12, seed: int = 0) -> np.ndarray:
    frames = np.random.default_rng(seed).integers(0, 256, (20, count, 64, 64), dtype=np.uint8)
    np.save(path, frames)
    return frames


def test_moving_mnist_is_read_reduced_and_its_end_held_out(tmp_path):
    path = tmp_path / "m.npy"
    frames = moving_mnist(path, 25)
    small = np.round(frames.reshape(20, 25, 16, 4, 16, 4).mean((3, 5)) - 1e-4) / 255
    task = build_task({"name": "video", "file": str(path), "test_size": 9})
    assert (task.name, task.maximum_horizon) == ("video", 10)
    videos = whole(task, *task.test_set(8, generator()))
    expected = small[:18, 23:].transpose(1, 0, 2, 3)
    assert np.abs(videos - expected).max() < 1.01 / 255
    drawn = whole(task, *task.sample(200, 10, generator()))
    distance = np.abs(drawn[:, 0, None] - small[0]).max((2, 3))
    assert set(distance.argmin(1)) == set(range(23))
    assert distance.min(1).max() < 1.01 / 255
    mean = drawn[:, 10:].mean((0, 1))
    held_out = whole(task, *task.test_set(10, generator()))[:, 10:]
    error = ((held_out - mean) ** 2).mean()
    assert task.know_nothing_error(10) == pytest.approx(error, rel=0.01)
    check_scenario({"name": "video", "file": str(path)}, 3, tmp_path)


def test_the_same_file_is_the_same_run_wherever_it_lies(tmp_path):
    frames = moving_mnist(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.asfortranarray(frames))
    moving_mnist(tmp_path / "c.npy", seed=1)
    runs = [run_of({"name": "video", "file": str(tmp_path / f"{x}.npy")}, 3) for x in "abc"]
    assert runs[0].identity == runs[1].identity != runs[2].identity


def saved(array: np.ndarray, save=np.save) -> bytes:
    buffer = io.BytesIO()
    save(buffer, array)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


GOOD = saved(np.zeros((20, 2, 64, 64), np.uint8))
SHAPES = [(2, 20, 64, 64), (20, 64, 64), (20, 2, 32, 32), (20, 1, 64, 64), (7,), ()]
BAD = [
    (b"", "not a .npy file .*EOF"),
    (b"GIF89a" * 9, "not a .npy file .*magic string"),
    (saved(np.zeros(3, np.uint8), np.savez), "not a .npy file .*magic string"),
    (pickle.dumps(Evil()), "not a .npy file"),
    (saved(np.array([Evil()], object)), "holds pickled Python objects"),
    (saved(np.zeros((20, 2, 64, 64), np.float32)), r"expected unsigned bytes \(uint8\), got fl"),
    (GOOD[:40], "not a .npy file .*EOF"),
    (GOOD.replace(b"descr", b"dscr?"), "not a .npy file"),
    (GOOD[:-1], r"truncated; .* \[20, 2, 64, 64\], so 163840 bytes .* got 163839"),
    (GOOD + b"x", "too long; .* got 163841"),
    (saved(np.zeros((20, 0, 64, 64), np.uint8)), r"holds nothing; .* \[20, 0, 64, 64\]"),
    *((saved(np.zeros(shape, np.uint8)), r"got \[") for shape in SHAPES),
]


@pytest.mark.parametrize(("content", "fault"), BAD)
def test_a_bad_file_is_named_with_its_fault(content, fault, tmp_path):
    path = tmp_path / "bad.npy"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"(?s)^task\.file .*bad\.npy: .*{fault}"):
        build_task({"name": "video", "file": str(path)})


def test_options_that_do_not_go_together_are_refused(tmp_path):
    moving_mnist(tmp_path / "m.npy", 2)
    file, nowhere = (
        {"name": "video", "file": str(tmp_path / "m.npy")},
        str(tmp_path / "nowhere.npy"),
    )
    for options, message in (
        ({**file, "root": str(tmp_path)}, r"^task\.root and task\.file exclude one another"),
        ({**file, "given": 20}, r"^task\.given must be less than the 20 frames .*got 20"),
        ({**file, "file": nowhere}, r"^task\.file .*nowhere\.npy: cannot be read \(No such"),
        ({**SYNTHETIC, "root": nowhere}, r"^task\.root .*expected a folder, got nothing"),
        ({**SYNTHETIC, "side": 8}, r"^task\.side must be larger than .*8 x 8.*got 8$"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_task(options)


@pytest.mark.parametrize(
    ("images", "fault"),
    [
        (torch.ones(2, 8, 9, dtype=torch.uint8), "expected square images, got 8 x 9 pixels"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), "image 0 is black"),
        (torch.ones(2, 8, dtype=torch.uint8), "wrong magic number"),
    ],
)
def test_bad_digits_are_named_with_their_fault(images, fault, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    with pytest.raises(ConfigError, match=rf"^task\.root .*train-images-idx3-ubyte: .*{fault}"):
        build_task({**SYNTHETIC, "root": str(tmp_path)})


def shown(path, side: int = 16, rows: int = 1) -> np.ndarray:
    """Return the frames of a GIF, ``[T, R, L, L]``, and which have orange gaps."""
    frames = []
    with Image.open(path) as gif:
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("RGB")).astype(float))
    size = side * 6 + 2
    tiles = [
        [frame[r * size + 2 : r * size + size : 6, 2:size:6, 0] for r in range(rows)]
        for frame in frames
    ]
    return np.array(tiles), [frame[0, 0].tolist() == [255, 140, 0] for frame in frames]


def test_a_trained_model_continues_a_video_that_is_given(tmp_path, capsys):
    run = run_of(SYNTHETIC, 6)
    folder = trained(run, tmp_path)
    out, video = tmp_path / "out.gif", tmp_path / "video.npy"
    clip = np.random.default_rng(0).integers(0, 256, (14, 32, 32), dtype=np.uint8)
    np.save(video, clip)
    words = [str(folder), "--output", str(out)]
    assert commanded.main([*words, "--video", str(video), "--frames", "4"]) == 0
    assert capsys.readouterr().out == f"{out}: 10 frames that were given, then 4 predicted ones\n"
    tiles, orange = shown(out)
    last = clip[-10:].reshape(10, 16, 2, 16, 2).mean((2, 4))
    assert orange == [False] * 10 + [True] * 4
    assert np.abs(tiles[:10, 0] - last).max() < 6  # a GIF has 256 colours
    _, model = load_run(folder)
    x_TBI = torch.cat((torch.tensor(last / 255).flatten(1), torch.zeros(4, 256)))
    with torch.no_grad():
        said = model(x_TBI.float().unsqueeze(1))[10:].clamp(0, 1).view(4, 16, 16).numpy()
    assert np.abs(tiles[10:, 0] - 255 * said).max() < 6
    # The first video of a file like Moving MNIST's.
    frames = moving_mnist(video, 3)
    assert commanded.main([*words, "--video", str(video)]) == 0
    tiles, orange = shown(out)
    first = frames[10:, 0].reshape(10, 16, 4, 16, 4).mean((2, 4))
    assert len(tiles) == 16
    assert np.abs(tiles[:10, 0] - first).max() < 6
    # One of its own, with the truth above.
    assert commanded.main([*words, "--frames", "3", "--seed", "5"]) == 0
    tiles, orange = shown(out, rows=2)
    truth = whole(
        run.task, *run.task._asked(run.task._videos(1, 3, generator(5), is_held_out=True))
    )
    assert np.abs(tiles[:, 0] - 255 * truth[0]).max() < 6
    assert np.abs(tiles[:10, 1] - tiles[:10, 0]).max() < 6


def test_what_cannot_be_continued_is_said(tmp_path):
    run, file = run_of(SYNTHETIC, 6), tmp_path / "video.npy"
    output = ["--output", str(tmp_path / "out.gif")]
    for words, message in (
        (["--output", "out.png"], "--output must be .* ends with .gif; got out.png"),
        (["--output", str(tmp_path / "x/out.gif")], "--output must lie in a folder that exists"),
        ([*output, "--frames", "0"], "--frames must be at least 1; got 0"),
        ([*output, "--seed", str(2**63)], "--seed must be from 0 to .* got 9223372036854"),
        ([*output, "--video", str(file)], "--video: .*video.npy: cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            use(run, *words)
    for array, fault in (
        (np.zeros((9, 16, 16), np.uint8), "video.npy: expected at least the 10 frames .* got 9"),
        (np.zeros((12, 16, 17), np.uint8), r"got \[12, 16, 17\]"),
        (np.zeros((20, 3, 64, 32), np.uint8), r"got \[20, 3, 64, 32\]"),
        (np.zeros((12, 16, 16)), "expected unsigned bytes"),
    ):
        np.save(file, array)
        with pytest.raises(ConfigError, match=f"^--video: .*{fault}"):
            use(run, *output, "--video", str(file))
    with pytest.raises(SystemExit):
        use(run)
    np.save(file, np.zeros((10, 16, 16), np.uint8))
    use(run, *output, "--video", str(file))
