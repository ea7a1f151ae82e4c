"""Attention without its scores in memory, where the device has it: cuDNN's on NVIDIA GPUs, a Pallas kernel on TPUs.

Keys are hidden by length: a row's real positions stand first. The bias [1, H, T, S] is shared by all rows, which is
what makes T5 fit: one bias a head, not one a row. Both keep scores and softmax in float32, as the plain attention does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["plain", "flash", "auto"]
LONGEST = 1024  # positions of a row that the kernel holds at once: its scores are T x S float32 numbers on the chip


def fused(
    how: Implementation, query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, lengths: jax.Array
) -> Callable[[Callable[[], jax.Array]], jax.Array] | None:
    """Return what computes attention without its scores in memory, given the plain way; None: only that one suits.

    `auto` takes cuDNN's on a GPU. The Pallas kernel has not been timed on a TPU: it wants `flash`, and one device.
    """
    width = query.shape[-1]
    if how == "plain" or key.shape[1] != query.shape[1]:
        return None
    if jax.default_backend() == "gpu":
        even = query.shape[2] % 2 == key.shape[2] % 2 == 0  # the gradient of its bias wants that
        suits = even and query.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
        return (lambda plain: cudnn(query, key, value, bias, lengths)) if suits else None
    alone = jax.sharding.get_abstract_mesh().empty or jax.sharding.get_abstract_mesh().size == 1
    if how == "auto" or not alone or bias is None or max(query.shape[2], key.shape[2]) > LONGEST:
        return None
    from softprompt_jax.models import flash_tpu  # Pallas takes a third of a second to import

    if flash_tpu.INTERPRET:
        return lambda plain: flash_tpu.kernel(query, key, value, bias, lengths)
    return lambda plain: jax.lax.platform_dependent(
        query, key, value, bias, lengths, tpu=flash_tpu.kernel, default=lambda *_: plain()
    )


def cudnn(
    query: Float[Array, "B H T K"],
    key: Float[Array, "B H S K"],
    value: Float[Array, "B H S K"],
    bias: Float[Array, "1 H T S"] | None,
    lengths: Int[Array, "B"],
) -> Float[Array, "B H T K"]:
    """Attend by cuDNN's fused kernel (bfloat16, heads of at most 128): keys past a row's length are not read."""
    swapped = (each.swapaxes(1, 2) for each in (query, key, value))
    mixed = jax.nn.dot_product_attention(
        *swapped,
        bias=None if bias is None else bias.astype(query.dtype),
        scale=1.0,
        query_seq_lengths=jnp.full(len(query), query.shape[2], jnp.int32),
        key_value_seq_lengths=jnp.maximum(lengths, 1).astype(jnp.int32),  # a row of padding alone is read by none
        implementation="cudnn",
    )
    return mixed.swapaxes(1, 2)
