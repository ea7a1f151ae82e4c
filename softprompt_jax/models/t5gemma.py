"""T5Gemma 1 and 2: an encoder and a decoder of the blocks of causal.py.

T5Gemma 1 has cross attention between self-attention and feed-forward block; in T5Gemma 2 one attention reads the
decoder's own keys and the encoding's together. Axes: see causal.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from softprompt_jax.models.attention import same_segment
from softprompt_jax.models.causal import CausalStack
from softprompt_jax.models.causal_settings import CausalSettings, LayerKind
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.layers import split_rng
from softprompt_jax.models.settings import Remat


class T5GemmaSettings(CausalSettings):
    """Every shape and switch of a T5Gemma; `kinds` and `pattern` are the decoder's."""

    encoder_kinds: tuple[LayerKind, ...]
    encoder_pattern: tuple[int, ...]  # number of each encoder layer's kind
    merged: bool = False  # decoder reads its own keys and the encoding's in one attention (T5Gemma 2)
    own_embeddings: bool = False  # decoder with an embedding table of its own (T5Gemma 1)
    padding: int = 0
    start: int = 2  # first input of the decoder

    @property
    def num_decoder_layers(self) -> int:
        """Layers of the stack that writes the answer."""
        return len(self.pattern)

    @property
    def encoder(self) -> T5GemmaSettings:
        """The settings with which the encoder's stack is built."""
        return self.model_copy(update={"kinds": self.encoder_kinds, "pattern": self.encoder_pattern})

    @property
    def always_plain(self) -> str | None:
        """Why it cannot have cuDNN's attention: published ones have heads of width 256."""
        return f"found a {self.family}, whose attention is always plain"

    def parameters(self) -> int:
        """Count the parameters of the model these settings describe."""
        plain = CausalSettings.model_construct(**dict(self))
        tables = (1 if self.tied else 2) * self.vocabulary_rows * self.d_model
        norm = self.d_model
        layer = (CausalSettings.parameters(plain) - tables - norm) // self.num_layers
        own = self.d_model * (2 * self.num_heads + 2 * self.num_key_heads) * self.d_kv + 2 * norm
        decoder = self.num_decoder_layers * (layer + (0 if self.merged else own))
        extra = self.vocabulary_rows * self.d_model if self.own_embeddings else 0
        return self.num_layers * layer + decoder + 2 * norm + tables + extra


class T5Gemma(LanguageModel):
    """A T5Gemma. Methods attach a soft prompt as `prompt`: embeddings of the ids from V on."""

    settings: T5GemmaSettings
    encoder: CausalStack
    decoder: CausalStack

    def __init__(self, settings: T5GemmaSettings, rng: jax.Array, dtype: str = "float32"):
        rngs = jax.random.split(rng, 5)
        super().__init__(settings, rngs[0], rngs[3], dtype)
        self.encoder = CausalStack(rngs[1], settings.encoder)
        self.decoder = CausalStack(rngs[2], settings, cross=not settings.merged)
        if settings.own_embeddings:
            shape = (settings.vocabulary_rows, settings.d_model)
            self.decoder_embedding: Any = nnx.Param(jax.random.normal(rngs[4], shape), axes=("vocab", "embed"))
        else:
            self.decoder_embedding = nnx.data(None)

    def first_input(self, tokens: Int[Array, "B T"]) -> Int[Array, "B"]:
        """Return the decoder's first input, the same for every text."""
        return jnp.full(tokens.shape[:1], self.settings.start, jnp.int32)

    def embed_answer(self, tokens: Int[Array, "B U"], rng: jax.Array | None = None) -> Float[Array, "B U D"]:
        """Look up what the decoder reads."""
        table = self.embedding if self.decoder_embedding is None else self.decoder_embedding
        return self.embed_with(table, tokens, rng)

    def encode(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        rng: jax.Array | None = None,
        remat: Remat | None = None,
    ) -> Float[Array, "B T D"]:
        """Encode token ids. `segments` numbers the examples of packed rows (default: one a row; 0 is padding)."""
        segments = self.is_real(tokens).astype(jnp.int32) if segments is None else segments
        prompt_rng, stack_rng = split_rng(rng, 2)
        x = self.with_offset(self.embed(tokens, prompt_rng), tokens)
        prompt_rows = tokens - self.settings.vocabulary_rows
        visible = same_segment(segments, segments)
        hidden, _ = self.encoder(x, visible, positions_in(segments), stack_rng, prompt_rows, remat)
        return self.encoder.norm(hidden)

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
        visible: Bool[Array, "#B 1 U U"] = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None, None]
        if segments is None:
            encoded_visible = (encoder_segments > 0)[:, None, None, :]
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            visible = jnp.broadcast_to(visible, (tokens.shape[0], *visible.shape[1:]))
        else:
            visible = visible & same_segment(segments, segments)
            encoded_visible, positions = same_segment(segments, encoder_segments), positions_in(segments)
        prompt_rows = tokens - self.settings.vocabulary_rows
        rest = rng, prompt_rows, remat, False, encoded, encoded_visible
        hidden, _ = self.decoder(self.embed_answer(tokens), visible, positions, *rest)
        return self.decoder.norm(hidden)

    def project(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return float32 logits over the V vocabulary rows."""
        if self.head is None and self.decoder_embedding is not None:
            kernel = self.decoder_embedding[...].T.astype(hidden.dtype)
            logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        else:
            logits = super().project(hidden)
        cap = self.settings.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def hidden(
        self, batch: dict[str, Array], rng: jax.Array | None = None, remat: Remat | None = None
    ) -> Float[Array, "B U D"]:
        """Return the decoder's output for a batch: `encoder_tokens`, `decoder_inputs`, and if packed `*_segments`."""
        tokens, packed = batch["encoder_tokens"], batch.get("encoder_segments")
        encoder_rng, decoder_rng = split_rng(rng, 2)
        encoded = self.encode(tokens, packed, encoder_rng, remat)
        segments = self.is_real(tokens).astype(jnp.int32) if packed is None else packed
        own = batch.get("decoder_segments")
        return self.decode(batch["decoder_inputs"], encoded, segments, own, decoder_rng, remat)


def positions_in(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return how many positions of its own segment stand before each; padding has 0."""
    same = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))
    return jnp.where(segments > 0, same.sum(-1) - 1, 0)
