"""What words leave at every layer of a model: hidden states, keys and values. Methods start from them."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from softprompt_jax.models.causal import CausalLM, CausalStack, turner, view
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.t5 import Stack
from softprompt_jax.models.t5gemma import T5Gemma

Attended = Literal["encoder", "decoder", "cross"]
Pair = tuple[Array, Array]  # keys and values


def attentions(model: LanguageModel) -> list[Attended]:
    """Return the kinds of attention that a model has; T5Gemma 2 reads the encoding in the decoder's own."""
    crosses = getattr(model.decoder.layers, "cross", None) is not None
    found: list[Attended] = ["decoder"] if model.encoder is None else ["encoder", "decoder"]
    return [*found, "cross"] if crosses else found


def activations(model: LanguageModel, rows: Float[Array, "P D"], positioned: bool = False) -> dict[Attended, Pair]:
    """Return the keys and values [L, P, GK] that embedded words have at every layer, in each kind of attention.

    `positioned`: rotary models turn the keys as those of the first tokens; otherwise keys have no position.
    """
    known = states(model, rows)

    def own(layer_kind_and_x: tuple[Any, Any, Array]) -> Pair:
        layer, kind, x = layer_kind_and_x
        normed = layer.attention_norm(x)
        if at is None:  # T5
            return layer.attention.key(normed), layer.attention.value(normed)
        keys, values = layer.attention.keys_values(normed[None])
        return _joined(turner(at, kind)(keys) if positioned else keys), _joined(values)

    found: dict[Attended, Pair] = {}
    for name in attentions(model):
        if name == "cross":
            continue
        stack, kinds, at = model.stacks[name], None, None
        if isinstance(stack, CausalStack):
            kinds, at = stack.kind_of_layer, view(stack.settings, jnp.arange(len(rows))[None])
        found[name] = jax.lax.map(own, (stack.layers, kinds, known[name]))
    if "cross" in attentions(model):
        encoded = known["encoded"]

        def cross(layer: Any) -> Pair:
            if isinstance(model, T5Gemma):
                keys, values = layer.cross.keys_values(encoded[None])
                return _joined(keys), _joined(values)
            return layer.cross.key(encoded), layer.cross.value(encoded)

        found["cross"] = jax.lax.map(cross, model.decoder.layers)
    return found


def _joined(heads: Float[Array, "1 G P K"]) -> Float[Array, "P GK"]:
    return heads[0].swapaxes(0, 1).reshape(heads.shape[2], -1)


def states(model: LanguageModel, rows: Float[Array, "P D"]) -> dict[str, Array]:
    """Return the hidden states [L, P, D] of words before every layer of each stack, and `encoded` [P, D].

    `rows` are the embedded words. They stand alone in the encoder, and in a decoder that sees their encoding. A
    decoder-only model encodes nothing.
    """
    scale = model.settings.embedding_scale if model.settings.scales_prompt else 1.0
    x = (rows[None] * scale).astype(model.dtype)
    positions = jnp.arange(len(rows))[None]
    together = jnp.ones((1, 1, 1, len(rows)), bool)
    past = jnp.tril(jnp.ones((len(rows), len(rows)), bool))[None, None]
    if isinstance(model, CausalLM):
        _, (decoder, *_) = model.decoder(model.at_positions(x, positions), past, positions, keep=True)
        return {"decoder": decoder[:, 0]}
    if isinstance(model, T5Gemma):
        every = jnp.broadcast_to(together, past.shape)
        encoded, (encoder, *_) = model.encoder(x, every, positions, keep=True)
        encoded = model.encoder.norm(encoded)
        seen = {"encoded": encoded, "encoded_visible": together}
        _, (decoder, *_) = model.decoder(x, past, positions, keep=True, **seen)
        return {"encoder": encoder[:, 0], "decoder": decoder[:, 0], "encoded": encoded[0]}
    encoder, encoded = _through(model.encoder, x, together)
    encoded = model.encoder.norm(encoded)
    decoder, _ = _through(model.decoder, x, past, encoded)
    return {"encoder": encoder, "decoder": decoder, "encoded": encoded[0]}


def _through(stack: Stack, x: Array, visible: Array, encoded: Array | None = None) -> tuple[Array, Array]:
    """Run the layers of a stack; return what each of them reads, and the output before the norm."""
    positions = jnp.arange(x.shape[1])

    def run(x, layer):
        before = x[0]
        x = layer.attend_self(x, (layer.bias if stack.bias is None else stack.bias)(positions, positions), visible)
        if layer.cross is not None:
            assert encoded is not None
            seen = jnp.ones((1, 1, 1, encoded.shape[1]), bool)
            x = layer.attend_cross(x, layer.cross.keys_values(encoded), seen)
        return layer.feed(x), before

    x, reads = jax.lax.scan(run, x, stack.layers)
    return reads, x
