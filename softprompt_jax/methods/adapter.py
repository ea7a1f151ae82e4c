"""Adapters (Houlsby et al., 2019; Pfeiffer et al., 2021): a small network behind a sublayer, added to its output."""

from __future__ import annotations

import zlib
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from softprompt_jax.methods.base import Context, WeightMethod
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.methods.wrap import Wrapped, axes_of, linear_of, linears, replace
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.layers import ACTIVATIONS, Linear
from softprompt_jax.optim.optimizers import AdamW, Optimizer

_PLACES = {"houlsby": ["attention.output", "cross.output", "feed_forward.down"], "pfeiffer": ["feed_forward.down"]}


class Adapter(WeightMethod):
    """Adapters of an inner `width`: behind attention and feed-forward (`houlsby`) or feed-forward only (`pfeiffer`).

    Where a block has a norm at its end too (Gemma 2), they stand before it.
    """

    paper: ClassVar[str] = "Houlsby et al., 2019"
    identity_at_start: ClassVar[bool] = True
    default_optimizer: ClassVar[Optimizer] = AdamW(learning_rate=1e-3)
    kind: Literal["adapter"] = "adapter"
    style: Literal["houlsby", "pfeiffer"] = "houlsby"  # place of the networks: behind attention and feed-forward
    # (houlsby), or feed-forward only (pfeiffer)
    width: int = Field(default=64, ge=1)  # inner width of each network
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "relu"  # function between its two layers

    def attach(self, model: LanguageModel, key: jax.Array, context: Context) -> None:
        """Put a network behind every sublayer of the style."""
        there = [path.rpartition("layers.")[2] for path in linears(model)]
        places = [f"*.{place}" for place in _PLACES[self.style] if place in there]
        replace(
            model, places, lambda path, module: Bottleneck(module, self, path, key), f"methods: {self.style} adapter"
        )


class Bottleneck(Wrapped):
    """`y + f(y A + a) B + b` for `y = inner(x)`; B and b are 0 at the start."""

    def __init__(self, inner: Linear | Wrapped, settings: Adapter, path: str, key: jax.Array):
        *layers, _, columns = linear_of(inner).kernel.shape
        axis, width = axes_of(inner)[-1], settings.width
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        down = columns**-0.5 * jax.random.normal(own, (*layers, columns, width))
        self.inner, self.activation = inner, settings.activation
        self.down = Trainable(down, axes=(axis, "rank"))
        self.down_bias = Trainable(jnp.zeros((*layers, width)), axes=("rank",))
        self.up = Trainable(jnp.zeros((*layers, width, columns)), axes=("rank", axis))
        self.up_bias = Trainable(jnp.zeros((*layers, columns)), axes=(axis,))

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        made = self.inner(x, key)
        down, shift, up, out = (w[...].astype(x.dtype) for w in (self.down, self.down_bias, self.up, self.up_bias))
        hidden = ACTIVATIONS[self.activation](made.reshape(-1, made.shape[-1]) @ down + shift)
        return made + (hidden @ up + out).reshape(made.shape)
