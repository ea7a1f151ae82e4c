"""Soft prompts: t5x's and PEFT's numbers, ids past the vocabulary, and where the rows start from."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft_fixture
import pytest
import t5x_fixture
import tiny
from flax import nnx

from softprompt_jax.checkpoints.artifact import load_prompt
from softprompt_jax.config import UserError, parse
from softprompt_jax.methods import Context, Prompt, attach, leaves, split
from softprompt_jax.methods.prompt import T5_EMBEDDING_RMS, Labels, attach_rows, embedding_scale
from softprompt_jax.models.build import abstract
from softprompt_jax.models.presets import preset
from softprompt_jax.models.t5 import T5

# --------------------------------------------------------------------------- other implementations


def test_logits_encoding_and_gradient_equal_t5x(shared_fixtures):
    golden, real = t5x_fixture.golden(shared_fixtures), t5x_fixture.real_targets(shared_fixtures)
    model, batch = t5x_fixture.model(shared_fixtures, prompted=True), t5x_fixture.batch(shared_fixtures, prompted=True)
    loss, logits, gradient = tiny.loss_logits_gradient(split(model), batch, z_loss=1e-4)
    np.testing.assert_allclose(logits[real], golden["short/prompted/logits"][real], atol=1e-4)
    np.testing.assert_allclose(loss, golden["short/prompted/loss_sum_z1e-4"], rtol=1e-5)
    np.testing.assert_allclose(gradient["prompt"]["rows"], golden["short/prompted/grad_prompt_sum_z1e-4"], atol=1e-4)
    encoded, visible = tiny.encode(model, batch["encoder_tokens"]), np.asarray(batch["encoder_tokens"]) != 0
    np.testing.assert_allclose(encoded[visible], golden["short/prompted/encoded"][visible], atol=1e-4)


@pytest.mark.parametrize("name", peft_fixture.PROMPTED)
def test_logits_and_gradient_equal_peft(shared_fixtures, name):
    golden, model = peft_fixture.golden(shared_fixtures, name), peft_fixture.model(shared_fixtures, name)
    batch = peft_fixture.batch(shared_fixtures, name)
    real = np.asarray(batch["decoder_targets"]) != 0
    loss, logits, gradient = tiny.loss_logits_gradient(split(model), batch)
    np.testing.assert_allclose(logits[real], golden["logits"][real], atol=1e-4)
    np.testing.assert_allclose(loss / real.sum(), golden["loss"], rtol=1e-5)
    theirs = golden[f"grad/{peft_fixture.PROMPT_WEIGHT}"]
    np.testing.assert_allclose(gradient["prompt"]["rows"] / real.sum(), theirs[: peft_fixture.LENGTH], atol=1e-4)
    assert not theirs[peft_fixture.LENGTH :].any()  # the second half of what PEFT saves


# ------------------------------------------------------------------------- ids past the vocabulary


def test_prompt_ids_are_the_prompt_before_the_embedded_text_to_the_bit():
    model, batch = tiny.model(prompt=4), tiny.batch(prompt=4)
    embedded = model.embed(batch["encoder_tokens"])
    text = tiny.batch()["encoder_tokens"]
    table, rows = np.asarray(model.embedding[...]), np.asarray(model.prompt.rows[...])
    expected = np.concatenate([np.tile(rows, (4, 1, 1)), table[np.asarray(text)]], axis=1)
    np.testing.assert_array_equal(embedded, expected)


def test_prompt_ids_may_stand_anywhere_in_any_order_and_leave_the_text_alone():
    model = tiny.model(prompt=4)
    V = tiny.ROWS
    tokens = np.array([[7, V + 3, V, 8, 1, 0], [V + 1, 9, V + 1, 1, V + 2, V + 3]])
    both = np.concatenate([model.embedding[...], model.prompt.rows[...]])
    np.testing.assert_array_equal(model.embed(jnp.asarray(tokens)), both[tokens])
    text = jnp.asarray([[0, 1, 2, V - 1]])
    np.testing.assert_array_equal(model.embed(text), tiny.model().embed(text))


def test_a_large_or_missing_number_in_the_prompt_does_not_reach_rows_that_do_not_use_it():
    model = tiny.model(prompt=4)
    batch = tiny.batch()
    before = tiny.forward(model, batch)
    attach_rows(model, np.full((4, 16), 1e30, np.float32))
    np.testing.assert_array_equal(tiny.forward(model, batch), before)


def test_the_gradient_equals_finite_differences():
    model, batch = tiny.model(prompt=3), tiny.batch(prompt=3)
    parts = split(model)
    rows = np.asarray(parts.trainable["prompt"]["rows"])
    _, _, gradient = tiny.loss_logits_gradient(parts, batch)
    gradient = np.asarray(gradient["prompt"]["rows"], np.float64)
    assert (np.abs(gradient).max(1) > 1e-3).all()  # every row matters

    def loss(rows) -> float:
        parts.trainable["prompt"]["rows"] = jnp.asarray(rows, jnp.float32)
        return float(tiny.loss_logits_gradient(parts, batch)[0])

    draw = np.random.default_rng(0)
    for _ in range(4):
        direction = draw.normal(size=rows.shape)
        direction /= np.linalg.norm(direction)
        step = 1e-2
        measured = (loss(rows + step * direction) - loss(rows - step * direction)) / (2 * step)
        assert measured == pytest.approx((gradient * direction).sum(), rel=1e-2, abs=2e-3)


def test_the_prompt_gradient_has_no_scatter_and_no_gradient_of_the_table():
    parts = split(tiny.model(prompt=3))
    batch = tiny.batch(prompt=3)

    def gradient(lookup):
        def total(trainable):
            model = parts.merge(trainable, jax.lax.stop_gradient(parts.frozen))
            if lookup:  # the obvious way, to see that the search below finds it
                model.prompt = lambda indices, virtual, key: trainable["prompt"]["rows"][jnp.clip(indices, 0, 2)]
            return model(batch).sum()

        return str(jax.make_jaxpr(jax.grad(total))(parts.trainable))

    assert "scatter" not in gradient(lookup=False)
    assert "scatter" in gradient(lookup=True)


# -------------------------------------------------------------------------------------- where rows start

WORDS = {"good": [5, 6], "bad": [7], "a b": [10, 11, 12]}
CONTEXT = Context(lambda text: WORDS.get(text, []), frozenset({0, 1, 2, 3}), load_rows=load_prompt)


def started(init, length: int = 6, context: Context = CONTEXT, seed: int = 0, model=None) -> np.ndarray:
    model = model or tiny.model()
    method = parse(Prompt, {"length": length, "init": init}, "test")
    attach([method], model, jax.random.key(seed), context)
    rows = model.prompt.rows[...]
    assert rows.dtype == jnp.float32
    assert rows.shape == (length, 16)
    return np.asarray(rows)


@functools.cache
def table() -> np.ndarray:
    return np.asarray(tiny.model().embedding[...])


def test_random_rows_fill_the_papers_range_times_the_embedding_scale():
    model = tiny.model()
    model.embedding[...] = 3 * model.embedding[...]
    scale = float(np.sqrt(np.mean(np.square(3 * table()))) / T5_EMBEDDING_RMS)
    assert scale == pytest.approx(3 / 10.7, rel=0.1)
    rows = started("random", 200, model=model)
    assert np.abs(rows).max() == pytest.approx(0.5 * scale, rel=0.01)
    assert rows.mean() == pytest.approx(0, abs=0.02 * scale)
    paper_code = started({"kind": "random", "low": 0.0}, 200)
    assert paper_code.min() >= 0
    assert leaves(model)["prompt.rows"].learning_rate_scale == pytest.approx(scale)


def small_t5(root_mean_square: float):
    """Return a model with the shapes of T5 1.1 small whose embeddings have this size; no other weight is made."""
    model = abstract(preset("t5-v1_1-small"))
    drawn = np.random.default_rng(0).standard_normal((32128, 512), np.float32)
    model.embedding = nnx.Param(jnp.asarray(root_mean_square * drawn), **model.embedding.get_metadata())
    return model


@pytest.mark.parametrize("measured", [4.5, 10.7, 11.6375, 22.0])  # 11.6375: google/t5-v1_1-small
def test_published_sizes_keep_the_papers_numbers_whatever_their_exact_size(measured):
    assert embedding_scale(small_t5(measured)) == 1.0


@pytest.mark.parametrize("measured", [1.0, 0.02, 200.0])  # 1: as a T5 is before its training
def test_published_shapes_with_other_weights_have_their_own_scale(measured):
    assert embedding_scale(small_t5(measured)) == pytest.approx(measured / T5_EMBEDDING_RMS, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5gemma"])  # Gemma's texts are the embeddings times 4
def test_other_families_count_in_their_embeddings_own_size(family):
    model = tiny.model(of=family)
    size = float(jnp.sqrt(jnp.mean(jnp.square(model.embedding[...])))) * model.word_factor
    assert embedding_scale(model) == pytest.approx(size)
    assert started("vocabulary", 50, model=model).std() == pytest.approx(size, rel=0.2)
    assert leaves(model)["prompt.rows"].learning_rate_scale == pytest.approx(size)


def test_without_weights_the_scale_is_the_papers():
    assert embedding_scale(abstract(preset("t5-v1_1-small"))) == 1.0
    assert embedding_scale(abstract(tiny.settings())) == 1.0
    scales = []
    nnx.eval_shape(lambda: scales.append(embedding_scale(T5(tiny.settings(), jax.random.key(0)))))
    assert scales == [1.0]


def ids_of(rows: np.ndarray) -> list[int]:
    found = [np.flatnonzero((table() == row).all(1)) for row in rows]
    assert all(len(ids) == 1 for ids in found)
    return [int(ids[0]) for ids in found]


def test_vocabulary_rows_are_other_pieces_among_the_first_that_are_not_special():
    ids = ids_of(started({"kind": "vocabulary", "first": 8}, 8))
    assert sorted(ids) == [4, 5, 6, 7, 8, 9, 10, 11]  # without repetition, so all eight
    assert set(ids_of(started("vocabulary", 46))) == set(range(4, tiny.ROWS))
    assert set(ids_of(started({"kind": "vocabulary", "first": 3}, 40))) == {4, 5, 6}  # repeats where it must
    assert parse(Prompt, {"init": "vocabulary"}, "test").init.first == 5000
    np.testing.assert_array_equal(started("vocabulary"), started("vocabulary"))
    assert (started("vocabulary") != started("vocabulary", seed=1)).any()


def test_label_rows_average_the_pieces_of_a_word_and_the_rest_is_vocabulary():
    context = Context(CONTEXT.encode, CONTEXT.special_ids, ("good", "bad"))
    rows = started("labels", 6, context)
    np.testing.assert_allclose(rows[0], table()[[5, 6]].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(rows[1], table()[7])
    assert set(ids_of(rows[2:])) <= set(range(4, tiny.ROWS))
    np.testing.assert_array_equal(started("labels", 1, context), rows[:1])
    np.testing.assert_array_equal(started(None, 6, context), rows)  # the default where there are label words
    assert set(ids_of(started(None, 6))) <= set(range(4, tiny.ROWS))  # and without


def test_text_rows_are_its_pieces_repeated_or_cut():
    np.testing.assert_array_equal(started({"kind": "text", "text": "a b"}, 7), table()[[10, 11, 12] * 2 + [10]])
    np.testing.assert_array_equal(started({"kind": "text", "text": "a b"}, 2), table()[[10, 11]])


def test_file_rows_are_the_files(tmp_path):
    rows = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    init = {"kind": "file", "path": str(tmp_path / "rows.npy")}
    np.testing.assert_array_equal(started(init), rows)
    with pytest.raises(UserError, match=r"rows.npy: a prompt of shape \[6, 16\]; expected \[7, 16\]"):
        started(init, 7)


def test_what_cannot_start_a_prompt_is_refused():
    with pytest.raises(UserError, match="task has no label words"):
        started("labels")
    with pytest.raises(UserError, match="text is empty"):
        started({"kind": "text", "text": "unknown"})
    with pytest.raises(UserError, match="length"):
        started("vocabulary", 0)
    with pytest.raises(UserError, match="two methods want the prompt"):
        attach([Prompt(length=2), Prompt(length=2)], tiny.model(), jax.random.key(0), CONTEXT)
    for shape in ((3, 15), (3,), (2, 3, 16)):
        with pytest.raises(UserError, match="width of this backbone"):
            attach_rows(tiny.model(), np.zeros(shape))


def test_a_bfloat16_backbone_keeps_its_prompt_in_float32():
    model = tiny.model(dtype="bfloat16")
    Prompt(length=3).attach(model, jax.random.key(0), CONTEXT)
    assert model.prompt.rows[...].dtype == jnp.float32
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model.encoder))} == {"bfloat16"}
    assert model.embed(tiny.batch(prompt=3)["encoder_tokens"]).dtype == jnp.bfloat16


def test_an_empty_label_word_has_no_row():
    model = tiny.model()
    context = Context(lambda text: [5, 6] if text else [], frozenset({0, 1, 2}), label_words=("", "spam"))
    rows = Labels().rows(3, model, tiny.key(0), context)
    assert rows.shape == (3, model.settings.d_model)
    np.testing.assert_allclose(rows[0], model.embedding[...][jnp.asarray([5, 6])].mean(0), rtol=1e-6)
