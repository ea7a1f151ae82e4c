"""DePT: what is added to the words of a text, by hand; how many numbers; what it refuses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from softprompt_jax.config import UserError, parse
from softprompt_jax.methods import Context, DePT, put_trained, split
from softprompt_jax.methods.listing import parameters
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models.presets import preset
from softprompt_jax.run import Run

CONTEXT = Context(lambda text: [5, 6], frozenset({0, 1}))
TEXT = [9, 4, 17, 22, 8]


def offset_model(of: str, positions: int):
    """Return a model with DePT moved away from its start, and the rows that it adds [S, D]."""
    model = tiny.model(of=of)
    DePT(length=2, rank=3, positions=positions).attach(model, tiny.key(0), CONTEXT)
    draw = np.random.default_rng(1)
    trained = split(model).trainable
    trained["offset"]["right"] = jnp.asarray(draw.normal(size=(3, 16)), jnp.float32)
    put_trained(model, trained, "test")
    left, right = (np.asarray(part) for part in model.offset.factors())
    return model, left @ right


def logits(model, context: list[int]) -> np.ndarray:
    tokens = np.full((2, 12), model.settings.padding, np.int32)
    tokens[0, : len(context)] = context
    tokens[1, : len(context) - 1] = context[1:]  # a shorter row beside it
    first = np.asarray(model.first_input(jnp.asarray(tokens)))
    inputs = np.stack([first, np.full(2, 7, np.int32)], 1)
    return tiny.forward(model, {"encoder_tokens": jnp.asarray(tokens), "decoder_inputs": jnp.asarray(inputs)})[0]


@pytest.mark.parametrize("of", ["t5", "gpt2", pytest.param("gemma2", marks=pytest.mark.slow), "t5gemma"])
@pytest.mark.parametrize("positions", [3, 20])
def test_words_with_their_offsets_are_a_prompt_of_these_sums(of, positions):
    """Another way to the same logits: every word of the text as a prompt row that already holds what is added."""
    model, added = offset_model(of, positions)
    first, end = tiny.ROWS, [1] if model.text_end is not None else []
    text = [*TEXT, *end]
    found = logits(model, [first, first + 1, *text])
    factor = model.settings.embedding_scale if model.settings.scales_prompt else 1.0
    rows = np.array(model.word_rows(jnp.asarray(text)))
    last = len(text) - (not end)  # a decoder-only model's answer begins with the last one, as it is
    for place in range(min(last, positions)):
        rows[place] += added[place] / factor
    plain = tiny.model(of=of)
    attach_rows(plain, np.concatenate([np.asarray(model.prompt.table()), rows]))
    ids = [first + 2 + place if place < last else word for place, word in enumerate(text)]
    np.testing.assert_allclose(found, logits(plain, [first, first + 1, *ids]), atol=1e-5)
    model.offset.right[...] = jnp.zeros((3, 16))
    assert np.abs(found - logits(model, [first, first + 1, *text])).max() > 1e-3


def test_it_starts_as_its_prompt_alone_and_has_as_many_numbers_as_a_prompt_of_100_rows():
    model = tiny.model()
    DePT(length=2, rank=3).attach(model, tiny.key(0), CONTEXT)
    plain = tiny.model()
    attach_rows(plain, model.prompt.table())
    first = tiny.ROWS
    np.testing.assert_array_equal(
        logits(model, [first, first + 1, *TEXT, 1]), logits(plain, [first, first + 1, *TEXT, 1])
    )
    assert parameters(preset("t5-v1_1-base"), DePT()) == 40 * 768 + 45 * (256 + 768) == 100 * 768


def test_two_offsets_and_packed_rows_are_refused_in_a_line():
    model = tiny.model()
    DePT(length=2).attach(model, tiny.key(0), CONTEXT)
    with pytest.raises(UserError, match="two methods want what is added to the text; expected one"):
        DePT(length=2).attach(model, tiny.key(0), CONTEXT)
    with pytest.raises(UserError, match="packing with the method dept: what is added depends on a token's place"):
        parse(Run, {"task": "sentiment_movie", "methods": ["dept"], "packing": True}, "test")
