"""Our side: `make_step` of softprompt_jax, fed by its own batches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from worker import serve
from workload import LEARNING_RATE, PROMPT_LENGTH, WEIGHT_DECAY, Workload, systematic_sample

from softprompt_jax import load_backbone
from softprompt_jax.assembly import layout_of, with_settings
from softprompt_jax.cli.allocator import keep_freed_memory
from softprompt_jax.data.batches import TrainBatches, collate
from softprompt_jax.data.packing import Packing
from softprompt_jax.data.tokenized import TokenizedSet
from softprompt_jax.data.tokenizer import T5_FORMAT, TextFormat
from softprompt_jax.methods import leaves, split
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.optim import optimizers
from softprompt_jax.run import Run
from softprompt_jax.training.step import make_step


def of_folder(folder: str, dtype: str, variant: str, threads: int) -> Ours:
    """Load a side; `variant`: scan (the default settings), unroll, halves or quarters: unrolled, in parts."""
    backbone = load_backbone(folder, dtype)
    model = with_settings(backbone.model, unroll=variant != "scan")
    accumulate = {"halves": 2, "quarters": 4}.get(variant, 1)
    return Ours(model, Workload.read(folder), backbone.text_format, dtype=dtype, accumulate=accumulate)


class Ours:
    """A training step of a model, with these settings of a run."""

    def __init__(self, model: LanguageModel, workload: Workload, form: TextFormat = T5_FORMAT, **settings: Any):
        self.workload, self.form = workload, form
        attach_rows(model, workload.prompt(model.settings.d_model))
        self.layout = layout_of(model)
        optimizer = optimizers.AdamW(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        fixed = {"task": "sentiment_movie", "dropout": 0.0, "z_loss": 0.0, "loss": "mean", "optimizer": optimizer}
        run = Run(**fixed, batch_size=workload.batch_size, **settings)
        parts = split(model)
        optimizer = optimizers.build(run.optimizer, run.schedule.build(LEARNING_RATE, 1), leaves(model))
        self.function, self.frozen = make_step(run, parts, optimizer), parts.frozen
        trainable = jax.tree.map(jnp.copy, parts.trainable)
        state = {"trainable": trainable, "optimizer": optimizer.init(trainable), "step": jnp.zeros((), jnp.int32)}
        self.device = jax.local_devices()[0]  # said, as in a run: what a step returns is of this kind, and compiled for
        self.state = jax.device_put(state, self.device)
        self.key = jax.random.key(0)

    def step(self, batch: dict[str, np.ndarray]) -> float:
        """Take one optimizer step and return the loss before it."""
        self.state, measured = self.function(self.state, self.frozen, batch, self.key)
        return float(measured["loss"])

    def warm_up(self, batches: list[dict[str, np.ndarray]]) -> None:
        """Compile every shape, and leave the state as it was."""
        kept = jax.tree.map(np.asarray, self.state)
        for batch in {
            batch["encoder_tokens"].shape + batch["decoder_inputs"].shape: batch for batch in batches
        }.values():
            self.step(batch)
        self.state = jax.device_put(kept, self.device)

    def batches(self, case: str, count: int) -> tuple[list[dict[str, np.ndarray]], float]:
        """Return `count` batches and the share of padding in a whole epoch."""
        size = self.workload.batch_size
        if case == "fixed":
            tokenized = self._tokenized([pair for batch in self.workload.fixed(count) for pair in batch])
            return [self._padded(tokenized, np.arange(size) + i * size) for i in range(count)], 0.0
        tokenized = self._tokenized(self.workload.uneven)
        if case == "check":
            return [self._padded(tokenized, np.arange(size))], 0.0
        # bucketed: 12 shapes, as runs from 3,000 steps have; bucketed-4: short ones; packed-512: rows of 512 positions
        kind, _, number = case.partition("-")
        shapes = int(number or 12) if kind == "bucketed" else 12
        packing = Packing(length=int(number) if number else None) if kind == "packed" else None
        plan = TrainBatches(tokenized, size, 0, self.layout, max_shapes=shapes, packing=packing)
        epoch = [plan.batch(step) for step in range(plan.batches_per_epoch)]
        if case == "padded":
            epoch = [self._padded(tokenized, np.concatenate(plan.row_ids(step))) for step in range(len(epoch))]
        real = sum(
            (b[side] != self.form.padding).sum() for b in epoch for side in ("encoder_tokens", "decoder_targets")
        )
        sizes = np.array([b["encoder_tokens"].size + b["decoder_targets"].size for b in epoch])
        return [epoch[i] for i in systematic_sample(sizes, count)], float(1 - real / sizes.sum())

    def _padded(self, tokenized: TokenizedSet, ids: np.ndarray) -> dict[str, np.ndarray]:
        shape = PROMPT_LENGTH + self.workload.input_tokens, self.workload.target_tokens
        return collate(tokenized, ids[:, None], shape, self.layout)

    def _tokenized(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> TokenizedSet:
        inputs, targets = zip(*pairs, strict=True)
        sides = []
        for rows in (inputs, targets):
            sides += [np.concatenate(rows), np.concatenate([[0], np.cumsum([len(row) for row in rows])])]
        return TokenizedSet(*sides, self.workload.vocabulary_rows, form=self.form)


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    serve(of_folder)
