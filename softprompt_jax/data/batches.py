"""Token ids to batches: plan the order, bucket by length or pack, put the prompt in front.

A batch is a dict of int32 arrays (B rows, T encoder and U decoder positions). Padding is 0 for a T5, -1 for models
whose vocabulary has 0 as a word; segments are 0 there:

    encoder_tokens    [B, T]  text, EOS, padding; prompt ids (if any) before the text or around it
    decoder_inputs    [B, U]  prompt ids (if any stand there), targets shifted right behind the first input: a 0, or
                              the last token of `encoder_tokens` for decoder-only models
    decoder_targets   [B, U]  target, EOS, padding, which has no weight in the loss
    encoder_segments  [B, T]  in packed rows: 1, 2, ... for the examples of a row, 0 for padding
    decoder_segments  [B, U]  the same numbers; a batch without segments has one example a row

The order is a pure function of (seed, epoch, lengths) and the position is one integer, the step, so
that any process can compute any batch at any time and resuming replays nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from softprompt_jax.config import UserError
from softprompt_jax.data.buckets import Shape, batch_plan, choose_shapes, fitting_shape
from softprompt_jax.data.packing import Packing, Rows, choose_row_shape, pack
from softprompt_jax.data.prompt_layout import NO_PROMPT, PromptLayout
from softprompt_jax.data.tokenized import TokenizedSet

Batch = dict[str, np.ndarray]
Draw = Callable[[int, np.random.Generator], Int[np.ndarray, " chosen"]]  # the shuffled examples of an epoch


class TrainBatches:
    """Training batches without end: any step at random, or an iterator from a step on.

    `layout` says which prompt ids stand around the texts of each task. `batch_size` B is the global one; a process gets
    rows `process_index * B / process_count` onwards of each batch. `draw` gives the examples of an epoch (default: all
    of them, shuffled).

    With `packing` a batch has as many rows (a multiple of `parts`) as hold about `batch_size` examples, and empty
    ones up to a multiple of `rows_multiple`, so that devices and processes do not change what a step sees. `shapes`
    lists every (T, U) that occurs, prompt included; `examples_per_batch` and `padding_share`, of empty slots among
    those for text, are those of the first epoch.
    """

    def __init__(
        self,
        tokenized: TokenizedSet,
        batch_size: int,
        seed: int,
        layout: PromptLayout = NO_PROMPT,
        window: int = 64,
        max_shapes: int = 4,
        packing: Packing | None = None,
        parts: int = 1,
        rows_multiple: int = 1,
        draw: Draw | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._tokenized, self._layout = tokenized, layout
        self.batch_size, self.seed, self.window, self._packing = batch_size, seed, window, packing
        self._draw = draw or (lambda epoch, random: random.permutation(len(tokenized)))
        prompt = np.array(layout.lengths)
        self._lengths = tokenized.lengths + prompt
        if packing is not None:
            self.shapes = [choose_row_shape(self._lengths, packing)]
            first = self._packed(self._order(0)[0])
            self._filled = max(1, round(batch_size * len(first) / len(first.ids) / parts)) * parts
            multiple = int(np.lcm(rows_multiple, process_count))
            self.rows = -(-self._filled // multiple) * multiple
            self.batches_per_epoch = max(1, len(first) // self._filled)
        else:
            self.rows = self._filled = batch_size
        self._local = local_rows(self.rows, process_index, process_count)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan)
        first = self._epoch(0)
        if packing is None:
            self.batches_per_epoch = len(first) // self.rows
            needed = self._lengths[first.ids].reshape(-1, self.rows, 2).max(1)
            shapes = choose_shapes(needed - prompt, tokenized.lengths.max(0), max_shapes)
            self.shapes = [(text + int(prompt[0]), target + int(prompt[1])) for text, target in shapes]
            padded = sum(sum(fitting_shape(self.shapes, pair)) for pair in needed) * self.rows
        else:
            padded = self.batches_per_epoch * self.rows * sum(self.shapes[0])
        self.examples_per_batch = len(first.ids) / self.batches_per_epoch
        prompt_rows = len(first.ids) * layout.row_count(tokenized.vocabulary_rows)
        self.padding_share = float(1 - (self._lengths[first.ids].sum() - prompt_rows) / (padded - prompt_rows))

    def _order(self, epoch: int) -> tuple[Int[np.ndarray, " chosen"], np.random.Generator]:
        """The examples of an epoch, shuffled, and the generator that has shuffled them."""
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        return self._draw(epoch, random), random

    def _packed(self, order: Int[np.ndarray, " chosen"]) -> Rows:
        if len(order) < self.batch_size:
            order = np.resize(order, self.batch_size)
        return pack(order, self._lengths, self.shapes[0], self.window * self.batch_size)

    def _plan(self, epoch: int) -> Rows:
        """The rows of an epoch, batch after batch; what fills no batch, other examples every epoch, is left out.

        Every epoch has as many batches as the first; one that packs better takes some rows twice.
        """
        order, random = self._order(epoch)
        if self._packing is None:
            ids = batch_plan(order, self._lengths, self.batch_size, random, self.window).reshape(-1)
            return Rows(ids, np.arange(len(ids) + 1))
        rows = self._packed(order)
        return rows.take(np.resize(random.permutation(len(rows)), self.batches_per_epoch * self._filled))

    def row_ids(self, step: int) -> list[Int[np.ndarray, " _"]]:
        """Return the example ids of each row of the whole batch of a step, the same in every process."""
        epoch, index = divmod(step, self.batches_per_epoch)
        rows = self._epoch(epoch)
        filled = [rows[row] for row in range(index * self._filled, (index + 1) * self._filled)]
        return filled + [np.zeros(0, np.int64)] * (self.rows - self._filled)

    def shape(self, step: int) -> Shape:
        """Return the (T, U) of the batch of a step."""
        if self._packing is not None:
            return self.shapes[0]
        return fitting_shape(self.shapes, self._lengths[np.concatenate(self.row_ids(step))].max(0))

    def batch(self, step: int) -> Batch:
        """Return this process's rows of the batch of a step."""
        rows, packed = self.row_ids(step)[self._local], self._packing is not None
        return collate(self._tokenized, rows, self.shape(step), self._layout, packed)

    def from_step(self, step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches from a step on, prepared ahead by a thread."""
        import grain

        batches = grain.MapDataset.range(step, sys.maxsize).map(self.batch)
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def evaluation_batches(
    tokenized: TokenizedSet,
    batch_size: int,
    layout: PromptLayout = NO_PROMPT,
    shapes: list[Shape] | None = None,
) -> Iterator[tuple[Batch, Int[np.ndarray, " B"]]]:
    """Yield (batch, example ids) over every example once, longest first, so that memory runs out early or never.

    The last batch is filled with rows of id -1 that repeat an input and have no targets: they weigh
    nothing in a loss, and whoever decodes them drops them. `shapes` (of text, smallest first) are chosen for this set
    unless given.
    """
    order = np.argsort(-tokenized.lengths.sum(1), kind="stable")
    ids = np.full((-(-len(order) // batch_size), batch_size), -1, np.int64)
    ids.reshape(-1)[: len(order)] = order
    needed = tokenized.lengths[np.where(ids < 0, ids[:, :1], ids)].max(1)
    shapes = shapes or choose_shapes(needed, tokenized.lengths.max(0))
    for batch_ids, pair in zip(ids, needed, strict=True):
        text, target = fitting_shape(shapes, pair)
        chosen = np.where(batch_ids < 0, batch_ids[0], batch_ids)
        shape = text + layout.lengths[0], target + layout.lengths[1]
        batch = collate(tokenized, chosen[:, None], shape, layout)
        for name in ("decoder_inputs", "decoder_targets"):
            batch[name][batch_ids < 0] = tokenized.form.padding
        yield batch, batch_ids


def collate(
    tokenized: TokenizedSet,
    rows: Sequence[Int[np.ndarray, " _"]] | Int[np.ndarray, "B segments"],
    shape: Shape,
    layout: PromptLayout,
    packed: bool = False,
) -> Batch:
    """Return the batch of these rows of examples, padded to `shape`, the (T, U) with prompts."""
    padding, start_id = tokenized.form.padding, tokenized.form.start
    tokens, segments = np.full((len(rows), shape[0]), padding, np.int32), np.zeros((len(rows), shape[0]), np.int32)
    inputs, targets = np.full((2, len(rows), shape[1]), padding, np.int32)
    target_segments = np.zeros((len(rows), shape[1]), np.int32)
    for row, ids in enumerate(rows):
        start, target_start = 0, 0
        for segment, index in enumerate(ids, start=1):
            task = 0 if tokenized.tasks is None else int(tokenized.tasks[index])
            encoder, target = layout.around(tokenized.input(index), task), tokenized.target(index)
            end = start + len(encoder)
            tokens[row, start:end], segments[row, start:end] = encoder, segment
            first = target_start + layout.lengths[1]
            target_end = first + len(target)
            inputs[row, target_start:first] = layout.before_decoder(task)
            inputs[row, first] = encoder[-1] if start_id is None else start_id
            inputs[row, first + 1 : target_end + 1] = target[: shape[1] - first - 1]
            targets[row, first:target_end], target_segments[row, target_start:target_end] = target, segment
            start, target_start = end, target_end
    batch = {"encoder_tokens": tokens, "decoder_inputs": inputs, "decoder_targets": targets}
    return batch | {"encoder_segments": segments, "decoder_segments": target_segments} if packed else batch


def examples_in(batch: Batch) -> int:
    """Return the number of examples in a batch, packed or not."""
    segments = batch.get("encoder_segments")
    return len(batch["encoder_tokens"]) if segments is None else int(segments.max(1).sum())


class BatchCounts(NamedTuple):
    """What stands in the slots of a batch, encoder and decoder together; a number, or [N] for N runs."""

    text: Any  # tokens of inputs and targets
    prompt: Any  # rows of prompts
    slots: Any  # all positions, empty ones included
    examples: Any

    @property
    def padding(self) -> Any:
        """The share of empty slots among those that no prompt row takes."""
        return 1 - self.text / (self.slots - self.prompt)


def count_slots(batch: Batch, vocabulary_rows: int, padding: int = 0) -> BatchCounts:
    """Count what a batch holds, packed or not; ids of `vocabulary_rows` and more are prompt rows."""
    tokens, inputs, targets = (batch[name] for name in ("encoder_tokens", "decoder_inputs", "decoder_targets"))
    in_encoder = int(np.count_nonzero(tokens >= vocabulary_rows))
    text = int(np.count_nonzero(tokens > padding)) - in_encoder + int(np.count_nonzero(targets > padding))
    prompt = in_encoder + int(np.count_nonzero(inputs >= vocabulary_rows))
    return BatchCounts(text, prompt, tokens.size + targets.size, examples_in(batch))


def local_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """Return which rows of a batch are a process's own."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size}: cannot be shared by {process_count} processes; expected a positive multiple"
        )
    local = batch_size // process_count
    return slice(process_index * local, (process_index + 1) * local)
