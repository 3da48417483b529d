"""The language model of characters: its data, its numbers, and what it writes."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from experiments import use as commanded
from experiments.fields import ConfigError
from experiments.tasks import build_task
from experiments.train import load_run
from tests.experiments.scenario_checks import check_scenario, generator, run_of, trained, use

WORDS = "the cat saw the dog. a dog sat on a mat, the cat ran.\n" * 40


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(WORDS + "ü" * 3, encoding="utf-8")
    return {"name": "text", "file": str(path)}


def test_it_is_a_scenario(book, tmp_path):
    check_scenario(book, 12, tmp_path)


def test_the_language_reference_is_there_without_a_file():
    task = build_task({"name": "text"})
    x_TBI, target = task.test_set(50, generator())
    shown = "".join(task.alphabet[i] if i < len(task.alphabet) else "?" for i in target.T.flatten())
    assert task.name == "text"
    assert " the " in shown
    assert 4 < task.know_nothing_error(50) < 5
    assert x_TBI.shape == (50, target.shape[1], len(task.alphabet) + 1)


def test_windows_are_of_the_text_and_the_test_set_covers_its_end_once(book):
    task = build_task(book)
    words = WORDS + "???"
    cut = len(words) - len(words) // 10
    shown = [*task.alphabet, "?"]
    assert "ü" not in task.alphabet
    for (x_TBI, target), part in (
        (task.sample(20, 9, generator()), words[:cut]),
        (task.test_set(9, generator()), words[cut:]),
    ):
        for sample in range(x_TBI.shape[1]):
            before = "".join(shown[i] for i in x_TBI[:, sample].argmax(-1))
            after = "".join(shown[i] for i in target[:, sample])
            assert before[1:] == after[:-1]
            assert before + after[-1] in part
    whole = "".join(shown[i] for i in target.T.flatten())
    assert part[1 : len(whole) + 1] == whole
    assert len(part) - 1 - len(whole) < 9


def test_knowing_nothing_and_baselines_are_counts_of_the_training_part(book):
    task = build_task(book)
    cut = len(WORDS) + 3 - (len(WORDS) + 3) // 10
    train_words, size = WORDS[:cut], task.input_size
    one = Counter(train_words)

    def p1(c):
        return (one[c] + 2 / size) / (cut + 2)

    entropy = -sum(n / cut * math.log(p1(c)) for c, n in one.items())
    assert task.know_nothing_loss(9) == pytest.approx(entropy, rel=1e-6)
    pairs = Counter(pairwise(train_words))
    firsts = Counter(train_words[:-1])
    x_TBI, target = task.test_set(9, generator())
    names = [*task.alphabet, "ü"]
    bits = 0.0
    for a, b in zip(x_TBI.argmax(-1).flatten().tolist(), target.flatten().tolist(), strict=True):
        a, b = names[a], names[b]
        bits -= math.log2((pairs[a, b] + 2 * p1(b)) / (firsts[a] + 2))
    found = task.baselines(x_TBI, target, 9)
    assert found["bigram"] == pytest.approx(bits / target.numel(), rel=1e-6)
    assert found["trigram"] < found["bigram"] < task.know_nothing_error(9)


def test_without_temperature_it_writes_what_is_likeliest(book):
    run = run_of(book, 12)
    task, model = run.task, run.build_model()
    cold = task._write(model, "the ", 12, (0.0, 5e-324), generator())
    written = ["".join(characters) for characters in zip(*cold, strict=True)]
    assert written[0] == written[1]
    symbols = task._symbols("the " + written[0]).unsqueeze(1)
    with torch.no_grad():
        prediction = model(task._shown(model, symbols))[3:-1, 0, :-1]
    assert [task.alphabet[i] for i in prediction.argmax(-1)] == list(written[0])


def test_characters_are_written_as_often_as_their_softmax_says(book):
    run = run_of(book, 12)
    task, model = run.task, run.build_model()
    torch.nn.init.normal_(model.readout.bias, generator=generator(1))
    torch.nn.init.zeros_(model.readout.weight)  # every step has the same chances
    torch.nn.init.constant_(model.readout.bias[-1:], 9.0)  # the unknown one, never written
    count, temperatures = 1500, (0.5, 2.0)
    drawn = zip(*task._write(model, "the ", count, temperatures, generator()), strict=True)
    for temperature, characters in zip(temperatures, drawn, strict=True):
        often = Counter(characters)
        share = torch.tensor([often[c] / count for c in task.alphabet])
        expected = (model.readout.bias[:-1] / temperature).softmax(-1)
        deviation = (expected * (1 - expected) / count).sqrt()
        assert ((share - expected).abs() < 4.5 * deviation).all()


def test_a_stream_costs_what_one_pass_costs(book, monkeypatch):
    run = run_of(book, 12)
    task, model = run.task, run.build_model()
    symbols = task._test[:41]
    with torch.no_grad():
        logits = model(task._shown(model, symbols[:-1].unsqueeze(1)))[:, 0]
    expected = torch.nn.functional.cross_entropy(logits, symbols[1:]) / math.log(2)
    monkeypatch.setattr("experiments.tasks.text.PIECE", 7)
    assert task._streamed_bits(model, symbols) == pytest.approx(expected.item(), rel=1e-6)


def test_a_trained_model_writes_and_judges(book, tmp_path, capsys):
    folder = trained(run_of(book, 12), tmp_path)
    run, model = load_run(folder)
    words = [str(folder), "--prompt", "the c", "--characters", "30", "--seed", "4"]
    texts = []
    for _ in range(2):
        assert commanded.main(words) == 0
        printed = capsys.readouterr()
        texts.append(printed.out)
        assert "characters a second" in printed.err
    assert texts[0] == texts[1]
    assert len(texts[0]) == len("the c") + 30
    assert texts[0].startswith("the c")
    assert commanded.main([str(folder), "--file", book["file"]]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"{len(WORDS) + 3} characters, 3 of them unknown\n")
    bits = float(said.split(": ")[1].split()[0])
    expected = run.task._streamed_bits(model, run.task._symbols(WORDS + "üüü"))
    assert bits == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "Zü"], r"does not know \['Z', 'ü'\]"),
        (["--prompt", ""], "got nothing"),
        (["--characters", "0"], "--characters must be at least 1; got 0"),
        (["--temperature", "-1"], "--temperature must be a finite number .* 0; got -1"),
        (["--temperature", "nan"], "--temperature must be a finite number .* 0; got nan"),
        (["--temperature", "inf"], "--temperature must be a finite number .* 0; got inf"),
        (["--seed", "-1"], r"--seed must be from 0 to 2\*\*63 - 1; got -1"),
        (["--file", "nowhere.txt"], "--file: nowhere.txt cannot be read"),
    ],
)
def test_what_it_cannot_do_is_said(book, more, message):
    with pytest.raises(ConfigError, match=message):
        use(run_of(book, 12), *more)


def test_a_prompt_is_not_ignored_where_a_file_is_judged(book, capsys):
    with pytest.raises(SystemExit):
        use(run_of(book, 12), "--prompt", "the", "--file", "x")
    assert "--file: not allowed with argument --prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must have at least 2 characters; got 0"),
        (b"abc\xff" * 100, r"is not UTF-8 \(byte 3: invalid start byte\)"),
        (b"a\0b" * 100, "is no text .a zero byte at character 1."),
        (b"abcdefg", "must have some characters at least 10 times"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        build_task({"name": "text", "file": str(path)})
    assert str(path) in str(error.value)
    assert "task.file" in str(error.value)


def test_a_window_that_is_longer_than_what_is_held_out_names_the_file(book):
    held_out = len(WORDS + "üüü") // 10
    run_of(book, held_out - 1)
    with pytest.raises(ConfigError, match=f"at most {held_out - 1} .*book.txt has {held_out} "):
        run_of(book, held_out)


def test_a_large_alphabet_takes_memory_for_what_occurs(tmp_path, monkeypatch):
    alphabet = [chr(0x4E00 + i) for i in range(3000)]  # 2.7e10 triples
    path = tmp_path / "book.txt"
    path.write_text("".join(alphabet * 20), encoding="utf-8")
    monkeypatch.setattr("experiments.tasks.text.SHOWN", 3001 * 500)
    task = build_task({"name": "text", "file": str(path)})
    assert task.alphabet == alphabet
    x_TBI, target = task.test_set(9, generator())
    assert x_TBI.numel() <= 3001 * 500
    assert target.numel() == 55 * 9
    found = task.baselines(x_TBI, target, 9)
    assert found["trigram"] < found["bigram"] < task.know_nothing_error(9)


def test_the_same_text_is_the_same_run_wherever_it_lies(book, tmp_path):
    runs = [run_of(book, 12)]
    for name, words in (("other.txt", WORDS + "ü" * 3), ("changed.txt", WORDS)):
        (tmp_path / name).write_text(words, encoding="utf-8")
        runs.append(run_of({**book, "file": str(tmp_path / name)}, 12))
    assert runs[0].identity == runs[1].identity != runs[2].identity
