"""Attention, position buckets and masks, against the same written plainly in NumPy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_lm
from flax import nnx
from scipy import special

from softprompt_jax.assembly import abstract_backbone_of, assemble, check_devices
from softprompt_jax.checkpoints.backbone import EMBEDDED
from softprompt_jax.config import UserError, parse
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.methods import Context, Prefix
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models import flash, t5
from softprompt_jax.models.attention import (
    Seen,
    attend,
    attend_in_pieces,
    attend_shared,
    drop_keys,
    relative_buckets,
    same_segment,
)
from softprompt_jax.models.build import build
from softprompt_jax.models.causal_settings import LayerKind, Rope
from softprompt_jax.run import Run

TEXT = {"kind": "prompt", "length": 3, "init": {"kind": "vocabulary"}}


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


def mix(query, key, value, bias, visible, rate=0.0, rng=None) -> jax.Array:
    query, key, value, visible = (jnp.asarray(array) for array in (query, key, value, visible))
    return attend(query, key, value, None if bias is None else jnp.asarray(bias), visible, rate, rng)


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


@pytest.mark.parametrize("length", [129, 300, 1100])
def test_attention_in_pieces_is_that_of_all_at_once(length):
    """With a prefix that all queries see, a row's padding, a window, and keys that two heads share."""
    random = np.random.default_rng(length)
    query, mixes = (jnp.asarray(random.normal(size=(2, 4, length, 8)), jnp.float32) for _ in range(2))
    own = [jnp.asarray(random.normal(size=(2, 2, length, 8)), jnp.float32) for _ in range(2)]
    before = [jnp.asarray(random.normal(size=(2, 2, 5, 8)), jnp.float32) for _ in range(2)]
    places = np.arange(length)
    visible = np.broadcast_to(places[:, None] >= places, (2, 1, length, length)).copy()
    visible[0, :, :, length - 40 :] = False  # padding
    visible &= places[:, None] - places < 150

    def loss(attention, causal, query, own, before):
        parts = [Seen(*before, jnp.ones((2, 1, 1, 5), bool)), Seen(*own, jnp.asarray(visible), causal)]
        return (attention(query, parts, 0.3, 5.0) * mixes).sum()

    with jax.default_matmul_precision("highest"):
        whole = jax.value_and_grad(partial(loss, attend_shared, False), (0, 1, 2))(query, own, before)
        pieces = jax.value_and_grad(partial(loss, attend_in_pieces, True), (0, 1, 2))(query, own, before)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), pieces, whole)


def test_pieces_leave_out_later_keys_and_keep_no_scores():
    """300 queries are three pieces of 100: two thirds of the products, and none of the scores for the gradient."""
    part = jax.ShapeDtypeStruct((2, 4, 300, 8), jnp.float32)
    visible = jax.ShapeDtypeStruct((2, 1, 300, 300), jnp.bool_)

    def program(attention, causal):
        return lambda q, k, v, seen: attention(q, [Seen(k, v, seen, causal)], 1.0)

    def cost(attention, causal):
        compiled = jax.jit(program(attention, causal)).lower(part, part, part, visible).compile()
        return compiled.cost_analysis()["flops"]

    assert cost(attend_in_pieces, True) < 0.75 * cost(attend_shared, False)
    assert cost(attend_in_pieces, False) == cost(attend_shared, False)

    def kept(attention):
        one = program(attention, True)
        residuals = jax.eval_shape(
            lambda *arrays: jax.vjp(partial(lambda seen, *rest: one(*rest, seen), arrays[3]), *arrays[:3])[1],
            *(part, part, part, visible),
        )
        return [leaf for leaf in jax.tree.leaves(residuals) if leaf.dtype == jnp.float32 and leaf.size > part.size]

    assert kept(attend_shared)
    assert not kept(attend_in_pieces)


def test_a_model_attends_in_pieces_on_a_cpu_and_at_once_elsewhere():
    kinds = (LayerKind(rope=Rope()), LayerKind(rope=Rope(), window=100))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 400, (2, 200)), jnp.int32).at[1, 150:].set(-1)
    found, programs = [], []
    for platform in ("cpu", "tpu"):
        model = build(tiny_lm.settings(kinds=kinds, pattern=(0, 1), platform=platform), jax.random.key(0))
        with jax.default_matmul_precision("highest"):
            found.append(np.asarray(model.run(tokens)[0])[np.asarray(tokens) >= 0])
        programs.append(str(jax.make_jaxpr(lambda tokens, model=model: model.run(tokens)[0])(tokens)))
    np.testing.assert_allclose(*found, atol=1e-5)
    assert ["f32[2,2,2,200,200]" in program for program in programs] == [False, True]


def chosen(how: str = "flash", platform: str = "gpu", **changes) -> bool:
    """Decide for 65 positions of 2 heads of width 64 in bfloat16, or with one of these changed."""
    given = {"width": 64, "dtype": "bfloat16", "lengths": jnp.asarray([3])} | changes
    return flash.uses_flash(how, platform, jnp.zeros((1, 2, 65, given["width"]), given["dtype"]), given["lengths"])


CANNOT = [
    ({"platform": "cpu"}, "found cpu devices; expected NVIDIA GPUs"),
    ({"platform": "tpu"}, "found tpu devices; expected NVIDIA GPUs"),
    ({"dtype": "float32"}, "found float32; expected dtype bfloat16"),
    ({"width": 12}, "found heads of width 12; expected a multiple of 8 up to 128"),
    ({"width": 256}, "found heads of width 256"),
    ({"lengths": None}, "found packed rows, or prefixes of different lengths"),
]


@pytest.mark.parametrize(("change", "reason"), CANNOT)
def test_flash_that_cannot_be_had_is_refused_and_says_why_while_auto_computes_plainly(change, reason):
    with pytest.raises(UserError, match=f"attention flash: .*{reason}.*; use attention: auto, or plain"):
        chosen(**change)
    assert not chosen("auto", **change)


def test_the_kernel_is_chosen_by_the_platform_that_is_given_not_by_this_machines():
    assert jax.default_backend() == "cpu"
    assert chosen("flash")
    assert chosen("auto")
    assert not chosen("plain")


def test_a_model_takes_the_kernel_in_the_encoders_self_attention_only(monkeypatch):
    calls = []

    def kernel(query, key, value, bias, lengths):
        calls.append(query.shape)
        return attend(query, key, value, bias, (jnp.arange(key.shape[2]) < lengths[:, None])[:, None, None])

    monkeypatch.setattr(t5, "cudnn", kernel)
    batch = tiny.batch(length=9, prompt=3)  # rows of unlike lengths
    expected = tiny.model(prompt=3, dtype="bfloat16", attention="plain")(batch)
    assert not calls
    found = tiny.model(prompt=3, dtype="bfloat16", attention="flash", platform="gpu")(batch)
    assert calls == [(4, 2, 12, 8)]  # traced once, in the encoder's scan
    np.testing.assert_array_equal(expected, found)
    with pytest.raises(UserError, match="attention flash: found cpu devices"):
        tiny.model(dtype="bfloat16", attention="flash")(tiny.batch())


@pytest.mark.parametrize(
    ("changes", "platform", "reason"),
    [
        ({"dtype": "bfloat16"}, None, "found cpu devices"),
        ({}, "gpu", "found float32"),
        ({"dtype": "bfloat16", "packing": True}, "gpu", "found packed rows"),
    ],
)
def test_a_run_with_flash_is_refused_before_its_data_are_read(changes, platform, reason):
    run = parse(Run, {"task": "boolq", "attention": "flash", "dropout": 0, "methods": [TEXT], **changes}, "run")
    with pytest.raises(UserError, match=f"attention flash: {reason}"):
        check_devices(run, assemble(run), platform)
    check_devices(run.model_copy(update={"dtype": "bfloat16", "packing": None}), assemble(run), "gpu")


def test_what_was_trained_with_flash_is_read_on_any_device():
    run = parse(Run, {"task": "boolq", "attention": "flash", "dropout": 0}, "run")
    assert run.finished().attention == "auto"


def test_the_platform_is_in_no_file_and_no_hash():
    assert "platform" not in tiny.settings(platform="gpu").model_dump(mode="json")


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        ("gemma-2-2b", "found a gemma2, whose scores have a soft cap; expected a model without; use att"),
        ("gemma-3-1b", "found a gemma3_text, whose layers have unlike windows; expected a model of one; use att"),
        ("pythia-70m", None),
    ],
)
def test_flash_is_refused_for_a_model_whose_attention_is_plain(backbone, reason):
    run = parse(Run, {"task": "boolq", "backbone": backbone, "attention": "flash", "dtype": "bfloat16"}, "run")
    assembly = assemble(run, abstract_backbone_of(run), "gpu", load_tokenizer(EMBEDDED))
    if reason is None:
        check_devices(run, assembly, "gpu")
    else:
        with pytest.raises(UserError, match=reason):
            check_devices(run, assembly, "gpu")
    check_devices(run.model_copy(update={"attention": "auto"}), assembly, "gpu")


@pytest.fixture
def kernel(monkeypatch):
    """Let XLA's form of the same function stand in for cuDNN's, in float32 too; return the shapes of the queries."""
    function, calls = jax.nn.dot_product_attention, []

    def stand_in(*arrays, implementation, **settings):
        assert implementation == "cudnn"
        calls.append(arrays[0].shape)
        return function(*arrays, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(flash, "model_refusal", lambda platform, *_: None if platform == "gpu" else "found no GPU")
    return calls


def gap_batch(prompt: int) -> dict[str, jax.Array]:
    """Return contexts and answers of unlike lengths, padded in between and at the end; a row has no answer."""
    draw, first = np.random.default_rng(0), tiny.ROWS
    contexts, answers = np.full((3, 9 + prompt), -1, np.int32), np.full((3, 5), -1, np.int32)
    for row, (length, count) in enumerate([(9, 5), (4, 3), (6, 0)]):
        contexts[row, : prompt + length] = [*range(first, first + prompt), *draw.integers(3, first, length)]
        answers[row, :count] = [contexts[row, prompt + length - 1], *draw.integers(3, first, 5)][:count]
    return {"encoder_tokens": jnp.asarray(contexts), "decoder_inputs": jnp.asarray(answers)}


@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("window", marks=pytest.mark.slow)])
def test_a_decoder_only_model_gives_the_same_by_the_kernel_whose_rows_have_no_gaps(name, kernel):
    of, changes = name, {"num_heads": 4}
    if name == "window":
        of, changes = "llama", {"kinds": (LayerKind(window=4, rope=Rope()),)}
    batch = gap_batch(prompt=3)
    real = np.asarray(batch["decoder_inputs"] >= 0)
    outcomes = []
    for settings in ({"attention": "plain"}, {"platform": "gpu", "attention": "flash"}):
        model = tiny.model(prompt=3, of=of, **changes | settings)
        graphdef, trainable, rest = nnx.split(model, Trainable, ...)

        def loss(trainable, graphdef=graphdef, rest=rest):
            hidden = nnx.merge(graphdef, trainable, rest).hidden(batch)
            return (hidden.astype(jnp.float32) ** 2 * real[..., None]).sum(), hidden

        (_, hidden), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
        outcomes.append((np.asarray(hidden)[real], *map(np.asarray, jax.tree.leaves(gradient))))
        assert len(kernel) == ("platform" in settings)  # traced once, in the scan
    for plain, fused in zip(*outcomes, strict=True):
        np.testing.assert_allclose(fused, plain, atol=1e-4, rtol=1e-4)
    context = batch["encoder_tokens"]
    by_kernel, alone = (tiny.model(prompt=3, of=of, **changes, platform=p).run(context)[0] for p in ("gpu", "cpu"))
    seen = np.asarray(context >= 0)
    np.testing.assert_allclose(np.asarray(by_kernel)[seen], np.asarray(alone)[seen], atol=1e-4, rtol=1e-4)


def test_packed_rows_and_prefixes_of_a_decoder_only_model_stay_plain(kernel):
    batch, model = gap_batch(prompt=0), tiny.model(of="llama", platform="gpu")
    packed = batch | {
        f"{side}_segments": (batch[name] >= 0).astype(jnp.int32)
        for side, name in (("encoder", "encoder_tokens"), ("decoder", "decoder_inputs"))
    }
    real = np.asarray(batch["decoder_inputs"] >= 0)
    plain = np.asarray(model.hidden(packed))
    assert not kernel
    np.testing.assert_allclose(np.asarray(model.hidden(batch))[real], plain[real], atol=1e-4, rtol=1e-4)
    assert len(kernel) == 1
    cpu, gpu = (tiny.model(of="llama", platform=platform) for platform in ("cpu", "gpu"))
    for each in (cpu, gpu):
        Prefix(length=2, network=None).attach(each, jax.random.key(0), Context())
    np.testing.assert_allclose(
        np.asarray(gpu.hidden(batch))[real], np.asarray(cpu.hidden(batch))[real], atol=1e-4, rtol=1e-4
    )
    assert len(kernel) == 1
    refused = tiny.model(of="llama", platform="gpu", attention="flash")
    Prefix(length=2, network=None).attach(refused, jax.random.key(0), Context())
    with pytest.raises(UserError, match="attention flash: found a prefix before the keys; expected none"):
        refused.hidden(batch)


def test_a_key_without_its_value_is_a_dropped_key(arrays):
    visible, rng = np.arange(7)[None, None, None] < 6, tiny.key(3)
    expected = mix(**arrays, visible=visible, rate=0.4, rng=rng)
    dropped = drop_keys(jnp.asarray(arrays["value"]), 0.4, rng)
    assert (np.asarray(dropped) == 0).all(-1).any()
    np.testing.assert_allclose(mix(**arrays | {"value": dropped}, visible=visible), expected, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (5, 6), (4, 7), (4, 6)])
def test_the_kernel_is_given_even_lengths_and_what_it_must_know(monkeypatch, queries, keys):
    """The kernel itself needs a GPU; XLA's form of the same function stands in for it."""
    draw, given, function = np.random.default_rng(0), [], jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, **settings):
        assert implementation == "cudnn"
        given.append([array.shape[1] for array in arrays])
        return function(*arrays, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    sizes = [(2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, 8), (1, 3, queries, keys)]
    inputs = [jnp.asarray(draw.normal(size=size), jnp.float32) for size in sizes]
    lengths = jnp.asarray([keys, 3])
    visible = (jnp.arange(keys) < lengths[:, None])[:, None, None]
    expected, found = values_and_gradients(attend, inputs, visible), values_and_gradients(flash.cudnn, inputs, lengths)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)
    assert given == [[queries + queries % 2, *[keys + keys % 2] * 2]]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 20])
def test_cudnns_causal_attention_gives_the_plain_values_and_gradients(window):
    draw, length = np.random.default_rng(0), 131
    sizes = [(2, 4, length, 64), *[(2, 2, length, 64)] * 2]
    inputs = [jnp.asarray(draw.normal(size=size) / 4, jnp.bfloat16) for size in sizes]
    lengths, place = jnp.asarray([length, length - 40]), np.arange(length)
    near = place[:, None] - place < (window or length)
    seen = (place <= place[:, None]) & near & (place < np.asarray(lengths)[:, None, None])
    real = (place < np.asarray(lengths)[:, None])[:, None, :, None]

    def loss(attention, *inputs):
        mixed = jnp.where(real, attention(*inputs).astype(jnp.float32), 0)
        return (mixed**2).sum(), mixed

    def plain(query, key, value):
        return attend_shared(query, [Seen(key, value, jnp.asarray(seen)[:, None])], 0.125)

    outcomes = []
    for attention in (plain, lambda *arrays: flash.causal(*arrays, lengths, 0.125, window)):
        (_, mixed), gradients = jax.value_and_grad(partial(loss, attention), (0, 1, 2), has_aux=True)(*inputs)
        outcomes.append([np.asarray(each, np.float32) for each in (mixed, *gradients)])
    for one, other in zip(*outcomes, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-2 * np.abs(one).max())


@pytest.mark.gpu
@pytest.mark.parametrize("length", [256, 255])
@pytest.mark.parametrize("hidden", [0, 100])
def test_cudnns_attention_gives_the_plain_values_and_gradients(hidden, length):
    draw = np.random.default_rng(0)
    sizes = [(2, 4, length, 64)] * 3 + [(1, 4, length, length)]
    inputs = [jnp.asarray(draw.normal(size=size) / 4, jnp.bfloat16) for size in sizes]
    lengths = jnp.asarray([length, length - hidden])
    visible = (jnp.arange(length) < lengths[:, None])[:, None, None]
    expected = values_and_gradients(attend, inputs, visible)
    found = values_and_gradients(flash.cudnn, inputs, lengths)
    for one, other in zip(expected, found, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=2e-2 * np.abs(one).max())
