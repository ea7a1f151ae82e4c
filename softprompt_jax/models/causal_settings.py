"""Settings of decoder-only models: rotary positions, kinds of layers, and every shape and switch."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from softprompt_jax.config import Settings
from softprompt_jax.models.settings import Factor, ModelSettings, Size


class Rope(Settings):
    """Rotary positions (Su et al., 2021): base of the angles, share of a head that turns, scaling for long texts."""

    base: float = Field(default=10000.0, gt=0)
    share: float = Field(default=1.0, gt=0, le=1)  # part of a head's width that turns (GPT-NeoX)
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = Field(default=1.0, gt=0)  # how much longer texts become
    low: float = 1.0  # llama3: turns within the original length, below which frequencies are divided
    high: float = 4.0  # llama3: turns above which they stay
    original: int = 8192  # llama3: original length

    def frequencies(self, width: int) -> np.ndarray:
        """Return the angles per position [R] of heads of this width, float32."""
        turned = int(width * self.share)
        found = 1.0 / self.base ** (np.arange(0, turned, 2, dtype=np.float32) / np.float32(turned))
        if self.kind == "linear":
            found = found / self.factor
        elif self.kind == "llama3":
            turns = self.original * found / (2 * np.pi)
            smooth = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
            found = (1 - smooth) * found / self.factor + smooth * found
        return found.astype(np.float32)


class LayerKind(Settings):
    """What differs between the layers of a model."""

    window: int | None = None  # positions back that a query sees, its own included; null: all
    ahead: int | None = None  # positions ahead that a query of an encoder sees; null: all
    rope: Rope | None = None  # rotary positions; null: none


class CausalSettings(ModelSettings):
    """Every shape and switch of a decoder-only model, and how to compute with it."""

    num_key_heads: Size  # heads of keys and values, each shared by num_heads / num_key_heads query heads
    kinds: tuple[LayerKind, ...]
    pattern: tuple[int, ...]  # number of each layer's kind
    norm: Literal["rms", "rms_offset", "layer"] = "rms"  # rms_offset: times 1 + weight (Gemma)
    post_norms: bool = False  # norms after attention and feed-forward block too (Gemma 2)
    parallel: bool = False  # attention and feed-forward block read the same input (GPT-NeoX)
    query_key_norm: bool = False  # queries and keys normalised per head
    attention_bias: bool = False  # bias of the query, key and value products
    output_bias: bool = False  # bias of the attention's output product
    feed_forward_bias: bool = False
    score_scale: Factor  # factor of the scores before the softmax
    score_cap: float | None = None  # soft cap of the scores
    logit_cap: float | None = None  # soft cap of the logits
    learned_positions: int | None = None  # rows of a table of positions (GPT-2)

    @property
    def num_decoder_layers(self) -> int:
        """Layers of the stack that writes the answer."""
        return self.num_layers

    @property
    def always_plain(self) -> str | None:
        """Why a model cannot have cuDNN's attention on any device; None if it can."""
        if self.score_cap is not None:
            return f"found a {self.family}, whose scores have a soft cap; expected a model without"
        if len({kind.window for kind in self.kinds}) > 1:
            return f"found a {self.family}, whose layers have unlike windows; expected a model of one"
        return None

    def parameters(self) -> int:
        """Count the parameters of the model these settings describe."""
        heads, keys = self.num_heads * self.d_kv, self.num_key_heads * self.d_kv
        layer = self.d_model * (2 * heads + 2 * keys) + (3 if self.gated else 2) * self.d_model * self.d_ff
        layer += (heads + 2 * keys) * self.attention_bias + self.d_model * self.output_bias
        layer += (self.d_ff * (1 + self.gated) + self.d_model) * self.feed_forward_bias
        norm = self.d_model * (2 if self.norm == "layer" else 1)
        layer += norm * (4 if self.post_norms else 2) + 2 * self.d_kv * self.query_key_norm
        tables = (1 if self.tied else 2) * self.vocabulary_rows + (self.learned_positions or 0)
        return self.num_layers * layer + norm + tables * self.d_model
