"""The methods: each one file with a settings class that has `attach`. The union below is the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, get_args

import jax
from pydantic import Field

from softprompt_jax.backbone.t5 import T5
from softprompt_jax.methods.adapter import Adapter
from softprompt_jax.methods.bias import Bias
from softprompt_jax.methods.contract import Context, MethodSettings
from softprompt_jax.methods.full import Full
from softprompt_jax.methods.ia3 import IA3
from softprompt_jax.methods.lora import LoRA
from softprompt_jax.methods.norms import Norms
from softprompt_jax.methods.prompt import Prompt
from softprompt_jax.methods.surgery import Split, Trainable, leaves, put_trained, split

__all__ = [
    "IA3",
    "METHODS",
    "Adapter",
    "Bias",
    "Context",
    "Full",
    "LoRA",
    "Method",
    "MethodSettings",
    "Norms",
    "Prompt",
    "Split",
    "Trainable",
    "attach",
    "leaves",
    "put_trained",
    "split",
]

Method = Annotated[Prompt | LoRA | IA3 | Adapter | Norms | Bias | Full, Field(discriminator="kind")]
METHODS: dict[str, type[MethodSettings]] = {
    method.model_fields["kind"].default: method for method in get_args(get_args(Method)[0])
}


def attach(methods: Sequence[Method], model: T5, key: jax.Array, context: Context) -> None:
    """Attach methods in their order, each with a key of its own."""
    for index, method in enumerate(methods):
        method.attach(model, jax.random.fold_in(key, index), context)
