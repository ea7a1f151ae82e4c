"""Trained parameters that can differ between the examples of a batch: prefixes (keys, values), factors, offsets.

The state of one trained method, by name, as arrays in host memory:

    prefix encoder    keys and values [2, L, P, HK] of the encoder's attention (or decoder, cross), without positions
    positioned decoder  the same, counted as the P tokens before the first
    outputs PATH        factors [L, W] of the output of the product at this path, such as decoder.layers.cross.key
    inputs PATH         factors of its input (IA3)
    offset left         factor [S, R] of what is added to the words of a context by their places (DePT)
    offset right        the other factor [R, D]

On the device, tables [C, ...] hold the state of C methods, padded to the longest; entry 0 changes nothing. Each example
of a batch takes an entry.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from softprompt_jax.models.attention import PrefixKeyValues
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.layers import Linear

PerExampleState = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]
BatchState = dict[str, Array]  # [B, ...], and `count NAME` [B]: how many keys a row has there

_PREFIXES = ("prefix", "positioned")


def union_shapes(shapes: Shapes, extras: PerExampleState) -> Shapes:
    """Return the least shapes of entries that hold this state too."""
    found = shapes | {name: tuple(map(max, part.shape, shapes.get(name, part.shape))) for name, part in extras.items()}
    return dict(sorted(found.items()))


def empty_tables(shapes: Shapes, count: int) -> BatchState:
    """Return tables of `count` entries that change nothing."""
    made = {name: jnp.full((count, *shape), _nothing(name), jnp.float32) for name, shape in shapes.items()}
    return made | {f"count {name}": jnp.zeros((count,), jnp.int32) for name in shapes if is_prefix(name)}


def table_entry(shapes: Shapes, extras: PerExampleState) -> dict[str, np.ndarray]:
    """Return the state of one method, padded as an entry of such tables."""
    found: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        found[name] = np.full(shape, _nothing(name), np.float32)
        part = extras.get(name)
        if is_prefix(name):
            length = 0 if part is None else part.shape[2]
            found[f"count {name}"] = np.asarray(length, np.int32)
            if part is not None:
                found[name][:, :, _where(name, length, shape[2])] = part
        elif part is not None:
            found[name][tuple(map(slice, part.shape))] = part  # of lower rank, or for fewer places: 0 adds nothing
    return found


def gather(tables: BatchState, entries: Int[Array, "B"]) -> BatchState:
    """Return for each row of a batch its entry of the tables."""
    return {name: table[entries] for name, table in tables.items()}


def decoder_factors(rows: BatchState) -> BatchState:
    """Return the decoder's factors, which each of its steps needs; prefixes stand in its caches."""
    return {name: part for name, part in rows.items() if name.partition(" ")[2].startswith("decoder.")}


def prefix_lengths(rows: BatchState, kind: str) -> tuple[int, int]:
    """Return how many prefix keys without and with positions an attention has."""
    without, positioned = (rows[f"{name} {kind}"].shape[3] if f"{name} {kind}" in rows else 0 for name in _PREFIXES)
    return without, positioned


def install(model: LanguageModel, rows: BatchState) -> None:
    """Give a model, while it is traced, the state of each row of its batches."""
    heads = model.settings.num_key_heads
    encoder, decoder, cross = (_before(rows, kind, heads) for kind in ("encoder", "decoder", "cross"))
    if encoder is not None:
        model.encoder.prefix = PerExamplePrefixes(encoder, None, *prefix_lengths(rows, "encoder"))
    if decoder is not None or cross is not None:
        model.decoder.prefix = PerExamplePrefixes(decoder, cross, *prefix_lengths(rows, "decoder"))
    if "offset left" in rows:
        model.offset = PerExampleOffset(rows["offset left"], rows["offset right"])
    for name, part in rows.items():
        side, _, path = name.partition(" ")
        if side in ("outputs", "inputs"):
            *owners, attribute = path.split(".")
            owner = functools.reduce(getattr, owners, model)
            setattr(owner, attribute, PerExampleScaled(getattr(owner, attribute), part.swapaxes(0, 1), side))


def _before(rows: BatchState, kind: str, heads: int) -> PrefixKeyValues | None:
    parts = []
    for name in (f"{each} {kind}" for each in _PREFIXES):
        if name not in rows:
            continue
        pair = rows[name].transpose(1, 2, 0, 3, 4)  # keys or values, L, B, P, HK
        keys, values = pair.reshape(*pair.shape[:-1], heads, -1).swapaxes(3, 4)
        numbers, count = jnp.arange(pair.shape[3]), rows[f"count {name}"][:, None]
        real = numbers >= len(numbers) - count if name.startswith("positioned") else numbers < count
        parts.append((keys, values, jnp.broadcast_to(real, (len(keys), *real.shape))))
    if not parts:
        return None
    keys, values, real = zip(*parts, strict=True)
    return PrefixKeyValues(jnp.concatenate(keys, 3), jnp.concatenate(values, 3), jnp.concatenate(real, 2))


def is_prefix(name: str) -> bool:
    """Tell whether a name is that of keys and values."""
    return name.partition(" ")[0] in _PREFIXES


def kind_of(name: str) -> str:
    """Return what a name's arrays are: a prefix, an offset of the text, or factors."""
    return "prefix" if is_prefix(name) else "offset" if name.startswith("offset ") else "factors"


def _nothing(name: str) -> float:
    return 1.0 if kind_of(name) == "factors" else 0.0


def _where(name: str, length: int, longest: int) -> slice:
    """Return where a prefix stands in a padded entry: at the end, next to the text, if it has positions."""
    return slice(longest - length, longest) if name.startswith("positioned") else slice(length)


class PerExamplePrefixes(nnx.Module):
    """A `Stack.prefix` in which each row has its own keys and values [L, B, H, P, K]."""

    def __init__(
        self, attention: PrefixKeyValues | None, cross: PrefixKeyValues | None, unpositioned: int, positioned: int
    ):
        self.attention, self.cross = nnx.data(attention), nnx.data(cross)
        self.unpositioned, self.positioned = unpositioned, positioned

    def __call__(self) -> tuple[PrefixKeyValues | None, PrefixKeyValues | None]:
        return self.attention, self.cross

    def shift(self) -> Int[Array, "B 1"] | int:
        """Return how many positions the prefix of self-attention takes before the first token of each row."""
        if self.attention is None or self.attention.real is None:
            return 0
        return self.attention.real[0][:, self.unpositioned :].sum(-1, keepdims=True)


class PerExampleOffset(nnx.Module):
    """A `LanguageModel.offset` in which each row has its own factors."""

    def __init__(self, left: Float[Array, "B S R"], right: Float[Array, "B R D"]):
        self.left, self.right = nnx.Param(left), nnx.Param(right)

    def __call__(self, places: Int[Array, "B T"], words: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return what is added to words at these places of their texts."""
        left = self.left[...]
        inside = words & (places < left.shape[1])
        rows = jnp.take_along_axis(left, jnp.clip(places, 0, left.shape[1] - 1)[..., None], 1)
        return jnp.where(inside[..., None], rows, 0) @ self.right[...]


class PerExampleScaled(nnx.Module):
    """`inner(x) * factors`, or `inner(x * factors)`, with factors [L, B, W] of each row."""

    def __init__(self, inner: Linear | PerExampleScaled, factors: Float[Array, "L B W"], side: str):
        self.inner: Any = inner
        self.factors, self.side = nnx.Param(factors), side

    def __call__(self, x: Float[Array, "N T in"], rng: jax.Array | None = None) -> Float[Array, "N T out"]:
        factors = self.factors[...].astype(x.dtype)
        factors = jnp.repeat(factors, len(x) // len(factors), axis=0)[:, None]  # copies of a row follow each other
        return self.inner(x, rng) * factors if self.side == "outputs" else self.inner(x * factors, rng)
