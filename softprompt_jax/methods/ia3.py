"""IA3 (Liu et al., 2022): one trained factor for each feature of the keys, the values and the inner feed-forward."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from softprompt_jax.config import UserError
from softprompt_jax.methods import peft_names
from softprompt_jax.methods.base import Context, MethodSettings, Tensors, WeightMethod
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.methods.wrap import Wrapped, kernel_shape, linear_of, linears, replace
from softprompt_jax.models.t5 import T5, Linear, T5Settings
from softprompt_jax.optim.optimizers import AdamW, Optimizer


class IA3(WeightMethod):
    """IA3: the outputs of some products and the inputs of others are multiplied by trained factors, 1 at the start."""

    paper: ClassVar[str] = "Liu et al., 2022"
    identity_at_start: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "IA3"
    default_optimizer: ClassVar[Optimizer] = AdamW(learning_rate=1e-2)
    kind: Literal["ia3"] = "ia3"
    outputs: list[str] = Field(default=["key", "value"])  # patterns over the paths of products whose outputs are scaled
    inputs: list[str] = Field(default=["down"])  # patterns over the paths of products whose inputs are scaled

    @model_validator(mode="after")
    def _something(self) -> IA3:
        if not self.outputs and not self.inputs:
            raise ValueError("expected outputs or inputs to scale")
        return self

    def attach(self, model: T5, key: jax.Array, context: Context) -> None:
        """Put the factors behind or before every target."""
        for patterns, side in ((self.outputs, "outputs"), (self.inputs, "inputs")):
            if patterns:
                replace(model, patterns, lambda path, module, side=side: Scaled(module, side), f"methods: ia3 {side}")

    def per_example_state(self, model: T5) -> Tensors:
        """Return the factors behind and before every target."""
        found: Tensors = {}
        for path, (owner, name) in linears(model).items():
            module = getattr(owner, name)
            while isinstance(module, Scaled):
                key = f"{module.side} {path}"
                found[key] = np.asarray(module.factors[...]) * found.get(key, 1.0)
                module = module.inner
        return found

    def to_peft(self, model: T5) -> tuple[dict[str, Any], Tensors]:
        """Return the factors: [out, 1] behind a product, [1, in] before one."""
        settings, tensors = model.settings, {}
        sides: dict[str, list[str]] = {"outputs": [], "inputs": []}
        for path, (owner, name) in linears(model).items():
            module = getattr(owner, name)
            if not isinstance(module, Scaled):
                continue
            if isinstance(module.inner, Scaled):
                raise UserError(f"methods: ia3 scales both sides of {path}, which PEFT cannot; expected one side")
            weight = f"{path}.kernel"
            sides[module.side].append(weight)
            values = np.asarray(module.factors[...])
            values = values[..., None] if module.side == "outputs" else values[..., None, :]
            tensors |= peft_names.to_layers(settings, weight, "ia3_l", values)
        config = {
            "target_modules": peft_names.target_modules(settings, sides["outputs"] + sides["inputs"], ".kernel"),
            "feedforward_modules": peft_names.target_modules(settings, sides["inputs"], ".kernel"),
            "fan_in_fan_out": False,
        }
        return config, tensors

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], tensors: Tensors, settings: T5Settings
    ) -> tuple[MethodSettings, Tensors]:
        """Tell the sides by the tensors' shapes."""
        peft_names.check_settings(config, {"feedforward_modules", "init_ia3_weights"})
        values: Tensors = {}
        sides: dict[str, list[str]] = {"outputs": [], "inputs": []}
        for weight, parts in peft_names.from_layers(settings, tensors, ["ia3_l"], ".kernel").items():
            stack, place = parts["ia3_l"], weight.removesuffix(".kernel")
            if stack.ndim != 3 or 1 not in stack.shape[1:]:
                raise UserError(f"ia3_l of {place}: found {list(stack.shape[1:])}; expected [width, 1] or [1, width]")
            sides["outputs" if stack.shape[2] == 1 else "inputs"].append(place)
            values[f"{place}.factors"] = stack.reshape(len(stack), -1)
        short = {side: peft_names.short_paths(settings, places, ".kernel") for side, places in sides.items()}
        return cls(outputs=short["outputs"], inputs=short["inputs"]), values


class Scaled(Wrapped):
    """`inner(x) * factors`, or `inner(x * factors)`."""

    def __init__(self, inner: Linear | Wrapped, side: str):
        shape, axes = kernel_shape(inner), linear_of(inner).kernel.get_metadata()["axes"]
        axis = -1 if side == "outputs" else -2
        self.inner, self.side = inner, side
        self.factors = Trainable(jnp.ones((*shape[:-2], shape[axis])), axes=(axes[axis],))

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        factors = self.factors[...].astype(x.dtype)
        return self.inner(x, key) * factors if self.side == "outputs" else self.inner(x * factors, key)

    def merged(self, kernel: jax.Array) -> jax.Array:
        factors = self.factors[...]
        return kernel * (factors[..., None, :] if self.side == "outputs" else factors[..., None])
