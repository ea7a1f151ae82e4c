"""What every family of models is: an embedding table that prompts extend, stacks of layers, a head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from softprompt_jax.models.attention import PrefixKeyValues
from softprompt_jax.models.layers import Linear
from softprompt_jax.models.settings import ModelSettings, Remat


class StackBase(nnx.Module):
    """Places of a stack of layers that methods attach to, and how the stack is run."""

    layers: Any
    norm: Any

    def __init__(self, settings: ModelSettings, depth: int):
        self.prefix: Any = nnx.data(None)  # prefix tuning attaches a module here: () -> keys and values
        # P-tuning v2 attaches its prompts of every layer here; the name stands in the files of its runs.
        self.deep: Any = nnx.data(None)
        self.depth, self.dropout, self.unroll = depth, settings.dropout, settings.unroll
        self.remat: Remat = settings.remat

    def prefixes(self) -> tuple[PrefixKeyValues | None, PrefixKeyValues | None]:
        """Return the prefixes of self-attention and of cross attention [L, ...], None where there is none."""
        return (None, None) if self.prefix is None else self.prefix()

    def layer_prompt_rows(self, prompt_rows: Int[Array, "B T"] | None) -> tuple[Any, Any]:
        """Return the prompts of every layer, and `put(x, layer's prompts)`, which writes them at prompt positions."""
        return (None, lambda x, _: x) if self.deep is None or prompt_rows is None else self.deep(prompt_rows)


class LanguageModel(nnx.Module):
    """A frozen language model. Methods attach a soft prompt as `prompt`: embeddings of the ids from V on."""

    encoder: Any  # None: decoder-only
    decoder: Any

    def __init__(self, settings: ModelSettings, table_rng: jax.Array, head_rng: jax.Array, dtype: str):
        rows, width = settings.vocabulary_rows, settings.d_model
        self.embedding = nnx.Param(jax.random.normal(table_rng, (rows, width), jnp.float32), axes=("vocab", "embed"))
        head = None if settings.tied else Linear(head_rng, (width, rows), ("embed", "vocab"), width**-0.5)
        self.head: Any = nnx.data(None) if head is None else head
        self.prompt: Any = nnx.data(None)  # methods/prompt.py attaches a PromptTable here
        # DePT attaches a module here: what is added to the words of a context by their places in it.
        self.offset: Any = nnx.data(None)
        self.context: Any = nnx.data(None)  # training/distill.py attaches what the teacher has read here
        self.settings: Any = settings
        self.dtype = dtype

    @property
    def stacks(self) -> dict[str, StackBase]:
        """The stacks of layers by name: encoder and decoder, or the decoder alone."""
        return {name: stack for name in ("encoder", "decoder") if (stack := getattr(self, name)) is not None}

    @property
    def context_stack(self) -> StackBase:
        """The stack that reads contexts: the encoder, or the only one."""
        return next(iter(self.stacks.values()))

    def is_real(self, tokens: Int[Array, "*B"]) -> Bool[Array, "*B"]:
        """Tell which ids are no padding."""
        return tokens > self.settings.padding

    def is_end(self, tokens: Int[Array, "*B"]) -> Bool[Array, "*B"]:
        """Tell which ids end an answer."""
        others = (*self.settings.other_eos, *self.settings.ends)
        ends = tokens == self.settings.eos
        return ends | jnp.isin(tokens, jnp.asarray(others)) if others else ends

    @property
    def text_end(self) -> int | None:
        """The id at the end of every input; None: inputs have none."""
        return None if self.encoder is None else self.settings.eos

    def word_rows(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Return in float32 the prompt rows that are read as these ids of the vocabulary."""
        return self.embedding[...][ids].astype(jnp.float32) * self.word_factor

    @property
    def word_factor(self) -> float:
        """The factor of a row of the table that is read as a prompt row."""
        return 1.0 if self.settings.scales_prompt else self.settings.embedding_scale

    def embed(self, tokens: Int[Array, "B T"], rng: jax.Array | None = None) -> Float[Array, "B T D"]:
        """Look ids < V up in the frozen table and ids >= V in the prompt's rows."""
        return self.embed_with(self.embedding, tokens, rng)

    def embed_with(self, embedding: Any, tokens: Int[Array, "B T"], rng: jax.Array | None) -> Float[Array, "B T D"]:
        """Look ids < V up in this table and ids >= V in the prompt's rows."""
        rows = self.settings.vocabulary_rows
        text = embedding[...].astype(self.dtype)[jnp.clip(tokens, 0, rows - 1)]
        scale = jnp.asarray(self.settings.embedding_scale, text.dtype)  # rounded to the dtype first, as Gemma does
        if self.settings.embedding_scale != 1:
            text = text * scale
        if self.prompt is None:
            return text
        virtual = tokens >= rows
        prompt = self.prompt(tokens - rows, virtual, rng).astype(text.dtype)
        return jnp.where(virtual[..., None], prompt * scale if self.settings.scales_prompt else prompt, text)

    def with_offset(self, x: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Add to the embeddings of contexts what a method adds to their words, which prompt rows do not count among."""
        if self.offset is None:
            return x
        words = self.is_real(tokens) & (tokens < self.settings.vocabulary_rows)
        return x + self.offset(jnp.cumsum(words, -1) - 1, words).astype(x.dtype)

    def project(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return float32 logits over the V vocabulary rows."""
        kernel = self.embedding[...].T if self.head is None else self.head.kernel[...]
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def first_input(self, tokens: Int[Array, "B T"]) -> Int[Array, "B"]:
        """Return the first input of the answer to each context."""
        raise NotImplementedError

    def hidden(
        self, batch: dict[str, Array], rng: jax.Array | None = None, remat: Remat | None = None
    ) -> Float[Array, "B U D"]:
        """Return what stands at the answers' positions of a batch: `encoder_tokens`, `decoder_inputs`."""
        raise NotImplementedError

    def __call__(self, batch: dict[str, Array], rng: jax.Array | None = None) -> Float[Array, "B U V"]:
        """Return float32 logits of a batch."""
        return self.project(self.hidden(batch, rng))
