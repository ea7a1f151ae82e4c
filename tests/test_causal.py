"""Decoder-only models: equal to transformers and PEFT (fixtures), and to themselves in every form of a batch."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tiny_lm

from softprompt_jax.checkpoints.backbone import load_backbone
from softprompt_jax.config import UserError
from softprompt_jax.methods import Bias, Context, Hard, LoRA, Prefix, PTuningV2, leaves, split
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models import decode
from softprompt_jax.models.build import build
from softprompt_jax.models.causal_settings import LayerKind, Rope
from softprompt_jax.optim.gradient_free import GreedyWords
from softprompt_jax.optim.losses import cross_entropy

FIXTURES = Path(__file__).parents[1].parent / "shared/fixtures/lm"
FAMILIES = (
    *("LLAMA", "LLAMA3_ROPE", "MISTRAL", "QWEN2", "QWEN3", "SMOLLM3"),
    *("GEMMA", "GEMMA2", "GEMMA3", "GPT2", "GPT_NEO", "GPT_NEOX"),
)
PROMPTS = ("LLAMA_PROMPT", "GPT2_PROMPT", "GEMMA2_PROMPT", "GEMMA3_PROMPT")
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="../shared/fixtures/lm is not there")


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


def arrays(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return a fixture's arrays, and its ids with -1 for padding."""
    data = dict(np.load(FIXTURES / name / "data.npz"))
    return data, np.where(data["attention_mask"] == 1, data["input_ids"], -1).astype(np.int32)


def all_logits(model, ids: np.ndarray) -> np.ndarray:
    """Return the logits at every position of texts."""
    hidden, _ = model.run(jnp.asarray(ids))
    return np.asarray(model.project(model.decoder.norm(hidden)))


def split_at(ids: np.ndarray, cut: int, context: int, answer: int) -> dict[str, jax.Array]:
    """Return a text as a batch: `cut` tokens of context and the rest as its answer, both padded."""
    count = int((ids >= 0).sum())
    batch = {
        "encoder_tokens": np.full((1, context), -1, np.int32),
        "decoder_inputs": np.full((1, answer), -1, np.int32),
    }
    batch["encoder_tokens"][0, :cut] = ids[:cut]
    batch["decoder_inputs"][0, : count - cut + 1] = ids[cut - 1 : count]
    return {name: jnp.asarray(part) for name, part in batch.items()}


@needs_fixtures
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_equal_those_of_transformers(name):
    model = load_backbone(FIXTURES / name / "backbone").model
    data, ids = arrays(name)
    real = data["attention_mask"] == 1
    found = all_logits(model, ids)
    np.testing.assert_allclose(found[real], data["logits"][real], atol=1e-4)

    labels = np.where(data["labels"] < 0, -1, data["labels"])
    loss, weight = cross_entropy(jnp.asarray(found[:, :-1]), jnp.asarray(labels[:, 1:]), padding=-1)
    assert float(loss / weight) == pytest.approx(float(data["loss"]), abs=1e-5)

    model.settings = model.settings.model_copy(update={"eos": -5})  # the fixture's answers did not stop
    context = np.full((2, 9), -1, np.int32)
    context[:, :6] = data["greedy"][:, :6]
    tokens, scores = decode.greedy(model, jnp.asarray(context), 8)
    np.testing.assert_array_equal(tokens, data["greedy"][:, 6:])
    log_p = jax.nn.log_softmax(all_logits(model, data["greedy"].astype(np.int32)))[:, 5:-1]
    picked = np.take_along_axis(np.asarray(log_p), np.asarray(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores, picked.sum(-1), atol=1e-4)
    words = decode.score_words(model, jnp.asarray(context), tokens)
    np.testing.assert_allclose(np.diag(words), picked.sum(-1), atol=1e-4)


@needs_fixtures
@pytest.mark.parametrize(("name", "image_end"), [("T5GEMMA", None), ("T5GEMMA2", 126)])
def test_a_t5gemma_equals_that_of_transformers(name, image_end):
    """`image_end`: a token that T5Gemma 2 embeds apart, and that text never has; one of the fixture's answers does."""
    model = load_backbone(FIXTURES / name / "backbone").model
    data, _ = arrays(name)
    tokens = jnp.asarray(np.where(data["attention_mask"] == 1, data["input_ids"], 0), jnp.int32)
    batch = {"encoder_tokens": tokens, "decoder_inputs": jnp.asarray(data["decoder_input_ids"], jnp.int32)}
    assert image_end not in data["decoder_input_ids"]
    found, answered = np.asarray(model(batch)), data["labels"] >= 0
    np.testing.assert_allclose(found[answered], data["logits"][answered], atol=1e-4)
    real = data["attention_mask"] == 1
    np.testing.assert_allclose(
        np.asarray(model.encode(tokens))[real], data["encoder_last_hidden_state"][real], atol=1e-4
    )
    loss, weight = cross_entropy(jnp.asarray(found), jnp.asarray(np.where(answered, data["labels"], 0)))
    assert float(loss / weight) == pytest.approx(float(data["loss"]), abs=1e-5)

    model.settings = model.settings.model_copy(update={"eos": -5})  # the fixture's answers did not stop
    made, _ = decode.greedy(model, tokens, 6)
    comparable = np.cumsum(data["greedy"] == image_end, 1)[:, :-1] == 0  # what is read up to there is text
    assert comparable.sum() >= 21
    np.testing.assert_array_equal(np.asarray(made)[comparable], data["greedy"][:, 1:][comparable])


@needs_fixtures
@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_has_the_logits_gradient_and_training_steps_of_peft(name):
    from safetensors.numpy import load_file

    model = load_backbone(FIXTURES / name.removesuffix("_PROMPT") / "backbone").model
    data, ids = arrays(name)
    rows = load_file(FIXTURES / name / "adapter/adapter_model.safetensors")["prompt_embeddings"]
    attach_rows(model, rows)
    first, length = model.settings.vocabulary_rows, len(rows)
    prompted = np.concatenate([np.broadcast_to(first + np.arange(length), (len(ids), length)), ids], 1)
    real = np.concatenate([np.ones((len(ids), length), bool), ids >= 0], 1)
    np.testing.assert_allclose(all_logits(model, prompted)[real], data["logits"][real], atol=1e-4)

    parts = split(model)
    labels = np.where(data["labels"] < 0, -1, data["labels"])[:, 1:]

    def loss_of(trainable):
        model = parts.merge(trainable, parts.frozen)
        hidden, _ = model.run(jnp.asarray(prompted))
        logits = model.project(model.decoder.norm(hidden))[:, length:-1]
        loss, weight = cross_entropy(logits, jnp.asarray(labels), padding=-1)
        return loss / weight

    step = jax.jit(jax.value_and_grad(loss_of))
    trainable, losses = parts.trainable, []
    gradient_name = next(key for key in data if key.startswith("grad/"))
    np.testing.assert_allclose(step(trainable)[1]["prompt"]["rows"], data[gradient_name], atol=1e-5)
    optimizer = optax.adamw(0.05, weight_decay=0)
    state = optimizer.init(trainable)
    for _ in range(5):
        loss, gradient = step(trainable)
        losses.append(float(loss))
        updates, state = optimizer.update(gradient, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    np.testing.assert_allclose(losses, data["train5_adamw_losses"], atol=1e-4)


KINDS = {
    "plain": {},
    "windows": {"kinds": (LayerKind(window=3, rope=Rope()), LayerKind(rope=Rope(base=1e6))), "pattern": (0, 1)},
    "learned": {"kinds": (LayerKind(window=4), LayerKind()), "pattern": (0, 1), "learned_positions": 40},
}


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_text_is_cut_padded_and_packed_changes_nothing(kind):
    settings = tiny_lm.settings(**KINDS[kind])
    model = build(settings, jax.random.key(1))
    attach_rows(model, np.asarray(jax.random.normal(jax.random.key(2), (3, settings.d_model))))
    first = settings.vocabulary_rows
    texts = [np.concatenate([first + np.arange(3), 7 + 5 * np.arange(n) + s]) for s, n in enumerate((9, 4))]
    cuts = (8, 5)
    expected = [all_logits(model, text[None].astype(np.int32))[0] for text in texts]
    for text, cut, whole in zip(texts, cuts, expected, strict=True):
        for context in (cut, cut + 4):
            batch = split_at(text, cut, context, len(text) - cut + 3)
            found = np.asarray(model(batch))[0, : len(text) - cut + 1]
            np.testing.assert_allclose(found, whole[cut - 1 :], atol=1e-4)

    packed = {name: np.full((1, 16), -1, np.int32) for name in ("encoder_tokens", "decoder_inputs")}
    packed |= {name: np.zeros((1, 16), np.int32) for name in ("encoder_segments", "decoder_segments")}
    start = target = 0
    places = []
    for number, (text, cut) in enumerate(zip(texts, cuts, strict=True), 1):
        end, length = start + cut, len(text) - cut + 1
        packed["encoder_tokens"][0, start:end], packed["encoder_segments"][0, start:end] = text[:cut], number
        here = slice(target, target + length)
        packed["decoder_inputs"][0, here], packed["decoder_segments"][0, here] = text[cut - 1 :], number
        places.append(here)
        start, target = end, target + length
    found = np.asarray(model({name: jnp.asarray(part) for name, part in packed.items()}))[0]
    for here, whole, cut in zip(places, expected, cuts, strict=True):
        np.testing.assert_allclose(found[here], whole[cut - 1 :], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_from_caches_equal_recomputation(kind):
    settings = tiny_lm.settings(**KINDS[kind], eos=415)
    model = build(settings, jax.random.key(3))
    context = np.full((3, 10), -1, np.int32)
    for row, length in enumerate((10, 6, 1)):
        context[row, :length] = 11 + 3 * np.arange(length) + row
    tokens, _ = decode.greedy(model, jnp.asarray(context), 6)
    for row, length in enumerate((10, 6, 1)):
        ids = context[row, :length].tolist()
        for token in np.asarray(tokens[row]).tolist():
            assert token == int(all_logits(model, np.asarray([ids], np.int32))[0, -1].argmax())
            ids.append(token)
            if token == 415:
                break
    beams, scores = decode.beam(model, jnp.asarray(context), 6, decode.Beam(beams=2))
    for row in range(3):
        known = decode.score_words(model, jnp.asarray(context[row : row + 1]), beams[row])
        lengths = np.asarray((beams[row] >= 0).sum(-1))
        np.testing.assert_allclose(scores[row], np.asarray(known)[0] / lengths, atol=1e-4)


@pytest.mark.parametrize("penalty", [3.0, 0.1])
def test_a_repetition_penalty_is_that_of_transformers(penalty):
    """Logits of what stands in the context or the answer: over the penalty, or times it where negative."""
    model = build(tiny_lm.settings(eos=415, tied=False), jax.random.key(3))
    context = np.full((2, 6), -1, np.int32)
    context[0], context[1, :4] = [20, 21, 20, 23, 24, 25], [30, 31, 32, 33]
    tokens, scores = decode.greedy(model, jnp.asarray(context), 7, repetition_penalty=penalty)
    plain, _ = decode.greedy(model, jnp.asarray(context), 7)
    assert not np.array_equal(tokens, plain)
    for row, length in enumerate((6, 4)):
        ids, total = context[row, :length].tolist(), 0.0
        for token in np.asarray(tokens[row]).tolist():
            logits = all_logits(model, np.asarray([ids], np.int32))[0, -1]
            seen = logits[ids]
            likes = logits.copy()
            likes[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
            assert token == int(likes.argmax())
            total += float(jax.nn.log_softmax(logits)[token])
            ids.append(token)
        assert float(scores[row]) == pytest.approx(total, abs=1e-4)
    how = decode.Sampling(top_k=1, repetition_penalty=penalty, samples=2)  # of one token there is nothing to draw
    rngs = jax.random.split(jax.random.key(0), 2)
    drawn, _ = decode.sample(model, jnp.asarray(context), 7, rngs, how)
    np.testing.assert_array_equal(drawn, np.repeat(np.asarray(tokens)[:, None], 2, 1))


def test_an_answer_ends_at_other_ids_too():
    model = build(tiny_lm.settings(eos=415), jax.random.key(3))
    context = jnp.asarray([[20, 21, 20, 23, 24, 25]], jnp.int32)
    plain, _ = decode.greedy(model, context, 6)
    third = int(plain[0, 2])
    first = plain[0].tolist().index(third)
    model.settings = model.settings.model_copy(update={"ends": (third,)})
    for found in (decode.greedy(model, context, 6)[0], decode.beam(model, context, 6, decode.Beam(beams=2))[0][0]):
        assert third in found[0].tolist()[: 6 if found is not plain else 0]
        assert (found[0, found[0].tolist().index(third) + 1 :] == -1).all()
    assert decode.greedy(model, context, 6)[0][0].tolist() == [*plain[0, : first + 1].tolist(), *[-1] * (5 - first)]


def test_a_gradient_equals_finite_differences():
    settings = tiny_lm.settings(**KINDS["windows"])
    model = build(settings, jax.random.key(1))
    attach_rows(model, np.asarray(jax.random.normal(jax.random.key(2), (3, settings.d_model))))
    text = np.concatenate([settings.vocabulary_rows + np.arange(3), 5 + np.arange(8)]).astype(np.int32)
    batch, parts = split_at(text, 7, 9, 6), split(model)
    targets = np.full((1, 6), -1, np.int32)
    targets[0, :4] = text[7:]

    def loss(rows):
        logits = parts.merge({"prompt": {"rows": rows}}, parts.frozen)(batch)
        return cross_entropy(logits, jnp.asarray(targets), padding=-1)[0]

    rows = parts.trainable["prompt"]["rows"]
    direction = jax.random.normal(jax.random.key(4), rows.shape)
    with jax.enable_x64(True):
        slope = float(jnp.vdot(jax.grad(loss)(rows), direction))
        numeric = float(loss(rows + 1e-2 * direction) - loss(rows - 1e-2 * direction)) / 2e-2
    assert slope == pytest.approx(numeric, rel=2e-2)


@pytest.mark.parametrize("of", ["gemma2", "gpt2", "gpt_neox", "qwen3"])
def test_a_prefix_that_starts_as_words_before_the_text_is_these_words(of):
    """Keys and values of words that stand first depend on nothing behind them, at any layer."""
    model, words = tiny.model(of=of), [7, 11, 13, 17, 19]
    ids = np.random.default_rng(0).integers(2, tiny.ROWS, (3, 9)).astype(np.int32)
    expected = all_logits(model, np.concatenate([np.tile(np.int32(words), (3, 1)), ids], 1))[:, len(words) :]
    settings = {"length": 5, "network": None, "positions": "before", "init": {"kind": "text", "text": "five words"}}
    Prefix(**settings).attach(model, tiny.key(0), Context(lambda text: words))
    np.testing.assert_allclose(all_logits(model, ids), expected, atol=1e-4)
    batch = split_at(ids[0], 5, 7, 8)
    np.testing.assert_allclose(np.asarray(model(batch))[0, :5], expected[0, 4:], atol=1e-4)
    assert model.decoder.prefix.attention.keys.shape == (2, 5, model.settings.num_key_heads * 8)


@pytest.mark.parametrize("of", ["gemma2", "gpt2", "t5gemma"])
def test_prompts_of_every_layer_that_start_as_words_are_these_words(of):
    """In a decoder-only model also with the text behind them; in an encoder they see each other alone at the start."""
    model, words = tiny.model(of=of), [7, 11, 13]
    ids = np.random.default_rng(0).integers(2, tiny.ROWS, (3, 6)).astype(np.int32)
    first, start = tiny.ROWS, {"kind": "text", "text": "three words"}
    if of != "t5gemma":
        expected = all_logits(model, np.concatenate([np.tile(np.int32(words), (3, 1)), ids], 1))
    PTuningV2(length=3, init=start).attach(model, tiny.key(0), Context(lambda text: words))
    rows = np.tile(np.arange(first, first + 3, dtype=np.int32), (3, 1))
    if of != "t5gemma":
        np.testing.assert_allclose(all_logits(model, np.concatenate([rows, ids], 1)), expected, atol=1e-4)
        return
    plain, alone = tiny.model(of=of), np.int32([words])
    np.testing.assert_allclose(tiny.encode(model, rows[:1]), tiny.encode(plain, alone), atol=1e-4)


@pytest.mark.parametrize("of", ["gemma2", "t5gemma"])
def test_prefix_keys_without_positions_are_in_every_window(of):
    window = (LayerKind(window=2, ahead=1 if of == "t5gemma" else None, rope=Rope()),)
    changes = {"encoder_kinds": window, "encoder_pattern": (0,)} if of == "t5gemma" else {}
    model = tiny.model(
        of=of, kinds=(window[0].model_copy(update={"ahead": None}),), pattern=(0,), num_layers=1, **changes
    )
    attention: list = ["encoder" if of == "t5gemma" else "decoder"]
    Prefix(length=2, network=None, attentions=attention).attach(model, tiny.key(0), Context(list))
    ids = np.random.default_rng(0).integers(2, tiny.ROWS, (1, 12)).astype(np.int32)

    def last() -> np.ndarray:
        return tiny.encode(model, ids)[:, -1] if of == "t5gemma" else all_logits(model, ids)[:, -1]

    before, values = last(), model.context_stack.prefix.attention.values
    values[...] = values[...] + 1
    assert np.abs(last() - before).max() > 1e-3


@pytest.mark.parametrize(
    ("of", "method", "message"),
    [
        (
            "gpt2",
            Prefix(attentions=["encoder"]),
            r"attentions has encoder, which this model has not; expected .*decoder",
        ),
        ("gpt2", Prefix(attentions=["decoder", "cross"]), "attentions has cross, which this model has not"),
        ("t5gemma2", Prefix(attentions=["cross"]), "attentions has cross, .*; expected some of encoder, decoder"),
        ("gpt2", Bias(targets=[]), "no position biases; expected a T5; name targets"),
        ("gpt2", PTuningV2(length=2, place="both"), "this model has no decoder; expected before, after or a template"),
        ("gpt2", LoRA(targets=["cross.query"]), "'cross.query' matches no weight of this backbone"),
    ],
)
def test_what_a_model_has_not_is_refused_in_a_line(of, method, message):
    with pytest.raises(UserError, match=message) as error:
        method.attach(tiny.model(of=of), tiny.key(0), Context(list))
    assert "\n" not in str(error.value)


def test_words_of_a_model_that_scales_its_embeddings_are_read_and_searched_as_it_scales_them():
    model = tiny.model(of="gemma2")
    Hard(template="{text} it was").attach(model, tiny.key(0), Context(lambda text: [7, 8], word_ids=range(5, 30)))
    leaf = leaves(model)["prompt.words"]
    assert leaf.word_factor == model.settings.embedding_scale == 4
    assert model.prompt.template(model, lambda ids: " ".join(map(str, ids))) == "{text} 7 8"
    parts, search = split(model), GreedyWords(candidates=3).search({"prompt.words": leaf})
    proposed, _ = search.propose(search.init(None), parts.trainable, parts.frozen, tiny.key(1))
    table = np.asarray(model.word_rows(jnp.arange(tiny.ROWS)))
    for row in np.asarray(proposed["prompt"]["words"]).reshape(-1, 16):
        assert np.abs(table - row).max(1).min() < 1e-6
