"""Norm tuning (Zhao et al., 2024): scales and biases of the layer norms train, a few thousand numbers in all."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import numpy as np
from flax import nnx
from pydantic import Field

from softprompt_jax.config import UserError
from softprompt_jax.methods import peft_names
from softprompt_jax.methods.base import AdapterConfig, Context, MethodSettings, Tensors, WeightMethod
from softprompt_jax.methods.trainable import Trainable, thaw
from softprompt_jax.methods.wrap import matching
from softprompt_jax.models.families import names
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.settings import ModelSettings
from softprompt_jax.optim.optimizers import AdamW, Optimizer
from softprompt_jax.trees import flatten


class Norms(WeightMethod):
    """Norm tuning: float32 copies of the norms' scales train, and of the biases of those that have one (GPT).

    Nothing needs to be merged.
    """

    paper: ClassVar[str] = "Zhao et al., 2024"
    identity_at_start: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "LN_TUNING"
    default_optimizer: ClassVar[Optimizer] = AdamW(learning_rate=5e-3)
    kind: Literal["norms"] = "norms"
    targets: list[str] = Field(default=["*"], min_length=1)  # patterns over the paths of the norms, such as
    # decoder.layers.cross_norm

    def attach(self, model: LanguageModel, key: jax.Array, context: Context) -> None:
        """Make scales and biases trainable."""
        weights = names(model.settings)
        known = [weight.removesuffix(".scale") for weight in weights if weight.endswith(".scale")]
        places = matching(self.targets, known, "methods: norms targets")
        wanted = {weight for place in places for weight in (f"{place}.scale", f"{place}.bias") if weight in weights}
        if set(thaw(model, wanted.__contains__)) != wanted:
            raise UserError("methods: two methods train the same norms; expected one; remove the other")

    def to_peft(self, model: LanguageModel) -> tuple[AdapterConfig, Tensors]:
        """Return scales and biases, which stand for the backbone's own."""
        trained = flatten(nnx.to_pure_dict(nnx.state(model, Trainable)))
        tensors: Tensors = {}
        for weight, values in trained.items():
            ending = _ENDINGS[weight.rpartition(".")[2]]
            tensors |= peft_names.to_layers(model.settings, weight, ending, np.asarray(values))
        places = [weight.removesuffix(".scale") for weight in trained if weight.endswith(".scale")]
        return {"target_modules": peft_names.target_modules(model.settings, places, ".scale")}, tensors

    @classmethod
    def from_peft(
        cls, config: AdapterConfig, tensors: Tensors, settings: ModelSettings
    ) -> tuple[MethodSettings, Tensors]:
        """Stack the layers' scales and biases."""
        peft_names.check_settings(config, set())
        stacks = peft_names.from_layers(settings, tensors, list(_ENDINGS.values()), ".scale")
        targets = peft_names.short_paths(settings, list(stacks), ".scale")
        values = {
            f"{place}.{name}": parts[ending]
            for place, parts in stacks.items()
            for name, ending in _ENDINGS.items()
            if ending in parts
        }
        return cls(targets=targets), values


_ENDINGS = {"scale": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}
