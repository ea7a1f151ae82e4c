"""Decode a split with the current trainable weights and score it with the task's metrics."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softprompt_jax.config import UserError
from softprompt_jax.data import metrics
from softprompt_jax.data.batches import evaluation_batches
from softprompt_jax.data.buckets import Shape
from softprompt_jax.data.preprocessors import POSTPROCESSORS
from softprompt_jax.data.prompt_layout import NO_PROMPT, PromptLayout
from softprompt_jax.data.submission import average
from softprompt_jax.data.task import Example, Task
from softprompt_jax.data.tokenized import TokenizedSet
from softprompt_jax.data.tokenizer import Tokenizer
from softprompt_jax.distributed import mesh
from softprompt_jax.distributed.multihost import raise_if_preempted
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


class Decoder:
    """Predictions of a split model, decoded or chosen among label words; compiled once per shape."""

    def __init__(self, parts: Split, tokenizer: Tokenizer, decoding: Decoding | None = None):
        self._tokenizer = tokenizer
        how = decoding or decode.Greedy()

        @functools.partial(jax.jit, static_argnames="max_tokens")
        def decoded(
            trainable: Any,
            frozen: Any,
            tokens: jax.Array,
            before: jax.Array,
            numbers: jax.Array,
            forced: jax.Array,
            max_tokens: int,
        ) -> tuple[jax.Array, jax.Array]:
            return decode.answers(parts.merge(trainable, frozen), tokens, max_tokens, how, numbers, before, forced)

        @jax.jit
        def scored(
            trainable: Any, frozen: Any, tokens: jax.Array, before: jax.Array, words: jax.Array, divisors: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            log_p = decode.score_words(parts.merge(trainable, frozen), tokens, words, decoder_prompt=before)
            best = jnp.argmax(log_p / divisors, -1)
            return best, jnp.take_along_axis(log_p, best[:, None], -1)[:, 0]

        @jax.jit
        def likely(trainable: Any, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
            targets = batch["decoder_targets"]
            log_p = jax.nn.log_softmax(parts.merge(trainable, frozen)(batch))
            return jnp.sum(jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0] * (targets != 0), -1)

        self._decoded, self._scored, self._likely = decoded, scored, likely

    def predict(
        self,
        trainable: Any,
        frozen: Any,
        tokenized: TokenizedSet,
        batch_size: int,
        max_tokens: int,
        layout: PromptLayout = NO_PROMPT,
        shapes: list[Shape] | None = None,
        task: Task | None = None,
    ) -> list[str]:
        """Return the predicted text of every example, in order; batches have `shapes`, or some that suit the set.

        Where the task says to predict by likelihood, it is the label word of the highest log-probability,
        summed over the word's tokens or per token (Brown et al., 2020), EOS included.
        """
        found = self.answers(trainable, frozen, tokenized, batch_size, max_tokens, layout, shapes, task)
        return [each[0].text for each in found]

    def answers(
        self,
        trainable: Any,
        frozen: Any,
        tokenized: TokenizedSet,
        batch_size: int,
        max_tokens: int,
        layout: PromptLayout = NO_PROMPT,
        shapes: list[Shape] | None = None,
        task: Task | None = None,
        forced: Sequence[str] | None = None,
        first_number: int = 0,
    ) -> list[list[DecodedAnswer]]:
        """Return all answers to every example, as `predict` does the first: the samples, or the beams from the best.

        Decoded ones begin with what is `forced` on their example. Samples follow from an example's number, from
        `first_number` on.
        """
        labels = (task.words or []) if task is not None and task.predict_by != "decoding" else []
        words, divisors = self._choices(labels, task is not None and task.predict_by == "likelihood_per_token")
        answers = [[DecodedAnswer("", [], 0.0)]] * len(tokenized)
        beginnings = self._tokenizer.beginnings(forced or [""] * len(tokenized), max_tokens)
        first = layout.lengths[1]
        shards = mesh.row_shards()
        batch_size = -(-min(batch_size, len(tokenized)) // shards) * shards
        for batch, ids in evaluation_batches(tokenized, batch_size, layout, shapes=shapes):
            raise_if_preempted()
            given = mesh.shard_batch((batch["encoder_tokens"], batch["decoder_inputs"][:, :first]))
            if not labels:
                rest = mesh.shard_batch((np.asarray(ids + first_number, np.int32), beginnings[ids]))
                rows, scores = map(mesh.gather, self._decoded(trainable, frozen, *given, *rest, max_tokens))
                found = [list(map(self._answer, *each)) for each in zip(rows, scores.tolist(), strict=True)]
            else:
                best, scores = map(mesh.gather, self._scored(trainable, frozen, *given, words, divisors))
                found = [
                    [DecodedAnswer(labels[n], _real(words[n]), float(s))] for n, s in zip(best, scores, strict=True)
                ]
            for each, index in zip(found, ids, strict=True):
                if index >= 0:
                    answers[index] = each
        return answers

    def _answer(self, tokens: np.ndarray, score: float) -> DecodedAnswer:
        ids = _real(tokens)
        return DecodedAnswer(self._tokenizer.decode(ids), ids, score)

    def likelihoods(
        self, trainable: Any, frozen: Any, tokenized: TokenizedSet, batch_size: int, layout: PromptLayout = NO_PROMPT
    ) -> np.ndarray:
        """Return the log-probability of every example's target, EOS included, float32 [examples]."""
        found = np.zeros(len(tokenized), np.float32)
        shards = mesh.row_shards()
        batch_size = -(-min(batch_size, len(tokenized)) // shards) * shards
        for batch, ids in evaluation_batches(tokenized, batch_size, layout):
            raise_if_preempted()
            values = mesh.gather(self._likely(trainable, frozen, mesh.shard_batch(batch)))
            found[ids[ids >= 0]] = values[ids >= 0]
        return found

    def _choices(self, labels: list[str], per_token: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the label words' tokens [W, U] and what their scores are divided by."""
        ids = [[*self._tokenizer.encode(word), self._tokenizer.eos_id] for word in labels]
        words = np.zeros((len(ids), max(map(len, ids), default=0)), np.int32)
        for row, tokens in zip(words, ids, strict=True):
            row[: len(tokens)] = tokens
        return words, np.asarray([len(tokens) if per_token else 1 for tokens in ids], np.float32)


def _real(tokens: np.ndarray) -> list[int]:
    return [int(token) for token in tokens if token]


def score(
    task: Task, predictions: Sequence[str], examples: Sequence[Example], outputs: metrics.Outputs | None = None
) -> dict[str, float]:
    """Return the task's metrics, with `illegal` (share of predictions that are no label) and `count`.

    Those of a seqio Task are what its own metrics return, in their units, of the `outputs`, or of the texts alone if
    there are none; accuracy where it has none.
    """
    own: dict[str, float] = {}
    if task.scored_by_source:
        own = task.source.own_scores(predictions, examples, outputs)
        names = [name for name in task.metrics if name != task.source.own_metrics] or ([] if own else ["accuracy"])
        task = task.model_copy(update={"metrics": names})
    groups = [example.group for example in examples]
    answers = task_answers(task, predictions, examples)
    return own | metrics.compute(task, answers, [example.accepted for example in examples], groups)


def wants_likelihoods(task: Task) -> bool:
    """Tell whether a task's metrics look at the log-probabilities of the targets."""
    return task.scored_by_source and task.source.wants_likelihoods()


def task_answers(task: Task, predictions: Sequence[str], examples: Sequence[Example]) -> list[str]:
    """Return predictions after the task's postprocessor, if it has one."""
    if task.postprocess is None:
        return list(predictions)
    read = POSTPROCESSORS[task.postprocess]
    return [read(prediction, example.target) for prediction, example in zip(predictions, examples, strict=True)]


def mean_score(task: Task, scores: dict[str, float]) -> float:
    """Return the score of a task: the mean of its metrics."""
    return float(np.mean([scores[name] for name in _metrics_of(task, scores)]))


def run_score(run: Run, scores: dict[str, Any]) -> float:
    """Return the score of a run on a split, by which checkpoints and runs are compared; more is better.

    `scores` are those of the split in `result.json` or `metrics.jsonl`. The score is the mean of the task's metrics, of
    a mixture the mean over its tasks, of pre-training the negative loss.
    """
    if run.pretraining is not None:
        return -scores["loss"]
    return scores["mean"] if isinstance(run.task, Mixture) else mean_score(run.tasks[0], scores)


def score_factor(run: Run) -> float:
    """Return what a run's scores are multiplied by for readers: 100 (percent), 1 for losses and seqio's metrics."""
    return 1.0 if run.pretraining or any(task.scored_by_source for task in run.tasks) else 100.0


def score_text(value: float, factor: float) -> str:
    """Write a score times its `score_factor`: percent with one digit after the point, others with four digits."""
    return f"{factor * value:.1f}" if factor == 100 else f"{value:.4g}"


def _metrics_of(task: Task, scores: dict[str, Any]) -> list[str]:
    """Return the metrics of which a task's score is the mean; a seqio Task brings its own."""
    own = [name for name in scores if name not in ("illegal", "count", "loss")]
    return own if task.scored_by_source else task.metrics


def benchmark_average(benchmark: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Return a benchmark's average of the validation scores of finished runs, and the score of each task.

    Runs of the same task are averaged first. A task without a run is a UserError.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for folder in folders:
        path = folder / "result.json"
        if not path.is_file():
            raise UserError(f"{folder}: no result.json; expected the folder of a finished run; finish it first")
        scores = json.loads(path.read_text(encoding="utf-8"))["validation"]
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
