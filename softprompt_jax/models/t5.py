"""The T5 encoder-decoder in Flax NNX: stacked layers under one scan, and places that methods attach to.

Axes: B batch, T encoder length, U decoder length, S key length, D model width, H heads, K head width,
F feed-forward width, V vocabulary rows, L layers. Token 0 is padding. Ids >= V are prompt rows. `rng` is a random key,
`key` an attention key.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field, model_validator

from softprompt_jax.config import WrongSetting
from softprompt_jax.distributed.mesh import constrain
from softprompt_jax.models.attention import (
    PrefixKeyValues,
    attend,
    bias_before,
    drop_keys,
    relative_buckets,
    same_segment,
    sees_prefix,
    with_prefix,
)
from softprompt_jax.models.flash import Implementation, cudnn, uses_flash
from softprompt_jax.models.language_model import LanguageModel, StackBase
from softprompt_jax.models.layers import (
    FeedForward,
    Linear,
    Norm,
    dropout,
    split_rng,
)
from softprompt_jax.models.settings import Depth, ModelSettings, Remat


class T5Settings(ModelSettings):
    """Every shape and switch of a T5: what its `config.json` states, and how to compute with it."""

    family: Literal["t5"] = Field(default="t5", exclude=True)
    num_decoder_layers: Depth
    scale_output: bool = False  # decoder output multiplied by d_model ** -0.5 before the vocabulary (T5 1.0)
    bias_in_every_layer: bool = False  # position bias of its own in every layer (umT5)
    relative_buckets: int = Field(default=32, ge=2, le=10_000)
    relative_max_distance: int = Field(default=128, le=10_000_000)  # more than half of the buckets
    padding: int = 0
    start: int = 0  # first input of the decoder

    @model_validator(mode="after")
    def _distances_fill_the_buckets(self) -> T5Settings:
        if self.relative_max_distance <= self.relative_buckets // 2:
            expected = f"expected more than {self.relative_buckets // 2}, half of its {self.relative_buckets} buckets"
            raise WrongSetting("relative_max_distance", self.relative_max_distance, expected)
        return self

    @property
    def num_key_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads

    @property
    def always_plain(self) -> str | None:
        """None: the encoder's can be cuDNN's."""
        return None

    def parameters(self) -> int:
        """Count the parameters of the model these settings describe."""
        inner = self.num_heads * self.d_kv
        attention = 4 * self.d_model * inner
        feed_forward = (3 if self.gated else 2) * self.d_model * self.d_ff
        encoder = self.num_layers * (attention + feed_forward + 2 * self.d_model) + self.d_model
        decoder = self.num_decoder_layers * (2 * attention + feed_forward + 3 * self.d_model) + self.d_model
        tables = (self.num_layers + self.num_decoder_layers) if self.bias_in_every_layer else 2
        biases = tables * self.relative_buckets * self.num_heads
        return encoder + decoder + biases + (1 if self.tied else 2) * self.vocabulary_rows * self.d_model


class Attention(nnx.Module):
    """Query, key, value and output products around `attend`, or around cuDNN's kernel (flash.py)."""

    def __init__(self, rng: jax.Array, settings: T5Settings, implementation: Implementation = "plain"):
        width, inner = settings.d_model, settings.num_heads * settings.d_kv
        rngs = jax.random.split(rng, 4)
        self.query = Linear(rngs[0], (width, inner), ("embed", "heads"), (width * settings.d_kv) ** -0.5)
        self.key = Linear(rngs[1], (width, inner), ("embed", "heads"), width**-0.5)
        self.value = Linear(rngs[2], (width, inner), ("embed", "heads"), width**-0.5)
        self.output = Linear(rngs[3], (inner, width), ("heads", "embed"), inner**-0.5)
        self.heads, self.head_width, self.dropout = settings.num_heads, settings.d_kv, settings.dropout
        self.implementation: Implementation = implementation
        self.platform = settings.platform

    def split_heads(self, x: Float[Array, "B T HK"]) -> Float[Array, "B H T K"]:
        """Split the width into heads."""
        return x.reshape(*x.shape[:-1], self.heads, -1).swapaxes(1, 2)

    def keys_values(self, source: Float[Array, "B S D"], rng: jax.Array | None = None) -> tuple[Array, Array]:
        """Return keys and values [B, H, S, K] of a source: the input itself, or the encoding."""
        return self.split_heads(self.key(source, rng)), self.split_heads(self.value(source, rng))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        keys_values: tuple[Array, Array],
        bias: Float[Array, "#B H T S"] | None,
        visible: Bool[Array, "#B 1 #T S"],
        rng: jax.Array | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attend to the visible keys.

        `lengths`, where given, says the same as `visible`: how many keys at the start of each row are real.
        """
        query = self.split_heads(self.query(x, rng))
        keys, values = keys_values
        if uses_flash(self.implementation, self.platform, query, lengths):
            assert lengths is not None
            if rng is not None and self.dropout > 0:
                values = drop_keys(values, self.dropout, rng)
            mixed = cudnn(query, keys, values, bias, lengths)
        else:
            mixed = attend(query, keys, values, bias, visible, self.dropout, rng)
        return self.output(mixed.swapaxes(1, 2).reshape(*x.shape[:-1], -1), rng)

    def cross_attend(
        self,
        x: Float[Array, "B U D"],
        source: Float[Array, "B S D"],
        prefix: PrefixKeyValues | None,
        visible: Bool[Array, "B 1 #U PS"],
        rng: jax.Array | None = None,
    ) -> Float[Array, "B U D"]:
        """Attend to a source [B, S, D].

        Skip the second half on first reading: it is faster for short targets and computes the same. query . (W source)
        equals (W^T query) . source, so that few queries are multiplied by W instead of a long source.
        """
        plain = type(self.key) is Linear and type(self.value) is Linear  # no method has replaced them
        if prefix is not None or not plain or 2 * x.shape[1] > self.head_width:
            return self(x, with_prefix(prefix, *self.keys_values(source, rng)), None, visible, rng)
        to_keys, to_values = (
            linear.kernel[...].astype(x.dtype).reshape(-1, self.heads, self.head_width)
            for linear in (self.key, self.value)
        )
        query = jnp.einsum("BHUK,DHK->BHUD", self.split_heads(self.query(x, rng)), to_keys)
        mixed = attend(query, source[:, None], source[:, None], None, visible, self.dropout, rng)
        return self.output(jnp.einsum("BHUD,DHK->BUHK", mixed, to_values).reshape(*x.shape[:-1], -1), rng)


class RelativeBias(nnx.Module):
    """A learned number for each bucket of distances and each head, added to the attention scores."""

    def __init__(self, rng: jax.Array, settings: T5Settings, bidirectional: bool):
        shape = (settings.relative_buckets, settings.num_heads)
        self.table = nnx.Param(
            settings.d_model**-0.5 * jax.random.normal(rng, shape, jnp.float32), axes=("buckets", "heads")
        )
        self.bidirectional, self.max_distance = bidirectional, settings.relative_max_distance

    def __call__(self, queries: Int[Array, "T"], keys: Int[Array, "S"]) -> Float[Array, "1 H T S"]:
        table = self.table[...]
        buckets = relative_buckets(
            queries, keys, bidirectional=self.bidirectional, buckets=table.shape[0], max_distance=self.max_distance
        )
        return table[buckets].transpose(2, 0, 1)[None]


class Layer(nnx.Module):
    """An encoder layer, or with `cross` a decoder layer, which has cross attention too."""

    def __init__(self, rng: jax.Array, settings: T5Settings, cross: bool):
        rngs = jax.random.split(rng, 4)
        self.attention_norm = Norm(settings.d_model, settings.epsilon)
        self.attention = Attention(rngs[0], settings, "plain" if cross else settings.attention)
        self.cross_norm: Any = Norm(settings.d_model, settings.epsilon) if cross else nnx.data(None)
        self.cross: Any = Attention(rngs[1], settings) if cross else nnx.data(None)
        self.feed_forward_norm = Norm(settings.d_model, settings.epsilon)
        self.feed_forward = FeedForward(rngs[2], settings)
        own_bias = settings.bias_in_every_layer
        self.bias = RelativeBias(rngs[3], settings, not cross) if own_bias else nnx.data(None)
        self.dropout = settings.dropout

    def attend_self(self, x, bias, visible, rng=None, cache=None, lengths=None):
        """Add self-attention. `cache(keys, values)`, where given, returns the keys and values to attend to."""
        inner, outer = split_rng(rng, 2)
        normed = self.attention_norm(x)
        keys_values = self.attention.keys_values(normed, inner)
        if cache is not None:
            keys_values = cache(*keys_values)
        return x + dropout(self.attention(normed, keys_values, bias, visible, inner, lengths), self.dropout, outer)

    def attend_cross(self, x, keys_values, visible):
        """Add attention over the encoding's keys and values."""
        return x + self.cross(self.cross_norm(x), keys_values, None, visible)

    def attend_encoded(self, x, encoded, prefix, visible, rng=None):
        """Add attention over the encoding and, where there is one, the prefix before it."""
        inner, outer = split_rng(rng, 2)
        return x + dropout(
            self.cross.cross_attend(self.cross_norm(x), encoded, prefix, visible, inner), self.dropout, outer
        )

    def feed(self, x, rng=None):
        """Add the feed-forward block."""
        inner, outer = split_rng(rng, 2)
        return x + dropout(self.feed_forward(self.feed_forward_norm(x), inner), self.dropout, outer)


class Stack(StackBase):
    """L layers with a leading axis L on every weight, run by one scan, and a final norm."""

    def __init__(self, rng: jax.Array, settings: T5Settings, cross: bool):
        layers = settings.num_decoder_layers if cross else settings.num_layers
        super().__init__(settings, layers)
        layers_rng, bias_rng = jax.random.split(rng)
        self.layers = jax.vmap(lambda k: Layer(k, settings, cross))(jax.random.split(layers_rng, layers))
        shared_bias = not settings.bias_in_every_layer
        self.bias = RelativeBias(bias_rng, settings, not cross) if shared_bias else nnx.data(None)
        self.norm = Norm(settings.d_model, settings.epsilon)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        visible: Bool[Array, "#B 1 T T"],
        encoded: Float[Array, "B S D"] | None = None,
        encoded_visible: Bool[Array, "B 1 #T S"] | None = None,
        rng: jax.Array | None = None,
        prompt_rows: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
        remat: Remat | None = None,
    ) -> Float[Array, "B T D"]:
        """Run the layers; `remat`: what is computed again for the gradient (default: what the settings say)."""
        first, last, rngs = None, None, None
        if rng is not None:
            first, last, scanned = jax.random.split(rng, 3)
            rngs = jax.random.split(scanned, self.depth)
        positions = jnp.arange(x.shape[1])
        shared_bias = None if self.bias is None else self.biased(self.bias, positions, positions)
        before, before_cross = self.prefixes()
        deep, put = self.layer_prompt_rows(prompt_rows)
        visible = sees_prefix(visible, before)
        if lengths is not None and before is not None:
            # Where each row has a prefix of its own, padding stands between it and the text.
            lengths = lengths + before.keys.shape[-2] if before.real is None else None
        if encoded_visible is not None:
            encoded_visible = sees_prefix(encoded_visible, before_cross)

        def run(x, scanned):
            layer, layer_rng, before, before_cross, deep = scanned
            x = put(x, deep)
            rngs = split_rng(layer_rng, 3)
            bias = shared_bias if layer.bias is None else self.biased(layer.bias, positions, positions)
            x = layer.attend_self(x, bias, visible, rngs[0], functools.partial(with_prefix, before), lengths)
            if layer.cross is not None:
                x = layer.attend_encoded(x, encoded, before_cross, encoded_visible, rngs[1])
            return constrain(layer.feed(x, rngs[2]), "rows", None, None), None

        remat = remat or self.remat
        if remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
            run = jax.checkpoint(run, policy=policy, prevent_cse=self.unroll)  # a loop prevents it by itself
        x = constrain(dropout(x, self.dropout, first), "rows", None, None)
        xs = (self.layers, rngs, before, before_cross, deep)
        x, _ = jax.lax.scan(run, x, xs, unroll=self.unroll)
        return dropout(self.norm(x), self.dropout, last)

    def biased(
        self,
        bias: RelativeBias,
        queries: Int[Array, "T"],
        keys: Int[Array, "S"],
        own: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "#B H T PS"]:
        """Return the bias of these positions, with that of a prefix's keys before it.

        `own`: positions of the queries counted from their row's first token, where rows begin at different places.
        """
        text = bias(queries, keys)
        if self.prefix is None:
            return text
        return bias_before(
            bias, text, queries[None] if own is None else own, self.prefix.unpositioned, self.prefix.positioned
        )


class T5(LanguageModel):
    """A T5 encoder-decoder. Methods attach a soft prompt as `prompt`: embeddings of the ids from V on."""

    def __init__(self, settings: T5Settings, rng: jax.Array, dtype: str = "float32"):
        rngs = jax.random.split(rng, 4)
        super().__init__(settings, rngs[0], rngs[3], dtype)
        self.encoder = Stack(rngs[1], settings, cross=False)
        self.decoder = Stack(rngs[2], settings, cross=True)

    def first_input(self, tokens: Int[Array, "B T"]) -> Int[Array, "B"]:
        """Return the decoder's first input, the same for every text."""
        return jnp.full(tokens.shape[:1], self.settings.start, jnp.int32)

    def encode(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        rng: jax.Array | None = None,
        remat: Remat | None = None,
    ) -> Float[Array, "B T D"]:
        """Encode token ids. `segments` numbers the examples of packed rows (default: one a row; 0 is padding)."""
        real = self.is_real(tokens)
        lengths = real.sum(-1) if segments is None else None  # padding comes last
        segments = real.astype(jnp.int32) if segments is None else segments
        prompt_rng, stack_rng = split_rng(rng, 2)
        visible, prompt_rows = same_segment(segments, segments), tokens - self.settings.vocabulary_rows
        x = self.with_offset(self.embed(tokens, prompt_rng), tokens)
        return self.encoder(x, visible, rng=stack_rng, prompt_rows=prompt_rows, lengths=lengths, remat=remat)

    def decode(
        self,
        tokens: Int[Array, "B U"],
        encoded: Float[Array, "B T D"],
        encoder_segments: Int[Array, "B T"],
        segments: Int[Array, "B U"] | None = None,
        rng: jax.Array | None = None,
        remat: Remat | None = None,
    ) -> Float[Array, "B U D"]:
        """Decode inputs that are shifted already. The mask is causal; packed rows see their own segment only."""
        length = tokens.shape[1]
        visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if segments is None:
            encoded_visible = (encoder_segments > 0)[:, None, None, :]
        else:
            visible = visible & same_segment(segments, segments)
            encoded_visible = same_segment(segments, encoder_segments)
        prompt_rows = tokens - self.settings.vocabulary_rows
        x = self.embed(tokens)
        return self.decoder(x, visible, encoded, encoded_visible, rng, prompt_rows, remat=remat)

    def project(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return float32 logits over the V vocabulary rows."""
        return super().project(hidden * self.settings.d_model**-0.5 if self.settings.scale_output else hidden)

    def hidden(
        self, batch: dict[str, Array], rng: jax.Array | None = None, remat: Remat | None = None
    ) -> Float[Array, "B U D"]:
        """Return the decoder's output for a batch: `encoder_tokens`, `decoder_inputs`, and if packed `*_segments`."""
        tokens, packed = batch["encoder_tokens"], batch.get("encoder_segments")
        encoder_rng, decoder_rng = split_rng(rng, 2)
        encoded = self.encode(tokens, packed, encoder_rng, remat)
        segments = self.is_real(tokens).astype(jnp.int32) if packed is None else packed
        inputs = batch["decoder_inputs"]
        return self.decode(inputs, encoded, segments, batch.get("decoder_segments"), decoder_rng, remat)
