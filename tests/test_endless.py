"""Batches of a split without end: windows of it in buckets, and the same ones from any step on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from softprompt_jax.config import UserError
from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.data.streaming import StreamBatches
from softprompt_jax.data.task import Example
from softprompt_jax.data.tokenized import tokenize
from softprompt_jax.data.tokenizer import _Bytes

PROMPT = PromptLayout(np.arange(400, 403))
TOKENIZER = _Bytes("bytes")


def read(first: int, end: int | None = None):
    for number in itertools.islice(itertools.count(first), None if end is None else end - first):
        yield Example(f"{number} " + "x" * (7 * number % 23), "y" * (1 + number % 3))


def tokenized(examples):
    return tokenize(examples, TOKENIZER, 400, 32, 8)


def batches(source=read, size: int = 4, **changes) -> StreamBatches:
    first = tokenized(itertools.islice(read(0), 8 * size))
    return StreamBatches(source, tokenized, first, size, 5, PROMPT, largest=(32, 8), **changes)


def numbers(batch) -> list[int]:
    rows = [[t - 3 for t in row[3:] if t > 3] for row in batch["encoder_tokens"].tolist()]
    return [int(bytes(row).decode().split()[0]) for row in rows]


def same(first, second) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_every_window_holds_its_examples_once_behind_their_prompt():
    made = list(itertools.islice(batches().from_step(), 24))
    for window in range(3):
        found = [number for batch in made[8 * window : 8 * window + 8] for number in numbers(batch)]
        assert sorted(found) == list(range(32 * window, 32 * window + 32))
        assert found != sorted(found)
    assert all((batch["encoder_tokens"][:, :3] == PROMPT.before).all() for batch in made)
    assert {batch["encoder_tokens"].shape for batch in made} <= {(4, shape[0]) for shape in batches().shapes}
    assert len(batches().shapes) <= 4


def test_the_batches_from_a_step_on_are_those_of_the_whole_stream():
    whole = list(itertools.islice(batches().from_step(), 21))
    for step in (5, 8, 17):
        asked = []

        def counted(first, asked=asked):
            asked.append(first)
            return read(first)

        rest = list(itertools.islice(batches(counted).from_step(step), 21 - step))
        for found, expected in zip(rest, whole[step:], strict=True):
            same(found, expected)
        assert asked == [step // 8 * 32]  # the windows before it are skipped, not batched


def test_multihost_share_the_rows_of_each_batch():
    whole = next(batches().from_step(3))
    parts = [next(batches(process_index=index, process_count=2).from_step(3)) for index in range(2)]
    same(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


def test_a_stream_that_ends_is_one_line():
    stream = batches(lambda first: read(first, 40)).from_step()
    with pytest.raises(UserError, match="the stream ended after 40 examples; expected one without end"):
        list(stream)
