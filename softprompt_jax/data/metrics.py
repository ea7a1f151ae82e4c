"""Scores of predicted texts against target texts, each between 0 and 1 (correlations: -1 and 1).

A target may be one text or a list of acceptable texts; the metrics of free text take the best of them.
Illegal answers count as wrong, as in T5 (Raffel et al., 2020). scikit-learn, scipy, sacrebleu and
rouge-score do the computing and are imported when first used.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from softprompt_jax.config import UserError
from softprompt_jax.data.registry import Registry

Target = str | Sequence[str]


@dataclass(frozen=True)
class Answers:
    """What a metric sees: predictions beside targets, the legal `words`, and the group of each example, if any.

    `positive` is the word that `f1` counts. Examples with equal `groups` belong together, such as the answers to one
    question of MultiRC.
    """

    predictions: Sequence[str]
    targets: Sequence[Target]
    words: list[str] | None = None
    positive: str | None = None
    groups: Sequence[Hashable] | None = None

    def mean(self, score: Callable[[str, str], float]) -> float:
        """Return the mean over the examples of the best `score(prediction, acceptable answer)`."""
        pairs = zip(self.predictions, self.targets, strict=True)
        return float(np.mean([max(score(prediction, text) for text in _texts(target)) for prediction, target in pairs]))


class Outputs(NamedTuple):
    """What a model says of each example: the token ids of its answer up to EOS, and two log-probabilities.

    `scores` are those of the answers, `likelihoods` those of the targets.
    """

    ids: Sequence[Sequence[int]]
    scores: Sequence[float]
    likelihoods: np.ndarray | None


Metric = Callable[[Answers], float]
METRICS: Registry[Metric] = Registry()
_ZERO: Any = 0.0  # scikit-learn's stubs know only "warn"
_NUMERIC = ("pearson", "spearman")


def compute(names: Sequence[str], answers: Answers, where: str) -> dict[str, float]:
    """Return the metrics of these names, `illegal` (share of predictions that cannot be a target) and `count`."""
    if len(answers.predictions) != len(answers.targets):
        raise ValueError(f"{len(answers.predictions)} predictions for {len(answers.targets)} targets")
    if not answers.targets:
        raise UserError(f"{where}: nothing to score; expected at least one example; check the split")
    result = {name: float(METRICS[name](answers)) for name in names}
    return {**result, "illegal": _illegal(names, answers), "count": len(answers.targets)}


def majority(train_targets: Iterable[str] | Mapping[str, int], targets: Sequence[Target]) -> float:
    """Return the accuracy of always answering the most frequent target of the training split."""
    answer = most_frequent(train_targets)
    return sum(answer in _texts(target) for target in targets) / len(targets)


def most_frequent(targets: Iterable[str] | Mapping[str, int]) -> str:
    """Return the most frequent target; the alphabet decides between equally frequent ones."""
    counts = Counter(targets)
    return min(counts, key=lambda word: (-counts[word], word))


def _illegal(names: Sequence[str], answers: Answers) -> float:
    if answers.words is not None:
        return float(np.mean([prediction not in answers.words for prediction in answers.predictions]))
    if any(name in _NUMERIC for name in names):
        return float(np.mean([_number(prediction) is None for prediction in answers.predictions]))
    return 0.0


def _texts(target: Target) -> list[str]:
    return [target] if isinstance(target, str) else list(target)


# --------------------------------------------------------------------------------------------- labels


@METRICS.register("accuracy")
def accuracy(answers: Answers) -> float:
    """Share of predictions that equal the target (one of the targets)."""
    return answers.mean(lambda prediction, text: float(prediction == text))


@METRICS.register("f1")
def f1(answers: Answers) -> float:
    """F1 of the positive word (default: the second); an illegal prediction counts as the other, wrong, class.

    It is a missed positive or a false one, depending on the target (Raffel et al., 2020).
    """
    from sklearn.metrics import f1_score

    positive, words = answers.positive, answers.words
    if positive is None:
        if not words or len(words) < 2:
            raise UserError("metric f1: no positive word; expected two label words; set `positive` or `label_words`")
        positive = words[1]
    legal = set(words or [*answers.predictions])
    truth = [target == positive for target in answers.targets]
    guess = [p == positive if p in legal else not t for p, t in zip(answers.predictions, truth, strict=True)]
    return float(f1_score(truth, guess, zero_division=_ZERO))


@METRICS.register("f1_macro")
def f1_macro(answers: Answers) -> float:
    """Mean of the F1 of each label word; a word that never occurs counts as 0."""
    from sklearn.metrics import f1_score

    words = list(answers.words or dict.fromkeys(answers.targets))
    truth, guess = list(answers.targets), list(answers.predictions)
    return float(f1_score(truth, guess, labels=words, average="macro", zero_division=_ZERO))


@METRICS.register("matthews")
def matthews(answers: Answers) -> float:
    """Matthews correlation; illegal predictions form a class of their own; 0 where it is undefined."""
    from sklearn.metrics import matthews_corrcoef

    legal = set(answers.words or answers.targets)
    guess = [prediction if prediction in legal else "(illegal)" for prediction in answers.predictions]
    if len(set(guess)) < 2 or len(set(answers.targets)) < 2:
        return 0.0
    return float(matthews_corrcoef(list(answers.targets), guess))


@METRICS.register("group_exact_match")
def group_exact_match(answers: Answers) -> float:
    """Share of groups whose predictions are all right: MultiRC's EM, per question (Khashabi et al., 2018)."""
    pairs = zip(answers.predictions, answers.targets, strict=True)
    return _share_of_groups(answers, [prediction in _texts(target) for prediction, target in pairs], all)


@METRICS.register("group_agreement")
def group_agreement(answers: Answers) -> float:
    """Share of groups whose predictions are all the same: the gender parity of AX-g (Rudinger et al., 2018).

    Whether they are right does not matter: the sentences of a group differ only in the gender of a pronoun.
    """
    return _share_of_groups(answers, answers.predictions, lambda given: len(given) == 1)


def _share_of_groups(answers: Answers, values: Sequence[Any], holds: Callable[[set[Any]], bool]) -> float:
    """Return the share of groups of which a condition on the distinct values of their examples holds."""
    if answers.groups is None or any(group is None for group in answers.groups):
        raise UserError("metrics of groups: examples without a group; expected one each; set `group_fields`")
    found: dict[Hashable, set[Any]] = defaultdict(set)
    for group, value in zip(answers.groups, values, strict=True):
        found[group].add(value)
    return float(np.mean([holds(distinct) for distinct in found.values()]))


# -------------------------------------------------------------------------------------------- numbers


def _correlation(kind: str) -> Metric:
    """Return Pearson's or Spearman's; a prediction that is no number counts as -1, as in T5 (Raffel et al., 2020)."""

    def correlation(answers: Answers) -> float:
        import scipy.stats

        truth = [_number(target) if isinstance(target, str) else None for target in answers.targets]
        if None in truth:
            found = answers.targets[truth.index(None)]
            raise UserError(f"found the target {found!r}; pearson and spearman expected numbers")
        guess = [-1.0 if (number := _number(prediction)) is None else number for prediction in answers.predictions]
        if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(guess) == 0:  # type: ignore[arg-type]
            return 0.0  # undefined: one side is constant
        return float(getattr(scipy.stats, f"{kind}r")(guess, truth).statistic)

    return correlation


METRICS |= {kind: _correlation(kind) for kind in _NUMERIC}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


# ------------------------------------------------------------------------------------------ free text


@METRICS.register("exact_match")
def exact_match(answers: Answers) -> float:
    """Share of predictions that equal an answer, both normalised as in SQuAD (Rajpurkar et al., 2016)."""
    return answers.mean(lambda prediction, text: float(_squad_words(prediction) == _squad_words(text)))


@METRICS.register("squad_f1")
def squad_f1(answers: Answers) -> float:
    """Mean F1 over the words of the best answer, normalised as in SQuAD 1.1 (Rajpurkar et al., 2016).

    As in its script, no common word is 0, even where nothing is left of both sides.
    """
    return answers.mean(_squad_overlap)


def _squad_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _squad_overlap(prediction: str, answer: str) -> float:
    found, wanted = _squad_words(prediction), _squad_words(answer)
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def _rouge(kind: str) -> Metric:
    """Return the mean F without stemming, as in T5 but not resampled (Lin, 2004)."""

    def rouge(answers: Answers) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind])
        return answers.mean(lambda p, text: scorer.score(_sentences(text), _sentences(p))[kind].fmeasure)

    return rouge


METRICS |= {kind: _rouge(kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")}


def _sentences(text: str) -> str:
    """Put each sentence on its own line, as rougeLsum expects; a full stop between spaces ends a sentence."""
    return text.replace(" . ", " .\n")


def _sacrebleu(function: str, **settings: str) -> Metric:
    """Return a score over all examples by sacrebleu (Post, 2018), divided by 100."""

    def score(answers: Answers) -> float:
        import sacrebleu

        # sacrebleu skips a None where a row has fewer references than others.
        references: list[Any] = list(map(list, itertools.zip_longest(*map(_texts, answers.targets))))
        return getattr(sacrebleu, function)(list(answers.predictions), references, **settings).score / 100

    return score


METRICS["bleu"] = _sacrebleu("corpus_bleu")
METRICS["bleu_intl"] = _sacrebleu("corpus_bleu", tokenize="intl")  # which T5 reports (Raffel et al., 2020)
METRICS["chrf"] = _sacrebleu("corpus_chrf")  # by Popović (2015)
