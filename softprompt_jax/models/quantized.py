"""A frozen backbone whose layers' kernels are in 8 or 4 bits; embedding, head and norms stay floats.

    int8   one scale per output column: w = scale * q, q from -127 to 127
    nf4    16 levels that suit normally distributed weights (Dettmers et al., 2023), one scale per 64 inputs of a column

Forward and backward passes read the small integers; no converted copy of a weight outlives its product.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from softprompt_jax.config import UserError
from softprompt_jax.models.build import abstract, build
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.layers import Linear
from softprompt_jax.models.settings import ModelSettings

Quantization = Literal["int8", "nf4"]
BLOCK = 64  # inputs that share a scale in nf4


# Quantiles of a normal distribution scaled to [-1, 1], with an exact 0 (Dettmers et al., 2023, appendix E).
_NEGATIVE = (-1, -0.6961929, -0.52507305, -0.3949175, -0.28444135, -0.18477343, -0.09104999)
_POSITIVE = (0.07958033, 0.16093017, 0.24611229, 0.33791518, 0.4407098, 0.56261694, 0.7229567, 1)
NF4_LEVELS = np.array([*_NEGATIVE, 0, *_POSITIVE], np.float32)


class QuantizedLinear(Linear):
    """A Linear whose kernel is stored in a few bits; it cannot train."""

    def __init__(self, linear: Linear, kind: Quantization):
        packed, scale = pack(linear.kernel[...], kind)
        into, out = linear.kernel.get_metadata()["axes"]
        self.kernel = nnx.Param(packed, axes=(into, out))
        self.scale = nnx.Param(scale, axes=(out,) if kind == "int8" else (None, out))
        self.bias: Any = linear.bias if linear.bias is not None else nnx.data(None)
        self.kind: Quantization = kind

    def weight(self) -> Float[Array, "*L in out"]:
        """Return the kernel that the packed numbers stand for, in float32."""
        return unpack(self.kernel[...], self.scale[...], self.kind, jnp.float32)

    def multiply(self, rows: Float[Array, "N in"]) -> Float[Array, "N out"]:
        return _product(self.kind, rows, self.kernel[...], self.scale[...])


def pack(kernel: Float[Array, "*L in out"], kind: Quantization) -> tuple[jax.Array, jax.Array]:
    """Return the packed integers and float32 scales of a kernel.

    int8: [*L, in, out] and [*L, out]. nf4: two numbers a byte, [*L, in / 2, out] uint8, and [*L, in / 64, out].
    """
    wide = jnp.asarray(kernel, jnp.float32)
    if kind == "int8":
        scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-2), 1e-12) / 127
        return jnp.round(wide / scale[..., None, :]).astype(jnp.int8), scale
    *layers, width, columns = wide.shape
    block = _block(width)
    blocks = wide.reshape(*layers, width // block, block, columns)
    scale = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-2), 1e-12)
    middles = jnp.asarray((NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2)
    index = jnp.searchsorted(middles, blocks / scale[..., None, :]).astype(jnp.uint8).reshape(wide.shape)
    return index[..., 0::2, :] | (index[..., 1::2, :] << 4), scale


def unpack(packed: jax.Array, scale: jax.Array, kind: Quantization, dtype: Any) -> jax.Array:
    """Return the kernel [*L, in, out] that the packed integers approximate."""
    if kind == "int8":
        return (packed.astype(jnp.float32) * scale[..., None, :]).astype(dtype)
    *layers, half, columns = packed.shape
    index = jnp.stack([packed & 15, packed >> 4], axis=-2).reshape(*layers, 2 * half, columns)
    blocks = jnp.asarray(NF4_LEVELS)[index].reshape(*layers, scale.shape[-2], -1, columns)
    return (blocks * scale[..., None, :]).reshape(*layers, 2 * half, columns).astype(dtype)


@functools.partial(jax.jit, static_argnames="kind")
def pack_layers(kernel: Float[Array, "L in out"], kind: Quantization) -> tuple[jax.Array, jax.Array]:
    """Pack a stack of kernels layer by layer, which needs memory for one more layer."""
    return jax.lax.map(lambda layer: pack(layer, kind), kernel)


def quantized(model: LanguageModel, kind: Quantization) -> LanguageModel:
    """Replace the kernels of all layers by quantised ones, in place, one after the other."""
    for stack in model.stacks.values():
        for owner in (stack.layers.attention, getattr(stack.layers, "cross", None), stack.layers.feed_forward):
            for name, child in list(vars(owner).items()) if owner is not None else ():
                if isinstance(child, QuantizedLinear):
                    raise UserError("backbone: is quantised already; expected float weights")
                if isinstance(child, Linear):
                    setattr(owner, name, QuantizedLinear(child, kind))
    return model


def abstract_quantized(settings: ModelSettings, dtype: str, kind: Quantization | None) -> LanguageModel:
    """Build a model as shapes and dtypes only, its layers in int8 or nf4 (None: as floats)."""
    if kind is None:
        return abstract(settings, dtype)
    return nnx.eval_shape(lambda: quantized(build(settings, jax.random.key(0), dtype), kind))


def quantization_of(model: LanguageModel) -> Quantization | None:
    """Return how a model's layers are quantised; None: they are floats."""
    linear = model.decoder.layers.attention.query
    return linear.kind if isinstance(linear, QuantizedLinear) else None


def _block(width: int) -> int:
    """Return how many inputs share a scale: 64, or where that does not divide the width the largest even number."""
    block = next((size for size in range(min(BLOCK, width), 1, -1) if width % size == 0 and size % 2 == 0), None)
    if block is None:
        raise UserError(f"nf4: a kernel with {width} inputs; expected an even number; use int8")
    return block


def _forward(kind: Quantization, rows: jax.Array, packed: jax.Array, scale: jax.Array) -> jax.Array:
    if kind == "int8":  # scale the sums, not the weights: columns many times fewer
        return (rows @ packed.astype(rows.dtype)) * scale.astype(rows.dtype)
    return rows @ unpack(packed, scale, kind, rows.dtype)


_product = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _keep(kind: Quantization, rows: jax.Array, packed: jax.Array, scale: jax.Array) -> Any:
    # Only the packed integers are kept for the backward pass. Left to itself, a scan over layers keeps their
    # conversions, which is the memory that quantising was to save.
    return _forward(kind, rows, packed, scale), (packed, scale)


def _backward(kind: Quantization, saved: tuple[jax.Array, jax.Array], change: jax.Array) -> Any:
    packed, scale = saved
    if kind == "int8":
        return (change * scale.astype(change.dtype)) @ packed.astype(change.dtype).T, None, None
    return change @ unpack(packed, scale, kind, change.dtype).T, None, None


_product.defvjp(_keep, _backward)
