"""How much a method trains on a backbone, and with which optimizer."""

from __future__ import annotations

import math

import jax
from flax import nnx

from softprompt_jax.methods import Context, MethodSettings
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.build import build as build_model
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.settings import ModelSettings


def parameters(settings: ModelSettings, method: MethodSettings) -> int:
    """Return how many numbers a method trains on a backbone of these sizes; no weight is made."""

    def build() -> LanguageModel:
        model = build_model(settings, jax.random.key(0))
        method.attach(model, jax.random.key(0), Context())
        return model

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(build), Trainable)))


def optimizer_of(method: type[MethodSettings]) -> str:
    """Return the name of a method's default optimizer and its learning rate, if it has one."""
    optimizer = method.default_optimizer
    return f"{optimizer.kind} {optimizer.learning_rate:g}" if optimizer.learning_rate else optimizer.kind
