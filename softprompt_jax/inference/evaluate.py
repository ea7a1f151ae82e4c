"""Decode a split with the current trainable weights and score it with the task's metrics."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from softprompt_jax.config import UserError
from softprompt_jax.data import metrics
from softprompt_jax.data.batches import evaluation_batches
from softprompt_jax.data.buckets import Shape
from softprompt_jax.data.preprocessors import POSTPROCESSORS
from softprompt_jax.data.prompt_layout import NO_PROMPT, PromptLayout
from softprompt_jax.data.submission import average
from softprompt_jax.data.task import Distill, Example, Task
from softprompt_jax.data.tokenized import TokenizedSet
from softprompt_jax.data.tokenizer import Tokenizer
from softprompt_jax.distributed import mesh
from softprompt_jax.distributed.multihost import raise_if_preempted
from softprompt_jax.files import read_object
from softprompt_jax.inference import programs
from softprompt_jax.inference.programs import DeviceModel, Structure
from softprompt_jax.methods import Split
from softprompt_jax.models import decode
from softprompt_jax.models.decode import Decoding
from softprompt_jax.optim.losses import cross_entropy
from softprompt_jax.run import Run, load_run
from softprompt_jax.tasks.mixture import Mixture


class DecodedAnswer(NamedTuple):
    """What a model says: the text, its token ids up to EOS, and their log-probability (of beams, penalised)."""

    text: str
    ids: list[int]
    score: float


@dataclasses.dataclass(frozen=True)
class Batching:
    """How a set is put into batches, and how long answers get."""

    batch_size: int
    max_tokens: int
    layout: PromptLayout = NO_PROMPT
    shapes: list[Shape] | None = None  # of batches; None: some that suit the set
    progress: Callable[[int], object] | None = None  # called with how many examples a finished batch had


class Decoder:
    """Predictions of a split model, decoded or chosen among label words."""

    def __init__(self, parts: Split, tokenizer: Tokenizer, decoding: Decoding | None = None):
        self._tokenizer, self._decoding = tokenizer, decoding or decode.Greedy()
        self._structure = Structure(parts.graphdef)

    def answers(
        self,
        trainable: Any,
        frozen: Any,
        tokenized: TokenizedSet,
        how: Batching,
        task: Task | None = None,
        forced: Sequence[str] | None = None,
        first_number: int = 0,
    ) -> list[list[DecodedAnswer]]:
        """Return all answers to every example, in order: one, the samples, or the beams from the best.

        Where the task says to predict by likelihood, it is the likeliest label word (`choose`; Brown et al., 2020).
        Decoded answers begin with what is `forced` on their example. Samples follow from an example's number, from
        `first_number` on.
        """
        if task is not None and task.choices:
            return [[answer] for answer in self.choose(trainable, frozen, tokenized, how, task)[0]]
        answers = [[DecodedAnswer("", [], 0.0)]] * len(tokenized)
        model = DeviceModel(self._structure, trainable, frozen)
        beginnings = self._tokenizer.beginnings(forced or [""] * len(tokenized), how.max_tokens)
        for batch, ids in _batches(tokenized, how):
            rest = mesh.shard_batch((np.asarray(ids + first_number, np.int32), beginnings[ids]))
            made = programs.answers(model, self._decoding, how.max_tokens, *_given(batch, how), *rest)
            rows, scores = map(mesh.gather, made)
            for index, *each in zip(ids, rows, scores.tolist(), strict=True):
                if index >= 0:
                    answers[index] = list(map(self._answer, *each))
        return answers

    def choose(
        self, trainable: Any, frozen: Any, tokenized: TokenizedSet, how: Batching, task: Task
    ) -> tuple[list[DecodedAnswer], np.ndarray]:
        """Return the likeliest of a task's `choices` for every example, and the log-probability of each, [examples, W].

        A label word's log-probability is summed over its tokens, EOS included; the choice may be by the mean over them.
        """
        ids, padding = self._tokenizer.target_batch(task.choices), self._tokenizer.form.padding
        words = np.asarray([*itertools.zip_longest(*ids, fillvalue=padding)], np.int32).T
        model, log_p = (
            DeviceModel(self._structure, trainable, frozen),
            np.zeros((len(tokenized), len(words)), np.float32),
        )
        for batch, numbers in _batches(tokenized, how):
            values = mesh.gather(_word_likelihoods(model, *_given(batch, how), words))
            log_p[numbers[numbers >= 0]] = values[numbers >= 0]
        lengths = [len(tokens) if task.predict_by == "likelihood_per_token" else 1 for tokens in ids]
        best = np.argmax(log_p / np.asarray(lengths, np.float32), -1)
        chosen = zip(best, np.take_along_axis(log_p, best[:, None], -1)[:, 0], strict=True)
        return [DecodedAnswer(task.choices[n], self._real(words[n]), float(score)) for n, score in chosen], log_p

    def _answer(self, tokens: np.ndarray, score: float) -> DecodedAnswer:
        ids = self._real(tokens)
        return DecodedAnswer(self._tokenizer.decode(ids), ids, score)

    def likelihoods(self, trainable: Any, frozen: Any, tokenized: TokenizedSet, how: Batching) -> np.ndarray:
        """Return the log-probability of every example's target, EOS included, float32 [examples]."""
        return self.target_scores(trainable, frozen, tokenized, how)[0]

    def target_scores(
        self, trainable: Any, frozen: Any, tokenized: TokenizedSet, how: Batching
    ) -> tuple[Float[np.ndarray, " examples"], Bool[np.ndarray, " examples"]]:
        """Return the log-probability of every example's target, and whether it is what greedy decoding writes."""
        model = DeviceModel(self._structure, trainable, frozen)
        log_p, greedy = np.zeros(len(tokenized), np.float32), np.zeros(len(tokenized), bool)
        for batch, ids in _batches(tokenized, how):
            values, best = map(mesh.gather, _score_targets(model, mesh.shard_batch(batch)))
            log_p[ids[ids >= 0]], greedy[ids[ids >= 0]] = values[ids >= 0], best[ids >= 0]
        return log_p, greedy

    def _real(self, tokens: np.ndarray) -> list[int]:
        return [int(token) for token in tokens if token > self._tokenizer.form.padding]


@jax.jit
def _word_likelihoods(model: DeviceModel, tokens: jax.Array, before: jax.Array, words: jax.Array) -> jax.Array:
    """Return the log-probability of each of the words [W, U] after each text."""
    return decode.score_words(model.merge(), tokens, words, decoder_prompt=before)


@jax.jit
def _score_targets(model: DeviceModel, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return decode.score_targets(model.merge(), batch)


def _given(batch: dict[str, np.ndarray], how: Batching) -> tuple[Any, Any]:
    """Return a batch's texts, and the prompt rows before the decoder's input."""
    return mesh.shard_batch((batch["encoder_tokens"], batch["decoder_inputs"][:, : how.layout.lengths[1]]))


def _batches(tokenized: TokenizedSet, how: Batching) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yield (batch, example ids), the longest first; a batch divides by the mesh. Stop between two of them if asked."""
    shards = mesh.row_shards()
    batch_size = -(-min(how.batch_size, len(tokenized)) // shards) * shards
    for batch, ids in evaluation_batches(tokenized, batch_size, how.layout, shapes=how.shapes):
        raise_if_preempted()
        yield batch, ids
        if how.progress is not None:
            how.progress(int((ids >= 0).sum()))


def score(
    task: Task, predictions: Sequence[str], examples: Sequence[Example], outputs: metrics.Outputs | None = None
) -> dict[str, float]:
    """Return the task's metrics, with `illegal` (share of predictions that are no label) and `count`.

    Those of a seqio Task are what its own metrics return, in their units, of the `outputs`, or of the texts alone if
    there are none; accuracy where it has none.
    """
    own, names = {}, task.metrics
    if task.scored_by_source:
        own = task.source.own_scores(predictions, examples, outputs)
        names = [name for name in names if name != task.source.own_metrics] or ([] if own else ["accuracy"])
    if task.postprocess is not None:
        read = POSTPROCESSORS[task.postprocess]
        predictions = [read(made, example.target) for made, example in zip(predictions, examples, strict=True)]
    accepted, groups = [example.accepted for example in examples], [example.group for example in examples]
    answers = metrics.Answers(predictions, accepted, task.words, task.positive, groups)
    compared = task.compare(predictions, examples) if isinstance(task, Distill) else {}
    return own | metrics.compute(names, answers, f"task {task.name}") | compared


def wants_likelihoods(task: Task) -> bool:
    """Tell whether a task's metrics look at the log-probabilities of the targets."""
    return task.scored_by_source and task.source.wants_likelihoods()


def mean_score(task: Task, scores: dict[str, float]) -> float:
    """Return the score of a task: the mean of its metrics; a seqio Task brings its own."""
    own = [name for name in scores if name not in ("illegal", "count", "loss")]
    return float(np.mean([scores[name] for name in (own if task.scored_by_source else task.metrics)]))


def run_score(run: Run, scores: dict[str, Any]) -> float:
    """Return the score of a run on a split, by which checkpoints and runs are compared; more is better.

    `scores` are those of the split in `result.json` or `metrics.jsonl`. The score is the mean of the task's metrics, of
    a mixture the mean over its tasks, of pre-training the negative loss.
    """
    if run.pretraining is not None:
        return -scores["loss"]
    return scores["mean"] if isinstance(run.task, Mixture) else mean_score(run.tasks[0], scores)


def checkpoint_score(run: Run, scores: dict[str, Any]) -> float:
    """Return the number of a validation by which the best checkpoint is chosen, more is better: that of `best_by`.

    Errors: UserError where the validation has no such number.
    """
    if run.best_by is None:
        return run_score(run, scores)
    known = [name for name in scores if name.rpartition("/")[2] not in ("illegal", "count")]
    if run.best_by not in known:
        raise UserError(f"best_by: found {run.best_by!r}; expected one of {', '.join(known)}, which a validation has")
    lower = run.best_by.rpartition("/")[2] == "loss"
    return -scores[run.best_by] if lower else scores[run.best_by]


def score_factor(run: Run) -> float:
    """Return what a run's scores are multiplied by for readers: 100 (percent), 1 for losses and seqio's metrics."""
    return 1.0 if run.pretraining or any(task.scored_by_source for task in run.tasks) else 100.0


def score_text(value: float, factor: float) -> str:
    """Write a score times its `score_factor`: percent with one digit after the point, others with four digits."""
    return f"{factor * value:.1f}" if factor == 100 else f"{value:.4g}"


def benchmark_average(benchmark: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Return a benchmark's average of the validation scores of finished runs, and the score of each task.

    Runs of the same task are averaged first. A task without a run is a UserError.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for folder in folders:
        path = folder / "result.json"
        if not path.is_file():
            raise UserError(f"{folder}: no result.json; expected the folder of a finished run; finish it first")
        expected = "a run's result; delete it, and the same command evaluates again"
        scores = read_object(path, expected).get("validation")
        if not isinstance(scores, dict):
            raise UserError(f"{path}: lacks scores; expected {expected}")
        for task in load_run(folder / "config.yaml").tasks:
            own = scores["tasks"].get(task.name, {}) if "tasks" in scores else scores  # of a mixture, or of one task
            for name in task.metrics:
                if name in own:  # not of a task that is only trained on, nor of a seqio Task's own metrics
                    found.setdefault(task.name, {}).setdefault(name, []).append(own[name])
    means = {task: {name: float(np.mean(values)) for name, values in scores.items()} for task, scores in found.items()}
    mean = average(benchmark, {task: list(scores.values()) for task, scores in means.items()})
    return {"benchmark": benchmark, "split": "validation", "average": mean, "tasks": means}


def mean_loss(parts: Split, batches: Sequence[dict[str, np.ndarray]]):
    """Return a function of (trainable, frozen) giving the mean cross entropy in nats per target token."""

    @jax.jit
    def summed(trainable: Any, frozen: Any, batch: dict[str, jax.Array]):
        return cross_entropy(parts.merge(trainable, frozen)(batch), batch["decoder_targets"])

    def mean(trainable: Any, frozen: Any) -> float:
        sums = []
        for batch in batches:
            raise_if_preempted()
            sums.append(summed(trainable, frozen, mesh.shard_batch(batch)))
        return float(sum(loss for loss, _ in sums) / sum(weight for _, weight in sums))

    return mean
