"""Attention whose scores are never in memory: cuDNN's fused kernel, for the encoder's self-attention on NVIDIA GPUs.

Keys are hidden by length: a row's real positions stand first. The bias [1, H, T, S] is shared by all rows. Scores and
softmax are float32, as in the plain attention. The decoder's attention and cross attention are always plain: their
queries are few.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from softprompt_jax.config import UserError

Implementation = Literal["plain", "flash", "auto"]
Platform = Literal["cpu", "gpu", "tpu"]
_NO_LENGTHS = "found packed rows, or prefixes of different lengths; expected rows whose real keys all come first"


def model_refusal(platform: str, dtype: Any, head_width: int) -> str | None:
    """Return why the kernel cannot compute a model on such devices; None if it can."""
    if platform != "gpu":
        return f"found {platform} devices; expected NVIDIA GPUs"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"found {jnp.dtype(dtype).name}; expected dtype bfloat16"
    if head_width % 8 or head_width > 128:
        return f"found heads of width {head_width}; expected a multiple of 8 up to 128"
    return None


def batch_refusal(queries: int, keys: int, lengths: Int[Array, "B"] | None, drops_weights: bool) -> str | None:
    """Return why the kernel cannot compute a batch of so many positions a row; None if it can."""
    if drops_weights:
        return "found dropout of attention weights; expected dropout 0"
    if lengths is None:
        return _NO_LENGTHS
    if queries % 2 or keys % 2:  # the gradient of the bias needs even lengths
        return f"found {queries} queries and {keys} keys a row; expected even numbers"
    return None


def check_model(
    implementation: Implementation, platform: str, dtype: Any, head_width: int, packed: bool = False
) -> None:
    """Refuse `attention: flash` for a model, devices or packed rows that cannot have it."""
    _is_possible(implementation, model_refusal(platform, dtype, head_width) or (_NO_LENGTHS if packed else None))


def uses_flash(
    implementation: Implementation,
    platform: str,
    query: Float[Array, "B H T K"],
    key: Float[Array, "B H S K"],
    lengths: Int[Array, "B"] | None,
    drops_weights: bool,
) -> bool:
    """Decide for one attention of one batch; `auto` takes the kernel where it can, `flash` is refused where it cannot.

    Errors: UserError that says why `flash` cannot be had.
    """
    if implementation == "plain":
        return False
    reason = model_refusal(platform, query.dtype, query.shape[-1])
    return _is_possible(implementation, reason or batch_refusal(query.shape[2], key.shape[2], lengths, drops_weights))


def _is_possible(implementation: Implementation, reason: str | None) -> bool:
    if implementation == "flash" and reason is not None:
        raise UserError(f"attention flash: {reason}; use attention: auto, or plain")
    return reason is None


def cudnn(
    query: Float[Array, "B H T K"],
    key: Float[Array, "B H S K"],
    value: Float[Array, "B H S K"],
    bias: Float[Array, "1 H T S"] | None,
    lengths: Int[Array, "B"],
) -> Float[Array, "B H T K"]:
    """Attend by cuDNN's fused kernel; keys past a row's length are not read."""
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
