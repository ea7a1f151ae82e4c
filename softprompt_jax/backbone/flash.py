"""Attention without its scores in memory, where the device has it: cuDNN's on NVIDIA GPUs, a Pallas kernel on TPUs.

Keys are hidden by length: a row's real positions stand first. The bias [1, H, T, S] is shared by all rows, which is
what makes T5 fit: one bias a head, not one a row. Both keep scores and softmax in float32, as the plain attention does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

Implementation = Literal["plain", "flash", "auto"]
LONGEST = 1024  # positions of a row that the kernel holds at once: its scores are T x S float32 numbers on the chip
INTERPRET = False  # run the kernel on a CPU, slowly: for tests


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
        suits = query.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
        return (lambda plain: cudnn(query, key, value, bias, lengths)) if suits else None
    alone = jax.sharding.get_abstract_mesh().empty or jax.sharding.get_abstract_mesh().size == 1
    if how == "auto" or not alone or bias is None or max(query.shape[2], key.shape[2]) > LONGEST:
        return None
    if INTERPRET:
        return lambda plain: kernel(query, key, value, bias, lengths)
    return lambda plain: jax.lax.platform_dependent(
        query, key, value, bias, lengths, tpu=kernel, default=lambda *_: plain()
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


@jax.custom_vjp
def kernel(
    query: Float[Array, "B H T K"],
    key: Float[Array, "B H S K"],
    value: Float[Array, "B H S K"],
    bias: Float[Array, "1 H T S"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B H T K"]:
    """Attend by a Pallas kernel: a head of a row at a time, whose scores never leave the chip."""
    return _call(_forward, lengths, (query, key, value, bias), (query,))[0]


def _keep(query: Any, key: Any, value: Any, bias: Any, lengths: Any) -> Any:
    return kernel(query, key, value, bias, lengths), (query, key, value, bias, lengths)


def _change(kept: tuple, change: jax.Array) -> tuple:
    query, key, value, bias, lengths = kept
    shared = jax.ShapeDtypeStruct(bias.shape, jnp.float32)
    *changes, of_bias = _call(_backward, lengths, (query, key, value, bias, change), (query, key, value, shared))
    return *changes, of_bias.astype(bias.dtype), None


kernel.defvjp(_keep, _change)


def _call(body: Any, lengths: jax.Array, inputs: tuple, outputs: tuple) -> Any:
    """Run a body for every head and, within it, every row; what all rows share stays on the chip meanwhile."""
    rows, heads = inputs[0].shape[:2]

    def block(number: int, array: Any) -> pl.BlockSpec:
        shared = number == 3  # the bias, and its gradient
        return pl.BlockSpec((None, None, *array.shape[2:]), lambda h, b, *_: (0 if shared else b, h, 0, 0))

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads, rows),
            in_specs=[block(*each) for each in enumerate(inputs)],
            out_specs=[block(*each) for each in enumerate(outputs)],
        ),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in outputs],
        interpret=INTERPRET,
    )(lengths.astype(jnp.int32), *inputs)


def _product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    contracted = (((left_axis,), (right_axis,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(left, right, contracted, precision=precision, preferred_element_type=jnp.float32)


def _weights(lengths: Any, query: Any, key: Any, bias: Any) -> jax.Array:
    """Return softmax(query . key + bias) over the real keys of this row."""
    scores = _product(query[...], key[...], 1, 1) + bias[...].astype(jnp.float32)
    place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = scores + jnp.where(place < lengths[pl.program_id(1)], 0.0, -1e9)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _forward(lengths: Any, query: Any, key: Any, value: Any, bias: Any, mixed: Any) -> None:
    weights = _weights(lengths, query, key, bias)
    mixed[...] = _product(weights.astype(value.dtype), value[...], 1, 0).astype(mixed.dtype)


def _backward(
    lengths: Any,
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    change: Any,
    dquery: Any,
    dkey: Any,
    dvalue: Any,
    dbias: Any,
) -> None:
    weights = _weights(lengths, query, key, bias)
    dvalue[...] = _product(weights.astype(change.dtype), change[...], 0, 0).astype(dvalue.dtype)
    dweights = _product(change[...], value[...], 1, 1)
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True))

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        dbias[...] = jnp.zeros_like(dbias)

    dbias[...] += dscores
    small = dscores.astype(query.dtype)
    dquery[...] = _product(small, key[...], 1, 0).astype(dquery.dtype)
    dkey[...] = _product(small, query[...], 0, 0).astype(dkey.dtype)
