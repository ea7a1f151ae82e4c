"""Bias tuning (BitFit, Ben Zaken et al., 2022), also for models whose products have no biases, such as T5.

What trains: a vector added to the output of every product but that of the keys, 0 at the start, and T5's relative
position biases. A vector added to all keys changes every score of a query alike, which the softmax takes out again: its
gradient is 0 (Cordonnier et al., 2020), in BitFit too. Only with rotary positions it is not.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from softprompt_jax.config import UserError
from softprompt_jax.methods.base import Context, WeightMethod
from softprompt_jax.methods.trainable import Trainable, thaw
from softprompt_jax.methods.wrap import Wrapped, axes_of, linear_of, replace
from softprompt_jax.models.families import names
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.layers import Linear
from softprompt_jax.optim.optimizers import AdamW, Optimizer


class Bias(WeightMethod):
    """Bias tuning. With `targets: []` only T5's position biases train, and the model stays a plain T5."""

    paper: ClassVar[str] = "Ben Zaken et al., 2022"
    identity_at_start: ClassVar[bool] = True
    default_optimizer: ClassVar[Optimizer] = AdamW(learning_rate=5e-3)
    kind: Literal["bias"] = "bias"
    targets: list[str] = Field(default=["query", "value", "output", "feed_forward.*"])  # patterns over the paths of the
    # products that get a vector
    positions: bool = True  # training of the relative position biases, which only T5 has

    @model_validator(mode="after")
    def _something(self) -> Bias:
        if not self.targets and not self.positions:
            raise ValueError("expected targets, positions, or both")
        return self

    def attach(self, model: LanguageModel, key: jax.Array, context: Context) -> None:
        """Add the vectors, and make the position biases trainable."""
        if self.targets:
            replace(model, self.targets, lambda path, module: Shifted(module), "methods: bias targets")
        tables = [weight for weight in names(model.settings) if weight.endswith("bias.table")]
        if not tables and not self.targets:
            raise UserError("methods: this model has no position biases; expected a T5; name targets")
        if self.positions and tables and not thaw(model, tables.__contains__):
            raise UserError("methods: two methods train the position biases; expected one; set positions=false")


class Shifted(Wrapped):
    """`inner(x) + shift`."""

    def __init__(self, inner: Linear | Wrapped):
        kernel = linear_of(inner).kernel
        self.inner = inner
        self.shift = Trainable(jnp.zeros((*kernel.shape[:-2], kernel.shape[-1])), axes=axes_of(inner)[-1:])

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self.inner(x, key) + self.shift[...].astype(x.dtype)
