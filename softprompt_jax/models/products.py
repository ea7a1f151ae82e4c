"""Products of matrices in bfloat16 at the full rate of a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def matmul(
    a: Float[Array, "*A M K"], b: Float[Array, "*B K N"], dtype: DTypeLike | None = None
) -> Float[Array, "*C M N"]:
    """Return `a @ b` in `dtype` (default: that of `a`); sums are float32.

    XLA for CPUs multiplies bfloat16 at the rate of float32 unless the product itself is float32, in the backward pass
    too. Where a CPU has units for bfloat16, this is twice as fast. On other devices it is the plain product.
    """
    made = jnp.dtype(dtype or a.dtype)
    if a.dtype != jnp.bfloat16 or b.dtype != jnp.bfloat16 or a.shape[:-2] != b.shape[:-2]:
        return jnp.matmul(a, b, preferred_element_type=made)
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: _wide(a, b).astype(made),
        default=lambda a, b: jnp.matmul(a, b, preferred_element_type=made),
    )


@jax.custom_vjp
def _wide(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _backward(saved: tuple[jax.Array, jax.Array], change: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = saved
    change = change.astype(a.dtype)
    return (
        _wide(change, b.swapaxes(-1, -2)).astype(a.dtype),
        _wide(a.swapaxes(-1, -2), change).astype(b.dtype),
    )


_wide.defvjp(lambda a, b: (_wide(a, b), (a, b)), _backward)
