"""Scores, checked against scikit-learn, scipy, sacrebleu and worked examples; illegal answers count as wrong."""

from __future__ import annotations

import numpy as np
import pytest

from softprompt_jax.config import UserError
from softprompt_jax.tasks.metrics import METRICS, compute, majority
from softprompt_jax.tasks.task import Task

WORDS = ["ham", "spam", "other"]


def task(*names, **settings) -> Task:
    return Task(name="mine", source={"kind": "files"}, metrics=list(names), **settings)


def random_answers(seed: int, illegal: bool = False, count: int = 200):
    draw = np.random.default_rng(seed)
    choices = [*WORDS, "", "Spam"] if illegal else WORDS
    return [str(word) for word in draw.choice(choices, count)], [str(word) for word in draw.choice(WORDS, count)]


@pytest.mark.parametrize("illegal", [False, True])
def test_label_metrics_equal_scikit_learn(illegal):
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predictions, targets = random_answers(0, illegal)
    found = compute(
        task("accuracy", "f1", "f1_macro", "matthews", label_words=WORDS, positive="ham"), predictions, targets
    )
    ids = {word: number for number, word in enumerate(WORDS)}
    p, t = [ids.get(word, -1) for word in predictions], [ids[word] for word in targets]
    assert found["accuracy"] == pytest.approx(accuracy_score(t, p))
    assert found["f1"] == pytest.approx(f1_score(np.equal(t, 0), np.equal(p, 0)))
    assert found["f1_macro"] == pytest.approx(f1_score(t, p, labels=[0, 1, 2], average="macro"))
    assert found["matthews"] == pytest.approx(matthews_corrcoef(t, p))
    assert found["illegal"] == pytest.approx(np.mean(np.equal(p, -1)))
    assert (found["illegal"] > 0) == illegal
    assert found["count"] == 200


def test_f1_counts_the_second_word_unless_told():
    predictions, targets = ["spam", "ham", "ham", "spam"], ["spam", "spam", "ham", "ham"]
    assert compute(task("f1", label_words=["ham", "spam"]), predictions, targets)["f1"] == pytest.approx(0.5)
    told = compute(task("f1", label_words=["ham", "spam"], positive="ham"), ["ham"] * 4, targets)
    assert told["f1"] == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="no positive word"):
        METRICS["f1"](predictions, targets, None, None)


@pytest.mark.parametrize("name", METRICS)
def test_perfect_answers_score_one_and_metrics_of_nothing_useful_do_not_fail(name):
    targets = ["1", "2", "3", "1", "2", "3"]
    labels = {"label_words": ["1", "2", "3"], "positive": "1"}
    # BLEU of texts under four words is 0 by definition.
    long = [f"{target} many words in one line" for target in targets] if name in ("bleu", "chrf", "rouge") else targets
    labels = {} if long is not targets else labels
    assert compute(task(name, **labels), long, long)[name] == pytest.approx(1.0)
    for predictions in (["zzz"] * 6, [""] * 6):
        worst = compute(task(name, **labels), predictions, long)
        assert 0.0 <= worst[name] <= 0.05
        assert worst["illegal"] == (1.0 if labels else 0.0)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlations_equal_scipy_and_count_what_is_no_number(name):
    from scipy import stats

    draw = np.random.default_rng(0)
    truth = draw.normal(size=50)
    guess = truth + draw.normal(size=50)
    guess[3] = -1.0  # T5 reads what is no number as -1
    predictions = [str(number) for number in guess]
    predictions[3] = "a lot"
    found = compute(task(name), predictions, [str(number) for number in truth])
    expected = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name](guess, truth).statistic
    assert found[name] == pytest.approx(expected)
    assert found["illegal"] == pytest.approx(1 / 50)
    with pytest.raises(UserError, match="found the target 'x'; pearson and spearman expected numbers"):
        compute(task(name), ["1"], ["x"])


def test_squad_scores_normalise_and_take_the_best_answer():
    both = task("exact_match", "squad_f1")
    assert compute(both, ["The  cat."], ["cat"]) == {"exact_match": 1.0, "squad_f1": 1.0, "illegal": 0.0, "count": 1}
    found = compute(both, ["a black cat sat"], ["white cat"])
    assert (found["exact_match"], found["squad_f1"]) == (0.0, pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)))
    assert compute(both, ["black cat"], [["white dog", "black cat"]])["exact_match"] == 1.0
    assert compute(both, ["", "the"], ["", "x"])["squad_f1"] == 0.5


def test_generation_metrics_equal_sacrebleu_and_rouge_score():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    predictions = ["the cat sat on the mat today", "a dog barks at night in town"]
    targets = [["the cat sat on a mat", "a cat was on the mat today"], "dogs bark at night in the town"]
    found = compute(task("bleu", "chrf", "rouge"), predictions, targets)
    streams = [["the cat sat on a mat", targets[1]], ["a cat was on the mat today", None]]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score / 100)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, streams).score / 100)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    score = lambda answer, prediction: scorer.score(answer, prediction)["rougeL"].fmeasure  # noqa: E731
    best = [max(score(answer, predictions[0]) for answer in targets[0]), score(targets[1], predictions[1])]
    assert found["rouge"] == pytest.approx(np.mean(best))


def test_majority_is_the_training_splits_answer():
    assert majority(["a", "b", "b"], ["a", "a", "b", "a"]) == 0.25
    assert majority(["b", "a"], ["a", "b", "a"]) == pytest.approx(2 / 3)  # a tie falls to the first in the alphabet


def test_nothing_to_score_is_an_error():
    with pytest.raises(UserError, match=r"^task mine: nothing to score"):
        compute(task("accuracy"), [], [])
    with pytest.raises(ValueError, match="1 predictions for 2 targets"):
        compute(task("accuracy"), ["a"], ["a", "b"])
