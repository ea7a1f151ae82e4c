"""Scores, checked against scikit-learn, scipy, sacrebleu and worked examples; illegal answers count as wrong."""

from __future__ import annotations

import numpy as np
import pytest

from softprompt_jax.config import UserError
from softprompt_jax.data import metrics
from softprompt_jax.data.metrics import METRICS, Answers, majority
from softprompt_jax.data.task import Task

WORDS = ["ham", "spam", "other"]


def task(*names, **settings) -> Task:
    return Task(name="mine", source={"kind": "files"}, metrics=list(names), **settings)


def compute(task, predictions, targets, groups=None):
    return metrics.compute(task.metrics, Answers(predictions, targets, task.words, task.positive, groups), "task mine")


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
    guess = np.where(np.equal(p, -1), np.not_equal(t, 0), np.equal(p, 0))  # illegal: the opposite of the target
    assert found["f1"] == pytest.approx(f1_score(np.equal(t, 0), guess))
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
        METRICS["f1"](Answers(predictions, targets))


@pytest.mark.parametrize("name", METRICS)
def test_perfect_answers_score_one_and_metrics_of_nothing_useful_do_not_fail(name):
    targets = ["1", "2", "3", "1", "2", "3"]
    labels = {"label_words": ["1", "2", "3"], "positive": "1"}
    # BLEU of texts under four words is 0 by definition.
    free = name.startswith(("bleu", "chrf", "rouge"))
    long = [f"{target} many words in one line" for target in targets] if free else targets
    labels = {} if long is not targets else labels
    assert compute(task(name, **labels), long, long, range(6))[name] == pytest.approx(1.0)
    for predictions in (["zzz"] * 6, [""] * 6):
        worst = compute(task(name, **labels), predictions, long, range(6))
        assert 0.0 <= worst[name] <= (1.0 if name == "group_agreement" else 0.05)  # it asks for no target
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
    # As in SQuAD's script: nothing in common is 0, even where both sides are empty.
    assert compute(both, ["", "the"], ["", "x"]) == {"exact_match": 0.5, "squad_f1": 0.0, "illegal": 0.0, "count": 2}


def test_group_exact_match_wants_every_answer_of_a_question():
    grouped = task("group_exact_match", label_words=["no", "yes"])
    predictions, targets = ["yes", "no", "yes", "maybe", "no"], ["yes", "no", "no", "no", "no"]
    groups = [(0, 0), (0, 1), (0, 0), (1, 0), (1, 1)]
    assert compute(grouped, predictions, targets, groups)["group_exact_match"] == 0.5
    with pytest.raises(UserError, match="examples without a group; expected one each; set `group_fields`"):
        compute(grouped, predictions, targets)


def test_generation_metrics_equal_sacrebleu_and_rouge_score():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    predictions = ["the cat sat on the mat today", "a dog barks at night . it is in town – again"]
    targets = [
        ["the cat sat on a mat", "a cat was on the mat today"],
        "it is again in the town – or not . dogs bark at night",
    ]
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    found = compute(task("bleu", "bleu_intl", "chrf", *kinds), predictions, targets)
    streams = [["the cat sat on a mat", targets[1]], ["a cat was on the mat today", None]]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score / 100)
    intl = sacrebleu.corpus_bleu(predictions, streams, tokenize="intl").score / 100
    assert found["bleu_intl"] == pytest.approx(intl)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, streams).score / 100)
    lines = lambda text: text.replace(" . ", " .\n")  # noqa: E731
    for kind in kinds:
        score = lambda text, answer, kind=kind: RougeScorer([kind]).score(lines(text), lines(answer))[kind].fmeasure  # noqa: E731
        best = [max(score(text, predictions[0]) for text in targets[0]), score(targets[1], predictions[1])]
        assert found[kind] == pytest.approx(np.mean(best))
    assert found["rougeL"] != pytest.approx(found["rougeLsum"])


def test_majority_is_the_training_splits_answer():
    assert majority(["a", "b", "b"], ["a", "a", "b", "a"]) == 0.25
    assert majority(["b", "a"], ["a", "b", "a"]) == pytest.approx(2 / 3)  # a tie falls to the first in the alphabet


def test_nothing_to_score_is_an_error():
    with pytest.raises(UserError, match=r"^task mine: nothing to score"):
        compute(task("accuracy"), [], [])
    with pytest.raises(ValueError, match="1 predictions for 2 targets"):
        compute(task("accuracy"), ["a"], ["a", "b"])
