"""IA3 (Liu et al., 2022): one trained factor for each feature of the keys, the values and the inner feed-forward."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from softprompt_jax.config import UserError
from softprompt_jax.methods import peft_names
from softprompt_jax.methods.base import AdapterConfig, Context, MethodSettings, Tensors, WeightMethod
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.methods.wrap import Wrapped, axes_of, kernel_shape, replace, standing
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.layers import Linear
from softprompt_jax.models.settings import ModelSettings
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

    def attach(self, model: LanguageModel, key: jax.Array, context: Context) -> None:
        """Put the factors behind or before every target."""
        for patterns, side in ((self.outputs, "outputs"), (self.inputs, "inputs")):
            if patterns:
                replace(model, patterns, lambda path, module, side=side: Scaled(module, side), f"methods: ia3 {side}")

    def per_example_state(self, model: LanguageModel) -> Tensors:
        """Return the factors behind and before every target."""
        found: Tensors = {}
        for path, module in standing(model).items():
            while isinstance(module, Scaled):
                key = f"{module.side} {path}"
                found[key] = np.asarray(module.factors[...]) * found.get(key, 1.0)
                module = module.inner
        return found

    def to_peft(self, model: LanguageModel) -> tuple[AdapterConfig, Tensors]:
        """Return the factors: [out, 1] behind a product, [1, in] before one.

        Errors: UserError for a place with factors on both sides, and for a part of a fused product whose inputs are
        scaled unlike those of the others.
        """
        settings, tensors = model.settings, {}
        sides: dict[str, list[str]] = {"outputs": [], "inputs": []}
        found = {f"{path}.kernel": module for path, module in standing(model).items()}
        scaled = [weight for weight, module in found.items() if isinstance(module, Scaled)]
        for group in peft_names.products(settings, scaled):
            present = [module for weight in group if isinstance(module := found[weight], Scaled)]
            side, name = present[0].side, group[0] if len(group) == 1 else " and ".join(group)
            if any(isinstance(module.inner, Scaled) or module.side != side for module in present):
                raise UserError(
                    f"methods: ia3 scales both sides of {name.removesuffix('.kernel')}, which PEFT cannot; "
                    "expected one side"
                )
            parts = [_factors(found[weight], side) for weight in group]
            if side == "inputs" and any(not np.array_equal(part, parts[0]) for part in parts):
                raise UserError(
                    f"methods: ia3 scales the inputs of {name}, which are one product in PEFT, in unlike ways; "
                    "expected their outputs to be scaled; keep the run folder"
                )
            sides[side].append(group[0].removesuffix(".kernel"))
            values = peft_names.join(settings, group, parts)[..., None] if side == "outputs" else parts[0][..., None, :]
            tensors |= peft_names.to_layers(settings, group[0], "ia3_l", values)
        config = {
            "target_modules": peft_names.target_modules(settings, sides["outputs"] + sides["inputs"], ".kernel"),
            "feedforward_modules": peft_names.target_modules(settings, sides["inputs"], ".kernel"),
            "fan_in_fan_out": peft_names.fan_in_fan_out(settings),
        }
        return config, tensors

    @classmethod
    def from_peft(
        cls, config: AdapterConfig, tensors: Tensors, settings: ModelSettings
    ) -> tuple[MethodSettings, Tensors]:
        """Read the sides off the tensors' shapes. The parts of a fused product each get their own factors."""
        stored = {"fan_in_fan_out"} if peft_names.fan_in_fan_out(settings) else set()
        peft_names.check_settings(config, {"feedforward_modules", "init_ia3_weights"} | stored)
        values: Tensors = {}
        sides: dict[str, list[str]] = {"outputs": [], "inputs": []}
        for place, parts in peft_names.from_layers(settings, tensors, ["ia3_l"], ".kernel").items():
            stack = parts["ia3_l"]
            if stack.ndim != 3 or 1 not in stack.shape[1:]:
                raise UserError(f"ia3_l of {place}: found {list(stack.shape[1:])}; expected [width, 1] or [1, width]")
            side, factors = "outputs" if stack.shape[2] == 1 else "inputs", stack.reshape(len(stack), -1)
            sides[side].append(place)
            own = peft_names.own_part(settings, f"{place}.kernel", factors) if side == "outputs" else factors
            values[f"{place}.factors"] = np.ascontiguousarray(own)
        short = {side: peft_names.short_paths(settings, places, ".kernel") for side, places in sides.items()}
        return cls(outputs=short["outputs"], inputs=short["inputs"]), values


def _factors(module: Linear | Wrapped, side: str) -> np.ndarray:
    """Return the factors of a place; 1 where it has none."""
    if isinstance(module, Scaled):
        return np.asarray(module.factors[...])
    shape = kernel_shape(module)
    return np.ones((*shape[:-2], shape[-1 if side == "outputs" else -2]), np.float32)


class Scaled(Wrapped):
    """`inner(x) * factors`, or `inner(x * factors)`."""

    def __init__(self, inner: Linear | Wrapped, side: str):
        shape, axis = kernel_shape(inner), -1 if side == "outputs" else -2
        self.inner, self.side = inner, side
        self.factors = Trainable(jnp.ones((*shape[:-2], shape[axis])), axes=(axes_of(inner)[axis],))

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        factors = self.factors[...].astype(x.dtype)
        return self.inner(x, key) * factors if self.side == "outputs" else self.inner(x * factors, key)

    def merged(self, kernel: jax.Array) -> jax.Array:
        factors = self.factors[...]
        return kernel * (factors[..., None, :] if self.side == "outputs" else factors[..., None])

    def merged_bias(self, bias: jax.Array) -> jax.Array:
        return bias * self.factors[...] if self.side == "outputs" else bias
