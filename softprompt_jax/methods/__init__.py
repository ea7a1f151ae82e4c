"""What trains beside a frozen model: a soft prompt, and everything else of that kind. ADD A METHOD here.

Each method is one file: a class of settings with `attach`, which puts `Trainable` parameters (`trainable`) into a
model; `wrap` replaces products. The union `Method` below is the registry. Begin with `base.py`, then `prompt.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, get_args

import jax
from flax import nnx
from pydantic import Field

from softprompt_jax.methods.adapter import Adapter
from softprompt_jax.methods.base import Context, MethodSettings
from softprompt_jax.methods.bias import Bias
from softprompt_jax.methods.black_box import BlackBox
from softprompt_jax.methods.dept import DePT
from softprompt_jax.methods.full import Full
from softprompt_jax.methods.hard import Hard
from softprompt_jax.methods.ia3 import IA3
from softprompt_jax.methods.lora import LoRA
from softprompt_jax.methods.multitask import Multitask
from softprompt_jax.methods.norms import Norms
from softprompt_jax.methods.p_tuning import PTuning
from softprompt_jax.methods.p_tuning_v2 import PTuningV2
from softprompt_jax.methods.prefix import Prefix
from softprompt_jax.methods.prompt import Prompt
from softprompt_jax.methods.trainable import (
    Split,
    Trainable,
    check_lengths,
    check_trained,
    leaves,
    mark_owner,
    put_trained,
    split,
)
from softprompt_jax.methods.wayward import Wayward
from softprompt_jax.models.language_model import LanguageModel

__all__ = ["IA3", "METHODS", "Adapter", "Bias", "BlackBox", "Context", "DePT", "Full", "Hard", "LoRA", "Method"]
__all__ += ["MethodSettings", "Multitask", "Norms", "PTuning", "PTuningV2", "Prefix", "Prompt", "Split", "Trainable"]
__all__ += ["Wayward", "attach", "check_lengths", "check_trained", "finish", "leaves", "put_trained", "split"]

_OfPrompts = Prompt | Wayward | PTuning | DePT | Multitask | Prefix | PTuningV2
_OfWeights = LoRA | IA3 | Adapter | Norms | Bias | Full
_WithoutGradients = BlackBox | Hard
Method = Annotated[_OfPrompts | _OfWeights | _WithoutGradients, Field(discriminator="kind")]
METHODS: dict[str, type[MethodSettings]] = {
    method.model_fields["kind"].default: method for method in get_args(get_args(Method)[0])
}


def finish(model: LanguageModel) -> LanguageModel:
    """Return the same function without what only training needed, such as the network behind a prompt or prefix."""
    model = nnx.merge(*nnx.split(model))
    stacks = [(stack, name) for stack in model.stacks.values() for name in ("prefix", "deep")]
    for owner, name in ((model, "prompt"), *stacks):
        if getattr(owner, name) is not None:
            setattr(owner, name, getattr(owner, name).finished())
    return model


def attach(methods: Sequence[Method], model: LanguageModel, key: jax.Array, context: Context) -> None:
    """Attach methods in their order, each with a key of its own; what trains is marked with its method's number."""
    for index, method in enumerate(methods):
        method.attach(model, jax.random.fold_in(key, index), context)
        mark_owner(model, index, getattr(method, "learning_rate_scale", 1.0))
