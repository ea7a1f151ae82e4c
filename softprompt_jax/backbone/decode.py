"""Greedy decoding with key-value caches, and the likelihood of given words; the encoder runs once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from softprompt_jax.backbone.attention import sees_prefix, with_prefix
from softprompt_jax.backbone.t5 import T5

EOS = 1


def greedy(
    model: T5,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    encoder_segments: Int[Array, "B T"] | None = None,
    decoder_prompt: Int[Array, "B P"] | None = None,
) -> tuple[Int[Array, "B U"], Float[Array, "B"]]:
    """Return the most likely next tokens up to EOS (then 0), and the sum of their log-probabilities.

    Shapes: B rows, U = `max_tokens`; prompt ids already stand in `encoder_tokens`; those of `decoder_prompt`
    are read before the decoder's first input. Stops when every row has ended. Compiles once per shape.
    """
    tokens = encoder_tokens
    segments = (tokens != 0).astype(jnp.int32) if encoder_segments is None else encoder_segments
    encoded = model.encode(tokens, segments)
    visible = (segments > 0)[:, None, None, :]
    decoder, settings = model.decoder, model.settings
    before, before_cross = decoder.prefixes()
    cross = jax.lax.map(
        lambda layer_prefix: with_prefix(layer_prefix[1], *layer_prefix[0].cross.keys_values(encoded)),
        (decoder.layers, before_cross),
    )
    visible = sees_prefix(visible, before_cross)
    batch, first = tokens.shape[0], 0 if decoder_prompt is None else decoder_prompt.shape[1]
    shape = (decoder.depth, batch, settings.num_heads, first + max_tokens, settings.d_kv)
    empty = jnp.zeros(shape, encoded.dtype)
    cache = (empty, empty) if before is None else jax.vmap(with_prefix)(before, empty, empty)
    prefix_length = cache[0].shape[3] - shape[3]
    positions = jnp.arange(first + max_tokens)

    def read(tokens, position, caches):
        """Run the decoder on tokens [B, U] that stand from `position` on; return its output and the caches."""
        here = position + jnp.arange(tokens.shape[1])
        past = sees_prefix((positions <= here[:, None])[None, None], before)
        shared_bias = None if decoder.bias is None else decoder.biased(decoder.bias, here, positions)

        def run(carry, layer_cross_index):
            x, keys, values = carry
            layer, cross_keys_values, index, deep = layer_cross_index
            x = put(x, deep)
            written: list[Array] = []

            def remember(new_keys, new_values):
                start = (index, 0, 0, prefix_length + position, 0)
                written.append(jax.lax.dynamic_update_slice(keys, new_keys[None], start))
                written.append(jax.lax.dynamic_update_slice(values, new_values[None], start))
                return written[0][index], written[1][index]

            bias = shared_bias if layer.bias is None else decoder.biased(layer.bias, here, positions)
            x = layer.attend_self(x, bias, past, cache=remember)
            x = layer.feed(layer.attend_cross(x, cross_keys_values, visible))
            return (x, *written), None

        deep, put = decoder.deep_rows(tokens - settings.vocabulary_rows)
        xs = (decoder.layers, cross, jnp.arange(decoder.depth), deep)
        (x, *caches), _ = jax.lax.scan(run, (model.embed(tokens), *caches), xs)
        return x, tuple(caches)

    def step(carry):
        position, last, ended, caches, output, score = carry
        x, caches = read(last[:, None], first + position, caches)
        log_p = jax.nn.log_softmax(model.project(decoder.norm(x))[:, 0])
        best = jnp.argmax(log_p, -1).astype(jnp.int32)
        score = score + jnp.where(ended, 0, jnp.take_along_axis(log_p, best[:, None], -1)[:, 0])
        chosen = jnp.where(ended, 0, best)
        output = output.at[:, position].set(chosen)
        return position + 1, chosen, ended | (chosen == EOS), caches, output, score

    def unfinished(carry):
        position, _, ended, *_ = carry
        return (position < max_tokens) & ~jnp.all(ended)

    if decoder_prompt is not None and first:
        _, cache = read(decoder_prompt, 0, cache)
    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
        jnp.all(tokens == 0, -1),  # rows that only fill the batch
        cache,
        jnp.zeros((batch, max_tokens), jnp.int32),
        jnp.zeros((batch,), jnp.float32),
    )
    *_, output, score = jax.lax.while_loop(unfinished, step, start)
    return output, score


def score_words(
    model: T5,
    encoder_tokens: Int[Array, "B T"],
    words: Int[Array, "W U"],
    decoder_prompt: Int[Array, "B P"] | None = None,
) -> Float[Array, "B W"]:
    """Return the log-probability of each of W targets (0 is padding) after each input; the encoder runs once."""
    segments = (encoder_tokens != 0).astype(jnp.int32)
    encoded = model.encode(encoder_tokens, segments)
    batch = encoder_tokens.shape[0]
    before = jnp.zeros((batch, 0), jnp.int32) if decoder_prompt is None else decoder_prompt

    def score(word: Int[Array, "U"]) -> Float[Array, "B"]:
        shifted = jnp.broadcast_to(jnp.pad(word[:-1], (1, 0)), (batch, word.shape[0]))
        hidden = model.decode(jnp.concatenate([before, shifted], 1), encoded, segments)[:, before.shape[1] :]
        log_p = jax.nn.log_softmax(model.project(hidden))
        return jnp.sum(jnp.where(word != 0, log_p[:, jnp.arange(word.shape[0]), word], 0), -1)

    return jax.vmap(score, out_axes=1)(words)
