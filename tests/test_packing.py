"""Packed rows: what they hold, what a model computes of them, and that nothing is lost, doubled or mixed."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import ROWS

from softprompt_jax.config import UserError
from softprompt_jax.data.batches import TrainBatches, collate, examples_in
from softprompt_jax.data.packing import Packing, choose_row_shape, pack
from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.data.tokenized import TokenizedSet
from softprompt_jax.methods import split

P = 3


def some_set(count: int = 100, tasks: int = 0, seed: int = 0, longest: int = 30) -> TokenizedSet:
    draw = np.random.default_rng(seed)
    sides = []
    for sizes in (draw.geometric(0.12, count).clip(1, longest), draw.integers(1, 6, count)):
        ids = [np.append(draw.integers(2, ROWS, size - 1), 1) for size in sizes]
        sides += [np.concatenate(ids).astype(np.int32), np.concatenate([[0], np.cumsum(sizes)])]
    return TokenizedSet(*sides, ROWS, tasks=np.arange(count) % tasks if tasks else None)


def lengths_of(count: int) -> np.ndarray:
    """Encoder positions with the prompt, and decoder positions."""
    return some_set(count).lengths + np.array([P, 0])


def layout(tasks: int = 0) -> PromptLayout:
    ids = ROWS + np.arange(max(1, tasks) * P).reshape(-1, P)
    return PromptLayout(ids if tasks else ids[0])


# --------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(("shape", "window"), [((40, 8), 2048), ((64, 16), 50), ((35, 40), 7)])
def test_every_example_stands_in_one_row_that_holds_it(shape, window):
    lengths = lengths_of(300)
    order = np.random.default_rng(1).permutation(300)[:280]
    rows = pack(order, lengths, shape, window)
    assert sorted(rows.ids) == sorted(order)
    for row in range(len(rows)):
        assert len(rows[row]) > 0
        assert (lengths[rows[row]].sum(0) <= shape).all()


def test_rows_are_about_as_few_as_the_tokens_need():
    lengths = lengths_of(2000)
    rows = pack(np.arange(2000), lengths, (64, 40))
    assert len(rows) < 1.03 * lengths[:, 0].sum() / 64


def test_row_shape_holds_the_longest_example_and_binds_on_both_sides_alike():
    lengths = lengths_of(500)
    shape = choose_row_shape(lengths, Packing())
    assert shape[0] == -(-lengths[:, 0].max() // 8) * 8
    cost = {u: len(pack(np.arange(500), lengths, (shape[0], u))) * (shape[0] + u) for u in range(8, 65, 8)}
    assert cost[shape[1]] <= 1.02 * min(cost.values())
    assert choose_row_shape(lengths, Packing(length=100, target_length=9)) == (100, 9)
    with pytest.raises(UserError, match=r"^packing.length: found 20, an example has 33 positions .*; raise packing"):
        choose_row_shape(lengths, Packing(length=20))
    with pytest.raises(UserError, match=r"^packing.target_length: found 4, an example has 5 positions"):
        choose_row_shape(lengths, Packing(target_length=4))


# ------------------------------------------------------------------------------------------ batches


def contents(batch, row: int) -> list[tuple[list[int], list[int], list[int]]]:
    """The examples of a packed row: encoder tokens, decoder inputs, decoder targets of each segment."""
    result = []
    for segment in range(1, batch["encoder_segments"][row].max() + 1):
        encoder = batch["encoder_tokens"][row][batch["encoder_segments"][row] == segment]
        here = batch["decoder_segments"][row] == segment
        result.append(
            (encoder.tolist(), *(batch[f"decoder_{name}"][row][here].tolist() for name in ("inputs", "targets")))
        )
    return result


@pytest.mark.parametrize("tasks", [1, 4])
def test_packed_batches_hold_each_example_with_its_own_prompt_and_start(tasks):
    tokenized = some_set(tasks=tasks)
    train = TrainBatches(tokenized, 16, 0, layout(tasks), packing=Packing(length=48))
    (shape,) = train.shapes
    for step in range(2 * train.batches_per_epoch):
        batch = train.batch(step)
        assert batch["encoder_tokens"].shape == (train.rows, shape[0])
        assert batch["decoder_targets"].shape == (train.rows, shape[1])
        rows = train.row_ids(step)
        assert examples_in(batch) == sum(map(len, rows))
        for row, ids in enumerate(rows):
            expected = []
            for index in ids:
                target = tokenized.target(index).tolist()
                encoder = [*layout(tasks).before[index % tasks], *tokenized.input(index)]
                expected.append((encoder, [0, *target[:-1]], target))
            assert contents(batch, row) == expected
            assert not batch["encoder_tokens"][row][batch["encoder_segments"][row] == 0].any()
            assert not batch["decoder_targets"][row][batch["decoder_segments"][row] == 0].any()


def test_prompts_on_both_sides_of_packed_rows_keep_their_places():
    tokenized = some_set()
    around = PromptLayout(before=(ROWS, ROWS + 1), after=(7, ROWS + 2), decoder=(ROWS + 3, ROWS + 4))
    train = TrainBatches(tokenized, 16, 0, around, packing=Packing(length=48))
    for row, ids in enumerate(train.row_ids(0)):
        expected = []
        for index in ids:
            *text, end = tokenized.input(index).tolist()
            target = tokenized.target(index).tolist()
            encoder = [ROWS, ROWS + 1, *text, 7, ROWS + 2, end]
            expected.append((encoder, [ROWS + 3, ROWS + 4, 0, *target[:-1]], [0, 0, *target]))
        assert contents(train.batch(0), row) == expected


def test_a_batch_has_about_as_many_examples_as_asked_for_and_little_padding():
    tokenized = some_set(3000)
    train = TrainBatches(tokenized, 32, 0, layout(), packing=Packing(length=64))
    batches = [train.batch(step) for step in range(train.batches_per_epoch)]
    counts = [examples_in(batch) for batch in batches]
    assert np.mean(counts) == pytest.approx(32, rel=0.1)
    assert train.examples_per_batch == pytest.approx(np.mean(counts))
    arrays = [batch[name] for batch in batches for name in ("encoder_tokens", "decoder_targets")]
    empty = sum((array == 0).sum() for array in arrays)
    padding = empty / sum((array < ROWS).sum() for array in arrays)
    assert train.padding_share == pytest.approx(padding, abs=1e-12)
    assert empty / sum(array.size for array in arrays) < 0.15
    assert padding < 0.6 * TrainBatches(tokenized, 32, 0, layout()).padding_share


@pytest.mark.parametrize(("count", "batch_size"), [(500, 16), (90, 32)])
def test_an_epoch_has_every_example_at_most_once_and_all_but_a_rest(count, batch_size):
    train = TrainBatches(some_set(count), batch_size, 3, layout(), packing=Packing(length=48))
    seen = set()
    for epoch in range(6):
        steps = range(epoch * train.batches_per_epoch, (epoch + 1) * train.batches_per_epoch)
        rows = [tuple(row) for step in steps for row in train.row_ids(step)]
        twice = len(rows) - len(set(rows))  # an epoch that packs better than the first
        assert twice <= 2
        ids = [index for row in set(rows) for index in row]
        assert len(ids) == len(set(ids))
        assert count - len(ids) < 1.5 * batch_size
        seen |= set(ids)
    assert len(seen) > 0.99 * count


def test_a_set_smaller_than_a_batch_fills_it_by_starting_again():
    train = TrainBatches(some_set(5), 16, 0, layout(), packing=Packing(length=48))
    assert train.batches_per_epoch == 1
    for step in range(3):
        assert sum(map(len, train.row_ids(step))) >= 16
        assert {int(index) for row in train.row_ids(step) for index in row} == set(range(5))


def test_packed_batches_resume_and_are_a_pure_function():
    make = lambda seed: TrainBatches(some_set(), 8, seed, layout(), packing=Packing())  # noqa: E731
    whole = list(itertools.islice(make(3).from_step(0), 30))
    for expected, found in zip(whole[17:], make(3).from_step(17), strict=False):
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name])
    assert any((whole[0][name] != make(4).batch(0)[name]).any() for name in whole[0])


@pytest.mark.parametrize("multiple", [1, 3])
def test_multihost_share_packed_batches_without_overlap_or_loss(multiple):
    options = {"packing": Packing(length=40), "rows_multiple": multiple}
    parts = [TrainBatches(some_set(), 16, 0, layout(), **options, process_index=i, process_count=4) for i in range(4)]
    whole = TrainBatches(some_set(), 16, 0, layout(), packing=Packing(length=40), rows_multiple=4 * multiple)
    assert whole.rows % (4 * multiple) == 0
    alone = TrainBatches(some_set(), 16, 0, layout(), packing=Packing(length=40))
    assert alone.batches_per_epoch == whole.batches_per_epoch
    for step in range(3 * whole.batches_per_epoch):
        for name, array in whole.batch(step).items():
            filled = alone.batch(step)[name]  # devices and processes add rows of padding only
            np.testing.assert_array_equal(array[: len(filled)], filled)
            assert not array[len(filled) :].any()
            np.testing.assert_array_equal(np.concatenate([part.batch(step)[name] for part in parts]), array)


# --------------------------------------------------------------------------------- what a model makes of it


@pytest.mark.parametrize("shape", ["umt5, gated silu", pytest.param("1.0, unequal depths", marks=pytest.mark.slow)])
def test_loss_and_prompt_gradient_equal_those_of_unpacked_rows(shape):
    tasks, tokenized = 2, some_set(24, tasks=2)
    parts = split(tiny.model(prompt=tasks * P, **tiny.SHAPES[shape]))
    train = TrainBatches(tokenized, 10, 0, layout(tasks), packing=Packing(length=48, target_length=16))
    rows = train.row_ids(0)
    assert max(map(len, rows)) > 2
    packed = train.batch(0)
    alone = collate(tokenized, np.concatenate(rows)[:, None], (40, 8), layout(tasks))
    results = [
        tiny.loss_logits_gradient(parts, jax.tree.map(jnp.asarray, batch), z_loss=1e-2, label_smoothing=0.1)
        for batch in (packed, alone)
    ]
    (loss, logits, gradient), (alone_loss, alone_logits, alone_gradient) = results
    assert float(loss) == pytest.approx(float(alone_loss), rel=1e-5)
    expected = alone_gradient["prompt"]["rows"]
    np.testing.assert_allclose(
        gradient["prompt"]["rows"], expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max())
    )
    real = packed["decoder_targets"] > 0
    np.testing.assert_allclose(
        logits[real], alone_logits[alone["decoder_targets"] > 0], atol=1e-5 * np.abs(alone_logits).max()
    )


@pytest.mark.slow
def test_mean_loss_of_a_packed_batch_weighs_every_target_token_alike():
    import test_step

    tokenized = some_set(24)
    parts = test_step.prompted()
    train = TrainBatches(tokenized, 10, 0, layout(), packing=Packing(length=48, target_length=16), rows_multiple=2)
    packed = train.batch(0)
    alone = collate(tokenized, np.concatenate(train.row_ids(0))[:, None], (40, 8), layout(1))
    for batch in (packed, alone):
        for name, array in batch.items():
            batch[name] = jnp.asarray(array)
    # In two parts, whose rows hold unlike numbers of examples and tokens.
    found, loss = test_step.one_step(parts, test_step.run(loss="mean", accumulate=2, batch_size=2), packed)
    expected, alone_loss = test_step.one_step(parts, test_step.run(loss="mean"), alone)
    assert loss == pytest.approx(alone_loss, rel=1e-5)
    np.testing.assert_allclose(found["prompt"]["rows"], expected["prompt"]["rows"], rtol=1e-5, atol=1e-5)
