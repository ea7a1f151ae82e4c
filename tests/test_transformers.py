"""Every family beside transformers: a folder that we write, of random weights, has the same logits there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from softprompt_jax.checkpoints.backbone import load_backbone, save_backbone
from softprompt_jax.models.causal_settings import LayerKind, Rope

pytestmark = pytest.mark.torch
_ROPE, _WINDOW = LayerKind(rope=Rope()), LayerKind(window=4, rope=Rope())
_NO_CAPS = {"score_cap": None, "logit_cap": None}
MODELS = {name: (name, {}) for name in ("t5", *tiny.FAMILIES)} | {
    "llama3": ("llama", {"kinds": (LayerKind(rope=Rope(kind="llama3", factor=8, original=16)),)}),
    "mistral": ("llama", {"family": "mistral", "kinds": (_WINDOW,)}),
    "smollm3": ("llama", {"family": "smollm3", "kinds": (_ROPE, LayerKind()), "pattern": (0, 1)}),
    "gemma": ("gemma2", {"family": "gemma", "kinds": (_ROPE,), "pattern": (0, 0), "post_norms": False, **_NO_CAPS}),
    "gemma3_text": ("gemma2", {"family": "gemma3_text", "query_key_norm": True, **_NO_CAPS}),
    "gpt_neo": (
        "gpt2",
        {
            **{"family": "gpt_neo", "kinds": (LayerKind(), LayerKind(window=4)), "pattern": (0, 1)},
            **{"attention_bias": False, "score_scale": 1.0},
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_we_write_has_the_logits_that_transformers_computes_from_it(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    family, changes = MODELS[name]
    save_backbone(tiny.model(of=family, **changes), tmp_path, "float32")
    model, draw = load_backbone(tmp_path).model, np.random.default_rng(0)
    lengths, causal = [11, 6], model.encoder is None
    real = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids = np.where(real, draw.integers(3, tiny.ROWS, real.shape), 0)
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(real.astype(np.int64))}
    tokens = jnp.asarray(np.where(real, ids, model.settings.padding), jnp.int32)
    with jax.default_matmul_precision("highest"), torch.no_grad():
        if causal:
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
            found = model.project(model.decoder.norm(model.run(tokens)[0]))
        else:
            theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
            answers = draw.integers(3, tiny.ROWS, (2, 7))
            given["decoder_input_ids"] = torch.from_numpy(answers)
            found = model({"encoder_tokens": tokens, "decoder_inputs": jnp.asarray(answers, jnp.int32)})
        expected = theirs(**given).logits.numpy()
    seen = real if causal else np.ones(expected.shape[:2], bool)
    np.testing.assert_allclose(np.asarray(found)[seen], expected[seen], atol=1e-4)
