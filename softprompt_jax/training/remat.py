"""Which activations a step keeps for its gradient: all of them if a device has the memory, else fewer.

none   nearly all; activation functions are computed again, and on a CPU the scores of a causal model's long texts
dots   the products with weights; the rest is computed again
full   the input of each layer; the layer is computed again
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from softprompt_jax.distributed import mesh
from softprompt_jax.models.settings import Remat

SHARE = 0.8  # of what weights and state leave free; the rest is for a layer's own buffers and for gaps


def choose(kept: Callable[[Remat], int], room: int) -> Remat:
    """Return the policy that recomputes least among those whose `kept` bytes fit into `room`."""
    if kept("none") <= room:
        return "none"
    return "dots" if kept("dots") <= room else "full"


def kept_bytes(loss: Callable[[Any, Any], jax.Array], weights: Any, batch: dict[str, Any]) -> int:
    """Return the bytes of activations that a device keeps for the gradient of `loss(weights, batch)`.

    This is an abstract evaluation; nothing is computed. It counts what the forward pass hands to the backward pass, for
    two rows on each device and for one. What does not grow with the rows, such as weights, cancels in the difference.
    """
    shards = mesh.row_shards()

    def given(rows: int) -> int:
        some = {name: jax.ShapeDtypeStruct((rows * shards, *x.shape[1:]), x.dtype) for name, x in batch.items()}
        pullback = jax.eval_shape(lambda weights, batch: jax.vjp(lambda w: loss(w, batch), weights)[1], weights, some)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))

    rows = len(next(iter(batch.values())))
    return (given(2) - given(1)) * rows // shards**2


def memory() -> int | None:
    """Return the memory of a device in bytes; None where it does not say, as on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def room(held: int, memory: int) -> int:
    """Return the bytes left for activations on a device with `memory` bytes, of which `held` are in use."""
    return max(0, int(SHARE * (memory - held)))
