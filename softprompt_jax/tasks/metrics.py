"""Scores of predicted texts against target texts, each between 0 and 1 (correlations: -1 and 1).

A target may be one text or a list of acceptable texts; the metrics of free text take the best of them.
scikit-learn, scipy, sacrebleu and rouge-score do the computing and are imported when first used.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from softprompt_jax.config import UserError

Target = str | Sequence[str]
Metric = Callable[[Sequence[str], Sequence[Target], Sequence[str] | None, str | None], float]
METRICS: dict[str, Metric] = {}
_ZERO: Any = 0.0  # scikit-learn's stubs know only "warn"
_NUMERIC = ("pearson", "spearman")


@runtime_checkable
class Scored(Protocol):
    """What scoring needs to know of a task."""

    @property
    def name(self) -> str: ...
    @property
    def metrics(self) -> list[str]: ...
    @property
    def words(self) -> list[str] | None: ...
    @property
    def positive(self) -> str | None: ...


def metric(name: str) -> Callable[[Metric], Metric]:
    """Register `function(predictions, targets, words, positive)` as the metric called `name`."""

    def register(function: Metric) -> Metric:
        METRICS[name] = function
        return function

    return register


def compute(task: Scored, predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """Return the task's metrics, `illegal` (share of predictions that cannot be a target) and `count`."""
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    if not targets:
        raise UserError(f"task {task.name}: nothing to score; expected at least one example; check the split")
    result = {name: float(METRICS[name](predictions, targets, task.words, task.positive)) for name in task.metrics}
    return {**result, "illegal": _illegal(task, predictions), "count": len(targets)}


def majority(train_targets: Sequence[str], targets: Sequence[str]) -> float:
    """Return the accuracy of always answering the most frequent target of the training split."""
    counts = Counter(train_targets)
    answer = min(counts, key=lambda word: (-counts[word], word))
    return sum(target == answer for target in targets) / len(targets)


def _illegal(task: Scored, predictions: Sequence[str]) -> float:
    if task.words is not None:
        return float(np.mean([prediction not in task.words for prediction in predictions]))
    if any(name in _NUMERIC for name in task.metrics):
        return float(np.mean([_number(prediction) is None for prediction in predictions]))
    return 0.0


# --------------------------------------------------------------------------------------------- labels


@metric("accuracy")
def accuracy(predictions, targets, words=None, positive=None) -> float:
    """Share of predictions that equal the target (one of the targets)."""
    return float(np.mean([p in _answers(t) for p, t in zip(predictions, targets, strict=True)]))


@metric("f1")
def f1(predictions, targets, words=None, positive=None) -> float:
    """F1 of the positive word (default: the second); an illegal prediction is never positive."""
    from sklearn.metrics import f1_score

    if positive is None:
        if not words or len(words) < 2:
            raise UserError("metric f1: no positive word; expected two label words; set `positive` or `label_words`")
        positive = words[1]
    truth, answer = [t == positive for t in targets], [p == positive for p in predictions]
    return float(f1_score(truth, answer, zero_division=_ZERO))


@metric("f1_macro")
def f1_macro(predictions, targets, words=None, positive=None) -> float:
    """Mean over the label words of each one's F1; a word that never occurs counts 0."""
    from sklearn.metrics import f1_score

    words = list(words or dict.fromkeys(targets))
    return float(f1_score(list(targets), list(predictions), labels=words, average="macro", zero_division=_ZERO))


@metric("matthews")
def matthews(predictions, targets, words=None, positive=None) -> float:
    """Matthews correlation; illegal predictions form a class of their own; 0 where it is undefined."""
    from sklearn.metrics import matthews_corrcoef

    legal = set(words) if words else set(targets)
    answers = [p if p in legal else "(illegal)" for p in predictions]
    if len(set(answers)) < 2 or len(set(targets)) < 2:
        return 0.0
    return float(matthews_corrcoef(list(targets), answers))


# -------------------------------------------------------------------------------------------- numbers


@metric("pearson")
def pearson(predictions, targets, words=None, positive=None) -> float:
    """Pearson correlation; a prediction that is no number counts as -1, as in T5 (Raffel et al., 2020)."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, targets)


@metric("spearman")
def spearman(predictions, targets, words=None, positive=None) -> float:
    """Spearman correlation; a prediction that is no number counts as -1, as in T5 (Raffel et al., 2020)."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, targets)


def _correlation(function, predictions, targets) -> float:
    truth = [_number(target) for target in targets]
    if None in truth:
        raise UserError(f"found the target {targets[truth.index(None)]!r}; pearson and spearman expected numbers")
    answers = [-1.0 if (number := _number(prediction)) is None else number for prediction in predictions]
    if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(answers) == 0:  # type: ignore[arg-type]
        return 0.0  # undefined: one side is constant
    return float(function(answers, truth).statistic)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


# ------------------------------------------------------------------------------------------ free text


@metric("exact_match")
def exact_match(predictions, targets, words=None, positive=None) -> float:
    """Share of predictions that equal an answer, both normalised as in SQuAD (Rajpurkar et al., 2016)."""
    return float(np.mean([_best(_squad_exact, p, t) for p, t in zip(predictions, targets, strict=True)]))


@metric("squad_f1")
def squad_f1(predictions, targets, words=None, positive=None) -> float:
    """Mean F1 over the words of the best answer, normalised as in SQuAD (Rajpurkar et al., 2016)."""
    return float(np.mean([_best(_squad_overlap, p, t) for p, t in zip(predictions, targets, strict=True)]))


@metric("rouge")
def rouge(predictions, targets, words=None, positive=None) -> float:
    """Mean ROUGE-L F with stemming (Lin, 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    score = lambda prediction, target: scorer.score(target, prediction)["rougeL"].fmeasure  # noqa: E731
    return float(np.mean([_best(score, p, t) for p, t in zip(predictions, targets, strict=True)]))


@metric("bleu")
def bleu(predictions, targets, words=None, positive=None) -> float:
    """Corpus BLEU by sacrebleu's defaults, divided by 100 (Post, 2018)."""
    import sacrebleu

    return sacrebleu.corpus_bleu(list(predictions), _reference_streams(targets)).score / 100


@metric("chrf")
def chrf(predictions, targets, words=None, positive=None) -> float:
    """Corpus chrF by sacrebleu's defaults, divided by 100 (Popović, 2015)."""
    import sacrebleu

    return sacrebleu.corpus_chrf(list(predictions), _reference_streams(targets)).score / 100


def _answers(target: Target) -> list[str]:
    return [target] if isinstance(target, str) else list(target)


def _best(score: Callable[[str, str], float], prediction: str, target: Target) -> float:
    return float(max(score(prediction, answer) for answer in _answers(target)))


def _reference_streams(targets: Sequence[Target]) -> list[list[Any]]:
    # sacrebleu skips a None where a row has fewer references than others.
    answers = [_answers(target) for target in targets]
    width = max(map(len, answers))
    return [[each[i] if i < len(each) else None for each in answers] for i in range(width)]


def _squad_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _squad_exact(prediction: str, answer: str) -> float:
    return float(_squad_words(prediction) == _squad_words(answer))


def _squad_overlap(prediction: str, answer: str) -> float:
    found, wanted = _squad_words(prediction), _squad_words(answer)
    if not found or not wanted:
        return float(found == wanted)
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted))
