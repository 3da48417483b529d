"""Spoken digits: files, voices, features, transcripts, and what a trained model hears."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import stat
import struct
import wave

import numpy as np
import pytest
import torch

from experiments import use as commanded
from experiments.fields import ConfigError
from experiments.tasks import _formants, _spoken, build_task
from experiments.tasks import speech as module
from experiments.tasks._clips import Clips
from experiments.tasks._mel import HOP, PAD, WINDOW, MelBands
from experiments.tasks._spoken import WORDS, Clip
from experiments.tasks._templates import Templates
from experiments.tasks._transcripts import constant_error, marks, peaks, texts, transcript_loss
from experiments.tasks._wav import RATE, WavError, read_wav, wav_bytes
from experiments.tasks.speech import SpeechConfig, SpeechTask
from experiments.train import load_run
from tests.experiments.scenario_checks import (
    UNSCORED,
    check_scenario,
    distance,
    generator,
    run_of,
    trained,
    use,
)


@functools.cache
def said(voices: int) -> list[list[np.ndarray]]:
    random = np.random.default_rng(0)
    drawn = [_formants.Voice.draw(random) for _ in range(voices)]
    return [list(map(_spoken.levelled, each)) for each in _formants.say(drawn, random)]


def write_wav(path, samples, rate=RATE, channels=1, bits=16) -> None:
    """Write with Python's own module: a second opinion on the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.asarray(samples)
    if bits == 16:
        data = (samples * 32768).clip(-32768, 32767).astype("<i2").tobytes()
    else:
        data = (samples * 128 + 128).astype(np.uint8).tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(bits // 8)
        file.setframerate(rate)
        file.writeframes(data)


def write_tree(root):
    for speaker, words in zip(("ann", "bob", "cy"), said(3), strict=True):
        for word, samples in zip(WORDS, words, strict=True):
            write_wav(root / word / f"{speaker}_nohash_0.wav", samples)
    return root


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


SYNTHETIC = {"name": "speech", "voice": "formants", "test_size": 8}


@pytest.fixture(scope="module", autouse=True)
def few_voices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_spoken, "TRAINING_VOICES", 4)
        patch.setattr(_spoken, "TEST_VOICES", 2)
        yield


@pytest.fixture(scope="module")
def task(few_voices):
    return SpeechTask(SpeechConfig(voice="formants", test_size=8, noise=0.0))


# WAV files


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files_are_read_as_python_wrote_them(tmp_path, bits, channels):
    frames = np.random.default_rng(0).integers(-100, 100, (50, channels)) / 128
    write_wav(tmp_path / "a.wav", frames, channels=channels, bits=bits)
    np.testing.assert_array_equal(read_wav(tmp_path / "a.wav"), frames.mean(1).astype(np.float32))


def test_another_rate_is_resampled(tmp_path):
    seconds = np.arange(22050) / 22050
    write_wav(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * seconds), rate=22050)
    found = read_wav(tmp_path / "a.wav")
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert len(found) == RATE
    assert np.abs(found - expected)[100:-100].max() < 1e-3


def test_what_is_written_is_read_by_python(tmp_path):
    samples = np.array([0, 0.5, -1, 1], np.float32)
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(samples))
    with wave.open(str(path)) as file:
        assert file.getparams()[:4] == (1, 2, RATE, 4)
        assert list(struct.unpack("<4h", file.readframes(4))) == [0, 16384, -32767, 32767]


def chunk(name: bytes, data: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(data) if size is None else size) + data


def layout(kind=1, channels=1, rate=RATE, bits=16, block=None) -> bytes:
    block = channels * bits // 8 if block is None else block
    return struct.pack("<HHIIHH", kind, channels, rate, rate * block, block, bits)


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    return chunk(b"RIFF", b"WAVE" + b"".join(chunks), size)


FMT, DATA = chunk(b"fmt ", layout()), chunk(b"data", struct.pack("<2h", 16384, -16384))
EXTENSIBLE = chunk(b"fmt ", layout(kind=0xFFFE) + struct.pack("<HHIH14x", 22, 16, 4, 1))


@pytest.mark.parametrize(
    "content",
    [
        riff(FMT, DATA),
        riff(chunk(b"LIST", b"abc") + b"\0", FMT, DATA, chunk(b"LIST", b"ab")),
        riff(EXTENSIBLE, DATA),
        riff(FMT, chunk(b"data", DATA[8:], 0x7FFFF000), size=0x7FFFF024),
        riff(FMT, chunk(b"data", DATA[8:], 0xFFFFFFFF), size=0xFFFFFFFF),
        riff(FMT, DATA) + b"more",
    ],
    ids=["plain", "other chunks", "extensible", "espeak-ng's pipe", "ffmpeg's pipe", "longer"],
)
def test_true_variants_of_the_format_are_read(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    assert read_wav(tmp_path / "a.wav").tolist() == [0.5, -0.5]


BROKEN = {
    "empty": (b"", "not a WAV file.*an empty file"),
    "no RIFF": (b"ID3\x04" + bytes(40), "not a WAV file; expected RIFF"),
    "no WAVE": (riff(FMT, DATA).replace(b"WAVE", b"AVI "), "not a WAV file"),
    "truncated": (riff(FMT, DATA)[:-2], "truncated; its header says 48 bytes, the file has 46"),
    "half a frame": (riff(FMT, chunk(b"data", b"abc")), "truncated; expected frames of 2 bytes"),
    "compressed": (riff(chunk(b"fmt ", layout(kind=0x55)), DATA), r"got format 85 \(MP3\)"),
    "floats": (riff(chunk(b"fmt ", layout(kind=3, bits=32)), DATA), r"3 \(floating point\)"),
    "24 bits": (riff(chunk(b"fmt ", layout(bits=24)), DATA), "expected 8 or 16 bits.*got 24"),
    "no samples": (riff(FMT, chunk(b"data", b"")), "holds no samples"),
    "no data": (riff(FMT), "expected a chunk b'data', got none"),
    "no fmt": (riff(DATA), "expected chunk b'fmt ' before b'data'"),
    "short fmt": (riff(chunk(b"fmt ", b"abcd"), DATA), "at least 16 bytes in chunk b'fmt '"),
    "wrong size": (riff(FMT, chunk(b"data", b"abcd", 9)), "wrong size of chunk b'data': 9 bytes"),
    "contradiction": (riff(chunk(b"fmt ", layout(block=3)), DATA), "contradict each other"),
    "no rate": (riff(chunk(b"fmt ", layout(rate=0)), DATA), "from 100 to 768000 .* got 0"),
    "a rate beyond memory": (riff(chunk(b"fmt ", layout(rate=10**9)), DATA), "got 1000000000"),
    "no channel": (riff(chunk(b"fmt ", layout(channels=0)), DATA), "contradict each other"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_wav_file_is_named_with_its_fault(tmp_path, content, message):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(WavError, match=message) as error:
        read_wav(path)
    assert str(path) in str(error.value)


# Trees and voices


@pytest.mark.parametrize("kind", ["recorded", "along", "after"])
def test_it_is_a_scenario_whose_name_says_what_is_synthetic(kind, tree, tmp_path):
    options, name = {**SYNTHETIC, "answer": kind, "data_seed": 5}, "synthetic_speech"
    if kind == "recorded":
        options, name = {"name": "speech", "root": str(tree), "test_size": 9}, "speech"
    assert build_task(options).name == name + "_after" * (kind == "after")
    check_scenario(options, 2, tmp_path)


def test_lists_say_who_is_tested_on_and_else_a_hash_does(tree):
    def parts():
        found = _spoken.recorded(tree)
        return [{clip.speaker for clip in part} for part in (found.train, found.test)]

    train, test = parts()
    assert train | test == {"ann", "bob", "cy"}
    assert len(test) == 1
    (tree / "testing_list.txt").write_text("".join(f"{w}/bob_nohash_0.wav\n" for w in WORDS))
    (tree / "validation_list.txt").write_text("".join(f"{w}/cy_nohash_0.wav\n" for w in WORDS))
    assert parts() == [{"ann"}, {"bob"}]


def test_a_tree_that_lacks_something_or_is_damaged_is_named(tree):
    def fault():
        with pytest.raises(ConfigError, match=r"^task\.root must be") as error:
            SpeechTask(SpeechConfig(root=str(tree)))
        return str(error.value)

    testing = tree / "testing_list.txt"
    testing.write_text("one/bob_nohash_0.wav\n")
    assert f"{testing}: speaker bob is tested on and trained on" in fault()
    testing.write_text("one/nobody_nohash_0.wav\n")
    assert f"{testing}: names no file" in fault()
    testing.write_bytes(b"\xff")
    assert f"{testing}: cannot be read as UTF-8" in fault()
    files = [f"{word}/{speaker}_nohash_0.wav" for word in WORDS for speaker in ("ann", "bob")]
    testing.write_text("\n".join([*files, "one/cy_nohash_0.wav"]))
    assert f"{tree / 'one'}: no file of it is left to train on" in fault()
    testing.unlink()
    odd = tree / "two" / "ann.wav"
    odd.touch()
    assert f"{odd}: expected a name such as SPEAKER_nohash_0.wav" in fault()
    odd.unlink()
    damaged = tree / "seven" / "ann_nohash_1.wav"
    damaged.touch()
    assert f"{damaged}: not a WAV file" in fault()
    damaged.unlink()
    for path in tree.glob("*/[bc]*"):
        path.unlink()
    assert "expected 2 speakers or more, got only ann" in fault()
    (tree / "six" / "ann_nohash_0.wav").unlink()
    assert f"{tree / 'six'}: expected WAV files, got none" in fault()
    (tree / "six").rmdir()
    assert f"{tree / 'six'}: missing" in fault()
    tree = tree / "nowhere"
    assert f"{tree}: expected a folder, got nothing" in fault()


def test_the_same_sounds_are_the_same_run_wherever_they_lie(tree, tmp_path):
    other = write_tree(tmp_path / "other")
    runs = [run_of({"name": "speech", "root": str(root)}, 1) for root in (tree, other)]
    assert runs[0].identity == runs[1].identity
    write_wav(other / "one" / "ann_nohash_0.wav", np.ones(2000) * 0.1)
    build_task.__globals__["_built"].cache_clear()
    assert run_of({"name": "speech", "root": str(other)}, 1).identity != runs[0].identity


def test_no_test_voice_is_heard_in_training(task):
    assert not set(task._train.speakers) & set(task._test.speakers)
    assert len(task._train.clips) == 40
    assert len(task._test.clips) == 20
    clips = [tuple(np.round(clip.load(), 6)) for clip in task._train.clips + task._test.clips]
    assert len(set(clips)) == 60


def espeak(folder, monkeypatch, script: str) -> None:
    """Put a program of the name first on the path."""
    path = folder / "bin" / "espeak-ng"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")


def test_espeak_speaks_where_it_is_installed(tmp_path, monkeypatch):
    pause = np.zeros(RATE // 2, np.float32)
    words = said(1)[0]
    content = wav_bytes(np.concatenate([part for word in words for part in (word, pause)]))
    (tmp_path / "said.wav").write_bytes(content)
    espeak(tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/calls; cat {tmp_path}/said.wav')
    task = SpeechTask(SpeechConfig(test_size=8))
    assert task._title.startswith("synthetic speech (espeak-ng)")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(set(calls)) == 6
    assert all(word in call for word in WORDS for call in calls)
    for clip, word in zip(task._test.clips[:10], words, strict=True):
        loud = np.flatnonzero(np.abs(word) > 0.02 * np.abs(word).max())
        assert len(clip.load()) == pytest.approx(loud[-1] - loud[0], abs=RATE // 50)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", "exit status 3"),
        ("echo no sound", "not a WAV file"),
        ("cat {wav}", "expected 10 words, heard 1"),
        ("cat {silence}", "expected 10 words, heard 0"),
    ],
)
def test_what_espeak_does_wrong_is_said(tmp_path, monkeypatch, script, message):
    (tmp_path / "one.wav").write_bytes(wav_bytes(said(1)[0][0]))
    (tmp_path / "none.wav").write_bytes(wav_bytes(np.zeros(RATE)))
    files = {"wav": tmp_path / "one.wav", "silence": tmp_path / "none.wav"}
    espeak(tmp_path, monkeypatch, script.format(**files))
    with pytest.raises(ConfigError, match=message) as error:
        SpeechTask(SpeechConfig(voice="espeak"))
    assert str(error.value).startswith("task.voice=espeak (formants needs no program): espeak-ng ")


def test_without_espeak_there_are_formants(monkeypatch):
    monkeypatch.setattr(_spoken.shutil, "which", lambda _: None)
    assert "formant synthesiser" in SpeechTask(SpeechConfig())._title
    with pytest.raises(ConfigError, match=r"task\.voice=espeak .*espeak-ng is not installed"):
        SpeechTask(SpeechConfig(voice="espeak"))


def test_the_synthesiser_has_the_pitch_and_the_formants_that_it_is_told():
    voice = _formants.Voice(125.0, 1.0, (1.0, 1.0, 1.0), 0.5, 0.0, 0.0, 1.0, 0.6)
    (words,) = _formants.say([voice], np.random.default_rng(0))
    nine = words[9][: RATE // 5]
    lag = np.correlate(nine, nine, "full")[len(nine) - 1 :]
    assert RATE / (60 + lag[60:300].argmax()) == pytest.approx(125, rel=0.1)
    three = words[3][-RATE // 5 : -RATE // 10]
    power = np.abs(np.fft.rfft(three * np.hanning(len(three)), 4096)) ** 2
    tones = np.fft.rfftfreq(4096, 1 / RATE)

    def within(low, high):
        return power[(tones > low) & (tones < high)].sum()

    assert within(2000, 3200) > 10 * within(900, 1700)  # "ee": nothing between its formants


# Features


def test_bands_of_white_noise_have_its_variance():
    noise = np.random.default_rng(0).normal(0, 0.3, 4 * RATE).astype(np.float32)
    np.testing.assert_allclose(MelBands(20).powers(noise).mean(0), 0.09, rtol=0.15)


def test_a_tone_is_in_its_band_of_the_mel_scale():
    bands = MelBands(20)
    edges = 700 * (
        10 ** (np.linspace(*(2595 * np.log10(1 + np.array([60, 7600]) / 700)), 22) / 2595) - 1
    )
    for band in (2, 10, 19):
        tone = np.sin(2 * np.pi * edges[band + 1] * np.arange(RATE) / RATE).astype(np.float32)
        assert bands.powers(tone)[5].argmax() == band


def test_strings_of_clips_are_what_the_sounds_in_a_row_are(task):
    clips, bands, stack = task._train, task._bands, task.config.stack
    clip_LB = torch.tensor([[3], [17]])
    begin_LB = torch.tensor([[4], [4 + int(clips.frames[3]) + 2]])
    found = clips.strings(clip_LB, begin_LB, 60).flatten(0, 2)
    sound = np.zeros(PAD + 60 * stack * HOP, np.float32)
    for clip, begin in ((3, 4), (17, int(begin_LB[1, 0]))):
        samples = _spoken.levelled(clips.clips[clip].load())
        sound[begin * HOP + PAD :][: len(samples)] = samples
    np.testing.assert_allclose(found, bands.powers(sound), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("size", [1, 37, 160, 999, 10**6])
def test_frames_of_pieces_are_those_of_the_whole_to_the_bit(size):
    bands, random = MelBands(20), np.random.default_rng(0)
    samples = random.normal(0, 1, 5 * WINDOW + 7).astype(np.float32)
    pieces = (samples[at : at + size] for at in range(0, len(samples), size))
    found = np.concatenate(list(bands.stream(pieces, 3)))
    (whole,) = bands.stream(iter([samples]), 3)
    assert len(whole) == (1 + (len(samples) - WINDOW) // HOP) // 3 * 3
    np.testing.assert_array_equal(found, whole)
    np.testing.assert_allclose(whole, bands.powers(samples)[: len(whole)], rtol=1e-4)


@pytest.mark.parametrize("answer", ["along", "after"])
def test_words_are_said_in_the_order_of_the_target_and_end_where_it_says(monkeypatch, answer):
    monkeypatch.setattr(module, "GAIN", 0.0)
    task = SpeechTask(SpeechConfig(voice="formants", answer=answer, noise=0.0, test_size=10))
    stack = task.config.stack
    for clips, (x_TBI, target) in (
        (task._train, task.sample(10, 4, generator())),
        (task._test, task.test_set(4, generator())),
    ):
        words = []
        for i, clip in enumerate(clips.clips):
            powers = clips.powers(i)[: int(clips.frames[i]) // stack * stack].clone()
            words.append(
                (str(clip.digit), task._features(powers.unflatten(0, (-1, 1, stack)))[:, 0])
            )
        silence = task._features(torch.zeros(1, 1, stack, 20))[:, 0]
        assert Templates(words, silence).transcribe(x_TBI) == texts(marks(target))
        assert ((target != UNSCORED).sum(0) == 4).all()
        is_silent_TB = (x_TBI - silence).abs().amax(-1) == 0
        for sample, string in enumerate(marks(target)):
            for step, _ in string:
                if answer == "along":
                    assert not is_silent_TB[step - 2 : step + 1, sample].all()
                else:
                    assert is_silent_TB[step - 1 :, sample].all()
        if answer == "along":
            last = torch.tensor([string[-1][0] for string in marks(target)])
            after = torch.arange(len(x_TBI)).unsqueeze(1) > last
            assert is_silent_TB[after].all()


# Transcripts


def test_the_greedy_transcript_leaves_out_repeats_and_blanks():
    classes = torch.tensor([[3, 3, 0, 3, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]).T
    prediction = torch.nn.functional.one_hot(classes, 11).float()
    assert peaks(prediction) == [[(0, 2), (3, 2), (4, 0)], []]
    assert texts(peaks(prediction)) == ["220", ""]


def test_the_loss_is_minus_the_log_of_all_alignments_per_digit():
    torch.manual_seed(0)
    prediction = torch.randn(5, 2, 4, dtype=torch.float64)
    target = torch.full((5, 2), UNSCORED)
    target[1, 0], target[4, 0], target[3, 1] = 2, 2, 1
    chances = prediction.softmax(-1)
    totals = [0.0, 0.0]
    for path in itertools.product(range(4), repeat=5):
        kept = [s for s, before in zip(path, (0, *path), strict=False) if s not in (0, before)]
        for sample, right in enumerate(([2, 2], [1])):
            if kept == right:
                totals[sample] += math.prod(
                    chances[t, sample, s].item() for t, s in enumerate(path)
                )
    expected = -sum(map(math.log, totals)) / 3
    assert transcript_loss(prediction, target).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("answer", ["along", "after"])
def test_the_right_answer_has_no_error_and_costs_nothing(answer):
    task = SpeechTask(SpeechConfig(voice="formants", answer=answer, test_size=10))
    _, target = task.test_set(3, generator())
    right = 1e3 * torch.nn.functional.one_hot(target.clamp(min=0), 11).double()
    assert task.loss(right, target).item() == 0
    assert task.error(right, target).item() == 0
    assert task.error(-right, target).item() >= 1
    empty = torch.zeros_like(right)
    empty[..., 0] = 1
    assert task.error(empty, target).item() == 1
    if answer == "along":
        assert task.error(right.roll(1, 0), target).item() == 0
    else:
        assert task.error(right.roll(-9, 0), target).item() == 1  # before the string has ended


@pytest.mark.parametrize(("shares", "length"), [((0.25,) * 4, 3), ((0.2, 0.5, 0.3), 2)])
def test_knowing_nothing_costs_what_the_best_constant_transcript_costs(shares, length):
    symbols = "abcd"[: len(shares)]
    share_of = dict(zip(symbols, shares, strict=True))
    strings = list(itertools.product(symbols, repeat=length))

    def expected(constant: tuple[str, ...]) -> float:
        return sum(
            math.prod(map(share_of.get, string)) * distance("".join(constant), "".join(string))
            for string in strings
        )

    counts = range(length + 2)
    constants = itertools.chain(*(itertools.product(symbols, repeat=n) for n in counts))
    best = min(map(expected, constants))
    assert constant_error(shares, length) == pytest.approx(best / length, rel=1e-9)


def test_digits_are_drawn_with_equal_chances(task):
    assert task.know_nothing_loss(3) == pytest.approx(math.log(10))
    assert task.know_nothing_error(1) == pytest.approx(0.9)
    _, target = task.sample(3000, 3, generator())
    counts = target[target != UNSCORED].bincount(minlength=11)
    assert counts[0] == 0
    assert (counts[1:] - 900).abs().max() < 150


def test_a_speaker_says_only_what_there_is_of_him():
    clips = [
        Clip(d, s, lambda: np.ones(800, np.float32)) for d, s in ((1, "a"), (2, "a"), (7, "b"))
    ]

    bank = Clips(clips, MelBands(8), 3, hashlib.sha256())
    digit, clip = bank.draw(torch.tensor([0, 1] * 20), 5, generator())
    assert set(digit[:, ::2].flatten().tolist()) == {1, 2}
    assert set(digit[:, 1::2].flatten().tolist()) == {7}
    assert [bank.clips[i].digit for i in clip.flatten()] == digit.flatten().tolist()
    assert bank.shares == pytest.approx((0, 0.25, 0.25, 0, 0, 0, 0, 0.5, 0, 0))


def test_templates_hear_words_that_are_faster_or_slower():
    torch.manual_seed(0)
    one, two, silence = torch.randn(6, 4), torch.randn(5, 4), torch.zeros(1, 4)
    templates = Templates([("1", one), ("2", two)], silence)
    quick, slow = one[::2], two.repeat_interleave(2, 0)
    x_TBI = torch.stack(
        [
            torch.cat([silence, quick, slow, silence, two, silence]),
            torch.cat([silence.repeat(9, 1), one, one]),
        ],
        1,
    )
    assert templates.transcribe(x_TBI + 0.05 * torch.randn(x_TBI.shape)) == ["122", "11"]


def test_measures_are_of_whole_strings_voices_and_delays(task):
    x_TBI, target = task.test_set(2, generator())
    classes = target.clamp(min=0).roll(2, 0)  # two steps late
    classes[:, 1] = 0  # by the second voice, and its only string without an answer

    def model(_):
        return torch.nn.functional.one_hot(classes, 11).float()

    found = task.measures(model, x_TBI, target, 2)
    assert found["strings right"] == pytest.approx(7 / 8)
    assert found["character error rate, worst voice"] == pytest.approx(1 / 4)
    assert found["seconds from a word's end to its digit"] == pytest.approx(0.08)


# Use


@pytest.mark.parametrize(("core", "answer"), [("fused_rnn", "along"), ("lstm", "after")])
def test_pieces_are_heard_as_the_whole_is(core, answer):
    torch.manual_seed(0)
    model = run_of({**SYNTHETIC, "noise": 0.0}, 2, model={"core": core}).build_model().eval()
    with torch.no_grad():
        model.readout.weight.mul_(30)
    task = SpeechTask(SpeechConfig(voice="formants", test_size=8, answer=answer))
    samples = np.concatenate([clip.load() for clip in task._test.clips[:3]])
    whole, *others = (list(task.listen(model, samples, size, 2)) for size in (10**9, 1600, 333))
    assert whole
    assert all(each == whole for each in others)
    if answer == "after":
        assert min(second for second, _ in whole) > len(samples) / RATE


def test_states_of_a_stream_are_those_of_the_whole_to_the_bit(task):
    model = run_of({**SYNTHETIC, "noise": 0.0}, 2).build_model().eval()
    x_TBI, _ = task.test_set(2, generator())
    with torch.no_grad():
        whole, _ = model.core(x_TBI[:, :1])
    outputs, state = [], None
    model.core.register_forward_hook(lambda _, __, result: outputs.append(result[0]))
    for piece in x_TBI[:, :1].split(4):
        _, state = model.stream(piece, state)
    assert torch.equal(torch.cat(outputs), whole)


def test_a_trained_model_transcribes_what_a_held_out_voice_says(tmp_path, capsys):
    folder = trained(run_of(SYNTHETIC, 2), tmp_path)
    run, model = load_run(folder)
    path = tmp_path / "new.wav"
    assert commanded.main([str(folder), "--wav", str(path), "--say", "314"]) == 0
    heard = list(run.task.listen(model, read_wav(path), 1600, 2))
    printed = capsys.readouterr()
    lines = [f"{second:6.2f} s  {WORDS[digit]}" for second, digit in heard]
    digits = "".join(str(digit) for _, digit in heard) or "no digit"
    assert printed.out.splitlines() == [*lines, f"{path}: {digits}"]
    assert "s of sound in" in printed.err
    clips = {clip.digit: clip.load() for clip in run.task._test.clips[:10]}
    assert len(read_wav(path)) == sum(len(clips[d]) + RATE // 5 for d in (3, 1, 4)) + RATE // 5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--wav", "nowhere.wav"], "--wav: nowhere.wav: cannot be read"),
        (["--wav", "x", "--chunk", "0"], "--chunk must be a finite .* 6.25e-05 s; got 0"),
        (["--wav", "x", "--chunk", "nan"], "--chunk must be a finite number .*; got nan"),
        (["--wav", "x", "--say", "3a"], "--say must be digits such as 314; got '3a'"),
        (["--wav", __file__, "--say", "3"], "--wav must be a new file, with --say"),
        (["--wav", __file__], "--wav: .*: not a WAV file"),
    ],
)
def test_what_it_cannot_do_is_said(more, message):
    with pytest.raises(ConfigError, match=message):
        use(run_of(SYNTHETIC, 2), *more)
