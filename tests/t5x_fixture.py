"""The small T5 1.1 of shared/fixtures/t5x in our layout, with its inputs and what t5x made of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt_jax.backbone.pretrained import unflatten
from softprompt_jax.backbone.t5 import T5, T5Settings, abstract
from softprompt_jax.methods.prompt import attach_rows

SETTINGS = T5Settings(
    vocabulary_rows=256, d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=2, num_decoder_layers=2
)
_NORMS = {"attention_norm": "pre_attention_layer_norm", "feed_forward_norm": "pre_mlp_layer_norm"}
_PARTS = {"query": "query", "key": "key", "value": "value", "output": "out"}


@functools.cache
def golden(fixtures: Path) -> Mapping[str, np.ndarray]:
    with np.load(fixtures / "t5x" / "golden.npz") as arrays:
        return dict(arrays)


@functools.cache
def _weights(fixtures: Path) -> dict[str, np.ndarray]:
    """Return the parameters under our paths: layers stacked, relative biases [buckets, heads]."""
    with np.load(fixtures / "t5x" / "tiny_params_flat.npz") as arrays:
        theirs = dict(arrays)
    ours = {"embedding": theirs["token_embedder/embedding"], "head.kernel": theirs["decoder/logits_dense/kernel"]}
    for stack in ("encoder", "decoder"):

        def layers(name, stack=stack):
            return np.stack([theirs[f"{stack}/layers_{i}/{name}"] for i in range(2)])

        ours[f"{stack}.norm.scale"] = theirs[f"{stack}/{stack}_norm/scale"]
        ours[f"{stack}.bias.table"] = theirs[f"{stack}/relpos_bias/rel_embedding"].T
        attentions, norms = {"attention": "attention"}, dict(_NORMS)
        if stack == "decoder":
            attentions = {"attention": "self_attention", "cross": "encoder_decoder_attention"}
            norms |= {
                "attention_norm": "pre_self_attention_layer_norm",
                "cross_norm": "pre_cross_attention_layer_norm",
            }
        for name, their_name in attentions.items():
            for part, their_part in _PARTS.items():
                ours[f"{stack}.layers.{name}.{part}.kernel"] = layers(f"{their_name}/{their_part}/kernel")
        for part, their_part in {"gate": "wi_0", "up": "wi_1", "down": "wo"}.items():
            ours[f"{stack}.layers.feed_forward.{part}.kernel"] = layers(f"mlp/{their_part}/kernel")
        for name, their_name in norms.items():
            ours[f"{stack}.layers.{name}.scale"] = layers(f"{their_name}/scale")
    assert sum(array.size for array in ours.values()) == sum(array.size for array in theirs.values())
    return ours


def model(fixtures: Path, prompted: bool = False, dtype: str = "float32") -> T5:
    graphdef, state = nnx.split(abstract(SETTINGS, dtype))
    nnx.replace_by_pure_dict(state, unflatten({k: jnp.asarray(v, dtype) for k, v in _weights(fixtures).items()}))
    made = nnx.merge(graphdef, state)
    if prompted:
        attach_rows(made, golden(fixtures)["prompt"])
    return made


def batch(fixtures: Path, prompted: bool = False) -> dict[str, jnp.ndarray]:
    arrays = golden(fixtures)
    encoder = arrays["short/encoder_input_tokens"]
    if prompted:
        ids = np.tile(np.arange(256, 261, dtype=np.int32), (len(encoder), 1))
        encoder = np.concatenate([ids, encoder], 1)
    return {
        "encoder_tokens": jnp.asarray(encoder),
        "decoder_inputs": jnp.asarray(arrays["short/decoder_input_tokens"]),
        "decoder_targets": jnp.asarray(arrays["short/decoder_target_tokens"]),
    }


def real_targets(fixtures: Path) -> np.ndarray:
    """Tell where logits are compared, [B, U]."""
    return golden(fixtures)["short/decoder_loss_weights"] > 0
