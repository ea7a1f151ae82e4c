"""Examples to batches: tokenise, plan the order, bucket by length, put the prompt in front.

A batch is a dict of int32 arrays, 0 being padding (B rows, T encoder and U decoder positions):

    encoder_tokens   [B, T]  prompt ids (if any), text, EOS, padding
    decoder_inputs   [B, U]  targets shifted right behind a 0
    decoder_targets  [B, U]  target, EOS, padding; a 0 has no weight in the loss

Packed batches will add `encoder_segments` [B, T] and `decoder_segments` [B, U] (1, 2, ... per
example of a row, 0 padding); a batch without them has one segment a row.

The order is a pure function of (seed, epoch, lengths) and the position is one integer, the step, so
that any process can compute any batch at any time and resuming replays nothing.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from softprompt_jax.config import UserError
from softprompt_jax.tasks.buckets import Shape, batch_plan, choose_shapes, fitting_shape
from softprompt_jax.tasks.task import Example
from softprompt_jax.tasks.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class TokenizedSet:
    """Token ids of a split, ragged: example i is `inputs[input_offsets[i]:input_offsets[i + 1]]`, EOS included."""

    inputs: Int[np.ndarray, " input_tokens"]
    input_offsets: Int[np.ndarray, " examples_and_one"]
    targets: Int[np.ndarray, " target_tokens"]
    target_offsets: Int[np.ndarray, " examples_and_one"]
    vocabulary_rows: int
    truncated_inputs: int = 0
    truncated_targets: int = 0

    def __len__(self) -> int:
        return len(self.input_offsets) - 1

    @property
    def input_lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each input."""
        return np.diff(self.input_offsets)

    @property
    def target_lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each target."""
        return np.diff(self.target_offsets)

    def input(self, index: int | np.integer) -> Int[np.ndarray, " T"]:
        """Return the ids of one input."""
        return self.inputs[self.input_offsets[index] : self.input_offsets[index + 1]]

    def target(self, index: int | np.integer) -> Int[np.ndarray, " U"]:
        """Return the ids of one target."""
        return self.targets[self.target_offsets[index] : self.target_offsets[index + 1]]


# ------------------------------------------------------------------------------------------- tokenise


def tokenize(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    vocabulary_rows: int,
    max_input_tokens: int,
    max_target_tokens: int,
    input_eos: bool = True,
    truncate_targets: bool = False,
    cache: Path | None = None,
) -> TokenizedSet:
    """Turn examples into ids, in chunks, so that a generator of a million examples needs little memory.

    Limits count EOS. A longer input is cut before its EOS and counted; a longer target is a UserError
    unless `truncate_targets`. An id of `vocabulary_rows` or more is a UserError, since it would become a
    prompt row. With `cache`, a folder, the result is stored under a hash of everything it depends on.
    """
    if max_input_tokens < 1 or max_target_tokens < 1:
        raise UserError(
            f"max_input_tokens {max_input_tokens}, max_target_tokens {max_target_tokens}: expected at least 1 each"
        )
    path = None
    if cache is not None:
        examples = list(examples)
        limits = (1, vocabulary_rows, max_input_tokens, max_target_tokens, input_eos, truncate_targets)
        path = cache / f"{_digest(examples, tokenizer, limits)}.npz"
        if path.is_file():
            return _read(path)

    inputs, targets = _Side(), _Side()
    for chunk in _chunks(examples, 4096):
        for example_ids in tokenizer.encode_batch([example.input for example in chunk]):
            inputs.add(example_ids, max_input_tokens, [tokenizer.eos_id] if input_eos else [])
        first = len(targets.lengths)
        for number, example_ids in enumerate(tokenizer.encode_batch([example.target for example in chunk])):
            if len(example_ids) + 1 > max_target_tokens and not truncate_targets:
                raise UserError(
                    f"example {first + number}: the target {chunk[number].target[:40]!r} has {len(example_ids) + 1} "
                    f"tokens with EOS; expected at most {max_target_tokens}; raise max_target_tokens"
                )
            targets.add(example_ids, max_target_tokens, [tokenizer.eos_id])
        inputs.flush()
        targets.flush()
    if not inputs.lengths:
        raise UserError("no examples to tokenise; expected at least one; check the split")
    if 0 in inputs.lengths:
        raise UserError(
            f"example {inputs.lengths.index(0)}: the input is empty; expected text; complete or drop the row"
        )
    result = TokenizedSet(*inputs.arrays(), *targets.arrays(), vocabulary_rows, inputs.truncated, targets.truncated)
    largest = int(max(result.inputs.max(), result.targets.max()))
    if largest >= vocabulary_rows:
        piece = tokenizer.pieces[largest] if largest < tokenizer.size else "?"
        raise UserError(
            f"{tokenizer.source}: the tokenizer does not fit the model: it gives the id {largest} ({piece!r}); "
            f"expected ids under {vocabulary_rows}, the rows of the embedding; use the backbone's own tokenizer"
        )
    if path is not None:
        _write(path, result)
    return result


class _Side:
    """The ids of one side, gathered in one array per chunk."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.chunks: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.truncated = 0

    def add(self, ids: list[int], limit: int, end: list[int]) -> None:
        kept = limit - len(end)
        self.truncated += len(ids) > kept
        self.rows.append(ids[:kept] + end)
        self.lengths.append(len(self.rows[-1]))

    def flush(self) -> None:
        self.chunks.append(np.fromiter(itertools.chain.from_iterable(self.rows), np.int32))
        self.rows = []

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(self.chunks), np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])


def _chunks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    iterator = iter(examples)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _digest(examples: Sequence[Example], tokenizer: Tokenizer, limits: tuple) -> str:
    digest = hashlib.sha256(f"{tokenizer.fingerprint} {limits} {len(examples)}".encode())
    for example in examples:
        for text in (example.input, example.target):
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(encoded) + encoded)
    return digest.hexdigest()[:32]


def _read(path: Path) -> TokenizedSet:
    with np.load(path) as stored:
        values: dict[str, Any] = {name: stored[name] for name in _FIELDS}
    for name, value in values.items():
        values[name] = value if value.ndim else int(value)
    return TokenizedSet(**values)


def _write(path: Path, tokenized: TokenizedSet) -> None:
    """Write at once or not at all: several processes may do so at the same time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.savez(file, **{name: getattr(tokenized, name) for name in _FIELDS})
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be written ({error.strerror}); expected a writable cache folder"
        ) from None


_FIELDS = tuple(TokenizedSet.__dataclass_fields__)

# -------------------------------------------------------------------------------------------- batches


class TrainBatches:
    """Training batches without end: any step at random, or an iterator from a step on.

    `prompt_ids` [P] (ids of `vocabulary_rows` and more) go before every text, or [examples, P] before
    each its own. `batch_size` B is the global one; a process gets rows `process_index * B / process_count`
    onwards of each batch. `shapes` lists every (T, U) that occurs, prompt included; `padding_share` is the
    share of padding among all tokens of the first epoch.
    """

    def __init__(
        self,
        tokenized: TokenizedSet,
        batch_size: int,
        seed: int,
        prompt_ids: Int[np.ndarray, " P"] | Int[np.ndarray, "examples P"] | None = None,
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
        prompt_length = self._prompts.shape[1]
        self.shapes = [(prompt_length + text, target) for text, target in self._text_shapes]
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
    prompt_ids: Int[np.ndarray, " P"] | Int[np.ndarray, "examples P"] | None = None,
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


def collate(
    tokenized: TokenizedSet, ids: Int[np.ndarray, " B"], shape: Shape, prompts: Int[np.ndarray, "examples P"]
) -> Batch:
    """Return the batch of these examples, text padded to `shape`; the prompts come on top of it."""
    prompt_length = prompts.shape[1]
    encoder_tokens = np.zeros((len(ids), prompt_length + shape[0]), np.int32)
    decoder_targets = np.zeros((len(ids), shape[1]), np.int32)
    encoder_tokens[:, :prompt_length] = prompts[ids]
    for row, index in enumerate(ids):
        text, target = tokenized.input(index), tokenized.target(index)
        encoder_tokens[row, prompt_length : prompt_length + len(text)] = text
        decoder_targets[row, : len(target)] = target
    decoder_inputs = np.zeros_like(decoder_targets)
    decoder_inputs[:, 1:] = decoder_targets[:, :-1]
    return {"encoder_tokens": encoder_tokens, "decoder_inputs": decoder_inputs, "decoder_targets": decoder_targets}


def _prompts(tokenized: TokenizedSet, prompt_ids: np.ndarray | None) -> np.ndarray:
    """One row of prompt ids per example (a view where they share one)."""
    ids = np.zeros((0,), np.int32) if prompt_ids is None else np.asarray(prompt_ids, np.int32)
    if ids.size and ids.min() < tokenized.vocabulary_rows:
        raise ValueError(f"prompt id {ids.min()} is a text id; expected ids from {tokenized.vocabulary_rows} on")
    return np.broadcast_to(ids, (len(tokenized), ids.shape[-1]))


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
