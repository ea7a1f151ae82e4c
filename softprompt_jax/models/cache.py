"""KV caches: what a model keeps of a context, and how it reads an answer's tokens behind it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from softprompt_jax.distributed.mesh import constrain_cache
from softprompt_jax.models.attention import PrefixKeyValues, Seen, sees_prefix, with_prefix
from softprompt_jax.models.causal import CausalLM, of_kind, turner, view, windows
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.t5 import T5
from softprompt_jax.models.t5gemma import T5Gemma

Caches = tuple[Array, ...]  # keys and values [L, B, H, S, K]


class Begun(NamedTuple):
    """Contexts that a model has read: the encoder, and of decoder prompts [B, P] the decoder; or the decoder alone."""

    cross: Caches  # keys and values of the encodings, or of the contexts, behind a prefix [L, B, H, XT, K]
    seen: Bool[Array, "B 1 1 XT"]  # which of these are real
    prefix: PrefixKeyValues | None  # before the decoder's own keys
    missing: Bool[Array, "B P"]  # where a prompt is shorter
    caches: Caches  # of the decoder: prefix, prompt, then empty places [L, B, H, S, K]
    # Of models with positions, which those of a prefix shift:
    first: Int[Array, "B"] | None = None  # position of the first place behind the prefix
    before: Int[Array, "B P"] | None = None  # positions of a prefix in the caches
    positions: Int[Array, "B XT"] | None = None  # decoder-only: those of the context


def begin(
    model: LanguageModel, tokens: Int[Array, "B T"], prompt: Int[Array, "B P"] | None, places: int, copies: int = 1
) -> Begun:
    """Read contexts and decoder prompts (0 on the left: shorter), with so many empty places behind these.

    With `copies` each row is there so many times, one after the other. Decoder-only models have no decoder prompts.
    """
    if isinstance(model, CausalLM):
        return _begin_causal(model, tokens, places, copies)
    if isinstance(model, T5Gemma):
        return _begin_t5gemma(model, tokens, prompt, places, copies)
    assert isinstance(model, T5)
    return _begin_t5(model, tokens, prompt, places, copies)


def decode_at(
    model: LanguageModel, begun: Begun, tokens: Int[Array, "B U"], position: Any, caches: Caches
) -> tuple[Float[Array, "B U D"], Caches]:
    """Run the decoder on tokens at a position, which counts from the first place of the decoder prompts.

    What a shorter prompt lacks is not seen, and the positions of its row count from its first id.
    """
    if isinstance(model, CausalLM | T5Gemma):
        assert begun.first is not None
        prefix = 0 if begun.before is None else begun.before.shape[1]
        queries = begun.first[:, None] + position + jnp.arange(tokens.shape[1])
        own = begun.first[:, None] + jnp.arange(caches[0].shape[3] - prefix)
        past = own[:, None, None, :] <= queries[:, None, :, None]
        if length := begun.missing.shape[1]:
            past = past & ~jnp.pad(begun.missing, ((0, 0), (0, own.shape[1] - length)))[:, None, None]
        if begun.before is not None:
            own, past = jnp.concatenate([begun.before, own], 1), sees_prefix(past, begun.prefix)
        return through_causal(model, tokens, caches, prefix + position, queries, own, past, begun)
    assert isinstance(model, T5)
    return _decode_t5(model, begun, tokens, position, caches)


def _begin_t5(
    model: T5, tokens: Int[Array, "B T"], prompt: Int[Array, "B P"] | None, places: int, copies: int
) -> Begun:
    encoded = model.encode(tokens)
    decoder, (prefix, cross_prefix) = model.decoder, model.decoder.prefixes()
    cross = jax.lax.map(
        lambda layer_prefix: with_prefix(layer_prefix[1], *layer_prefix[0].cross.keys_values(encoded)),
        (decoder.layers, cross_prefix),
    )
    seen = sees_prefix(model.is_real(tokens)[:, None, None, :], cross_prefix)
    prompt = jnp.zeros((tokens.shape[0], 0), jnp.int32) if prompt is None else prompt
    if copies > 1:
        cross = jax.tree.map(lambda part: jnp.repeat(part, copies, axis=1), cross)
        seen, prompt = jnp.repeat(seen, copies, axis=0), jnp.repeat(prompt, copies, axis=0)
        if prefix is not None and prefix.real is not None:
            prefix = jax.tree.map(lambda part: jnp.repeat(part, copies, axis=1), prefix)
    rows, length = prompt.shape
    shape = (decoder.depth, rows, model.settings.num_heads, length + places, model.settings.d_kv)
    empty = jnp.zeros(shape, encoded.dtype)
    caches = (empty, empty) if prefix is None else jax.vmap(with_prefix)(prefix, empty, empty)
    begun = Begun(_sharded(cross), seen, prefix, prompt == 0, _sharded(caches))
    return begun._replace(caches=decode_at(model, begun, prompt, 0, caches)[1]) if length else begun


def _decode_t5(
    model: T5, begun: Begun, tokens: Int[Array, "B U"], position: Any, caches: Caches
) -> tuple[Float[Array, "B U D"], Caches]:
    first = 0 if begun.prefix is None else begun.prefix.keys.shape[-2]
    positions, length = jnp.arange(caches[0].shape[3] - first), begun.missing.shape[1]
    here = position + jnp.arange(tokens.shape[1])
    past, own = (positions <= here[:, None])[None, None], None
    if length:
        past = past & ~jnp.pad(begun.missing, ((0, 0), (0, len(positions) - length)))[:, None, None]
        own = here - begun.missing.sum(-1, keepdims=True)
    biased = functools.partial(model.decoder.biased, queries=here, keys=positions, own=own)
    past = sees_prefix(past, begun.prefix)
    return through_decoder(model, tokens, caches, first + position, biased, past, begun.cross, begun.seen)


def through_decoder(
    model: T5,
    tokens: Int[Array, "B U"],
    caches: Caches,
    place: Any,
    biased: Callable[[Any], Float[Array, "#B H U S"]],
    past: Bool[Array, "#B 1 #U S"],
    cross: Caches,
    seen: Bool[Array, "B 1 1 T"],
) -> tuple[Float[Array, "B U D"], Caches]:
    """Run the decoder's layers on tokens, whose keys and values go to `place` of the caches [L, B, H, S, K].

    Caches and `cross` [L, B, H, T, K] may have more rows than there are tokens, and `cross` more positions than `seen`;
    these are left as they are.
    """
    decoder, rows = model.decoder, tokens.shape[0]
    shared_bias = None if decoder.bias is None else biased(decoder.bias)

    def run(carry, layer_index_deep):
        x, keys, values = carry
        layer, index, deep = layer_index_deep
        x = put(x, deep)
        written: list[Array] = []

        def remember(new_keys, new_values):
            for cache, new in ((keys, new_keys), (values, new_values)):
                written.append(constrain_cache(jax.lax.dynamic_update_slice(cache, new[None], (index, 0, 0, place, 0))))
            return _of_layer(written[0], index, rows, keys.shape[3]), _of_layer(written[1], index, rows, keys.shape[3])

        bias = shared_bias if layer.bias is None else biased(layer.bias)
        x = layer.attend_self(x, bias, past, cache=remember)
        cross_keys_values = tuple(_of_layer(part, index, rows, seen.shape[-1]) for part in cross)
        x = layer.feed(layer.attend_cross(x, cross_keys_values, seen))
        return (x, *written), None

    deep, put = decoder.layer_prompt_rows(tokens - model.settings.vocabulary_rows)
    xs = (decoder.layers, jnp.arange(decoder.depth), deep)
    (x, *written), _ = jax.lax.scan(run, (model.embed(tokens), *caches), xs)
    return x, tuple(written)


def _begin_causal(model: CausalLM, tokens: Int[Array, "B T"], places: int, copies: int) -> Begun:
    real = model.is_real(tokens)
    last = jnp.maximum(real.sum(-1) - 1, 0)  # of the last token, which the answer reads as its first input
    _, (_, *context) = model.run(tokens, keep=True)
    seen = real & (jnp.arange(tokens.shape[1]) < last[:, None])
    shift = model.decoder.shift()
    first, positions = (last[:, None] + shift)[:, 0], jnp.maximum(jnp.cumsum(real, -1) - 1, 0) + shift
    prefix = model.decoder.prefixes()[0]
    if prefix is not None:
        context = jax.vmap(with_prefix)(prefix, *context)
        seen = sees_prefix(seen[:, None, None], prefix)[:, 0, 0]
        positions = jnp.concatenate([model.decoder.prefix_positions(tokens.shape[0]), positions], 1)
    if copies > 1:
        context = jax.tree.map(lambda part: jnp.repeat(part, copies, axis=1), context)
        seen, positions, first = (jnp.repeat(part, copies, axis=0) for part in (seen, positions, first))
    keys = context[0]
    empty = jnp.zeros((*keys.shape[:3], places, keys.shape[-1]), keys.dtype)
    missing, caches = jnp.zeros((first.shape[0], 0), bool), _sharded((empty, empty))
    return Begun(_sharded(context), seen[:, None, None], None, missing, caches, first, positions=positions)


def _begin_t5gemma(
    model: T5Gemma, tokens: Int[Array, "B T"], prompt: Int[Array, "B P"] | None, places: int, copies: int
) -> Begun:
    encoded, stack, (prefix, cross_prefix) = model.encode(tokens), model.decoder, model.decoder.prefixes()
    cross = jax.lax.map(
        lambda layer_prefix: with_prefix(layer_prefix[1], *layer_prefix[0].context(encoded)),
        (stack.layers, cross_prefix),
    )
    seen = sees_prefix(model.is_real(tokens)[:, None, None, :], cross_prefix)
    prompt = jnp.zeros((tokens.shape[0], 0), jnp.int32) if prompt is None else prompt
    first = jnp.broadcast_to(stack.shift(), (tokens.shape[0], 1))[:, 0] - (prompt == 0).sum(-1)
    before = None if prefix is None else stack.prefix_positions(tokens.shape[0])
    if copies > 1:
        cross = jax.tree.map(lambda part: jnp.repeat(part, copies, axis=1), cross)
        seen, prompt, first = (jnp.repeat(part, copies, axis=0) for part in (seen, prompt, first))
        if prefix is not None and before is not None:
            before = jnp.repeat(before, copies, axis=0)
            prefix = prefix if prefix.real is None else jax.tree.map(lambda x: jnp.repeat(x, copies, axis=1), prefix)
    rows, length = prompt.shape
    shape = (stack.depth, rows, model.settings.num_key_heads, length + places, model.settings.d_kv)
    empty = jnp.zeros(shape, encoded.dtype)
    caches = (empty, empty) if prefix is None else jax.vmap(with_prefix)(prefix, empty, empty)
    begun = Begun(_sharded(cross), seen, prefix, prompt == 0, _sharded(caches), first, before)
    return begun._replace(caches=decode_at(model, begun, prompt, 0, caches)[1]) if length else begun


def through_causal(
    model: CausalLM | T5Gemma,
    tokens: Int[Array, "B U"],
    caches: Caches,
    place: Any,
    queries: Int[Array, "B U"],
    own: Int[Array, "B S"],
    past: Bool[Array, "B 1 U S"],
    begun: Begun,
) -> tuple[Float[Array, "B U D"], Caches]:
    """Run the layers on tokens, whose keys and values go to `place` of the caches [L, B, G, S, K].

    A prefix lies before an encoder-decoder's own keys, and before the context of a decoder-only model. `queries` and
    `own` are the positions of the tokens and of the caches' places; `past` says which of these are seen.
    """
    stack, settings, rows = model.decoder, model.settings, tokens.shape[0]
    at = view(settings, queries)
    own_seen = windows(settings, past, queries, own)
    context = jnp.broadcast_to(begun.seen, (rows, 1, tokens.shape[1], begun.seen.shape[-1]))
    context_seen = context[None] if begun.positions is None else windows(settings, context, queries, begun.positions)
    alone = isinstance(model, CausalLM)
    embedded = model.embed(tokens, None, queries) if alone else model.embed_answer(tokens)

    def run(carry, layer_index_kind_deep):
        x, keys, values = carry
        layer, index, kind, deep = layer_index_kind_deep
        written: list[Array] = []
        context_keys, context_values = (_of_layer(part, index, rows, begun.seen.shape[-1]) for part in begun.cross)

        def see(new_keys, new_values):
            for cache, new in ((keys, new_keys), (values, new_values)):
                written.append(constrain_cache(jax.lax.dynamic_update_slice(cache, new[None], (index, 0, 0, place, 0))))
            own_keys, own_values = (_of_layer(part, index, rows, keys.shape[3]) for part in written)
            return [Seen(own_keys, own_values, of_kind(own_seen, kind))]

        encoding = Seen(context_keys, context_values, of_kind(context_seen, kind))
        x = layer(put(x, deep), turner(at, kind), see, None, encoding)
        return (x, *written), None

    deep, put = stack.layer_prompt_rows(tokens - settings.vocabulary_rows)
    xs = (stack.layers, jnp.arange(stack.depth), stack.kind_of_layer, deep)
    (x, *written), _ = jax.lax.scan(run, (embedded, *caches), xs)
    return x, tuple(written)


def _sharded(caches: Any) -> Caches:
    return tuple(map(constrain_cache, caches))


def _of_layer(cache: Array, index: Any, rows: Any, length: Any) -> Array:  # a symbol while exporting
    size = (1, rows, cache.shape[2], length, cache.shape[4])
    return jax.lax.dynamic_slice(cache, (index, 0, 0, 0, 0), size)[0]
