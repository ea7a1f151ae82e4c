"""Attention as T5 does it: no 1/sqrt(d), an additive relative bias, a float32 softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def relative_buckets(
    query_positions: Int[Array, "T"],
    key_positions: Int[Array, "S"],
    *,
    bidirectional: bool,
    buckets: int,
    max_distance: int,
) -> Int[Array, "T S"]:
    """Map every query-key distance to a bucket: exact when near, logarithmic up to `max_distance`.

    The encoder (`bidirectional`) spends half of the buckets on each direction; the decoder sees only
    the past. Source: Raffel et al., 2020, section 2.1.
    """
    distance = query_positions[:, None] - key_positions[None, :]  # positive: the key lies in the past
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance < 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / jnp.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return offset + jnp.where(distance < exact, distance, far)


def same_segment(query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """Return which keys a query sees: those of its own segment; segment 0 is padding, seen by none."""
    visible = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments > 0)[:, None, :]
    return visible[:, None]


class PrefixKeyValues(NamedTuple):
    """Keys and values that stand before those of the text: shared by all rows, or one set a row.

    A whole stack's have an axis L in front.
    """

    keys: Float[Array, "*LB H P K"]
    values: Float[Array, "*LB H P K"]
    real: Bool[Array, "*L B P"] | None = None  # which of them a row has; None: shared by all rows


def with_prefix(prefix: PrefixKeyValues | None, keys: Array, values: Array) -> tuple[Array, Array]:
    """Put a prefix's keys and values, [H, P, K] or [B, H, P, K], before those [B, H, S, K] of every row."""
    if prefix is None:
        return keys, values
    rows = (
        jnp.broadcast_to(part.astype(keys.dtype), (keys.shape[0], *part.shape[-3:]))
        for part in (prefix.keys, prefix.values)
    )
    joined = [jnp.concatenate(pair, 2) for pair in zip(rows, (keys, values), strict=True)]
    return joined[0], joined[1]


def sees_prefix(visible: Bool[Array, "#B 1 #T S"], prefix: PrefixKeyValues | None) -> Bool[Array, "#B 1 #T PS"]:
    """Extend a mask over S keys to the P keys of a stack's prefix before them; every query sees its row's prefix."""
    if prefix is None:
        return visible
    if prefix.real is None:
        return jnp.pad(visible, ((0, 0), (0, 0), (0, 0), (prefix.keys.shape[-2], 0)), constant_values=True)
    real = prefix.real[0][:, None, None]
    before = jnp.broadcast_to(real, (len(real), 1, visible.shape[2], real.shape[-1]))
    return jnp.concatenate([before, jnp.broadcast_to(visible, (len(real), *visible.shape[1:]))], -1)


def bias_before(
    bias: Callable[[Array, Array], Any],
    text: Float[Array, "#B H U S"],
    queries: Int[Array, "#B U"],
    unpositioned: int,
    positioned: int,
) -> Float[Array, "#B H U PS"]:
    """Put the bias of a prefix's keys before the bias of the text.

    A prefix has first `unpositioned` keys, whose bias is 0, then `positioned` keys, which count as the tokens before a
    row's first. `queries`: positions, counted from a row's first token.
    """
    if positioned:
        near = jax.vmap(lambda row: bias(row, jnp.arange(-positioned, 0))[0])(queries)
        rows = max(len(near), len(text))
        text = jnp.concatenate([jnp.broadcast_to(part, (rows, *part.shape[1:])) for part in (near, text)], -1)
    return jnp.pad(text, ((0, 0), (0, 0), (0, 0), (unpositioned, 0))) if unpositioned else text


def attend(
    query: Float[Array, "B H T K"],
    key: Float[Array, "B #H S K"],
    value: Float[Array, "B #H S K"],
    bias: Float[Array, "#B H T S"] | None,
    visible: Bool[Array, "#B 1 #T S"],
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
) -> Float[Array, "B H T K"]:
    """Mix the values by softmax(query . key + bias) over the visible keys; scores stay in float32.

    Dropout removes a key for all queries of a head at once, as T5's own code does.
    H is 1 for keys and values that all heads share. Heads stand before the length: on a CPU the same products over
    [B, T, H, K] take five times as long.
    """
    scores = jnp.matmul(query, key.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    added = jnp.where(visible, 0, -1e9)  # added, not selected: the gradient then needs no mask
    if bias is not None:
        added = added + bias.astype(jnp.float32)
    scores = scores + added
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)  # softmax divides by it; here the mix does, which has fewer numbers
    weights = weights.astype(value.dtype)
    if dropout_rng is not None and dropout_rate > 0:
        batch, heads, _, keys = weights.shape
        kept = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, (batch, heads, 1, keys))
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0).astype(value.dtype)
    return ((weights @ value) / total).astype(value.dtype)


def drop_keys(values: Float[Array, "B H S K"], dropout_rate: float, dropout_rng: jax.Array) -> Float[Array, "B H S K"]:
    """Return the values with which attention without dropout gives what `attend` gives with it.

    A key that is dropped for all queries of a head adds nothing, as if its value were 0, and softmax still counts it.
    """
    batch, heads, keys, _ = values.shape
    kept = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, (batch, heads, 1, keys))
    return jnp.where(kept.swapaxes(-1, -2), values / (1 - dropout_rate), 0).astype(values.dtype)


class Seen(NamedTuple):
    """Keys and values of G heads, each of which H / G query heads share, and which of them a query sees."""

    keys: Float[Array, "B G S K"]
    values: Float[Array, "B G S K"]
    visible: Bool[Array, "#B 1 #T S"]
    causal: bool = False  # they are of the queries' own tokens, and no query sees a later one

    def of_queries(self, start: int, end: int) -> Seen:
        """Return what some of the queries see."""
        visible = self.visible[:, :, start:end] if self.visible.shape[2] > 1 else self.visible
        if not self.causal:
            return self._replace(visible=visible)
        return Seen(self.keys[:, :, :end], self.values[:, :, :end], visible[..., :end])


def attend_in_pieces(
    query: Float[Array, "B H T K"], parts: Sequence[Seen], scale: float, cap: float | None = None
) -> Float[Array, "B H T K"]:
    """Do what `attend_shared` does for one piece of the queries after the other, without a causal part's later keys.

    Pieces have up to 128 queries; long texts have 8 pieces. Scores are not kept for the gradient but computed again.
    For a CPU, where this takes less time: memory costs more than products.
    """
    length = query.shape[2]
    pieces = min(8, -(-length // 128))
    if pieces == 1 or not any(part.causal for part in parts):
        return attend_shared(query, parts, scale, cap)
    size = -(-length // pieces)
    one = jax.checkpoint(lambda query, *parts: attend_shared(query, parts, scale, cap), prevent_cse=False)
    ends = [(start, min(length, start + size)) for start in range(0, length, size)]
    mixed = [one(query[:, :, start:end], *(part.of_queries(start, end) for part in parts)) for start, end in ends]
    return jnp.concatenate(mixed, 2)


def attend_shared(
    query: Float[Array, "B H T K"],
    parts: Sequence[Seen],
    scale: float,
    cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
) -> Float[Array, "B H T K"]:
    """Mix the values of all parts by one softmax(query . key * scale); scores and softmax are float32.

    Keys and values are neither repeated for the heads that share them nor joined: only the scores are. `cap`: scores
    become cap * tanh(score / cap) (Gemma 2).
    """
    batch, heads, length, width = query.shape
    groups = parts[0].keys.shape[1]
    grouped = query.reshape(batch, groups, heads // groups * length, width)
    scores, hidden = [], []
    for part in parts:
        found = jnp.matmul(grouped, part.keys.swapaxes(-1, -2), preferred_element_type=jnp.float32) * scale
        scores.append(found.reshape(batch, groups, heads // groups, length, -1))
        rows = jnp.where(part.visible, 0, -1e9)[:, :, None]
        hidden.append(jnp.broadcast_to(rows, (*rows.shape[:3], length, rows.shape[-1])) if len(parts) > 1 else rows)
    joined = jnp.concatenate(scores, -1) if len(parts) > 1 else scores[0]
    if cap is not None:
        joined = cap * jnp.tanh(joined / cap)
    if len(parts) > 1:
        hidden = [jnp.concatenate([jnp.broadcast_to(each, (batch, *each.shape[1:])) for each in hidden], -1)]
    joined = joined + hidden[0]
    weights = jnp.exp(joined - jax.lax.stop_gradient(joined.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(query.dtype)
    if dropout_rng is not None and dropout_rate > 0:
        kept = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, (*weights.shape[:3], 1, weights.shape[-1]))
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0).astype(query.dtype)
    mixed, start = jnp.zeros((), query.dtype), 0
    for part in parts:
        own = weights[..., start : start + part.keys.shape[2]]
        start += part.keys.shape[2]
        mixed = mixed + own.reshape(batch, groups, -1, own.shape[-1]) @ part.values
    return (mixed.reshape(*total.shape[:-1], width) / total).astype(query.dtype).reshape(query.shape)


def rotate(
    x: Float[Array, "B H T K"], cosine: Float[Array, "#B 1 T R"], sine: Float[Array, "#B 1 T R"]
) -> Float[Array, "B H T K"]:
    """Turn the first 2R of K numbers by their positions' angles (Su et al., 2021): number i together with i + R."""
    half = cosine.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], -1)
