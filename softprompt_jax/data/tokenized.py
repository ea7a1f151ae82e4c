"""Texts to token ids, once: checked against the limits and the vocabulary, and cached on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from softprompt_jax.config import UserError
from softprompt_jax.data.task import Example
from softprompt_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizedSet:
    """Token ids of a split, ragged: example i is `inputs[input_offsets[i]:input_offsets[i + 1]]`, EOS included.

    `tasks` numbers the task of each example, where there are several.
    """

    inputs: Int[np.ndarray, " input_tokens"]
    input_offsets: Int[np.ndarray, " examples_and_one"]
    targets: Int[np.ndarray, " target_tokens"]
    target_offsets: Int[np.ndarray, " examples_and_one"]
    vocabulary_rows: int
    truncated_inputs: int = 0
    truncated_targets: int = 0
    tasks: Int[np.ndarray, " examples"] | None = None

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

    @property
    def lengths(self) -> Int[np.ndarray, "examples 2"]:
        """Tokens of each input and target."""
        return np.stack([self.input_lengths, self.target_lengths], axis=1)

    def first(self, count: int | None) -> TokenizedSet:
        """Return the first examples, or all."""
        end = None if count is None else count + 1
        return dataclasses.replace(
            self, input_offsets=self.input_offsets[:end], target_offsets=self.target_offsets[:end]
        )

    def input(self, index: int | np.integer) -> Int[np.ndarray, " T"]:
        """Return the ids of one input."""
        return self.inputs[self.input_offsets[index] : self.input_offsets[index + 1]]

    def target(self, index: int | np.integer) -> Int[np.ndarray, " U"]:
        """Return the ids of one target."""
        return self.targets[self.target_offsets[index] : self.target_offsets[index + 1]]


def concatenate(sets: Sequence[TokenizedSet]) -> TokenizedSet:
    """Return the examples of several tasks as one set, numbered by task."""
    lengths = np.concatenate([part.lengths for part in sets])
    offsets = np.concatenate([np.zeros((1, 2), np.int64), lengths.cumsum(0)])
    return TokenizedSet(
        np.concatenate([part.inputs for part in sets]),
        offsets[:, 0],
        np.concatenate([part.targets for part in sets]),
        offsets[:, 1],
        sets[0].vocabulary_rows,
        tasks=np.repeat(np.arange(len(sets), dtype=np.int32), [len(part) for part in sets]),
    )


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
    """Turn examples into token ids in chunks, so that a generator of a million examples needs little memory.

    Limits include EOS. A longer input is cut before its EOS and counted; a longer target is a UserError
    unless `truncate_targets`. An id of `vocabulary_rows` or more is a UserError, since it would become a
    prompt row. With `cache`, a folder, the result is stored under a hash of all that it depends on: the texts, the
    tokenizer and the limits. Examples are then read twice. A damaged file is written again.
    """
    if max_input_tokens < 1 or max_target_tokens < 1:
        raise UserError(
            f"max_input_tokens {max_input_tokens}, max_target_tokens {max_target_tokens}: expected at least 1 each"
        )
    path = None
    if cache is not None:
        examples = list(examples) if isinstance(examples, Iterator) else examples
        limits = (FORMAT, vocabulary_rows, max_input_tokens, max_target_tokens, input_eos, truncate_targets)
        path = cache / f"{_digest(examples, tokenizer, limits)}.npz"
        if (stored := _read(path)) is not None:
            return stored

    inputs, targets = _Side(), _Side()
    for chunk in _chunks(examples, 4096):
        end = [tokenizer.eos_id] if input_eos else []
        for example, example_ids in zip(chunk, _ids(chunk, 0, tokenizer, end), strict=True):
            inputs.add(example_ids, max_input_tokens, end, example.cut[0])
        first, end = len(targets.lengths), [tokenizer.eos_id]
        for number, example_ids in enumerate(_ids(chunk, 1, tokenizer, end)):
            if (len(example_ids) > max_target_tokens or chunk[number].cut[1]) and not truncate_targets:
                found = f"more than {len(example_ids)}" if chunk[number].cut[1] else str(len(example_ids))
                raise UserError(
                    f"example {first + number}: the target {chunk[number].target[:40]!r} has {found} "
                    f"tokens with EOS; expected at most {max_target_tokens}; raise max_target_tokens"
                )
            targets.add(example_ids, max_target_tokens, end, chunk[number].cut[1])
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

    def add(self, ids: list[int], limit: int, end: list[int], cut: bool) -> None:
        self.truncated += len(ids) > limit or cut
        self.rows.append(ids if len(ids) <= limit else ids[: limit - len(end)] + end)
        self.lengths.append(len(self.rows[-1]))

    def flush(self) -> None:
        self.chunks.append(np.fromiter(itertools.chain.from_iterable(self.rows), np.int32))
        self.rows = []

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(self.chunks), np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])


def _ids(chunk: list[Example], side: int, tokenizer: Tokenizer, end: list[int]) -> Iterator[list[int]]:
    """Yield the ids of each example's input (0) or target (1), its own or those of its text with `end`."""
    texts = [(example.input, example.target)[side] for example in chunk if example.ids is None]
    encoded = iter(tokenizer.encode_batch(texts))
    for example in chunk:
        yield [*next(encoded), *end] if example.ids is None else example.ids[side]


def _chunks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    iterator = iter(examples)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _digest(examples: Iterable[Example], tokenizer: Tokenizer, limits: tuple) -> str:
    digest = hashlib.sha256(f"{tokenizer.fingerprint} {limits}".encode())
    for example in examples:
        for text in (example.input, example.target):
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(encoded) + encoded)
        if example.ids is not None:
            digest.update(repr((example.ids, example.cut)).encode())
    return digest.hexdigest()[:32]


def _read(path: Path) -> TokenizedSet | None:
    """Read a stored set; None if there is none or it is damaged (the file has a checksum for each array)."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            values: dict[str, Any] = {name: stored[name] for name in _FIELDS}
    except Exception:  # zipfile and NumPy raise nearly anything for a damaged file
        return None
    for name, value in values.items():
        values[name] = value if value.ndim else int(value)
    return TokenizedSet(**values)


def _write(path: Path, tokenized: TokenizedSet) -> None:
    """Write the file in one step, since several processes may do so at the same time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.savez(file, **{name: getattr(tokenized, name) for name in _FIELDS})
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be written ({error.strerror}); expected a writable cache folder"
        ) from None


FORMAT = 2  # of stored sets: another number makes all of them anew
_FIELDS = tuple(name for name in TokenizedSet.__dataclass_fields__ if name != "tasks")
