"""What methods there are: how much each trains on a backbone, and how."""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import nnx

from softprompt_jax.methods import METHODS, Context, MethodSettings
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.t5 import T5, T5Settings


@dataclasses.dataclass(frozen=True)
class Listed:
    """One line of the list."""

    kind: str
    paper: str
    parameters: int  # that train, with default settings
    optimizer: str  # the default, with its learning rate if it has one
    peft: str | None


def listed(settings: T5Settings) -> list[Listed]:
    """Describe every method with its default settings on a backbone of these sizes; no weight is made."""
    return [
        Listed(kind, method.paper, parameters(settings, method()), optimizer_of(method), method.peft_type)
        for kind, method in METHODS.items()
    ]


def parameters(settings: T5Settings, method: MethodSettings) -> int:
    """Return how many numbers a method trains on a backbone of these sizes; no weight is made."""

    def build() -> T5:
        model = T5(settings, jax.random.key(0))
        method.attach(model, jax.random.key(0), Context())
        return model

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(build), Trainable)))


def optimizer_of(method: type[MethodSettings]) -> str:
    """Return the name of a method's default optimizer and its learning rate, if it has one."""
    optimizer = method.default_optimizer
    return f"{optimizer.kind} {optimizer.learning_rate:g}" if optimizer.learning_rate else optimizer.kind
