"""Token ids to batches: plan the order, bucket by length, put the prompt in front.

A batch is a dict of int32 arrays, 0 being padding (B rows, T encoder and U decoder positions):

    encoder_tokens   [B, T]  text, EOS, padding; prompt ids (if any) before the text or around it
    decoder_inputs   [B, U]  prompt ids (if any stand there), targets shifted right behind a 0
    decoder_targets  [B, U]  target, EOS, padding; a 0 has no weight in the loss

Packed batches will add `encoder_segments` [B, T] and `decoder_segments` [B, U] (1, 2, ... per
example of a row, 0 padding); a batch without them has one segment a row.

The order is a pure function of (seed, epoch, lengths) and the position is one integer, the step, so
that any process can compute any batch at any time and resuming replays nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from softprompt_jax.config import UserError
from softprompt_jax.placement import Placement
from softprompt_jax.tasks.buckets import Shape, batch_plan, choose_shapes, fitting_shape
from softprompt_jax.tasks.tokenized import TokenizedSet

Batch = dict[str, np.ndarray]
PromptIds = Placement | np.ndarray | None
EOS = 1  # of every T5


class TrainBatches:
    """Training batches without end: any step at random, or an iterator from a step on.

    `prompt_ids` [P] (ids of `vocabulary_rows` and more) go before every text, or [examples, P] before
    each its own, or where a `Placement` says. `batch_size` B is the global one; a process gets rows
    `process_index * B / process_count`
    onwards of each batch. `shapes` lists every (T, U) that occurs, prompt included; `padding_share` is the
    share of padding among all tokens of the first epoch.
    """

    def __init__(
        self,
        tokenized: TokenizedSet,
        batch_size: int,
        seed: int,
        prompt_ids: PromptIds = None,
        window: int = 64,
        max_shapes: int = 4,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._rows = _local_rows(batch_size, process_index, process_count)
        self._tokenized, self._prompts = tokenized, _prompts(tokenized, prompt_ids)
        self.batch_size, self.seed, self.window = batch_size, seed, window
        self._lengths = tokenized.input_lengths + tokenized.target_lengths
        self._plan = functools.lru_cache(maxsize=2)(
            lambda epoch: batch_plan(self._lengths, self.batch_size, self.seed, epoch, self.window)
        )
        first = self._plan(0)
        self.batches_per_epoch = len(first)
        needed = _needed(tokenized, first)
        self._text_shapes = choose_shapes(needed, _largest(tokenized), max_shapes)
        prompt_length, decoder_length = self._prompts.lengths
        self.shapes = [(prompt_length + text, decoder_length + target) for text, target in self._text_shapes]
        prompt_length += decoder_length
        padded = sum(sum(fitting_shape(self._text_shapes, pair)) + prompt_length for pair in needed) * batch_size
        real = self._lengths[first].sum() + first.size * prompt_length
        self.padding_share = float(1 - real / padded)

    def example_ids(self, step: int) -> Int[np.ndarray, " B"]:
        """Return the example ids of the whole batch of a step, the same in every process."""
        epoch, index = divmod(step, self.batches_per_epoch)
        return self._plan(epoch)[index]

    def batch(self, step: int) -> Batch:
        """Return this process's rows of the batch of a step."""
        ids = self.example_ids(step)
        shape = fitting_shape(self._text_shapes, _needed(self._tokenized, ids[None])[0])
        return collate(self._tokenized, ids[self._rows], shape, self._prompts)

    def from_step(self, step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches from a step on, prepared ahead by a thread."""
        import grain

        batches = grain.MapDataset.source(_Steps()).slice(slice(step, None)).map(self.batch)
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


class _Steps:
    """0, 1, 2, ... as a data source."""

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        return index


def evaluation_batches(
    tokenized: TokenizedSet,
    batch_size: int,
    prompt_ids: PromptIds = None,
    max_shapes: int = 4,
    process_index: int = 0,
    process_count: int = 1,
    shapes: list[Shape] | None = None,
) -> Iterator[tuple[Batch, Int[np.ndarray, " B"]]]:
    """Yield (batch, example ids) over every example once, longest first, so that memory runs out early or never.

    The last batch is filled with rows of id -1 that repeat an input and have no targets: they weigh
    nothing in a loss, and whoever decodes them drops them. Several processes get their rows of each batch.
    `shapes` (smallest first) are chosen for this set unless given.
    """
    rows = _local_rows(batch_size, process_index, process_count)
    prompts = _prompts(tokenized, prompt_ids)
    order = np.argsort(-(tokenized.input_lengths + tokenized.target_lengths), kind="stable")
    ids = np.full((-(-len(order) // batch_size), batch_size), -1, np.int64)
    ids.reshape(-1)[: len(order)] = order
    needed = _needed(tokenized, np.where(ids < 0, ids[:, :1], ids))
    shapes = shapes or choose_shapes(needed, _largest(tokenized), max_shapes)
    for batch_ids, pair in zip(ids, needed, strict=True):
        local = batch_ids[rows]
        batch = collate(tokenized, np.where(local < 0, batch_ids[0], local), fitting_shape(shapes, pair), prompts)
        for name in ("decoder_inputs", "decoder_targets"):
            batch[name][local < 0] = 0
        yield batch, local


def collate(tokenized: TokenizedSet, ids: Int[np.ndarray, " B"], shape: Shape, prompts: Prompts) -> Batch:
    """Return the batch of these examples, text padded to `shape`; the prompts come on top of it."""
    prompt_length, first = prompts.lengths  # the decoder's first own input
    encoder_tokens = np.zeros((len(ids), prompt_length + shape[0]), np.int32)
    decoder_targets = np.zeros((len(ids), first + shape[1]), np.int32)
    for row, index in enumerate(ids):
        encoder, target = prompts.surround(tokenized.input(index), index), tokenized.target(index)
        encoder_tokens[row, : len(encoder)] = encoder
        decoder_targets[row, first : first + len(target)] = target
    decoder_inputs = np.zeros_like(decoder_targets)
    decoder_inputs[:, :first] = prompts.decoder[ids]
    decoder_inputs[:, first + 1 :] = decoder_targets[:, first:-1]
    return {"encoder_tokens": encoder_tokens, "decoder_inputs": decoder_inputs, "decoder_targets": decoder_targets}


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The ids around each example: before its text, after it, before its decoder input (views where all share them)."""

    before: Int[np.ndarray, "examples _"]
    after: Int[np.ndarray, "examples _"]
    decoder: Int[np.ndarray, "examples _"]

    @property
    def lengths(self) -> Shape:
        """How much longer they make an encoder and a decoder row."""
        return self.before.shape[1] + self.after.shape[1], self.decoder.shape[1]

    def surround(self, text: Int[np.ndarray, " T"], index: int | np.integer) -> Int[np.ndarray, " PT"]:
        """Return an example's encoder ids; what stands after the text stands before its EOS."""
        end = len(text) - int(text[-1] == EOS)
        return np.concatenate([self.before[index], text[:end], self.after[index], text[end:]])


def _prompts(tokenized: TokenizedSet, prompt_ids: PromptIds) -> Prompts:
    """Return what stands around each example."""
    if not isinstance(prompt_ids, Placement):
        if prompt_ids is not None and prompt_ids.size and prompt_ids.min() < tokenized.vocabulary_rows:
            raise ValueError(
                f"prompt id {prompt_ids.min()} is a text id; expected ids from {tokenized.vocabulary_rows} on"
            )
        prompt_ids = Placement(() if prompt_ids is None else prompt_ids)
    parts = (np.asarray(part, np.int32) for part in (prompt_ids.before, prompt_ids.after, prompt_ids.decoder))
    return Prompts(*(np.broadcast_to(part, (len(tokenized), part.shape[-1])) for part in parts))


def _needed(tokenized: TokenizedSet, ids: Int[np.ndarray, "batches B"]) -> Int[np.ndarray, "batches 2"]:
    """The longest input and target of each batch."""
    offsets = tokenized.input_offsets, tokenized.target_offsets
    return np.stack([(side[ids + 1] - side[ids]).max(1) for side in offsets], axis=1)


def _largest(tokenized: TokenizedSet) -> Shape:
    return int(tokenized.input_lengths.max()), int(tokenized.target_lengths.max())


def _local_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size}: cannot be shared by {process_count} processes; expected a positive multiple"
        )
    local = batch_size // process_count
    return slice(process_index * local, (process_index + 1) * local)
