"""Full tuning ("model tuning" in Lester et al., 2021): every weight of the backbone trains."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax

from softprompt_jax.methods.base import Context, MethodSettings
from softprompt_jax.methods.trainable import thaw
from softprompt_jax.models.families import names
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.optim.optimizers import AdamW, Optimizer


class Full(MethodSettings):
    """Full tuning: float32 copies of all weights train; they compute in the run's dtype."""

    paper: ClassVar[str] = "Raffel et al., 2020"
    identity_at_start: ClassVar[bool] = True
    trains_backbone: ClassVar[bool] = True
    default_optimizer: ClassVar[Optimizer] = AdamW(learning_rate=5e-4)
    kind: Literal["full"] = "full"

    def attach(self, model: LanguageModel, key: jax.Array, context: Context) -> None:
        """Make every weight of the backbone trainable, not what other methods have frozen of their own."""
        own = set(names(model.settings))
        thaw(model, lambda path: path.replace(".inner", "") in own)
