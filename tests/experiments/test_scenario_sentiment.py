"""Sentiment: its sentences and reviews, its baselines, and what is shown of a judgement."""

from __future__ import annotations

import math
import re
import shutil
from functools import partial
from itertools import pairwise

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sklearn.linear_model import LogisticRegression

from experiments import use as commanded
from experiments.evaluation import HeldOut
from experiments.fields import ConfigError
from experiments.tasks import _opinions, build_task
from experiments.tasks._reviews import words_of
from tests.experiments.scenario_checks import check_scenario, generator, run_of, trained, use

GRAMMAR = {"name": "sentiment", "test_size": 300}
CLAUSE = re.compile(r"\b(?:i|we) (?:found|thought|called) (?:it|this) (\w+) (\w+)")
GOOD = {"good", "great", "lovely", "clever", "funny", "bright", "fresh", "warm", "superb"}
BAD = {"bad", "awful", "dull", "silly", "boring", "weak", "empty", "stale", "dreadful"}
NEGATIONS = {"not", "never", "hardly"}


def sentences_of(x_TBI) -> list[str]:
    """The words of one-hot vectors; nothing for a zero vector."""
    table = [*_opinions.WORDS, ""]
    symbols = x_TBI.argmax(-1).where(x_TBI.any(-1), len(table) - 1)
    return [" ".join(table[s] for s in sample).strip() for sample in symbols.T.tolist()]


def author_says(sentence: str) -> tuple[str, str]:
    (clause,) = CLAUSE.findall(sentence)
    return clause


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A tree as aclImdb: twelve reviews of each class and part, of three to eight words."""
    root = tmp_path_factory.mktemp("reviews")
    for part in ("train", "test"):
        for name, word in (("pos", "Lovely"), ("neg", "dreadful")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(12):
                text = f"{'so ' * (i % 6)}{word}<br />film{i} !"
                (folder / f"{i}_7.txt").write_text(text, encoding="utf-8")
    (root / "train" / "unsup").mkdir()
    (root / "train" / "unsup" / "0_0.txt").write_bytes(b"\xff not read")
    (root / "train" / "pos" / "urls.csv").write_bytes(b"\xff not read")
    return root


def of_tree(root, **options) -> dict:
    return {"name": "sentiment", "root": str(root), "vocabulary": 4, "test_size": 20, **options}


@pytest.mark.parametrize(("is_synthetic", "horizon"), [(True, 9), (False, 6)])
def test_it_is_a_scenario_whose_name_says_what_is_synthetic(is_synthetic, horizon, tree, tmp_path):
    options = GRAMMAR if is_synthetic else of_tree(tree)
    check_scenario(options, horizon, tmp_path)
    assert build_task(options).name == ("synthetic_sentiment" if is_synthetic else "sentiment")


@pytest.mark.parametrize("horizon", [1, 5, 6, 17])
def test_the_clause_of_the_author_determines_the_answer_and_lies_where_the_horizon_says(horizon):
    task = build_task(GRAMMAR)
    for x_TBI, target in (
        task.sample(300, horizon, generator(1)),
        task.test_set(horizon, generator(2)),
    ):
        for sentence, label in zip(sentences_of(x_TBI), target[:, 0].tolist(), strict=True):
            modifier, adjective = author_says(sentence)
            assert adjective in GOOD | BAD
            assert label == ((adjective in GOOD) != (modifier in NEGATIONS))
            assert sentence.split()[-horizon - 1] == adjective
        first = len(x_TBI) - 1 - task.dependency(horizon)
        assert {s.split()[first - len(x_TBI)] for s in sentences_of(x_TBI)} == {"i", "we"}


def test_pairs_of_held_out_sentences_are_in_no_training_sentence():
    task = build_task({**GRAMMAR, "test_size": 3000})
    pair = re.compile(rf"\b({'|'.join(NEGATIONS)}|quite|rather|truly) ({'|'.join(GOOD | BAD)})\b")
    seen, held_out = (
        {found for sentence in sentences_of(x) for found in pair.findall(sentence)}
        for x, _ in (task.sample(3000, 12, generator(1)), task.test_set(12, generator(2)))
    )
    assert not seen & held_out
    assert len(seen) == 2 * len(held_out) == 72
    for position in (0, 1):  # every word of them is known
        assert {p[position] for p in seen} == {p[position] for p in held_out}


def test_labels_are_balanced_and_nothing_but_the_clause_of_the_author_gives_them_away():
    task = build_task(GRAMMAR)
    horizon, count = 12, 6000
    x_TBI, target = task.sample(2 * count, horizon, generator(3))
    label = target[:, 0].numpy() > 0.5
    assert abs(label.mean() - 0.5) < 4 * 0.5 / math.sqrt(2 * count)

    def accuracy(features) -> float:
        model = LogisticRegression(max_iter=300).fit(features[:count], label[:count])
        return model.score(features[count:], label[count:])

    after, before = x_TBI[-horizon:], x_TBI[: -horizon - _opinions.DECIDING]
    chance = 0.5 + 4 * 0.5 / math.sqrt(count)
    for words in (after, before):  # each word at its place, and counts
        assert accuracy(words.transpose(0, 1).flatten(1)) < chance
        assert accuracy(words.sum(0)) < chance
    assert accuracy(x_TBI.sum(0)) < 0.7


def test_the_baselines_of_sentences_are_a_bag_of_words_and_the_last_polar_word_or_opinion():
    task = build_task({**GRAMMAR, "test_size": 2000})
    x_TBI, target = task.test_set(12, generator(4))
    train_x, train_target = task.sample(4000, 12, generator(0))
    bag = LogisticRegression(max_iter=1000).fit(train_x.sum(0), train_target[:, 0])
    found = task.baselines(x_TBI, target, 12)
    assert found["bag of words"] == pytest.approx(
        1 - bag.score(x_TBI.sum(0), target[:, 0]), abs=0.003
    )
    word_errors = opinion_errors = 0
    for sentence, label in zip(sentences_of(x_TBI), target[:, 0] > 0.5, strict=True):
        words = sentence.split()
        at = max(i for i, word in enumerate(words) if word in GOOD | BAD)
        word_errors += (words[at] in GOOD) != label
        opinion_errors += ((words[at] in GOOD) != (words[at - 1] in NEGATIONS)) != label
    assert found["last polar word"] == pytest.approx(int(word_errors) / 2000)
    assert found["last opinion"] == pytest.approx(int(opinion_errors) / 2000)
    assert 0.1 < found["last opinion"] < found["last polar word"]
    assert task.baselines(*task.test_set(5, generator(4)), 5)["last opinion"] == 0


class Constant(torch.nn.Module):
    """Says that all is positive."""

    def forward(self, x_TBI):
        return torch.ones(x_TBI.shape[1], 1)


def test_plain_and_negated_sentences_are_measured_apart():
    task = build_task(GRAMMAR)
    x_TBI, target = task.test_set(3, generator(5))
    negated = torch.tensor([author_says(s)[0] in NEGATIONS for s in sentences_of(x_TBI)])
    measured = task.measures(Constant(), x_TBI, target, 3)
    assert measured == {
        "accuracy, plain sentences": pytest.approx(target[~negated].mean().item()),
        "accuracy, negated sentences": pytest.approx(target[negated].mean().item()),
    }


def test_reviews_are_split_into_words_and_marks():
    assert words_of("It's GOOD,<br /><br/>isn't it? ÉTÉ 10/10") == (
        ["it's", "good", ",", "isn't", "it", "?", "été", "10", "/", "10"]
    )


def test_the_last_words_of_reviews_are_read_and_rare_ones_are_one_symbol(tree):
    task = build_task(of_tree(tree))
    words = {"so": 0, "!": 1, "dreadful": 2, "lovely": 3}  # by frequency, then by name
    assert task.input_size == len(words) + 1
    assert task.maximum_horizon == 8
    x_TBI, target = task.test_set(4, generator())
    shown = [
        [int(vector.argmax()) if vector.any() else None for vector in x_TBI[:, sample]]
        for sample in range(20)
    ]
    for symbols, label in zip(shown, target[:, 0].tolist(), strict=True):
        judged = words["lovely" if label else "dreadful"]
        assert symbols[1:] == [judged, len(words), words["!"]]
        assert symbols[0] in (None, words["so"])
    assert task.know_nothing_loss(4) == pytest.approx(math.log(2))
    assert task.know_nothing_error(4) == 0.5
    assert task.baselines(x_TBI, target, 4) == {"bag of words": 0.0}


def test_training_texts_are_of_the_training_part_and_held_out_ones_of_the_test_part(tree, tmp_path):
    root = copied(tree, tmp_path)
    for name in ("pos", "neg"):
        for path in (root / "test" / name).iterdir():
            path.write_text("unheard of")
    task = build_task(of_tree(root, vocabulary=100))
    unknown = task.input_size - 1
    assert not task.sample(200, 3, generator())[0][..., unknown].any()
    assert task.test_set(3, generator())[0][-2:, :, unknown].all()


def test_the_test_set_has_no_review_twice_and_lies_in_order_of_length(tree):
    task = build_task(of_tree(tree, test_size=1000))
    x_TBI, target = task.test_set(8, generator())
    assert target.sum() == 12
    assert x_TBI.shape[1] == 24
    lengths = x_TBI.any(-1).sum(0)
    assert torch.equal(lengths, lengths.sort().values)
    measured = task.measures(Constant(), x_TBI, target, 8)
    for i, name in enumerate(("shortest third of reviews", "middle third", "longest third")):
        third = target[8 * i : 8 * (i + 1)]
        assert measured[f"accuracy, {name}"] == pytest.approx(third.mean().item())


def copied(tree, tmp_path):
    return shutil.copytree(tree, tmp_path / "copy")


def replaced(folder, file=None):
    """Remove a folder; put a file there if one is given."""
    shutil.rmtree(folder)
    if file is not None:
        folder.write_bytes(file)


def emptied(folder):
    replaced(folder)
    folder.mkdir()


def renamed(folder):
    for path in folder.iterdir():
        path.rename(path.with_suffix(".html"))


def folder_for_file(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "place", "fault"),
    [
        (replaced, "test/neg", "expected a folder of .txt files, got nothing"),
        (partial(replaced, file=b"x"), "test/neg", "expected a folder of .txt files, got a file"),
        (emptied, "test/neg", "expected at least one .txt file, got an empty folder"),
        (renamed, "test/neg", "expected at least one .txt file, got 12 other file(s)"),
        (folder_for_file, "test/neg/0_7.txt", "cannot be read (Is a directory)"),
        (b"so bad \xe9", "test/neg/0_7.txt", "is not UTF-8 (byte 7: unexpected end of data)"),
        (b" \n<br />", "test/neg/0_7.txt", "has no word in it"),
    ],
)
def test_a_broken_tree_is_refused_by_file_and_fault(tree, tmp_path, damage, place, fault):
    root = copied(tree, tmp_path)
    if isinstance(damage, bytes):
        (root / place).write_bytes(damage)
    else:
        damage(root / place)
    with pytest.raises(ConfigError) as raised:
        build_task(of_tree(root))
    assert "task.root" in str(raised.value)
    assert f"{root / place}: {fault}" in str(raised.value)


def test_the_same_reviews_are_the_same_run_wherever_they_lie(tree, tmp_path):
    root = copied(tree, tmp_path)
    here, there = (run_of(of_tree(each), 6).identity for each in (tree, root))
    assert here == there
    (root / "train" / "pos" / "0_7.txt").write_text("Lovely other film !", encoding="utf-8")
    build_task.__globals__["_built"].cache_clear()
    assert run_of(of_tree(root), 6).identity != here
    assert run_of({**GRAMMAR, "vocabulary": 7}, 6).identity == run_of(GRAMMAR, 6).identity


@pytest.mark.parametrize("core", ["fused_rnn", "lstm"])
def test_the_gradient_of_a_word_is_what_a_little_more_of_it_does_to_the_logit(core):
    run = run_of(GRAMMAR, 4, precision="float64", model={"core": core})
    task, model = run.task, run.build_model().double()
    symbols, _ = _opinions.draw(3, 4, generator(), True)
    logits, gradients = task._gradients(model, symbols)
    x_TBI, step = task._vectors(symbols).double(), 1e-6
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x_TBI)[:, 0])
        for t in range(len(x_TBI)):
            more = x_TBI.clone()
            more[t] *= 1 + step
            change = (model(more)[:, 0] - logits) / step
            torch.testing.assert_close(change, gradients[t], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("is_synthetic", [True, False])
def test_the_look_has_words_judgements_and_gradients(tree, is_synthetic):
    run = run_of(GRAMMAR if is_synthetic else of_tree(tree), 4)
    drawing, text = HeldOut(run).looks(run.build_model())
    title = text.text.splitlines()[0]
    assert ("synthetic" in title) == is_synthetic
    assert title in drawing.figure.get_suptitle()
    assert len(re.findall(r"^(?:right|WRONG): judged (?:posi|nega)tive with", text.text, re.M)) == 6
    words = re.findall(r"^ *[+-]\d\.\d\de[+-]\d\d  (\S+)$", text.text, re.M)
    shown = [each.get_text() for each in drawing.figure.axes[0].texts]
    assert [each for each in shown if not each.startswith(("right", "WRONG"))] == words


def test_every_word_of_the_look_is_inside_the_page():
    run = run_of(GRAMMAR, 40)
    drawing, _ = HeldOut(run).looks(run.build_model())
    renderer = FigureCanvasAgg(drawing.figure).get_renderer()
    page = drawing.figure.bbox
    boxes = [each.get_window_extent(renderer) for each in drawing.figure.axes[0].texts]
    assert all(page.x0 <= b.x0 and b.x1 <= page.x1 for b in boxes)
    assert all(page.y0 <= b.y0 and b.y1 <= page.y1 for b in boxes)
    for one, other in pairwise(boxes):
        assert one.x1 <= other.x0 or other.y1 <= one.y0  # beside it or below


def test_a_trained_model_judges_a_text_and_a_file(tmp_path, capsys):
    folder = str(trained(run_of(GRAMMAR, 4), tmp_path))
    given = "I thought it not marvellous, not GOOD!"
    assert commanded.main([folder, "--text", given]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"judged (positive|negative) with 0\.\d{3}", printed[0])
    assert printed[1] == "unknown words: marvellous, ,, !"
    assert printed[2] == "gradient of the logit:"
    assert [line.split()[1] for line in printed[3:]] == words_of(given)
    assert [float(line.split()[0]) for line in printed[3:]][4] == 0  # nothing is unknown
    (tmp_path / "given.txt").write_text(given, encoding="utf-8")
    assert commanded.main([folder, "--file", str(tmp_path / "given.txt")]) == 0
    assert capsys.readouterr().out.splitlines() == printed


def test_of_a_long_review_the_last_words_are_judged(tree, capsys):
    use(run_of(of_tree(tree), 3), "--text", "a lovely new film !")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "read: the last 3 of 5 words"
    assert [line.split()[1] for line in printed[4:]] == ["new", "film", "!"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text", " "], "--text must have at least one word; got ' '"),
        (["--text", "zebra"], "--text must have a word that the model knows; got 'zebra'"),
        (["--file", "nowhere.txt"], "--file: nowhere.txt: cannot be read"),
    ],
)
def test_what_cannot_be_judged_is_said(more, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        use(run_of(GRAMMAR, 4), *more)
