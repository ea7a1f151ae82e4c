"""What a run trains on and how it is scored: a task, or pre-training."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import grain
import numpy as np

from softprompt_jax.assembly import Assembly
from softprompt_jax.config import UserError, cache_folder
from softprompt_jax.data import metrics
from softprompt_jax.data.batches import TrainBatches
from softprompt_jax.data.streaming import StreamBatches
from softprompt_jax.data.task import Distill, Example, Task, iterate, with_limits
from softprompt_jax.data.tokenized import TokenizedSet, concatenate, tokenize
from softprompt_jax.distributed import mesh
from softprompt_jax.inference.evaluate import (
    Batching,
    Decoder,
    checkpoint_score,
    mean_loss,
    mean_score,
    score,
    wants_likelihoods,
)
from softprompt_jax.inference.mistakes import mistakes_of
from softprompt_jax.methods import Split
from softprompt_jax.pretraining.data import PretrainingData
from softprompt_jax.run import Run
from softprompt_jax.tasks import load, splits
from softprompt_jax.tasks.mixture import Mixture, draw_mixture
from softprompt_jax.training.distill import answered
from softprompt_jax.training.given import Metric, scores_of

WINDOW = 64  # batches of a split without end that are in memory at a time
SENTINEL = "<extra_id_0>"
ILLEGAL_HINT = (
    "more than half of the validation answers are no label word (`illegal`); try predict_by: likelihood in the task, "
    "more steps, or a larger pre-trained backbone"
)


class RunData:
    """The data of a run on a task or a mixture: train batches, validation, and the final result."""

    select_best = True

    def __init__(
        self,
        run: Run,
        assembly: Assembly,
        parts: Split,
        tasks: list[TaskSplits] | None = None,
        decoder: Decoder | None = None,
        metrics: Sequence[Metric] = (),
    ):
        """Read the data, unless runs that differ in their prompts' values only share theirs, and the decoder.

        `metrics`: functions that score answers beside the tasks' own metrics.
        """
        self.run, self._metrics = run, metrics
        self.mistakes: dict[str, Any] = {}  # of the result, by task
        self.tasks = tasks or [TaskSplits(task, run, assembly, number, parts) for number, task in enumerate(run.tasks)]
        if not any("validation" in task.tokens for task in self.tasks):
            raise UserError(f"task {run.task_name}: none of its tasks has a validation split; expected one that has")
        self._decoder = decoder or Decoder(parts, assembly.tokenizer, run.decoding)
        longest = max(int(tokens.target_lengths.max()) for task in self.tasks for tokens in task.tokens.values())
        legal = all(task.task.words for task in self.tasks)  # nothing longer than the longest target can be right
        self._longest = longest if legal else run.max_target_tokens
        train, draw = [task.tokens["train"] for task in self.tasks], None
        if isinstance(run.task, Mixture):
            counts = [len(tokens) for tokens in train]
            self.rates = run.task.rates.rates(counts)
            draw = draw_mixture(counts, self.rates, run.seed, at_least=run.batch_size)
            train = [concatenate(train)]
        index, count = mesh.process_share()
        share: dict[str, Any] = {"layout": assembly.layout, "max_shapes": run.max_compiled_shapes}
        share |= {"process_index": index, "process_count": count}
        if task := next((task for task in self.tasks if task.endless), None):
            if len(self.tasks) > 1 or run.packing is not None:
                raise UserError(
                    f"task {task.name}: its train split never ends; expected a finite one in a mixture and for "
                    "packing; train on it alone, in buckets, or take some of it in the Task"
                )
            limits = run.max_input_tokens, run.max_target_tokens
            self.train_batches = StreamBatches(
                task.read, task.tokenize, train[0], run.batch_size, run.seed, largest=limits, **share
            )
            return
        self.train_batches = TrainBatches(
            train[0],
            run.batch_size,
            run.seed,
            packing=run.packing,
            parts=run.accumulate,
            rows_multiple=run.accumulate * mesh.row_shards(),
            draw=draw,
            **share,
        )

    def describe(self) -> str:
        """Say in a line what the data are."""
        described = [task.describe() for task in self.tasks]
        if isinstance(self.run.task, Mixture):
            described = [f"{text} at {rate:.1%}" for text, rate in zip(described, self.rates, strict=True)]
            described[0] = f"mixture {self.run.task_name}: {described[0]}"
        inputs, targets, batches = self._truncated("inputs"), self._truncated("targets"), self.train_batches
        shapes = ", ".join(f"{t}/{u}" for t, u in batches.shapes)
        packed = f"packed in {batches.rows} rows of {shapes}, {batches.examples_per_batch:.1f} examples a step"
        line = (
            f"{'; '.join(described)}; {packed if self.run.packing else f'shapes {shapes}'}; "
            f"padding {batches.padding_share:.0%}; {inputs} inputs truncated to {self.run.max_input_tokens} tokens"
        )
        return f"{line}, {targets} targets to {self.run.max_target_tokens}" if self.run.truncate_targets else line

    def _truncated(self, side: str) -> int:
        return sum(getattr(tokens, f"truncated_{side}") for task in self.tasks for tokens in task.tokens.values())

    def measures(self) -> dict[str, float]:
        """Return what was found of the data: of the first epoch, and truncations in all splits."""
        batches = self.train_batches
        return {
            "examples_per_batch": round(batches.examples_per_batch, 2),
            "batches_per_epoch": batches.batches_per_epoch,
            "padding": round(batches.padding_share, 4),
            "truncated_inputs": self._truncated("inputs"),
            "truncated_targets": self._truncated("targets"),
        }

    def batches(self, first: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches from step `first` on."""
        return self.train_batches.from_step(first)

    def _scores(self, split: str, weights: tuple[Any, Any], validating: bool = False) -> dict[str, dict[str, float]]:
        """The metrics of each task that has the split."""
        scored = [task for task in self.tasks if split in task.tokens]
        how = split, self._decoder, weights, self._longest, validating, self._metrics
        return {task.name: task.scores(*how) for task in scored}

    def _mean(self, scores: dict[str, dict[str, float]]) -> float:
        return float(np.mean([mean_score(task.task, scores[task.name]) for task in self.tasks if task.name in scores]))

    def validate(self, trainable: Any, frozen: Any) -> tuple[dict[str, float], float]:
        """Return the validation metrics and the number that selects the best checkpoint: `best_by`, or their mean.

        Among the metrics is `loss`, the mean cross entropy in nats per target token; that of a mixture is the mean over
        its tasks.
        """
        scores = self._scores("validation", (trainable, frozen), validating=True)
        found = scores[self.run.task_name] if not isinstance(self.run.task, Mixture) else {"mean": self._mean(scores)}
        if isinstance(self.run.task, Mixture):
            found |= {f"{task}/{name}": value for task, each in scores.items() for name, value in each.items()}
            found["loss"] = float(np.mean([each["loss"] for each in scores.values()]))
        return found, checkpoint_score(self.run, found)

    def result(self, trainable: Any, parts: Split) -> dict[str, Any]:
        """Return the metrics of the chosen weights, beside the majority class and no training.

        Those of a mixture are `mean` and `tasks`, by name. `mistakes` has those of each task with label words, on the
        test split or where there is none on validation.
        """
        scored = [task for task in self.tasks if "validation" in task.tokens]
        measured = "test" if all("test" in task.tokens for task in scored) else "validation"
        mixture = isinstance(self.run.task, Mixture)

        def scores(split: str, values: Any) -> dict[str, Any] | None:
            each = self._scores(split, (values, parts.frozen))
            if not each:
                return None
            return {"mean": self._mean(each), "tasks": each} if mixture else each[self.run.task_name]

        trained = {split: scores(split, trainable) for split in ("validation", "test")}
        # Before the untrained model answers.
        self.mistakes = {task.name: task.mistakes for task in scored if task.mistakes is not None}
        majority = {task.name: task.majority(measured) for task in scored}
        context = parts.merge(parts.trainable, parts.frozen).context
        return {
            **trained,
            "baselines": {
                "split": measured,
                "majority": majority if mixture else majority[self.run.task_name],
                "untrained": scores(measured, parts.trainable),
            },
            **({} if context is None else {"context_tokens": context.length - context.begin}),
        }


def mostly_illegal(scores: dict[str, float]) -> bool:
    """Tell whether more than half of the answers, of a task of a mixture too, are no label word."""
    return any(value > 0.5 for name, value in scores.items() if name.rpartition("/")[2] == "illegal")


class TaskSplits:
    """One task of a run: the tokens of its splits, and the examples that it is scored on."""

    def __init__(self, task: Task, run: Run, assembly: Assembly, number: int, parts: Split | None = None):
        task = with_limits(task, run.max_input_tokens, run.max_target_tokens)
        self.task, self.name, self._run, self._assembly = task, task.name, run, assembly
        task.check(assembly.tokenizer)
        available = splits(task)
        for needed in ("train",) if isinstance(run.task, Mixture) else ("train", "validation"):
            if needed not in available:
                raise UserError(
                    f"task {task.name}: no {needed} split; found {', '.join(available)}; expected train and "
                    f"validation; keep some rows apart in a file and state it (task.source.{needed}=FILE)"
                    + (", or set task.validation=0.1 for a share of train" if needed == "validation" else "")
                )
        if "validation" not in available:  # a task of a mixture that is trained on and not scored
            available = ["train"]
        self.endless = task.source.is_endless("train")
        self._taught = isinstance(task, Distill)  # whether tokens of targets are the teacher's
        self.mistakes: dict[str, Any] | None = None  # of the last result that was measured
        self.examples: dict[str, list[Example]] = {}
        self.tokens: dict[str, TokenizedSet] = {}
        for split in ("train", "validation", "test"):
            if split not in available:
                continue
            examples: Iterable[Example] = Reread(task, split)
            if isinstance(task, Distill):
                assert parts is not None
                examples = self.examples[split] = answered(task, split, run, assembly, parts)
            elif next(iter(examples), None) is None:
                load(task, split)  # which says that the split is empty
            elif split != "train":  # which may be too large for a list
                examples = self.examples[split] = load(task, split)
            elif self.endless:
                examples = list(itertools.islice(self.read(0), WINDOW * run.batch_size))
            # What comes with ids has nothing to tokenise, and is not gone through twice to name a cached file.
            cache = None if task.source.makes_ids else cache_folder() / "tokens"
            self.tokens[split] = self.tokenize(examples, split, cache)
        self._check_words()
        if task.words and not self._taught and not self.endless and self.tokens["train"].has_one_target:
            raise UserError(
                f"task {task.name}: all examples of split 'train' have one label, as tokens; expected two or more; "
                "check the source and the label_words"
            )
        self._layout = assembly.layout.of_task(number) if run.own_prompts else assembly.layout

    def _check_words(self) -> None:
        """Refuse label words that are one to the tokenizer, of which ranking would always choose the first."""
        known: dict[tuple[int, ...], str] = {}
        for word, ids in zip(
            self.task.words or (), self._assembly.tokenizer.target_batch(self.task.words or ()), strict=True
        ):
            if (other := known.setdefault(tuple(ids), word)) != word:
                raise UserError(
                    f"task {self.name}: the label words {other!r} and {word!r} are the same, as tokens; expected words "
                    "that the backbone's tokenizer tells apart; choose others"
                )

    def read(self, first: int) -> Iterator[Example]:
        """Yield the train examples of a split without end from a number on."""
        return iterate(self.task, "train", first=first)

    def tokenize(self, examples: Iterable[Example], split: str = "train", cache: Path | None = None) -> TokenizedSet:
        """Return examples as ids within the run's limits."""
        run, model = self._run, self._assembly.model
        limits = model.settings.vocabulary_rows, run.max_input_tokens, run.max_target_tokens
        cut = run.truncate_targets
        if run.target_sentinel:  # which is dropped again where answers are read
            examples = (dataclasses.replace(example, target=SENTINEL + example.target) for example in examples)
        try:
            return tokenize(examples, self._assembly.tokenizer, *limits, truncate_targets=cut, cache=cache)
        except UserError as error:
            raise UserError(f"task {self.name}: {split}: {error}") from None

    def describe(self) -> str:
        """Say how many examples there are."""
        sizes = {split: str(len(tokens)) for split, tokens in self.tokens.items()}
        if self.endless:
            sizes["train"] = "without end (a restart reads anew what was seen)"
        if "validation" not in sizes:
            sizes["train"] += " (no validation split: trained on, not scored)"
        if self.task.validation is not None:
            sizes["validation"] += f" ({self.task.validation:.0%} of train, by a hash of the input)"
        return f"task {self.name}: " + ", ".join(f"{split} {size}" for split, size in sizes.items())

    def scores(
        self,
        split: str,
        decoder: Decoder,
        weights: tuple[Any, Any],
        longest: int,
        validating: bool = False,
        functions: Sequence[Metric] = (),
    ) -> dict[str, float]:
        """Return the metrics of a split under `weights`, trainable and frozen ones.

        In a validation they are those of the first examples, with the `loss` per target token.
        """
        first = self._run.evaluation_examples if validating else self._run.result_examples
        how, tokens = Batching(self._run.evaluation_batch_size, longest, self._layout), self.tokens[split].first(first)
        examples, likelihoods = self.examples[split][:first], None
        if self.task.choices:
            best, log_p = decoder.choose(*weights, tokens, how, self.task)
            order = {word: number for number, word in enumerate(self.task.choices)}
            if (
                not self._run.truncate_targets
                and not self._taught
                and all(example.target in order for example in examples)
            ):
                likelihoods = log_p[np.arange(len(examples)), [order[example.target] for example in examples]]
        else:
            best = [each[0] for each in decoder.answers(*weights, tokens, how, self.task)]
        if likelihoods is None and (validating or wants_likelihoods(self.task)):
            likelihoods = decoder.likelihoods(*weights, tokens, how)
        outputs = metrics.Outputs([answer.ids for answer in best], [answer.score for answer in best], likelihoods)
        if not validating:
            self.mistakes = mistakes_of(self.task, split, best, examples)
        answers = [answer.text for answer in best]
        found = score(self.task, answers, examples, outputs)
        own = scores_of(functions, answers, [example.accepted for example in examples]) if functions else {}
        if twice := sorted(own.keys() & (found.keys() | {"loss"})):
            raise UserError(f"metrics: a function returns {twice[0]}, as the task does; expected another name")
        found |= own
        if validating:
            assert likelihoods is not None
            found["loss"] = -float(likelihoods.sum(dtype=np.float64)) / int(tokens.target_lengths.sum())
        return found

    def majority(self, split: str) -> float:
        """Return the accuracy of the train split's most frequent target, of an endless one's first window's."""
        if self.task.source.makes_ids:  # whose preprocessors are not run again
            train = self.tokens["train"]
            ids, times = Counter(tuple(train.target(i).tolist()) for i in range(len(train))).most_common(1)[0]
            counts = Counter({self._assembly.tokenizer.decode(ids): times})
        else:
            train = self.examples["train"] if self._taught else Reread(self.task, "train")
            counts = Counter(example.target for example in train)
        scored = self.examples[split][: self._run.result_examples]
        return metrics.majority(counts, [example.target for example in scored])


class Reread:
    """The examples of a split, read anew each time that they are gone through."""

    def __init__(self, task: Task, split: str):
        self._task, self._split = task, split

    def __iter__(self) -> Iterator[Example]:
        return iterate(self._task, self._split)


class PretrainingRunData:
    """The data of pre-training; validation is the loss on text windows of another seed."""

    select_best = False
    mistakes: ClassVar[dict[str, Any]] = {}

    def __init__(self, run: Run, assembly: Assembly, parts: Split):
        settings = run.pretraining
        assert settings is not None
        folder = assembly.tokenizer_folder
        if assembly.model.prompt is not None:
            kinds = ", ".join(method.kind for method in run.methods)
            raise UserError(
                f"methods: {kinds} with pre-training, whose texts have no place for a prompt; expected methods that "
                "train weights; set methods to [{kind: full}]"
            )
        rows = assembly.model.settings.vocabulary_rows
        if assembly.tokenizer.size > rows:
            raise UserError(
                f"backbone: vocabulary_rows {rows}; expected at least {assembly.tokenizer.size}, the pieces and "
                "sentinels of the tokenizer"
            )
        self.data = PretrainingData(settings, folder, run.batch_size, run.seed, run.steps)
        held_out = settings.model_copy(update={"stages": settings.stages[-1:]})
        sample = PretrainingData(held_out, folder, run.batch_size, run.seed + 1, 32)
        self._loss = mean_loss(parts, [sample.batch(i) for i in range(0, 32, 4)])

    def describe(self) -> str:
        return f"pre-training: shapes {', '.join(f'{t}/{u}' for t, u in self.data.shapes)}"

    def measures(self) -> dict[str, float]:
        """Return nothing: the data are made as they are needed."""
        return {}

    def batches(self, first: int) -> Iterator[dict[str, np.ndarray]]:
        index, count = mesh.process_share()

        def share(step: int) -> dict[str, np.ndarray]:
            return {name: np.split(rows, count)[index] for name, rows in self.data.batch(step).items()}

        source = grain.MapDataset.range(first, len(self.data)).map(share)
        return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))

    def validate(self, trainable: Any, frozen: Any) -> tuple[dict[str, float], float]:
        """Return the validation loss, and its negative as the score."""
        loss = self._loss(trainable, frozen)
        return {"loss": loss}, -loss

    def result(self, trainable: Any, parts: Split) -> dict[str, Any]:
        """Return the final loss."""
        return {"validation": self.validate(trainable, parts.frozen)[0], "test": None}
