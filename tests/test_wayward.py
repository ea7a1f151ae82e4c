"""Wayward prompts: the distance to a text and what it weighs."""

from __future__ import annotations

import numpy as np
import optax
import pytest
import tiny
from test_step import one_step, run

from softprompt_jax.config import UserError, parse
from softprompt_jax.methods import Context, Wayward, finish, split

CONTEXT = Context(lambda text: [5, 6], frozenset({0, 1, 2}))


def held(**settings):
    model = tiny.model()
    parse(Wayward, {"length": 3, "text": "two words", **settings}, "test").attach(model, tiny.key(0), CONTEXT)
    return model


def test_rows_start_at_their_words_and_the_distance_is_relative():
    model = held()
    words = np.asarray(model.embedding[...])[[5, 6, 5]]
    np.testing.assert_array_equal(model.prompt.table(), words)
    assert float(model.prompt.distance()) == 0
    model.prompt.rows[...] = model.prompt.rows[...] * 1.5
    assert float(model.prompt.distance()) == pytest.approx(0.25, rel=1e-5)
    assert set(split(model).trainable["prompt"]) == {"rows"}  # the words do not train
    assert not hasattr(finish(model).prompt, "words")


@pytest.mark.slow
def test_a_step_pays_for_the_distance_of_every_target_token():
    model, batch = held(init="vocabulary"), tiny.batch(prompt=3)
    parts, words = split(model), np.asarray(model.prompt.words[...])
    started, real = np.asarray(model.prompt.table()), int((batch["decoder_targets"] != 0).sum())
    distance = np.mean((started - words) ** 2) / np.mean(words**2)
    assert distance > 0.1
    moved, losses = {}, {}
    for weight in (0.0, 2.0):
        method = {"kind": "wayward", "length": 3, "text": "two words", "weight": weight}
        moved[weight], losses[weight] = one_step(parts, run(methods=[method]), batch, optax.sgd(1.0))
    assert losses[2.0] - losses[0.0] == pytest.approx(2 * distance, rel=1e-4)
    slope = 2.0 * real * 2 * (started - words) / started.size / np.mean(words**2)
    found = np.asarray(moved[0.0]["prompt"]["rows"] - moved[2.0]["prompt"]["rows"])
    np.testing.assert_allclose(found, slope, rtol=1e-3, atol=1e-4)


def test_a_text_is_needed():
    with pytest.raises(UserError, match="text"):
        parse(Wayward, {"text": ""}, "test")
    with pytest.raises(UserError, match="text is empty"):
        Wayward(length=2).attach(tiny.model(), tiny.key(0), Context(lambda text: []))
