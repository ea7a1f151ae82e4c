"""What the settings of every family of models have in common: sizes, special ids, and how to compute."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from softprompt_jax.config import Settings
from softprompt_jax.models.flash import Implementation, Platform

Remat = Literal["none", "dots", "full"]
Activation = Literal["relu", "gelu_tanh", "gelu", "silu"]
# Settings that say how a model computes, not which model it is.
RUNTIME_DEFAULTS = {
    "dropout": 0.0,
    "attention": "auto",
    "platform": "cpu",
    "remat": "none",
    "unroll": False,
    "ends": (),
}


# Sizes that a foreign config.json may state; they are judged before anything is built.
Size = Annotated[int, Field(ge=1, le=10_000_000)]
Depth = Annotated[int, Field(ge=1, le=10_000)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ModelSettings(Settings):
    """Every shape and switch of a model: what its `config.json` states, and how to compute with it."""

    family: str  # model_type of its config.json
    vocabulary_rows: Size  # rows of the embedding table, which may be padded past the tokenizer's size
    d_model: Size
    d_kv: Size  # width of a head
    d_ff: Size
    num_heads: Size
    num_layers: Depth
    activation: Activation = "gelu_tanh"
    gated: bool = True
    tied: bool = False  # embedding table used as vocabulary projection too
    epsilon: float = Field(default=1e-6, gt=0, lt=1)
    embedding_scale: Factor = 1.0  # factor of the embeddings of text
    scales_prompt: bool = False  # the same factor for prompt rows (T5Gemma 1)
    dropout: float = 0.0
    attention: Implementation = "auto"  # kernel of self-attention over texts: plain; flash: cuDNN's, or an error that
    # says why not; auto: cuDNN's where it can be had
    platform: Platform = Field(default="cpu", exclude=True)  # devices that compute; set while loading
    remat: Remat = "none"
    unroll: bool = False  # scan over layers written out: compiles longer, runs about a tenth faster on a CPU
    padding: int = -1  # largest id that is padding: -1, or 0 where the vocabulary has padding as 0
    eos: int = 1  # id that ends an answer
    other_eos: tuple[int, ...] = ()  # others that do, such as the end of a turn
    ends: tuple[int, ...] = Field(default=(), exclude=True)  # others, for a run's `text: {stop: ...}`

    @property
    def decoder_depth(self) -> int:
        """Layers of the stack that writes the answer."""
        return getattr(self, "num_decoder_layers", self.num_layers)

    @property
    def always_plain(self) -> str | None:
        """Why a model cannot have cuDNN's attention on any device; None if it can."""
        return f"found a {self.family}, whose attention is always plain"

    def parameters(self) -> int:
        """Count the parameters of the model these settings describe."""
        raise NotImplementedError

    @property
    def key_width(self) -> int:
        """Width of the keys, and of the values, of all heads together."""
        return getattr(self, "num_key_heads", self.num_heads) * self.d_kv
