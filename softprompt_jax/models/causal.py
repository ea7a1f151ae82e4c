"""Decoder-only language models: one block with explicit settings, stacked and scanned, for all families.

A text is one row: its context (`encoder_tokens`), then its answer (`decoder_inputs`), whose first input is the
context's last token. Answers see the real keys of their context and, causally, their own; positions count real tokens,
so that padding between the two parts is only hidden.

Axes: B batch, T context length, U answer length, S key length, D model width, H heads, G key heads, K head width,
F feed-forward width, V vocabulary rows, L layers. Ids >= V are prompt rows, -1 is padding. `rng` is a random key, `key`
an attention key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from softprompt_jax.distributed.mesh import constrain
from softprompt_jax.models.attention import (
    PrefixKeyValues,
    Seen,
    attend_in_pieces,
    attend_shared,
    drop_keys,
    rotate,
    sees_prefix,
    with_prefix,
)
from softprompt_jax.models.causal_settings import CausalSettings
from softprompt_jax.models.flash import Implementation, causal, is_possible, uses_flash
from softprompt_jax.models.language_model import LanguageModel, StackBase
from softprompt_jax.models.layers import FeedForward, LayerNorm, Linear, Norm, dropout, split_rng
from softprompt_jax.models.settings import Remat

FAR = 1 << 30  # position of keys that are in every window


class View(NamedTuple):
    """What the layers need to know of the queries: their angles, for each kind of layer."""

    cosine: Float[Array, "N B 1 T R"] | None
    sine: Float[Array, "N B 1 T R"] | None


def view(settings: CausalSettings, positions: Int[Array, "B T"]) -> View:
    """Return what the layers need to know of queries at these positions."""
    ropes = [kind.rope for kind in settings.kinds]
    if not any(ropes):
        return View(None, None)
    widest = [rope.frequencies(settings.d_kv) for rope in ropes if rope is not None]
    still = np.zeros_like(widest[0])  # angles of 0 turn nothing
    frequencies = np.stack([still if rope is None else rope.frequencies(settings.d_kv) for rope in ropes])
    angles = positions[None, :, None, :, None].astype(jnp.float32) * frequencies[:, None, None, None, :]
    return View(jnp.cos(angles), jnp.sin(angles))


def of_kind(parts: Any, kind: Any) -> Any:
    """Return the part of a layer's kind; parts of one kind alone need no index."""
    if parts is None:
        return None
    return parts[0] if len(parts) == 1 else jax.lax.dynamic_index_in_dim(parts, kind, keepdims=False)


def windows(
    settings: CausalSettings,
    visible: Bool[Array, "B 1 T S"],
    queries: Int[Array, "B T"],
    keys: Int[Array, "B S"],
) -> Bool[Array, "N B 1 T S"]:
    """Return for each kind of layer which keys are visible; windows are measured in positions, not in slots."""
    found = [kind.window for kind in settings.kinds]
    if not any(found):
        return visible[None]
    distance = (queries[:, :, None] - keys[:, None, :])[:, None]
    near = [True if window is None else distance < window for window in found]
    far = distance <= -FAR // 2  # of keys without positions
    ahead = [True if kind.ahead is None else (distance >= -kind.ahead) | far for kind in settings.kinds]
    return jnp.stack([visible & back & front for back, front in zip(near, ahead, strict=True)])


class Attention(nnx.Module):
    """Query, key, value and output products around `attend_shared`."""

    def __init__(self, rng: jax.Array, settings: CausalSettings):
        width, inner, outer = settings.d_model, settings.num_heads * settings.d_kv, settings.num_key_heads
        rngs, into = jax.random.split(rng, 4), ("embed", "heads")
        bias, shared = settings.attention_bias, outer * settings.d_kv
        self.query = Linear(rngs[0], (width, inner), into, width**-0.5, bias)
        self.key = Linear(rngs[1], (width, shared), into, width**-0.5, bias)
        self.value = Linear(rngs[2], (width, shared), into, width**-0.5, bias)
        self.output = Linear(rngs[3], (inner, width), ("heads", "embed"), inner**-0.5, settings.output_bias)
        normed = settings.query_key_norm
        offset = settings.norm == "rms_offset"
        self.query_norm: Any = Norm(settings.d_kv, settings.epsilon, offset) if normed else nnx.data(None)
        self.key_norm: Any = Norm(settings.d_kv, settings.epsilon, offset) if normed else nnx.data(None)
        self.heads, self.key_heads, self.dropout = settings.num_heads, outer, settings.dropout
        self.scale, self.cap, self.window = settings.score_scale, settings.score_cap, settings.kinds[0].window
        self.implementation: Implementation = settings.attention
        self.platform = settings.platform

    def queries(self, x: Float[Array, "B T D"], rng: jax.Array | None = None) -> Float[Array, "B H T K"]:
        """Return the queries, without their positions."""
        split = self.query(x, rng).reshape(*x.shape[:-1], self.heads, -1).swapaxes(1, 2)
        return split if self.query_norm is None else self.query_norm(split)

    def keys_values(self, x: Float[Array, "B S D"], rng: jax.Array | None = None) -> tuple[Array, Array]:
        """Return keys, without their positions, and values [B, G, S, K]."""
        keys, values = (
            part(x, rng).reshape(*x.shape[:-1], self.key_heads, -1).swapaxes(1, 2) for part in (self.key, self.value)
        )
        return keys if self.key_norm is None else self.key_norm(keys), values

    def __call__(
        self, query: Array, parts: list[Seen], rng: jax.Array | None = None, lengths: Int[Array, "B"] | None = None
    ) -> Float[Array, "B T D"]:
        """Attend to the visible keys of all parts.

        `lengths`, where given, says the same as the one part's `visible`: keys up to the query's own position, of which
        so many at the start of each row are real.
        """
        if lengths is not None and uses_flash(self.implementation, self.platform, query, lengths):
            keys, values = parts[0][:2]
            if rng is not None and self.dropout > 0:
                values = drop_keys(values, self.dropout, rng)
            mixed = causal(query, keys, values, lengths, self.scale, self.window)
        elif self.platform == "cpu" and (rng is None or self.dropout == 0):
            mixed = attend_in_pieces(query, parts, self.scale, self.cap)
        else:
            mixed = attend_shared(query, parts, self.scale, self.cap, self.dropout, rng)
        return self.output(mixed.swapaxes(1, 2).reshape(query.shape[0], query.shape[2], -1), rng)


class Block(nnx.Module):
    """A layer: attention and feed-forward block, each behind a norm and, in some families, before one.

    With `cross` it attends to an encoding in between.
    """

    def __init__(self, rng: jax.Array, settings: CausalSettings, cross: bool = False):
        rngs = jax.random.split(rng, 3)
        self.attention_norm = make_norm(settings)
        self.attention = Attention(rngs[0], settings)
        self.feed_forward_norm = make_norm(settings)
        self.feed_forward = FeedForward(rngs[1], settings, settings.feed_forward_bias)
        self.attention_post_norm: Any = make_norm(settings) if settings.post_norms else nnx.data(None)
        self.feed_forward_post_norm: Any = make_norm(settings) if settings.post_norms else nnx.data(None)
        self.cross: Any = Attention(rngs[2], settings) if cross else nnx.data(None)
        self.cross_norm: Any = make_norm(settings) if cross else nnx.data(None)
        self.cross_post_norm: Any = make_norm(settings) if cross and settings.post_norms else nnx.data(None)
        self.parallel, self.dropout = settings.parallel, settings.dropout

    def context(self, encoded: Float[Array, "B S D"], rng: jax.Array | None = None) -> tuple[Array, Array]:
        """Return the keys and values [B, G, S, K] of an encoding; without cross attention those of self-attention."""
        return (self.attention if self.cross is None else self.cross).keys_values(encoded, rng)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turn: Any,
        see: Any,
        rng: jax.Array | None = None,
        encoding: Seen | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the layer's output.

        `turn(heads)` gives queries or keys their positions; `see(keys, values)` returns the parts to attend to, to
        which an `encoding` is added, or cross attention attends to it. `lengths`: see `Attention`.
        """
        rngs = split_rng(rng, 6)
        normed = self.attention_norm(x)
        keys, values = self.attention.keys_values(normed, rngs[0])
        parts = see(turn(keys), values)
        if encoding is not None and self.cross is None:
            parts = [*parts, encoding]
        mixed = self.attention(turn(self.attention.queries(normed, rngs[0])), parts, rngs[0], lengths)
        if self.attention_post_norm is not None:
            mixed = self.attention_post_norm(mixed)
        mixed = x + dropout(mixed, self.dropout, rngs[1])
        if self.cross is not None:
            assert encoding is not None
            crossed = self.cross(self.cross.queries(self.cross_norm(mixed), rngs[4]), [encoding], rngs[4])
            if self.cross_post_norm is not None:
                crossed = self.cross_post_norm(crossed)
            mixed = mixed + dropout(crossed, self.dropout, rngs[5])
        fed = self.feed_forward(self.feed_forward_norm(x if self.parallel else mixed), rngs[2])
        if self.feed_forward_post_norm is not None:
            fed = self.feed_forward_post_norm(fed)
        return mixed + dropout(fed, self.dropout, rngs[3])


def make_norm(settings: CausalSettings) -> Norm | LayerNorm:
    """Return a norm of the model's width."""
    if settings.norm == "layer":
        return LayerNorm(settings.d_model, settings.epsilon)
    return Norm(settings.d_model, settings.epsilon, settings.norm == "rms_offset")


def turner(at: View, kind: Any) -> Any:
    """Return the function that gives queries or keys [B, H, T, K] of a layer's kind their positions."""
    cosine, sine = of_kind(at.cosine, kind), of_kind(at.sine, kind)
    return lambda heads: heads if cosine is None else rotate(heads, cosine, sine)


class CausalStack(StackBase):
    """L blocks with a leading axis L on every weight, run by one scan, and a final norm."""

    def __init__(self, rng: jax.Array, settings: CausalSettings, cross: bool = False):
        super().__init__(settings, len(settings.pattern))
        self.layers = jax.vmap(lambda k: Block(k, settings, cross))(jax.random.split(rng, self.depth))
        self.norm = make_norm(settings)
        self.settings = settings

    @property
    def kind_of_layer(self) -> Int[np.ndarray, "L"]:
        """The number of each layer's kind."""
        return np.asarray(self.settings.pattern, np.int32)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        visible: Bool[Array, "B 1 S S"],
        positions: Int[Array, "B S"],
        rng: jax.Array | None = None,
        prompt_rows: Int[Array, "B S"] | None = None,
        remat: Remat | None = None,
        keep: bool = False,
        encoded: Float[Array, "B T D"] | None = None,
        encoded_visible: Bool[Array, "B 1 #S T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
        causal: bool = False,
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Run the layers, without the norm. `lengths`: see `Attention`. `causal`: `visible` has no later token.

        With `keep` return for all layers what they read [L, B, S, D], keys and values [L, B, G, S, K] too.
        """
        first, rngs = None, None
        if rng is not None:
            first, scanned = jax.random.split(rng)
            rngs = jax.random.split(scanned, self.depth)
        (prefix, cross_prefix), (deep, put) = self.prefixes(), self.layer_prompt_rows(prompt_rows)
        if encoded_visible is not None:
            encoded_visible = sees_prefix(encoded_visible, cross_prefix)
        positions = positions + self.shift()
        at = view(self.settings, positions)
        seen = windows(self.settings, visible, positions, positions)
        ahead = None if prefix is None else self.sees_prefix(prefix, positions)
        lengths = self._for_kernel(lengths, prefix is not None, rng is not None)

        def run(x, scanned):
            layer, layer_rng, kind, before, before_cross, deep = scanned
            x, encoding = put(x, deep), None
            kept: list[Array] = [x] if keep else []
            if encoded is not None:
                assert encoded_visible is not None
                encoding = Seen(*with_prefix(before_cross, *layer.context(encoded, layer_rng)), encoded_visible)

            def see(keys, values):
                kept.extend((keys, values) if keep else ())
                own = Seen(keys, values, of_kind(seen, kind), causal)
                return [own] if before is None else [prefix_part(before, of_kind(ahead, kind), keys), own]

            x = layer(x, turner(at, kind), see, layer_rng, encoding, lengths)
            return constrain(x, "rows", None, None), tuple(kept)

        remat = remat or self.remat
        if remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
            run = jax.checkpoint(run, policy=policy, prevent_cse=self.unroll)
        x = constrain(dropout(x, self.dropout, first), "rows", None, None)
        xs = (self.layers, rngs, self.kind_of_layer, prefix, cross_prefix, deep)
        return jax.lax.scan(run, x, xs, unroll=self.unroll)

    def _for_kernel(self, lengths: Int[Array, "B"] | None, prefix: bool, training: bool) -> Int[Array, "B"] | None:
        """Return the lengths where cuDNN's kernel can compute what is asked for. Errors: UserError for `flash`."""
        settings, reason = self.settings, self.settings.always_plain
        if prefix:
            reason = reason or "found a prefix before the keys; expected none"
        if training and settings.dropout > 0 and settings.num_key_heads != settings.num_heads:
            reason = reason or "found dropout of keys that heads share; expected dropout 0"
        return lengths if lengths is not None and is_possible(settings.attention, reason) else None

    def shift(self) -> Int[Array, "#B 1"] | int:
        """Return how many positions a prefix takes before the first token of each row."""
        return 0 if self.prefix is None else self.prefix.shift()

    def prefix_positions(self, rows: int) -> Int[Array, "B P"]:
        """Return the positions of a prefix's keys in each row; the first that text has is `shift()`."""
        before = np.concatenate([np.full(self.prefix.unpositioned, FAR), np.arange(-self.prefix.positioned, 0)])
        return jnp.broadcast_to(before + self.shift(), (rows, len(before)))

    def sees_prefix(self, prefix: PrefixKeyValues, positions: Int[Array, "B T"]) -> Bool[Array, "N B 1 T P"]:
        """Return for each kind of layer which keys of the prefix the queries of text see."""
        rows, length = positions.shape[0], prefix.keys.shape[-2]
        visible = jnp.ones((rows, 1, positions.shape[1], length), bool)
        if prefix.real is not None:
            visible = visible & prefix.real[0][:, None, None]
        return windows(self.settings, visible, positions, self.prefix_positions(rows))


def prefix_part(prefix: PrefixKeyValues, visible: Array, like: Array) -> Seen:
    """Return a layer's prefix as a part for every row of a batch."""
    keys, values = (jnp.broadcast_to(part.astype(like.dtype), (like.shape[0], *part.shape[-3:])) for part in prefix[:2])
    return Seen(keys, values, visible)


class CausalLM(LanguageModel):
    """A decoder-only language model. Methods attach a soft prompt as `prompt`: embeddings of the ids from V on."""

    settings: CausalSettings
    decoder: CausalStack

    def __init__(self, settings: CausalSettings, rng: jax.Array, dtype: str = "float32"):
        rngs = jax.random.split(rng, 4)
        super().__init__(settings, rngs[0], rngs[1], dtype)
        self.encoder: Any = nnx.data(None)
        self.decoder = CausalStack(rngs[2], settings)
        if settings.learned_positions is None:
            self.positions: Any = nnx.data(None)
        else:
            shape = (settings.learned_positions, settings.d_model)
            self.positions = nnx.Param(0.02 * jax.random.normal(rngs[3], shape), axes=("positions", "embed"))

    def embed(self, tokens: Array, rng: jax.Array | None = None, positions: Array | None = None) -> Array:
        """Look ids < V up in the frozen table and ids >= V in the prompt's rows; add learned positions."""
        return self.at_positions(super().embed(tokens, rng), positions)

    def at_positions(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"] | None) -> Float[Array, "B T D"]:
        """Add learned positions, where a model has some, to embeddings."""
        if self.positions is None:
            return x
        assert positions is not None
        return x + self.positions[...].astype(x.dtype)[jnp.clip(positions, 0, self.positions.shape[0] - 1)]

    def project(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return float32 logits over the V vocabulary rows."""
        logits = super().project(hidden)
        cap = self.settings.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def first_input(self, tokens: Int[Array, "B T"]) -> Int[Array, "B"]:
        """Return the last token of each context, behind which its answer comes."""
        last = jnp.maximum(self.is_real(tokens).sum(-1) - 1, 0)
        return jnp.take_along_axis(tokens, last[:, None], 1)[:, 0]

    def run(
        self, tokens: Int[Array, "B S"], rng: jax.Array | None = None, remat: Remat | None = None, keep: bool = False
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Run the layers over rows whose padding stands at their ends; `keep`: see `CausalStack`."""
        real = self.is_real(tokens)
        positions = jnp.maximum(jnp.cumsum(real, -1) - 1, 0)
        visible = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None, None] & real[:, None, None, :]
        return self.run_at(tokens, visible, positions, rng, remat, keep, tokens.shape[1], lengths=real.sum(-1))

    def run_at(self, tokens, visible, positions, rng=None, remat=None, keep=False, context=0, order=None, lengths=None):
        """Run the layers over tokens at these positions; the first `context` of each row are the contexts'.

        `order` [B, S]: places of the tokens in the order in which they run. `lengths`: see `Attention`.
        """
        prompt_rng, stack_rng = split_rng(rng, 2)
        x = self.embed(tokens, prompt_rng, positions + self.decoder.shift())
        if self.offset is not None:
            x = jnp.concatenate([self.with_offset(x[:, :context], tokens[:, :context]), x[:, context:]], 1)
        if order is not None:
            x = jnp.take_along_axis(x, order[..., None], 1)
            tokens, positions = (jnp.take_along_axis(each, order, 1) for each in (tokens, positions))
        prompt_rows = tokens - self.settings.vocabulary_rows
        rest = stack_rng, prompt_rows, remat, keep
        return self.decoder(x, visible, positions, *rest, lengths=lengths, causal=True)

    def hidden(
        self, batch: dict[str, Array], rng: jax.Array | None = None, remat: Remat | None = None
    ) -> Float[Array, "B U D"]:
        """Return what stands at the answers' positions of a batch.

        `encoder_tokens` [B, T] and `decoder_inputs` [B, U] run side by side in one row; the context's last token is the
        answer's first input, so that it is hidden where it stands. Packed rows have `*_segments` too. On a GPU, whose
        attention wants keys without gaps, what is hidden in other rows goes to their ends.
        """
        context, answer = batch["encoder_tokens"], batch["decoder_inputs"]
        tokens = jnp.concatenate([context, answer], 1)
        real = self.is_real(tokens)
        segments = real.astype(jnp.int32)
        if "encoder_segments" in batch:
            segments = jnp.concatenate([batch["encoder_segments"], batch["decoder_segments"]], 1) * real
        own = segments[:, : context.shape[1]]
        following = jnp.pad(own[:, 1:], ((0, 0), (0, 1)))
        last = jnp.pad((own > 0) & (following != own), ((0, 0), (0, answer.shape[1])))
        counted = jnp.where(last, 0, segments)  # 0: seen by none, and no position of its own
        order = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        same = (segments[:, :, None] == counted[:, None, :]) & (counted > 0)[:, None, :] & order
        positions = jnp.maximum(same.sum(-1) - ~last, 0)
        settings = self.settings
        by_length = settings.platform == "gpu" and settings.attention != "plain" and settings.always_plain is None
        if not by_length or "encoder_segments" in batch:
            hidden, _ = self.run_at(tokens, same[:, None], positions, rng, remat, context=context.shape[1])
            return self.decoder.norm(hidden[:, context.shape[1] :])
        seen = counted > 0
        places = jnp.argsort(~seen, axis=1, stable=True)
        visible = order[None, None] & jnp.take_along_axis(seen, places, 1)[:, None, None]
        hidden, _ = self.run_at(
            tokens, visible, positions, rng, remat, context=context.shape[1], order=places, lengths=seen.sum(-1)
        )
        answers = jnp.argsort(places, axis=1)[:, context.shape[1] :, None]  # where the answers' tokens have gone
        return self.decoder.norm(jnp.take_along_axis(hidden, answers, 1))
