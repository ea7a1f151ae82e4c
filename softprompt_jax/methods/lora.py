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
from softprompt_jax.methods.base import AdapterConfig, Context, MethodSettings, Tensors, WeightMethod
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.methods.wrap import Wrapped, axes_of, kernel_shape, plain_bias, plain_kernel, replace, standing
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.layers import Linear, dropout
from softprompt_jax.models.settings import ModelSettings
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

    def attach(self, model: LanguageModel, key: jax.Array, context: Context) -> None:
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

    def to_peft(self, model: LanguageModel) -> tuple[AdapterConfig, Tensors]:
        """Return both matrices of every target, transposed, one pair a layer.

        Query, key and value that are one product in Hugging Face's layout (GPT-2) get one pair, of a rank that holds
        the others as blocks.
        """
        settings, tensors = model.settings, {}
        found = {f"{path}.kernel": module for path, module in standing(model).items()}
        weights = [weight for weight, module in found.items() if isinstance(module, LowRank)]
        fused = [_fused(settings, group, found) for group in peft_names.products(settings, weights)]
        rank = max(parts["down"].shape[-1] for _, parts in fused)
        for weight, parts in fused:
            for ending, name in _PARTS.items():
                if name in parts:
                    widths = [(0, 0)] * parts[name].ndim
                    if name != "magnitude":
                        axis = -1 if name == "down" else -2
                        widths[axis] = (0, rank - parts[name].shape[axis])
                    turned = _transposed(np.pad(parts[name], widths))
                    tensors |= peft_names.to_layers(settings, weight, ending, turned)
        alpha = self.alpha * (math.sqrt(rank / self.rank) if self.rslora else rank / self.rank)
        config = {
            "r": rank,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "target_modules": peft_names.target_modules(
                settings, [weight.removesuffix(".kernel") for weight in weights], ".kernel"
            ),
            "bias": "none",
            "fan_in_fan_out": peft_names.fan_in_fan_out(settings),
        }
        return config, tensors

    @classmethod
    def from_peft(
        cls, config: AdapterConfig, tensors: Tensors, settings: ModelSettings
    ) -> tuple[MethodSettings, Tensors]:
        """Stack the layers; what PEFT can vary from layer to layer (rank, alpha, targets) is refused.

        An adapter of a fused product becomes one of query, key and value each, with the same first matrix.
        """
        stored = {"fan_in_fan_out"} if peft_names.fan_in_fan_out(settings) else set()
        peft_names.check_settings(config, _UNDERSTOOD | stored)
        if config.get("init_lora_weights") not in (None, True, False, "gaussian", "eva", "orthogonal"):
            raise UserError(
                f"init_lora_weights is {config['init_lora_weights']!r}, which changed the backbone's weights; "
                "expected LoRA over the backbone as it was; merge the adapter in PEFT and load the merged model"
            )
        values: Tensors = {}
        stacks = peft_names.from_layers(settings, tensors, list(_PARTS), ".kernel")
        for place, parts in stacks.items():
            for ending, stack in parts.items():
                name, turned = _PARTS[ending], _transposed(stack)
                turned = turned if name == "down" else peft_names.own_part(settings, f"{place}.kernel", turned)
                values[f"{place}.{name}"] = np.ascontiguousarray(turned)
        method = cls(
            rank=config["r"],
            alpha=config["lora_alpha"],
            targets=peft_names.short_paths(settings, list(stacks), ".kernel"),
            dropout=config.get("lora_dropout", 0.0),
            rslora=config.get("use_rslora", False),
            dora=config.get("use_dora", False),
        )
        return method, values


def _fused(settings: ModelSettings, group: list[str], found: dict[str, Any]) -> tuple[str, Tensors]:
    """Return a weight of a group of `peft_names.products`, and the parts of one adapter of all of them."""
    present = [weight for weight in group if isinstance(found[weight], LowRank)]
    downs = [np.asarray(found[weight].down[...]) for weight in present]
    dora = found[present[0]].magnitude is not None
    alike = all(np.array_equal(downs[0], down) for down in downs)
    down = downs[0] if alike else np.concatenate(downs, -1)
    ups, lengths = [], []
    for weight in group:
        module = found[weight]
        ups.append(np.zeros((*down.shape[:-2], down.shape[-1], kernel_shape(module)[-1]), np.float32))
        if weight in present:
            width = downs[0].shape[-1]
            start = 0 if alike else width * present.index(weight)
            ups[-1][..., start : start + width, :] = np.asarray(module.up[...])
        if dora:
            own = module.magnitude[...] if weight in present else jnp.linalg.norm(plain_kernel(module), axis=-2)
            lengths.append(np.asarray(own))
    parts = {"down": down, "up": peft_names.join(settings, group, ups)}
    return group[0], parts | ({"magnitude": peft_names.join(settings, group, lengths)} if dora else {})


_PARTS = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "magnitude"}
_UNDERSTOOD = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"),
    *("megatron_core", "qalora_group_size"),  # without effect where what they belong to is off
}


class LowRank(Wrapped):
    """`inner(x) + scale x A B`, with a trained length for each column if `magnitude` is there (DoRA)."""

    def __init__(self, inner: Linear | Wrapped, settings: LoRA, path: str, key: jax.Array):
        *layers, width, columns = kernel_shape(inner)
        into, out = axes_of(inner)
        number = zlib.crc32(path.encode())  # of this place, so that no two draw the same
        bound = width**-0.5
        shape = (*layers, width, settings.rank)
        down = jax.random.uniform(jax.random.fold_in(key, number), shape, minval=-bound, maxval=bound)
        self.inner = inner
        self.down = Trainable(down, axes=(into, "rank"))
        self.up = Trainable(jnp.zeros((*layers, settings.rank, columns)), axes=("rank", out))
        self.magnitude: Any = nnx.data(None)
        if settings.dora:
            self.magnitude = Trainable(jnp.linalg.norm(plain_kernel(inner), axis=-2), axes=(out,))
        self.scale, self.dropout, self.number = settings.scale, settings.dropout, number

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        kept = x if key is None else dropout(x, self.dropout, jax.random.fold_in(key, self.number))
        rows = kept.reshape(-1, x.shape[-1])
        change = (rows @ self.down[...].astype(x.dtype)) @ self.up[...].astype(x.dtype)
        made = self.inner(x, key) + self.scale * change.reshape(*x.shape[:-1], -1)
        if self.magnitude is None:
            return made
        lengths = jnp.linalg.norm(self._sum(plain_kernel(self.inner)), axis=-2)
        # The lengths are a constant for the gradient, as in the paper.
        factors = (self.magnitude[...] / jax.lax.stop_gradient(lengths)).astype(x.dtype)
        if (bias := plain_bias(self.inner)) is None:
            return made * factors
        bias = bias.astype(x.dtype)  # is not scaled, as in PEFT
        return (made - bias) * factors + bias

    def merged(self, kernel: jax.Array) -> jax.Array:
        total = self._sum(kernel)
        if self.magnitude is None:
            return total
        return total * (self.magnitude[...] / jnp.linalg.norm(total, axis=-2))[..., None, :]

    def _sum(self, kernel: jax.Array) -> jax.Array:
        change = jnp.matmul(self.down[...], self.up[...], precision=jax.lax.Precision.HIGHEST)
        return kernel + self.scale * change


def _transposed(stack: np.ndarray) -> np.ndarray:
    """Turn each layer's matrix; leave stacks of vectors."""
    return np.ascontiguousarray(stack.swapaxes(-1, -2)) if stack.ndim == 3 else stack
