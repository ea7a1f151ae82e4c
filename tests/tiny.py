"""Small models with random weights, made here, for tests that need no other implementation's numbers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models.build import abstract, settings_class
from softprompt_jax.models.causal_settings import LayerKind, Rope
from softprompt_jax.models.settings import ModelSettings
from softprompt_jax.models.t5 import T5, T5Settings
from softprompt_jax.optim.losses import cross_entropy
from softprompt_jax.trees import flatten, unflatten

ROWS = 50  # V: rows of the embedding table

# Every setting of a T5 at least once with another value; in combinations, because each is a compilation.
SHAPES = {
    "1.1": {},
    "1.0, unequal depths": {
        **{"activation": "relu", "gated": False, "tied": True, "scale_output": True},
        **{"num_layers": 3, "num_decoder_layers": 1},
    },
    "umt5, gated silu": {"bias_in_every_layer": True, "activation": "silu"},
    "wide heads, one layer, coarse positions, gelu": {
        **{"d_kv": 12, "num_layers": 1, "activation": "gelu", "gated": False},  # heads * d_kv = 24, d_model = 16
        **{"relative_buckets": 8, "relative_max_distance": 5, "epsilon": 1e-3},
    },
}


# Models of other families, each setting of theirs at least once.
_ROPE, _WINDOW = Rope(), LayerKind(window=4, rope=Rope())
_LLAMA = {"activation": "silu", "num_heads": 4, "num_key_heads": 2, "score_scale": 8**-0.5}
_GPT = {
    **{"num_heads": 2, "num_key_heads": 2, "score_scale": 8**-0.5, "gated": False, "norm": "layer"},
    **{"attention_bias": True, "output_bias": True, "feed_forward_bias": True, "epsilon": 1e-5},
}
_GEMMA = _LLAMA | {
    **{"activation": "gelu_tanh", "norm": "rms_offset", "post_norms": True, "embedding_scale": 4.0, "tied": True},
    **{"score_cap": 50.0, "logit_cap": 30.0, "kinds": (_WINDOW, LayerKind(rope=_ROPE)), "pattern": (0, 1)},
}
_AHEAD = {"encoder_kinds": (LayerKind(window=5, ahead=4, rope=_ROPE), LayerKind(rope=_ROPE)), "encoder_pattern": (0, 1)}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"kinds": (LayerKind(rope=_ROPE),), "pattern": (0, 0)},
    "qwen2": _LLAMA | {"kinds": (LayerKind(rope=_ROPE),), "pattern": (0, 0), "attention_bias": True},
    "qwen3": _LLAMA | {"kinds": (LayerKind(rope=_ROPE),), "pattern": (0, 0), "query_key_norm": True},
    "gemma2": _GEMMA,
    "gpt2": _GPT | {"kinds": (LayerKind(),), "pattern": (0, 0), "learned_positions": 64, "tied": True},
    "gpt_neox": _GPT | {"kinds": (LayerKind(rope=Rope(share=0.5)),), "pattern": (0, 0), "parallel": True},
    "t5gemma": _GEMMA | _AHEAD | {"own_embeddings": True, "scales_prompt": True},
    "t5gemma2": _GEMMA | _AHEAD | {"merged": True, "query_key_norm": True, "score_cap": None, "logit_cap": None},
}


def settings(of: str = "t5", **changes) -> ModelSettings:
    sizes = {"vocabulary_rows": ROWS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2}
    if of == "t5":
        return T5Settings(**{**sizes, "num_heads": 2, "num_decoder_layers": 2, **changes})
    return settings_class(of)(**{**sizes, "family": of, **FAMILIES[of], **changes})


def model(seed: int = 0, dtype: str = "float32", prompt: int = 0, of: str = "t5", **changes) -> Any:
    """Return a model whose every weight, norms and biases too, is far from its initial value (no compilation)."""
    draw = np.random.default_rng(seed)
    made_for = settings(of, **changes)
    graphdef, state = nnx.split(abstract(made_for, dtype))
    leaves = {}
    for path, leaf in flatten(nnx.to_pure_dict(state)).items():
        values = draw.normal(size=leaf.shape)
        if path.endswith("scale"):
            values = 0.3 * values + (getattr(made_for, "norm", None) != "rms_offset")  # whose factor is 1 + scale
        elif path.endswith("kernel"):
            values = values / np.sqrt(leaf.shape[-2])
        leaves[path] = jnp.asarray(values, jnp.dtype(dtype))
    nnx.replace_by_pure_dict(state, unflatten(leaves))
    made = nnx.merge(graphdef, state)
    if prompt:
        attach_rows(made, draw.normal(size=(prompt, made.settings.d_model)).astype(np.float32))
    return made


def batch(rows: int = 4, length: int = 9, targets: int = 5, prompt: int = 0, seed: int = 1) -> dict[str, jax.Array]:
    """Return rows of unlike lengths; `prompt` ids stand before each."""
    draw = np.random.default_rng(seed)

    def tokens(width):
        made = draw.integers(2, ROWS, (rows, width)).astype(np.int32)
        for row, end in enumerate(np.linspace(width, 2, rows).astype(int)):
            made[row, end - 1] = 1
            made[row, end:] = 0
        return made

    encoder, decoder = tokens(length), tokens(targets)
    ids = np.tile(np.arange(ROWS, ROWS + prompt, dtype=np.int32), (rows, 1))
    return {
        "encoder_tokens": jnp.asarray(np.concatenate([ids, encoder], 1)),
        "decoder_inputs": jnp.asarray(np.pad(decoder[:, :-1], ((0, 0), (1, 0)))),
        "decoder_targets": jnp.asarray(decoder),
    }


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, batch, key):
    return nnx.merge(graphdef, state)(batch, key)


def forward(model: T5, batch: dict[str, jax.Array], key: jax.Array | None = None) -> np.ndarray:
    """Return a model's logits [B, U, V]; models of one structure share a program."""
    graphdef, state = nnx.split(model)
    return np.asarray(_forward(graphdef, state, batch, key))


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef, state, tokens):
    return nnx.merge(graphdef, state).encode(tokens)


def encode(model: T5, tokens) -> np.ndarray:
    graphdef, state = nnx.split(model)
    return np.asarray(_encode(graphdef, state, tokens))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _gradient(graphdef, trainable, frozen, batch, z_loss, label_smoothing):
    def loss(trainable):
        model = nnx.merge(graphdef, trainable, jax.lax.stop_gradient(frozen))
        logits = model(batch)
        padding = model.settings.padding
        return cross_entropy(logits, batch["decoder_targets"], z_loss, label_smoothing, padding)[0], logits

    return jax.value_and_grad(loss, has_aux=True)(trainable)


def loss_logits_gradient(parts, batch, z_loss: float = 0.0, label_smoothing: float = 0.0):
    """Return the summed loss, the logits, and the loss's gradient with respect to everything that trains."""
    (loss, logits), gradient = _gradient(parts.graphdef, parts.trainable, parts.frozen, batch, z_loss, label_smoothing)
    return loss, np.asarray(logits), gradient


def key(seed: int) -> jax.Array:
    """Return a random key whose programs compile faster than the default's."""
    return jax.random.key(seed, impl="unsafe_rbg")
