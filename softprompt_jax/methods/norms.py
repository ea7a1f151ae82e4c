"""Norm tuning (Zhao et al., 2024): the scales of the layer norms train, a few thousand numbers in the whole model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import numpy as np
from flax import nnx
from pydantic import Field

from softprompt_jax.config import UserError
from softprompt_jax.methods import peft_names
from softprompt_jax.methods.base import Context, MethodSettings, Tensors, WeightMethod
from softprompt_jax.methods.trainable import Trainable, thaw
from softprompt_jax.methods.wrap import matching
from softprompt_jax.models.families.t5 import names
from softprompt_jax.models.t5 import T5, T5Settings
from softprompt_jax.optim.optimizers import AdamW, Optimizer
from softprompt_jax.trees import flatten


class Norms(WeightMethod):
    """Norm tuning: float32 copies of the norms' scales train; merging is nothing to do."""

    paper: ClassVar[str] = "Zhao et al., 2024"
    identity_at_start: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "LN_TUNING"
    default_optimizer: ClassVar[Optimizer] = AdamW(learning_rate=5e-3)
    kind: Literal["norms"] = "norms"
    targets: list[str] = Field(default=["*"], min_length=1)  # patterns over the paths of the norms, such as
    # decoder.layers.cross_norm

    def attach(self, model: T5, key: jax.Array, context: Context) -> None:
        """Make the scales trainable."""
        known = [weight.removesuffix(".scale") for weight in names(model.settings) if weight.endswith(".scale")]
        wanted = {f"{place}.scale" for place in matching(self.targets, known, "methods: norms targets")}
        if set(thaw(model, wanted.__contains__)) != wanted:
            raise UserError("methods: two methods train the same norms; expected one; remove the other")

    def to_peft(self, model: T5) -> tuple[dict[str, Any], Tensors]:
        """Return the scales, which stand for the backbone's own."""
        scales = flatten(nnx.to_pure_dict(nnx.state(model, Trainable)))
        tensors: Tensors = {}
        for weight, values in scales.items():
            tensors |= peft_names.to_layers(model.settings, weight, _ENDING, np.asarray(values))
        return {"target_modules": peft_names.target_modules(model.settings, list(scales), ".scale")}, tensors

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], tensors: Tensors, settings: T5Settings
    ) -> tuple[MethodSettings, Tensors]:
        """Stack the layers' scales."""
        peft_names.check_settings(config, set())
        stacks = peft_names.from_layers(settings, tensors, [_ENDING], ".scale")
        places = [weight.removesuffix(".scale") for weight in stacks]
        targets = peft_names.short_paths(settings, places, ".scale")
        return cls(targets=targets), {weight: parts[_ENDING] for weight, parts in stacks.items()}


_ENDING = "ln_tuning_layers.weight"
