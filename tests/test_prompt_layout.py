"""Prompts before, after and around a text and on the decoder's side: the same as putting the rows there by hand."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from test_decode import by_whole_passes, eager_to_end, greedy

from softprompt_jax.checkpoints.artifact import save_prompt
from softprompt_jax.checkpoints.backbone import Backbone
from softprompt_jax.config import UserError, parse
from softprompt_jax.data.batches import TrainBatches, evaluation_batches
from softprompt_jax.data.prompt_layout import PromptLayout, place
from softprompt_jax.data.tokenized import TokenizedSet
from softprompt_jax.inference.from_arrays import generate
from softprompt_jax.inference.predictor import load_predictor
from softprompt_jax.methods import Context, Prompt, split
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models.attention import same_segment

V = tiny.ROWS
WORDS = {"it was": [11, 12], "so": [13]}


def test_the_names_and_a_template_give_ids_in_order():
    assert place("before", 3, V, WORDS.__getitem__) == PromptLayout((V, V + 1, V + 2), (), ())
    assert place("after", 2, V, WORDS.__getitem__) == PromptLayout((), (V, V + 1), ())
    assert place("decoder", 2, V, WORDS.__getitem__) == PromptLayout((), (), (V, V + 1))
    assert place("both", 2, V, WORDS.__getitem__) == PromptLayout((V, V + 1), (), (V + 2, V + 3))
    around = place("{prompt:2} so {prompt:1} {text} it was {prompt}", 4, V, WORDS.__getitem__)
    assert around == PromptLayout((V, V + 1, 13, V + 2), (11, 12, V + 3), ())


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("under", "expected before, after, decoder, both, or a template"),
        ("{prompt:3} it was", "template with {text} once"),
        ("{text} {text} {prompt:3}", "template with {text} once"),
        ("{prompt:3} {text} {label}", "template with {text} once"),
        ("{prompt:2} {text}", "does not place the prompt's 3 rows"),
        ("{prompt:3} {text} {prompt}", "does not place the prompt's 3 rows"),
        ("{prompt} {text} {prompt}", "does not place the prompt's 3 rows"),
    ],
)
def test_a_place_that_cannot_be_is_refused_in_a_line(where, message):
    with pytest.raises(UserError, match=message.replace("{", r"\{")) as caught:
        parse(Prompt, {"length": 3, "place": where}, "test.yaml")
    assert "\n" not in str(caught.value)


def test_an_anchor_past_the_table_is_refused():
    with pytest.raises(UserError, match=r"'so' has the id 13; expected under 12"):
        place("{text} so {prompt}", 1, 12, WORDS.__getitem__)


def some_set() -> TokenizedSet:
    """Three inputs of unlike lengths with their EOS, three targets."""
    inputs = [[5, 6, 7, 1], [8, 1], [9, 10, 1]]
    targets = [[20, 21, 1], [22, 1], [23, 1]]
    ends = [np.cumsum([0, *map(len, side)]) for side in (inputs, targets)]
    flat = [np.concatenate(side).astype(np.int32) for side in (inputs, targets)]
    return TokenizedSet(flat[0], ends[0], flat[1], ends[1], V)


def prompted(where: str, rows: int = 4, seed: int = 0):
    model = tiny.model(seed)
    attach_rows(model, np.random.default_rng(9).normal(size=(rows, 16)).astype(np.float32), where, WORDS.__getitem__)
    return model


def batch(model) -> dict[str, jax.Array]:
    made = next(evaluation_batches(some_set(), 3, model.prompt.layout, shapes=[(5, 4)]))[0]
    return {name: jnp.asarray(value) for name, value in made.items()}


def test_what_stands_after_a_text_stands_before_its_end():
    tokens = batch(prompted("{prompt:1} {text} it was {prompt:3}"))["encoder_tokens"]
    expected = [V, 5, 6, 7, 11, 12, V + 1, V + 2, V + 3, 1, 0]
    np.testing.assert_array_equal(tokens[0], expected)
    np.testing.assert_array_equal(tokens[2], [V, 8, 11, 12, V + 1, V + 2, V + 3, 1, 0, 0, 0])
    np.testing.assert_array_equal(
        batch(prompted("after"))["encoder_tokens"][2], [8, V, V + 1, V + 2, V + 3, 1, 0, 0, 0]
    )


LENGTH, DECODER_LENGTH = 12, 9  # of every case below, so that they share their programs


@functools.cache
def by_hand_program(graphdef):
    def run(state, x, real, y):
        model = nnx.merge(graphdef, state)
        encoded = model.encoder(x, same_segment(real, real))
        causal = jnp.tril(jnp.ones((DECODER_LENGTH, DECODER_LENGTH), bool))[None, None]
        return model.project(model.decoder(y, causal, encoded, (real > 0)[:, None, None, :]))

    return jax.jit(run)


def by_hand(rows: np.ndarray, encoder_ids: list[list[int]], decoder_ids: list[list[int]]) -> np.ndarray:
    """Return the logits of rows that are looked up in the table and the prompt joined, one after the other."""
    model = tiny.model()
    both = np.concatenate([model.embedding[...], rows])

    def stacked(ids, width):
        return jnp.asarray(np.stack([np.pad(both[row], ((0, width - len(row)), (0, 0))) for row in ids]))

    real = jnp.asarray([[1] * len(row) + [0] * (LENGTH - len(row)) for row in encoder_ids])
    graphdef, state = nnx.split(model)
    x, y = stacked(encoder_ids, LENGTH), stacked(decoder_ids, DECODER_LENGTH)
    return np.asarray(by_hand_program(graphdef)(state, x, real, y))


@pytest.mark.parametrize("where", ["after", "decoder", "both", "{prompt:1} {text} it was {prompt:3}"])
def test_logits_equal_those_of_concatenated_embeddings(where):
    model = prompted(where)
    made = batch(model)
    texts, targets = [[5, 6, 7], [9, 10], [8]], [[20, 21], [23], [22]]
    rows = list(range(V, V + 4))
    before, after, decoder = {
        "after": ([], rows, []),
        "decoder": ([], [], rows),
        "both": (rows[:2], [], rows[2:]),
    }.get(where, (rows[:1], [11, 12, *rows[1:]], []))
    encoder_ids = [[*before, *text, *after, 1] for text in texts]
    decoder_ids = [[*decoder, 0, *target] for target in targets]
    expected = by_hand(np.asarray(model.prompt.rows[...]), encoder_ids, decoder_ids)
    widths = {"encoder_tokens": LENGTH, "decoder_inputs": DECODER_LENGTH, "decoder_targets": DECODER_LENGTH}
    made = {name: jnp.pad(made[name], ((0, 0), (0, width - made[name].shape[1]))) for name, width in widths.items()}
    attach_rows(model, model.prompt.rows[...])  # what the model knows of the place is for the data only
    logits = tiny.forward(model, made)
    first = len(decoder)
    for row, target in enumerate(targets):
        real = slice(first, first + len(target) + 1)
        np.testing.assert_allclose(logits[row, real], expected[row, real], atol=1e-5)
        np.testing.assert_array_equal(
            made["decoder_targets"][row], [0] * first + [*target, 1] + [0] * (8 - first - len(target))
        )


def test_no_target_stands_at_a_prompt_row_so_that_the_loss_counts_real_ones_only():
    made = batch(prompted("decoder"))
    assert not np.asarray(made["decoder_targets"])[:, :4].any()
    np.testing.assert_array_equal(made["decoder_inputs"][0], [V, V + 1, V + 2, V + 3, 0, 20, 21, 1])
    assert int((made["decoder_targets"] != 0).sum()) == 7


@pytest.mark.slow
def test_the_gradient_of_decoder_rows_equals_finite_differences():
    model = prompted("both")
    parts, made = split(model), batch(model)
    rows = np.asarray(parts.trainable["prompt"]["rows"])
    gradient = np.asarray(tiny.loss_logits_gradient(parts, made)[2]["prompt"]["rows"])
    assert (np.abs(gradient).max(1) > 1e-3).all()
    direction = np.random.default_rng(1).normal(size=rows.shape)

    def loss(step: float) -> float:
        parts.trainable["prompt"]["rows"] = jnp.asarray(rows + step * direction, jnp.float32)
        return float(tiny.loss_logits_gradient(parts, made)[0])

    assert (loss(2e-3) - loss(-2e-3)) / 4e-3 == pytest.approx((gradient * direction).sum(), rel=1e-2)


@pytest.mark.slow
def test_greedy_decoding_reads_the_decoder_rows_first():
    model = eager_to_end(prompted("both", seed=5))
    made = batch(model)
    before = made["decoder_inputs"][:, : len(model.prompt.layout.decoder[0])]
    output, score = greedy(model, made["encoder_tokens"], 6, decoder_prompt=before)
    expected, expected_score = by_whole_passes(model, made["encoder_tokens"], 6, before=before)
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_allclose(score, expected_score, atol=1e-4)
    plain, _ = greedy(model, made["encoder_tokens"], 6)
    assert (plain != output).any()


def test_shapes_and_padding_count_the_rows_on_both_sides():
    batches = TrainBatches(some_set(), 3, 0, prompted("both").prompt.layout, max_shapes=1)
    made = batches.batch(0)
    assert (made["encoder_tokens"].shape[1], made["decoder_inputs"].shape[1]) == batches.shapes[0]
    text = np.count_nonzero((made["encoder_tokens"] > 0) & (made["encoder_tokens"] < V)) + np.count_nonzero(
        made["decoder_targets"]
    )
    rows = np.count_nonzero(made["encoder_tokens"] >= V) + np.count_nonzero(made["decoder_inputs"] >= V)
    size = made["encoder_tokens"].size + made["decoder_inputs"].size
    assert batches.padding_share == pytest.approx(1 - text / (size - rows))


def test_tasks_may_have_rows_of_their_own_at_every_place():
    own = np.arange(V, V + 6).reshape(3, 2)
    prompts = PromptLayout(own, own[:, :1], own[:, 1:])
    each = dataclasses.replace(some_set(), tasks=np.arange(3, dtype=np.int32))
    made = next(evaluation_batches(each, 3, prompts, shapes=[(5, 4)]))[0]
    np.testing.assert_array_equal(made["encoder_tokens"][1], [V + 4, V + 5, 9, 10, V + 4, 1, 0, 0])
    np.testing.assert_array_equal(made["decoder_inputs"][1], [V + 5, 0, 23, 1, 0])


def test_attaching_twice_and_anchors_without_a_tokenizer_are_refused():
    model = tiny.model()
    Prompt(length=2, place="after").attach(model, jax.random.key(0), Context(list))
    with pytest.raises(UserError, match="two methods want the prompt"):
        Prompt(length=2).attach(model, jax.random.key(0), Context(list))
    with pytest.raises(UserError, match=r"'it was'.*tokenizer"):
        attach_rows(tiny.model(), np.zeros((3, 16)), "{text} it was {prompt}")


def test_a_prompt_file_says_where_its_rows_stand(small, tmp_path):
    rows = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    for where in ("both", "{prompt:1} {text} the garden {prompt:3}"):
        save_prompt(rows, tmp_path / "rows.safetensors", {"place": where, "backbone": str(small.backbone)})
        predictor = load_predictor(tmp_path / "rows.safetensors", str(small.backbone))
        expected = place(where, 4 if "{" in where else 2, 160, predictor.tokenizer.encode)
        assert predictor.model.prompt.layout == expected
    assert len(predictor.texts(["the old mill", "the garden is warm"])) == 2
    with pytest.raises(UserError, match="stands not only before"):
        generate(Backbone(predictor.model, small.backbone, "small"), np.array([[5, 1]]))
