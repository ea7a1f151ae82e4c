"""T5s whose padding, EOS and first decoder input are not 0, 1 and 0: MADLAD-400, Pile-T5, CodeT5."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from softprompt_jax.checkpoints.backbone import format_of, load_backbone, save_backbone
from softprompt_jax.data.prompt_layout import place
from softprompt_jax.models import decode

TEXTS = [[5, 9, 17, 2], [7, 2], [11, 12, 13, 14, 15, 2]]


def padded(padding: int) -> jnp.ndarray:
    rows = np.full((3, 8), padding, np.int32)
    for row, ids in zip(rows, TEXTS, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(rows)


@pytest.mark.parametrize("pad", [0, 1])
def test_a_config_states_padding_eos_and_first_input(tmp_path, pad):
    save_backbone(tiny.model(), tmp_path, "float32")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"pad_token_id": pad, "eos_token_id": 2, "decoder_start_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = load_backbone(tmp_path).settings
    assert (settings.padding, settings.eos, settings.start) == (0 if pad == 0 else -1, 2, 0)
    form = format_of(settings)
    assert (form.padding, form.eos, form.start, form.causal) == (settings.padding, 2, 0, False)


def test_padding_by_minus_one_gives_the_answers_of_padding_by_zero():
    usual, other = tiny.model(eos=2), tiny.model(eos=2, padding=-1)
    tokens, scores = decode.greedy(other, padded(-1), 5)
    expected, expected_scores = decode.greedy(usual, padded(0), 5)
    np.testing.assert_array_equal(np.where(np.asarray(tokens) < 0, 0, tokens), expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    batch = {"encoder_tokens": padded(-1), "decoder_inputs": jnp.asarray([[0, 5]] * 3)}
    same = batch | {"encoder_tokens": padded(0)}
    np.testing.assert_allclose(other(batch), usual(same), atol=1e-5)
    np.testing.assert_allclose(usual(batch), usual(same), atol=1e-5)  # -1 is padding for every model
    unknown = batch | {"encoder_tokens": padded(-1).at[1, 0].set(0)}  # where 0 is a word, it is read
    assert not np.allclose(other(unknown)[1], usual(unknown)[1])


def test_rows_after_a_text_stand_before_its_own_eos():
    layout = place("after", 2, 100, lambda text: [], 2)
    assert layout.around([5, 9, 2]).tolist() == [5, 9, 100, 101, 2]
    assert place("after", 2, 100, lambda text: [], None).around([5, 9, 2]).tolist() == [5, 9, 2, 100, 101]
