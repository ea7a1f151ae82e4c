"""Texts to token ids, once: checked against the limits and the vocabulary, and cached on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from softprompt_jax.config import UserError
from softprompt_jax.data.task import Example
from softprompt_jax.data.tokenizer import PLAIN, T5_FORMAT, TextFormat, Tokenizer
from softprompt_jax.files import written_whole


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
    form: TextFormat = T5_FORMAT

    def __len__(self) -> int:
        return len(self.input_offsets) - 1

    @property
    def target_lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each target."""
        return np.diff(self.target_offsets)

    @property
    def lengths(self) -> Int[np.ndarray, "examples 2"]:
        """Tokens of each input and target."""
        return np.stack([np.diff(self.input_offsets), self.target_lengths], axis=1)

    @property
    def has_one_target(self) -> bool:
        """Whether all examples have the same target."""
        lengths = self.target_lengths
        rows = self.targets.reshape(len(self), -1) if (lengths == lengths[0]).all() else None
        return rows is not None and bool((rows == rows[0]).all())

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
        form=sets[0].form,
    )


def tokenize(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    vocabulary_rows: int,
    max_input_tokens: int,
    max_target_tokens: int,
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
        limits = (FORMAT, vocabulary_rows, max_input_tokens, max_target_tokens, truncate_targets)
        if tokenizer.form != T5_FORMAT:
            limits = (*limits, tokenizer.form)
        if tokenizer.form != T5_FORMAT or tokenizer.text != PLAIN:
            limits = (*limits, tokenizer.begin, tokenizer.end, tokenizer.target_prefix, tokenizer.text.cut)
        path = cache / f"{_digest(examples, tokenizer, limits)}.npz"
        if (stored := _read(path)) is not None:
            return dataclasses.replace(stored, form=tokenizer.form)

    inputs = _Side(0, max_input_tokens, tokenizer)
    targets = _Side(1, max_target_tokens, tokenizer, truncate_targets)
    remaining = iter(examples)
    while chunk := list(itertools.islice(remaining, 4096)):
        inputs.add(chunk)
        targets.add(chunk)
    if not inputs.lengths:
        raise UserError("no examples to tokenise; expected at least one; check the split")
    if 0 in inputs.lengths:
        raise UserError(
            f"example {inputs.lengths.index(0)}: the input is empty; expected text; complete or drop the row"
        )
    counts = vocabulary_rows, inputs.truncated, targets.truncated
    result = TokenizedSet(*inputs.arrays(), *targets.arrays(), *counts, form=tokenizer.form)
    largest = int(max(result.inputs.max(), result.targets.max()))
    if largest >= vocabulary_rows:
        piece = tokenizer.pieces[largest] if largest < tokenizer.size else "?"
        raise UserError(
            f"{tokenizer.source}: the tokenizer does not fit the model: it gives the id {largest} ({piece!r}); "
            f"expected ids under {vocabulary_rows}, the rows of the embedding; use the backbone's own tokenizer"
        )
    if path is not None:
        with written_whole(path, shared=True) as part:
            np.savez(part, allow_pickle=False, **{name: getattr(result, name) for name in _FIELDS})
    return result


class _Side:
    """The ids of one side, inputs (0) or targets (1), gathered in one array per chunk."""

    def __init__(self, side: int, limit: int, tokenizer: Tokenizer, truncate: bool = True) -> None:
        self.side, self.limit, self.tokenizer, self.truncate = side, limit, tokenizer, truncate
        self.chunks: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.truncated = 0

    def add(self, chunk: list[Example]) -> None:
        rows, end = [], [self.tokenizer.eos_id] if self.side else [*self.tokenizer.end]
        for example, ids in zip(chunk, token_ids(chunk, self.side, self.tokenizer, end), strict=True):
            too_long, cut = len(ids) > self.limit, example.cut[self.side]
            if (too_long or cut) and not self.truncate:
                raise UserError(
                    f"example {len(self.lengths) + len(rows)}: the target {example.target[:40]!r} has "
                    f"{'more than ' * cut}{len(ids)} tokens with EOS; expected at most {self.limit}; "
                    "raise max_target_tokens"
                )
            self.truncated += too_long or cut
            if too_long:
                ids = [*ids[: self.limit - 1], *end] if self.side else self.tokenizer.cut_input(ids, self.limit)
            rows.append(ids)
        self.lengths += map(len, rows)
        self.chunks.append(np.fromiter(itertools.chain.from_iterable(rows), np.int32))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(self.chunks), np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])


def token_ids(chunk: Sequence[Example], side: int, tokenizer: Tokenizer, end: list[int]) -> Iterator[list[int]]:
    """Yield the ids of each example's input (0) or target (1), its own or those of its text with `end`."""
    begin, prefix = ((), tokenizer.target_prefix) if side else (tokenizer.begin, "")
    texts = [(example.input, example.target)[side] for example in chunk if example.ids is None]
    encoded = iter(tokenizer.encode_batch([prefix + text for text in texts]))
    for example in chunk:
        yield [*begin, *next(encoded), *end] if example.ids is None else example.ids[side]


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
            values = {name: stored[name] for name in _FIELDS}
    except Exception:  # zipfile and NumPy raise nearly anything for a damaged file
        return None
    found: dict[str, Any] = {name: value if value.ndim else int(value) for name, value in values.items()}
    return TokenizedSet(**found)


FORMAT = 2  # of stored sets: another number makes all of them anew
_FIELDS = tuple(name for name in TokenizedSet.__dataclass_fields__ if name not in ("tasks", "form"))
