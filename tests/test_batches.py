"""The order of batches, their shapes and their contents."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest

from softprompt_jax.config import UserError
from softprompt_jax.data import metrics
from softprompt_jax.data.batches import TrainBatches, count_slots, evaluation_batches
from softprompt_jax.data.buckets import batch_plan, choose_shapes
from softprompt_jax.data.packing import Packing
from softprompt_jax.data.prompt_layout import NO_PROMPT, PromptLayout
from softprompt_jax.data.task import Example, Task
from softprompt_jax.data.tokenized import tokenize
from softprompt_jax.data.tokenizer import Tokenizer

ROWS = 40  # rows of the embedding table
PROMPT = PromptLayout(np.arange(ROWS, ROWS + 5))


class Letters(Tokenizer):
    """One id per letter, from 3 on."""

    def __init__(self):
        pieces = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
        super().__init__("letters", pieces, 0, 1, 2, "letters")
        self.calls = 0

    def encode_batch(self, texts):
        self.calls += 1
        return [[ord(letter) - ord("a") + 3 for letter in text] for text in texts]

    def _text(self, ids):
        return "".join(self.pieces[id_] for id_ in ids)


def planned(lengths, batch_size: int, seed: int, epoch: int, window: int = 64):
    random = np.random.default_rng([seed, epoch])
    pairs = np.stack([lengths, np.ones_like(lengths)], 1)  # of encoder and decoder
    return batch_plan(random.permutation(len(lengths)), pairs, batch_size, random, window)


def some_examples(count: int, seed: int = 0, longest: int = 40) -> list[Example]:
    random = np.random.default_rng(seed)
    lengths = random.geometric(0.12, count).clip(1, longest)
    text = lambda length: "".join(chr(97 + letter) for letter in random.integers(0, 26, length))  # noqa: E731
    return [Example(text(length), text(random.integers(1, 4)), {"id": i}) for i, length in enumerate(lengths)]


def some_set(count: int = 100, **limits):
    return tokenize(some_examples(count), Letters(), ROWS, 48, 8, **limits)


# ---------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize(("count", "batch_size", "window"), [(64, 8, 3), (100, 8, 4), (1000, 32, 64), (7, 7, 1)])
def test_every_example_occurs_at_most_once_an_epoch_and_all_but_a_rest_do(count, batch_size, window):
    lengths = np.random.default_rng(0).integers(1, 99, count)
    for epoch in range(3):
        ids = planned(lengths, batch_size, 5, epoch, window).reshape(-1)
        assert len(set(ids)) == len(ids) == count // batch_size * batch_size
        assert set(ids) <= set(range(count))


def test_all_examples_are_seen_within_a_few_epochs_although_a_rest_is_left_out():
    lengths = np.arange(30)
    seen = {int(id_) for epoch in range(12) for id_ in planned(lengths, 16, 0, epoch).reshape(-1)}
    assert seen == set(range(30))


def test_plan_is_a_pure_function_and_differs_between_epochs_and_seeds():
    lengths = np.random.default_rng(0).integers(1, 99, 256)
    plan = planned(lengths, 8, 1, 2)
    np.testing.assert_array_equal(plan, planned(lengths.copy(), 8, 1, 2))
    assert (plan != planned(lengths, 8, 1, 3)).any()
    assert (plan != planned(lengths, 8, 2, 2)).any()


def test_batches_hold_examples_of_similar_length_in_mixed_order():
    lengths = np.random.default_rng(0).integers(1, 200, 1024)
    batches = lengths[planned(lengths, 16, 0, 0, window=64)]
    assert np.ptp(batches, axis=1).mean() < 10
    means = batches.mean(1)
    assert (np.diff(means) > 0).mean() < 0.7  # not sorted over the epoch


def test_set_smaller_than_a_batch_fills_it_by_starting_again():
    plan = planned(np.array([3, 1, 2]), 8, 0, 0)
    assert plan.shape == (1, 8)
    assert sorted(Counter(plan[0].tolist()).values()) == [2, 3, 3]


# -------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("seed", range(5))
def test_chosen_shapes_are_close_to_the_best_of_all_choices(seed):
    random = np.random.default_rng(seed)
    needed = np.stack([random.geometric(0.03, 60).clip(1, 96), random.integers(1, 25, 60)], axis=1)
    largest = (100, 24)

    def cost(shapes):
        return sum(min(t + u for t, u in shapes if t >= pair[0] and u >= pair[1]) for pair in needed)

    chosen = choose_shapes(needed, largest, max_shapes=3)
    assert len(chosen) <= 3
    assert (104, 24) in chosen
    grid = list(itertools.product(range(8, 105, 8), (2, 4, 8, 16, 24)))
    best = min(cost([*pair, (104, 24)]) for pair in itertools.combinations(grid, 2))
    assert cost(chosen) <= 1.03 * best


def test_one_shape_and_equal_lengths_need_no_choice():
    needed = np.array([[9, 2]] * 4)
    assert choose_shapes(needed, (9, 2), max_shapes=4) == [(16, 2)]
    assert choose_shapes(np.array([[9, 2], [90, 5]]), (90, 5), max_shapes=1) == [(96, 8)]


def test_shapes_are_few_and_padding_is_what_the_batches_show():
    tokenized = some_set(600)
    train = TrainBatches(tokenized, 8, 0, PROMPT, max_shapes=4)
    assert len(train.shapes) <= 4
    batches = [train.batch(step) for step in range(3 * train.batches_per_epoch)]
    assert {(b["encoder_tokens"].shape[1], b["decoder_targets"].shape[1]) for b in batches} <= set(train.shapes)
    arrays = [b[name] for b in batches[: train.batches_per_epoch] for name in ("encoder_tokens", "decoder_targets")]
    padding = sum((array == 0).sum() for array in arrays) / sum((array < ROWS).sum() for array in arrays)
    assert train.padding_share == pytest.approx(padding, abs=1e-12)
    assert padding < 0.5 * TrainBatches(tokenized, 8, 0, PROMPT, max_shapes=1).padding_share


@pytest.mark.parametrize("packing", [None, Packing(length=80)], ids=["buckets", "packed"])
def test_a_longer_prompt_makes_padding_look_no_better(packing):
    tokenized, shares = some_set(200), []
    for length in (0, 5, 30):
        train = TrainBatches(tokenized, 8, 0, PromptLayout(np.arange(ROWS, ROWS + length)), packing=packing)
        counts = count_slots(train.batch(3), ROWS)
        assert counts.prompt == counts.examples * length
        shares.append((counts.padding, train.padding_share))
        assert counts.text + counts.prompt + round(counts.padding * (counts.slots - counts.prompt)) == counts.slots
    if packing is None:  # the same text in the same slots
        assert shares[0] == shares[1] == shares[2]


# ------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("layout", [NO_PROMPT, PROMPT, PromptLayout(ROWS + np.arange(600).reshape(100, 6))])
def test_batches_reproduce_the_rows(layout):
    tokenized = dataclasses.replace(some_set(), tasks=np.arange(100))
    train = TrainBatches(tokenized, 8, 0, layout)
    for step in range(20):
        batch = train.batch(step)
        assert all(array.dtype == np.int32 for array in batch.values())
        for row, index in enumerate(np.concatenate(train.row_ids(step))):
            prompt = layout.before[index if layout.tasks else 0]
            length = len(prompt) + len(tokenized.input(index))
            encoder, targets = batch["encoder_tokens"][row], batch["decoder_targets"][row]
            np.testing.assert_array_equal(encoder[:length], [*prompt, *tokenized.input(index)])
            assert not encoder[length:].any()
            assert encoder[length - 1] == 1
            np.testing.assert_array_equal(targets[targets > 0], tokenized.target(index))
            np.testing.assert_array_equal(batch["decoder_inputs"][row], [0, *targets[:-1]])


def test_iterating_from_a_step_continues_what_an_iteration_from_the_start_gives():
    train = TrainBatches(some_set(), 8, 3, PROMPT)
    whole = list(itertools.islice(train.from_step(0), 30))
    resumed = list(itertools.islice(TrainBatches(some_set(), 8, 3, PROMPT).from_step(17), 13))
    for expected, found in zip(whole[17:], resumed, strict=True):
        assert expected.keys() == found.keys()
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name])


def test_multihost_share_each_batch_without_overlap_or_loss():
    tokenized = some_set()
    whole = TrainBatches(tokenized, 8, 0, PROMPT)
    parts = [TrainBatches(tokenized, 8, 0, PROMPT, process_index=i, process_count=4) for i in range(4)]
    for step in range(30):
        for name, array in whole.batch(step).items():
            np.testing.assert_array_equal(np.concatenate([part.batch(step)[name] for part in parts]), array)


@pytest.mark.parametrize("count", [3, 8, 13, 100])
def test_evaluation_visits_every_example_once_and_padded_rows_weigh_nothing(count):
    tokenized = some_set(count)
    seen = []
    for batch, ids in evaluation_batches(tokenized, 8, PROMPT):
        assert batch["encoder_tokens"].shape[0] == len(ids) == 8
        assert (
            batch["encoder_tokens"][:, PROMPT.lengths[0]] > 0
        ).all()  # padded rows still hold a text: no empty softmax
        assert not batch["decoder_targets"][ids < 0].any()
        assert not batch["decoder_inputs"][ids < 0].any()
        for row, index in enumerate(ids):
            if index >= 0:
                targets = batch["decoder_targets"][row]
                np.testing.assert_array_equal(targets[targets > 0], tokenized.target(index))
                seen.append(int(index))
    assert sorted(seen) == list(range(count))


def test_metric_over_a_padded_last_batch_is_exact():
    examples = [Example("x" * (i % 9 + 1), "yes" if i % 3 else "no") for i in range(21)]
    task = Task(source={"kind": "files"}, label_words=["no", "yes"])
    answers = ["yes" if i % 2 else "no" for i in range(21)]
    predictions, targets = [], []
    for _, ids in evaluation_batches(tokenize(examples, Letters(), ROWS, 16, 8), 8):
        predictions += [answers[i] for i in ids if i >= 0]
        targets += [examples[i].target for i in ids if i >= 0]
    expected = np.mean([answers[i] == examples[i].target for i in range(21)])
    answers_of = metrics.Answers(predictions, targets, task.words)
    assert metrics.compute(task.metrics, answers_of, "task") == {"accuracy": expected, "illegal": 0.0, "count": 21}


# ------------------------------------------------------------------------------------------ tokenise


def test_long_input_is_cut_before_its_eos_and_counted():
    tokenized = tokenize([Example("abcdef", "a"), Example("abc", "a")], Letters(), ROWS, 4, 4)
    assert tokenized.truncated_inputs == 1
    assert tokenized.input(0).tolist() == [3, 4, 5, 1] == tokenized.input(1).tolist()


def test_long_target_is_an_error_or_counted():
    examples = [Example("a", "b"), Example("a", "bcde")]
    with pytest.raises(UserError, match=r"^example 1: the target 'bcde' has 5 tokens .* expected at most 4; [^\n]*$"):
        tokenize(examples, Letters(), ROWS, 8, 4)
    cut = tokenize(examples, Letters(), ROWS, 8, 4, truncate_targets=True)
    assert (cut.truncated_targets, cut.target(1).tolist()) == (1, [4, 5, 6, 1])


def test_tokenizer_that_does_not_fit_the_model_is_refused():
    with pytest.raises(UserError, match=r"does not fit the model: it gives the id 28 \('z'\); expected ids under 20"):
        tokenize([Example("az", "a")], Letters(), 20, 8, 8)


def test_batch_size_must_be_shared_evenly():
    with pytest.raises(UserError, match="batch_size 6: cannot be shared by 4 processes"):
        TrainBatches(some_set(), 6, 0, process_count=4)


@pytest.mark.parametrize("examples", [[], [Example("", "a", ids=([], [5, 1]))]])
def test_nothing_to_read_is_an_error(examples):
    with pytest.raises(UserError, match="expected"):
        tokenize(examples, Letters(), ROWS, 8, 8)


def test_cached_tokens_are_the_same_and_keyed_by_everything(tmp_path):
    examples, tokenizer = some_examples(20), Letters()
    first = tokenize(examples, tokenizer, ROWS, 12, 8, cache=tmp_path)
    calls = tokenizer.calls
    again = tokenize(examples, tokenizer, ROWS, 12, 8, cache=tmp_path)
    assert tokenizer.calls == calls
    assert again.truncated_inputs == first.truncated_inputs > 0
    for name in ("inputs", "input_offsets", "targets", "target_offsets"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    tokenize(examples, tokenizer, ROWS, 13, 8, cache=tmp_path)
    tokenize([*examples[:-1], Example("other", "a")], tokenizer, ROWS, 12, 8, cache=tmp_path)
    tokenize(examples, tokenizer, ROWS + 1, 12, 8, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_sets_of_several_chunks_keep_their_order():
    examples = [Example("a" * (i % 5 + 1), "b") for i in range(9000)]
    tokenized = tokenize(iter(examples), Letters(), ROWS, 8, 4)
    assert len(tokenized) == 9000
    np.testing.assert_array_equal(tokenized.lengths[:, 0], np.arange(9000) % 5 + 2)
