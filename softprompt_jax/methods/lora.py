"""LoRA (Hu et al., 2022): a product of two thin matrices beside a frozen one; also rsLoRA and DoRA."""

from __future__ import annotations

import math
import zlib
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from softprompt_jax.config import UserError
from softprompt_jax.methods import peft_names
from softprompt_jax.methods.base import Context, MethodSettings, Tensors, WeightMethod
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.methods.wrap import Wrapped, kernel_shape, linear_of, linears, plain_kernel, replace
from softprompt_jax.models.t5 import T5, Linear, T5Settings, dropout
from softprompt_jax.optim.optimizers import AdamW, Optimizer


class LoRA(WeightMethod):
    """LoRA: `x W + alpha / rank * x A B` in the place of `x W`; A is random and B zero at the start."""

    paper: ClassVar[str] = "Hu et al., 2022"
    identity_at_start: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "LORA"
    default_optimizer: ClassVar[Optimizer] = AdamW(learning_rate=2e-3)
    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)  # inner width of the two matrices
    alpha: float = Field(default=16.0, gt=0)  # factor of their product, divided by the rank
    targets: list[str] = Field(default=["query", "value"], min_length=1)  # patterns over the paths of the adapted
    # products
    dropout: float = Field(default=0.0, ge=0, lt=1)  # share of the features that A does not see in training, the same
    # at every position
    rslora: bool = False  # division of alpha by sqrt(rank) instead of rank (Kalajdzievski, 2023)
    dora: bool = False  # trained length for each column of the sum (Liu et al., 2024)

    def attach(self, model: T5, key: jax.Array, context: Context) -> None:
        """Put the two matrices beside every target."""

        def wrap(path: str, module: Linear | Wrapped) -> LowRank:
            width = min(kernel_shape(module)[-2:])
            if self.rank > width:
                raise UserError(f"methods: lora rank {self.rank} at {path}; expected at most its width {width}")
            return LowRank(module, self, path, key)

        replace(model, self.targets, wrap, "methods: lora targets")

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_peft(self, model: T5) -> tuple[dict[str, Any], Tensors]:
        """Return both matrices of every target, transposed, one pair a layer."""
        settings, tensors, weights = model.settings, {}, []
        for path, (owner, name) in linears(model).items():
            module = getattr(owner, name)
            if isinstance(module, LowRank):
                weights.append(f"{path}.kernel")
                for ending, part in _PARTS.items():
                    values = getattr(module, part)
                    if values is not None:
                        turned = _transposed(np.asarray(values[...]))
                        tensors |= peft_names.to_layers(settings, weights[-1], ending, turned)
        config = {
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "target_modules": peft_names.target_modules(settings, weights, ".kernel"),
            "bias": "none",
            "fan_in_fan_out": False,
        }
        return config, tensors

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], tensors: Tensors, settings: T5Settings
    ) -> tuple[MethodSettings, Tensors]:
        """Stack the layers; what PEFT can vary from layer to layer (rank, alpha, targets) is refused."""
        peft_names.check_settings(config, _UNDERSTOOD)
        if config.get("init_lora_weights") not in (None, True, False, "gaussian", "eva", "orthogonal"):
            raise UserError(
                f"init_lora_weights is {config['init_lora_weights']!r}, which changed the backbone's weights; "
                "expected LoRA over the backbone as it was; merge the adapter in PEFT and load the merged model"
            )
        values: Tensors = {}
        for weight, parts in peft_names.from_layers(settings, tensors, list(_PARTS), ".kernel").items():
            for ending, stack in parts.items():
                values[f"{weight.removesuffix('.kernel')}.{_PARTS[ending]}"] = _transposed(stack)
        places = [path.removesuffix(".down") for path in values if path.endswith(".down")]
        method = cls(
            rank=config["r"],
            alpha=config["lora_alpha"],
            targets=peft_names.short_paths(settings, places, ".kernel"),
            dropout=config.get("lora_dropout", 0.0),
            rslora=config.get("use_rslora", False),
            dora=config.get("use_dora", False),
        )
        return method, values


_PARTS = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "magnitude"}
_UNDERSTOOD = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"),
    *("megatron_core", "qalora_group_size"),  # without effect where what they belong to is off
}


class LowRank(Wrapped):
    """`inner(x) + scale x A B`, with a trained length for each column if `magnitude` is there (DoRA)."""

    def __init__(self, inner: Linear | Wrapped, settings: LoRA, path: str, key: jax.Array):
        *layers, width, columns = kernel_shape(inner)
        into, out = linear_of(inner).kernel.get_metadata()["axes"]
        number = zlib.crc32(path.encode())  # of this place, so that no two draw the same
        bound = width**-0.5
        shape = (*layers, width, settings.rank)
        down = jax.random.uniform(jax.random.fold_in(key, number), shape, minval=-bound, maxval=bound)
        self.inner = inner
        self.down = Trainable(down, axes=(into, "rank"))
        self.up = Trainable(jnp.zeros((*layers, settings.rank, columns)), axes=("rank", out))
        self.magnitude: Any = nnx.data(None)
        if settings.dora:
            self.magnitude = Trainable(_lengths(plain_kernel(inner)), axes=(out,))
        self.scale, self.dropout, self.number = settings.scale, settings.dropout, number

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        kept = x if key is None else dropout(x, self.dropout, jax.random.fold_in(key, self.number))
        rows = kept.reshape(-1, x.shape[-1])
        change = (rows @ self.down[...].astype(x.dtype)) @ self.up[...].astype(x.dtype)
        made = self.inner(x, key) + self.scale * change.reshape(*x.shape[:-1], -1)
        if self.magnitude is None:
            return made
        lengths = _lengths(self._sum(plain_kernel(self.inner)))  # a constant for the gradient, as in the paper
        return made * (self.magnitude[...] / jax.lax.stop_gradient(lengths)).astype(x.dtype)

    def merged(self, kernel: jax.Array) -> jax.Array:
        total = self._sum(kernel)
        if self.magnitude is None:
            return total
        return total * (self.magnitude[...] / _lengths(total))[..., None, :]

    def _sum(self, kernel: jax.Array) -> jax.Array:
        change = jnp.matmul(self.down[...], self.up[...], precision=jax.lax.Precision.HIGHEST)
        return kernel + self.scale * change


def _lengths(kernel: jax.Array) -> jax.Array:
    """Return the Euclidean length of each column of [..., in, out]."""
    return jnp.sqrt(jnp.sum(kernel * kernel, axis=-2))


def _transposed(stack: np.ndarray) -> np.ndarray:
    """Turn each layer's matrix; leave stacks of vectors."""
    return np.ascontiguousarray(stack.swapaxes(-1, -2)) if stack.ndim == 3 else stack
