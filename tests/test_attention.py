"""Attention, position buckets and masks, against the same written plainly in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import special

from softprompt_jax.config import UserError, parse
from softprompt_jax.methods import split
from softprompt_jax.models import flash, flash_tpu
from softprompt_jax.models.attention import attend, relative_buckets, same_segment
from softprompt_jax.run import Run


def buckets_of(distances, **settings) -> list[int]:
    """Return the buckets of keys that lie `distances` before their query."""
    positions = jnp.arange(max(map(abs, distances)) + 1)
    found = np.asarray(relative_buckets(positions, positions, **settings))
    # distance = query - key: the first column holds those >= 0, the first row the others.
    return [int(found[d, 0]) if d >= 0 else int(found[0, -d]) for d in distances]


def test_buckets_are_exact_when_near_and_logarithmic_when_far():
    published = {"buckets": 32, "max_distance": 128}
    far = [8, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 127, 128, 200]
    expected = [8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15, 15]
    both = {"bidirectional": True, **published}
    assert buckets_of(list(range(8)) + far, **both) == list(range(8)) + expected
    assert buckets_of([-d for d in far], **both) == [16 + bucket for bucket in expected]
    assert buckets_of([-1, -7], **both) == [17, 23]
    past = {"bidirectional": False, **published}
    assert buckets_of(range(16), **past) == list(range(16))
    assert buckets_of([16, 18, 19, 31, 64, 112, 113, 128, 300], **past) == [16, 16, 17, 21, 26, 30, 31, 31, 31]
    assert buckets_of([-1, -50], **past) == [0, 0]  # the future, which the mask hides


def test_buckets_depend_on_distances_only():
    settings = {"bidirectional": True, "buckets": 8, "max_distance": 20}
    here = relative_buckets(jnp.arange(5), jnp.arange(7), **settings)
    there = relative_buckets(jnp.arange(1000, 1005), jnp.arange(1000, 1007), **settings)
    np.testing.assert_array_equal(here, there)


def mix(query, key, value, bias, visible, *dropout) -> jax.Array:
    query, key, value, visible = (jnp.asarray(array) for array in (query, key, value, visible))
    return attend(query, key, value, None if bias is None else jnp.asarray(bias), visible, *dropout)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    sizes = {"query": (2, 3, 5, 4), "key": (2, 3, 7, 4), "value": (2, 3, 7, 4), "bias": (1, 3, 5, 7)}
    return {name: draw.normal(size=size).astype(np.float32) for name, size in sizes.items()}


def test_attention_is_a_softmax_without_scaling(arrays):
    visible = (np.random.default_rng(1).random((2, 1, 5, 7)) < 0.6) | (np.arange(7) == 0)
    query, key, value, bias = (arrays[name].astype(np.float64) for name in ("query", "key", "value", "bias"))
    scores = np.where(visible, np.einsum("bhtk,bhsk->bhts", query, key) + bias, -np.inf)
    expected = special.softmax(scores, -1) @ value
    np.testing.assert_allclose(mix(**arrays, visible=visible), expected, atol=1e-5)
    without = special.softmax(np.where(visible, scores - bias, -np.inf), -1) @ value
    np.testing.assert_allclose(mix(**arrays | {"bias": None}, visible=visible), without, atol=1e-5)


def test_a_hidden_key_changes_nothing_to_the_bit(arrays):
    visible = np.ones((2, 1, 1, 7), bool)
    visible[..., 4:] = False
    before = mix(**arrays, visible=visible)
    for name in ("key", "value"):
        arrays[name][:, :, 4:] = 1e4
    np.testing.assert_array_equal(mix(**arrays, visible=visible), before)


def test_bfloat16_attention_keeps_its_scores_in_float32(arrays):
    half = {name: jnp.asarray(array, jnp.bfloat16) for name, array in arrays.items()}
    visible = np.ones((2, 1, 1, 7), bool)
    assert mix(**half, visible=visible).dtype == jnp.bfloat16
    # Two scores that bfloat16 cannot tell apart: 256 and 257.
    query, key = np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 2, 2))
    query[...], key[..., 0, :], key[..., 1, :] = [16, 1], [16, 0], [16, 1]
    value = np.array([[[[0.0], [1.0]]]]).repeat(2, -1)
    mixed = mix(*(jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)), None, np.ones((1, 1, 1, 2), bool))
    np.testing.assert_allclose(float(mixed[0, 0, 0, 0]), special.expit(1.0), atol=4e-3)


def test_attention_dropout_removes_a_key_for_all_queries_of_a_head_and_keeps_the_expectation():
    keys = 400
    query, key = np.zeros((2, 3, 5, keys), np.float32), np.zeros((2, 3, keys, keys), np.float32)
    value = np.broadcast_to(np.eye(keys, dtype=np.float32), key.shape)  # so that the mix shows the weights
    visible = np.ones((2, 1, 1, keys), bool)
    weights = np.asarray(mix(query, key, value, None, visible, 0.25, tiny.key(0))) * keys
    assert set(np.round(np.unique(weights), 4)) == {0.0, np.float32(1.3333)}
    assert (weights == weights[:, :, :1]).all()
    assert weights.mean() == pytest.approx(1, abs=0.05)
    assert len({row.tobytes() for row in weights[:, :, 0].reshape(6, keys)}) == 6
    np.testing.assert_allclose(mix(query, key, value, None, visible, 0.25, None) * keys, 1, rtol=1e-5)


def test_a_query_sees_the_keys_of_its_segment_and_never_padding():
    queries, keys = jnp.asarray([[1, 2, 0]]), jnp.asarray([[1, 1, 2, 0]])
    expected = [[[[True, True, False, False], [False, False, True, False], [False, False, False, False]]]]
    np.testing.assert_array_equal(same_segment(queries, keys), expected)


def test_a_row_of_padding_alone_gives_finite_numbers(arrays):
    hidden = np.zeros((2, 1, 1, 7), bool)
    gradient = jax.grad(lambda query: mix(**arrays | {"query": query}, visible=hidden).sum())(arrays["query"])
    assert np.isfinite(gradient).all()


def values_and_gradients(attention, arrays, *rest):
    def loss(*inputs):
        mixed = attention(*inputs, *rest)
        return (mixed.astype(jnp.float32) ** 2).sum(), mixed

    (_, mixed), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays)
    return mixed, *gradients


def test_the_kernel_gives_the_values_and_gradients_of_the_plain_way(arrays, monkeypatch):
    monkeypatch.setattr(flash_tpu, "INTERPRET", True)
    lengths = jnp.asarray([7, 3])
    inputs = [jnp.asarray(arrays[name]) for name in ("query", "key", "value", "bias")]
    visible = (jnp.arange(7) < lengths[:, None])[:, None, None]
    expected = values_and_gradients(attend, inputs, visible)
    found = values_and_gradients(flash_tpu.kernel, inputs, lengths)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())


@pytest.mark.slow
def test_a_model_with_the_kernel_has_the_plain_ones_logits_and_prompt_gradient(monkeypatch):
    monkeypatch.setattr(flash_tpu, "INTERPRET", True)
    calls = []
    monkeypatch.setattr(flash_tpu, "kernel", lambda *inputs, run=flash_tpu.kernel: calls.append(1) or run(*inputs))
    batch = tiny.batch(prompt=3)  # rows of unlike lengths
    expected, found = (
        tiny.loss_logits_gradient(split(tiny.model(prompt=3, attention=how)), batch) for how in ("plain", "flash")
    )
    assert calls  # traced once: the encoder's scan
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())


def test_what_the_fused_ways_cannot_do_is_done_plainly(arrays):
    query, key, value, bias = (jnp.asarray(arrays[name]) for name in ("query", "key", "value", "bias"))
    lengths = jnp.asarray([7, 3])
    assert flash.fused("plain", query, key, value, bias, lengths) is None
    assert flash.fused("auto", query, key, value, bias, lengths) is None  # on a CPU
    assert flash.fused("flash", query, key[:, :1], value[:, :1], bias, lengths) is None  # keys that all heads share
    assert flash.fused("flash", query, key, value, None, lengths) is None
    long = jnp.zeros((1, 1, flash.LONGEST + 1, 2))
    assert flash.fused("flash", long, long, long, bias, lengths) is None
    plainly = flash.fused("flash", query, key, value, bias, lengths)
    np.testing.assert_array_equal(jax.jit(lambda: plainly(lambda: value[:, :, :5]))(), value[:, :, :5])  # no TPU here


def test_cudnn_gets_even_lengths_only(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def taken(length: int, others: int) -> bool:
        query, key = jnp.zeros((1, 2, length, 64), jnp.bfloat16), jnp.zeros((1, 2, others, 64), jnp.bfloat16)
        return flash.fused("auto", query, key, key, None, jnp.asarray([1])) is not None

    assert [taken(64, 64), taken(65, 65), taken(64, 69), taken(69, 64)] == [True, False, False, False]


def test_flash_with_dropout_is_refused():
    settings = {"task": "boolq", "attention": "flash"}
    with pytest.raises(UserError, match="cannot drop attention weights; expected dropout 0, or attention auto"):
        parse(Run, settings, "run")
    assert parse(Run, settings | {"dropout": 0}, "run").attention == "flash"


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [0, 100])
def test_cudnns_attention_gives_the_plain_values_and_gradients(hidden):
    draw = np.random.default_rng(0)
    sizes = {"query": (2, 4, 256, 64), "key": (2, 4, 256, 64), "value": (2, 4, 256, 64), "bias": (1, 4, 256, 256)}
    inputs = [jnp.asarray(draw.normal(size=size) / 4, jnp.bfloat16) for size in sizes.values()]
    lengths = jnp.asarray([256, 256 - hidden])
    visible = (jnp.arange(256) < lengths[:, None])[:, None, None]
    expected = values_and_gradients(attend, inputs, visible)
    found = values_and_gradients(flash.cudnn, inputs, lengths)
    for one, other in zip(expected, found, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=2e-2 * np.abs(one).max())
