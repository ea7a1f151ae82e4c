"""Attention whose scores are never in memory: cuDNN's fused kernel, on NVIDIA GPUs.

For the self-attention of a T5's encoder, and of a decoder-only model over whole texts. Keys are hidden by length: a
row's real positions stand first. A T5's bias [1, H, T, S] is shared by all rows. Scores and softmax are float32, as in
the plain attention. Dropout, which drops a key for all queries of a head, drops its value (`drop_keys`). What has few
queries is always plain: a T5's decoder, its cross attention, and answers token by token.
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


def check_model(
    implementation: Implementation, platform: str, dtype: Any, head_width: int, always_plain: str | None, packed: bool
) -> None:
    """Refuse `attention: flash` for a model, devices or packed rows that cannot have it.

    `always_plain`: why this model cannot have it anywhere.
    """
    reason = always_plain or model_refusal(platform, dtype, head_width)
    is_possible(implementation, reason or (_NO_LENGTHS if packed else None))


def uses_flash(
    implementation: Implementation, platform: str, query: Float[Array, "B H T K"], lengths: Int[Array, "B"] | None
) -> bool:
    """Decide for one attention of one batch; `auto` takes the kernel where it can, `flash` is refused where it cannot.

    `lengths`: how many keys at the start of each row are real; None: they are elsewhere.
    Errors: UserError that says why `flash` cannot be had.
    """
    if implementation == "plain":
        return False
    reason = model_refusal(platform, query.dtype, query.shape[-1])
    return is_possible(implementation, reason or (_NO_LENGTHS if lengths is None else None))


def is_possible(implementation: Implementation, reason: str | None) -> bool:
    """Tell whether nothing stands against the kernel. Errors: UserError with the reason for `flash`."""
    if implementation == "flash" and reason is not None:
        raise UserError(f"attention flash: {reason}; use attention: auto, or plain")
    return reason is None


def causal(
    query: Float[Array, "B H T K"],
    key: Float[Array, "B G T K"],
    value: Float[Array, "B G T K"],
    lengths: Int[Array, "B"],
    scale: float,
    window: int | None,
) -> Float[Array, "B H T K"]:
    """Attend by cuDNN's fused kernel to the key of the same position and those before it, of `window` at most.

    Keys past a row's length are not read; what their own positions give is nothing that counts.
    """
    mixed = jax.nn.dot_product_attention(
        *(each.swapaxes(1, 2) for each in (query, key, value)),
        scale=scale,
        is_causal=True,
        query_seq_lengths=jnp.full(len(query), query.shape[2], jnp.int32),
        key_value_seq_lengths=jnp.maximum(lengths, 1).astype(jnp.int32),
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return mixed.swapaxes(1, 2)


def cudnn(
    query: Float[Array, "B H T K"],
    key: Float[Array, "B H S K"],
    value: Float[Array, "B H S K"],
    bias: Float[Array, "1 H T S"] | None,
    lengths: Int[Array, "B"],
) -> Float[Array, "B H T K"]:
    """Attend by cuDNN's fused kernel; keys past a row's length are not read."""
    queries, keys = query.shape[2], key.shape[2]
    more = [(0, 0), (0, 0), (0, queries % 2), (0, keys % 2)]  # the gradient of the bias needs even lengths
    if bias is not None:
        bias = jnp.pad(bias.astype(query.dtype), more)
    query, key, value = (jnp.pad(x, [*more[:2], (0, x.shape[2] % 2), (0, 0)]) for x in (query, key, value))
    swapped = (each.swapaxes(1, 2) for each in (query, key, value))
    mixed = jax.nn.dot_product_attention(
        *swapped,
        bias=bias,
        scale=1.0,
        query_seq_lengths=jnp.full(len(query), queries, jnp.int32),
        key_value_seq_lengths=jnp.maximum(lengths, 1).astype(jnp.int32),  # a row of padding alone is read by none
        implementation="cudnn",
    )
    return mixed.swapaxes(1, 2)[:, :, :queries]
