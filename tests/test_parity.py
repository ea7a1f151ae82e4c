"""Random T5s of every shape give the numbers that transformers' PyTorch models give, in and out of our hands."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from softprompt_jax.checkpoints.backbone import load_backbone, save_backbone

pytestmark = pytest.mark.torch

SHAPES = {
    "t5 1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "t5 1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "gated silu": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    "shallow decoder": {"num_layers": 4, "num_decoder_layers": 1},
    "heads wider than the model": {"d_kv": 24},
    "coarse positions": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    "mt5": {"model_type": "mt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "umt5": {"model_type": "umt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    # Of T5 1.1's form, each with what its published sizes have of their own.
    "flan, t0, lm-adapted": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_heads": 3},
    "byt5": {
        **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "tokenizer_class": "ByT5Tokenizer"},
        **{"vocab_size": 384, "num_layers": 3, "num_decoder_layers": 1},
    },
    "ul2": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False, "d_kv": 16, "num_heads": 2},
}


def random_model(changes: dict):
    """Return a small transformers model whose every weight, norms and biases too, is far from its initial value."""
    torch = pytest.importorskip("torch")
    import transformers

    kind = changes.get("model_type", "t5")
    config_class, model_class = {
        "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
        "mt5": (transformers.MT5Config, transformers.MT5ForConditionalGeneration),
        "umt5": (transformers.UMT5Config, transformers.UMT5ForConditionalGeneration),
    }[kind]
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
    config = config_class(**{**sizes, "decoder_start_token_id": 0, **changes})
    torch.manual_seed(0)
    model = model_class(config).eval()
    if not changes.get("tie_word_embeddings", True):  # transformers 5 ties every new model and unties at loading
        model.lm_head.weight = torch.nn.Parameter(torch.empty(model.lm_head.weight.shape))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Norms and biases around 1; matrices by fan-in, so that no activation explodes.
            small = weight.dim() == 1 or "relative_attention_bias" in name
            weight.copy_(1 + 0.5 * torch.randn(weight.shape) if small else torch.randn(weight.shape) * 0.2)
    return model


def batch() -> dict[str, np.ndarray]:
    """Return three rows of unlike lengths, longer than the exact part of the position buckets."""
    draw = np.random.default_rng(0)
    encoder = draw.integers(2, 96, (3, 40))
    encoder[1, 25:] = encoder[2, 3:] = 0
    decoder = draw.integers(2, 96, (3, 12))
    decoder[:, 0] = 0
    return {"encoder_tokens": encoder.astype(np.int32), "decoder_inputs": decoder.astype(np.int32)}


def torch_logits(model, tokens: dict[str, np.ndarray]) -> np.ndarray:
    """Return the logits [B, U, V] of a transformers model."""
    import torch

    encoder = torch.from_numpy(tokens["encoder_tokens"]).long()
    decoder = torch.from_numpy(tokens["decoder_inputs"]).long()
    with torch.no_grad():
        logits = model(input_ids=encoder, attention_mask=encoder != 0, decoder_input_ids=decoder).logits.numpy()
    # transformers 5 scales umT5's output as if it were tied. It is not, and up to version 4 it was not scaled.
    return logits * (model.config.d_model**0.5 if model.config.model_type == "umt5" else 1)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_loaded_model_gives_the_logits_of_transformers(changes: dict, tmp_path: Path) -> None:
    model, tokens = random_model(changes), batch()
    model.save_pretrained(tmp_path)
    ours = load_backbone(tmp_path).model({name: jnp.asarray(value) for name, value in tokens.items()})
    theirs = torch_logits(model, tokens)
    assert np.abs(theirs).max() > 0.5  # else the tolerance below would mean nothing
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["t5 1.0", "flan, t0, lm-adapted", "mt5", "umt5", "byt5"])
def test_weights_in_torchs_own_file_give_them_too(family: str, tmp_path: Path) -> None:
    """As most LM-adapted, mT5, umT5 and ByT5 weights were published: a .bin beside a config of transformers 4."""
    import torch

    model, tokens = random_model(SHAPES[family]), batch()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"tie_word_embeddings": SHAPES[family].get("tie_word_embeddings", True)}
    config.pop("scale_decoder_outputs", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_backbone(tmp_path).model({name: jnp.asarray(value) for name, value in tokens.items()})
    np.testing.assert_allclose(ours, torch_logits(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [SHAPES["t5 1.0"], SHAPES["t5 1.1"]], ids=["t5 1.0", "t5 1.1"])
def test_saved_model_gives_transformers_the_same_logits(changes: dict, tmp_path: Path) -> None:
    import transformers

    model, tokens = random_model(changes), batch()
    model.save_pretrained(tmp_path / "theirs")
    save_backbone(load_backbone(tmp_path / "theirs").model, tmp_path / "ours", dtype="float32")
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(again, tokens), torch_logits(model, tokens), rtol=1e-5, atol=1e-5)
