"""The Pallas kernel of flash.py for TPUs: attention whose scores never leave the chip, and its gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

INTERPRET = False  # run the kernel on a CPU, slowly: for tests


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
