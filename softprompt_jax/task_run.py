"""What a run trains on and how it is scored: a task, or pre-training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from softprompt_jax import sharding
from softprompt_jax.assembly import Assembly
from softprompt_jax.config import UserError
from softprompt_jax.evaluate import Decoder, mean_loss, mean_score, score
from softprompt_jax.methods import Split
from softprompt_jax.run import Run
from softprompt_jax.tasks import load, metrics, splits
from softprompt_jax.tasks.packages import cache_folder
from softprompt_jax.tasks.pipeline import TrainBatches
from softprompt_jax.tasks.pretraining import PretrainingData
from softprompt_jax.tasks.tokenized import tokenize


class TaskRun:
    """The data of a run on a task: train batches, validation, and the final result."""

    select_best = True

    def __init__(self, run: Run, assembly: Assembly, parts: Split):
        self.run, self.task = run, run.resolved_task()
        rows = assembly.model.settings.vocabulary_rows
        self._prompt_ids = assembly.prompt_ids

        def read(split: str):
            examples = load(self.task, split)
            if split == "validation" and run.evaluation_examples is not None:
                examples = examples[: run.evaluation_examples]
            limits, cache = (run.max_input_tokens, run.max_target_tokens), cache_folder() / "tokens"
            cut = run.truncate_targets
            try:
                return examples, tokenize(
                    examples, assembly.tokenizer, rows, *limits, truncate_targets=cut, cache=cache
                )
            except UserError as error:
                raise UserError(f"task {self.task.name}: {split}: {error}") from None

        self._available = splits(self.task)
        self.sets = {name: read(name) for name in ("train", "validation", "test") if name in self._available}
        for needed in ("train", "validation"):
            if needed not in self.sets:
                raise UserError(
                    f"task {self.task.name}: no {needed} split; found {', '.join(self._available)}; "
                    "expected train and validation"
                )
        index, count = sharding.process_share()
        self.train_batches = TrainBatches(
            self.sets["train"][1],
            run.batch_size,
            run.seed,
            self._prompt_ids,
            max_shapes=run.shapes,
            packing=run.packing,
            rows_multiple=run.accumulate * sharding.row_shards(),
            process_index=index,
            process_count=count,
        )
        self._decoder = Decoder(parts, assembly.tokenizer)
        self._longest = max(int(tokenized.target_lengths.max()) for _, tokenized in self.sets.values())

    def describe(self) -> str:
        """Say in a line what the data are."""
        counts = ", ".join(f"{name} {len(examples)}" for name, (examples, _) in self.sets.items())
        inputs, targets = (
            sum(getattr(tokenized, name) for _, tokenized in self.sets.values())
            for name in ("truncated_inputs", "truncated_targets")
        )
        batches = self.train_batches
        shapes = ", ".join(f"{t}/{u}" for t, u in batches.shapes)
        packed = f"packed in {batches.rows} rows of {shapes}, {batches.examples_per_batch:.1f} examples a step"
        line = (
            f"task {self.task.name}: {counts}; {packed if self.run.packing else f'shapes {shapes}'}; "
            f"padding {batches.padding_share:.0%}; {inputs} inputs truncated to {self.run.max_input_tokens} tokens"
        )
        return f"{line}, {targets} targets to {self.run.max_target_tokens}" if self.run.truncate_targets else line

    def batches(self, first: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches from step `first` on."""
        return self.train_batches.from_step(first)

    def _scores(self, name: str, trainable: Any, frozen: Any) -> dict[str, float]:
        examples, tokenized = self.sets[name]
        predictions = self._decoder.predict(
            trainable, frozen, tokenized, self.run.evaluation_batch_size, self._longest, self._prompt_ids
        )
        return score(self.task, predictions, examples)

    def validate(self, trainable: Any, frozen: Any) -> tuple[dict[str, float], float]:
        """Return the validation metrics and the number that selects the best checkpoint."""
        scores = self._scores("validation", trainable, frozen)
        return scores, mean_score(self.task, scores)

    def result(self, trainable: Any, parts: Split) -> dict[str, Any]:
        """Return the metrics of the chosen weights, beside the majority class and no training."""
        measured = "test" if "test" in self.sets else "validation"
        targets = {name: [example.target for example in examples] for name, (examples, _) in self.sets.items()}
        return {
            "validation": self._scores("validation", trainable, parts.frozen),
            "test": self._scores("test", trainable, parts.frozen) if "test" in self.sets else None,
            "baselines": {
                "split": measured,
                "majority": metrics.majority(targets["train"], targets[measured]),
                "untrained": self._scores(measured, parts.trainable, parts.frozen),
            },
        }


class PretrainingRun:
    """The data of pre-training; validation is the loss on text windows of another seed."""

    select_best = False

    def __init__(self, run: Run, assembly: Assembly, parts: Split):
        settings = run.pretraining
        assert settings is not None
        folder = assembly.tokenizer_folder
        self.data = PretrainingData(settings, folder, run.batch_size, run.seed, run.steps)
        held_out = settings.model_copy(update={"stages": settings.stages[-1:]})
        sample = PretrainingData(held_out, folder, run.batch_size, run.seed + 1, 32)
        self._loss = mean_loss(parts, [sample.batch(i) for i in range(0, 32, 4)])

    def describe(self) -> str:
        """Say in a line what the data are."""
        return f"pre-training: shapes {', '.join(f'{t}/{u}' for t, u in self.data.shapes)}"

    def batches(self, first: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches from step `first` on."""
        index, count = sharding.process_share()

        def share(step: int) -> dict[str, np.ndarray]:
            return {name: np.split(rows, count)[index] for name, rows in self.data.batch(step).items()}

        source = grain.MapDataset.source(_Numbers(len(self.data))).slice(slice(first, None)).map(share)
        return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))

    def validate(self, trainable: Any, frozen: Any) -> tuple[dict[str, float], float]:
        """Return the validation loss, and its negative as the score."""
        loss = self._loss(trainable, frozen)
        return {"loss": loss}, -loss

    def result(self, trainable: Any, parts: Split) -> dict[str, Any]:
        """Return the final loss."""
        return {"validation": self.validate(trainable, parts.frozen)[0], "test": None}


class _Numbers:
    """0 to n - 1 as a data source."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index
