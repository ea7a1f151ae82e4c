"""What answers take of a device's memory: how many slots the server has by default, and what `plan` says of it."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

from softprompt_jax.distributed.mesh import current_mesh, row_shards
from softprompt_jax.models.settings import ModelSettings

_CACHES = 0.5  # share of the free memory that goes into slots; the rest is for reading texts, and for copies


def cache_bytes(settings: ModelSettings, dtype: str, rows: int, context: int, own: int) -> int:
    """Return the bytes that a device holds of keys and values of `rows` answers, with so many positions each.

    `context`: positions of what is answered, `own`: of the answer.
    """
    mesh = current_mesh()
    width = settings.key_width // (1 if mesh is None else mesh.shape["tensor"])
    numbers = 2 * settings.decoder_depth * width * (context + own)
    return -(-rows // row_shards()) * numbers * jnp.dtype(dtype).itemsize


def free_bytes() -> int:
    """Return the bytes that the first device of the mesh has left; of a CPU, its share of the machine's memory."""
    mesh = current_mesh()
    device = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def slots_that_fit(settings: ModelSettings, dtype: str, context: int, own: int, free: int, most: int) -> int:
    """Return how many answers at once fit into half of `free` bytes of each device, a power of two on each.

    At least one, and at most `most`, for each share of the rows: with more, every step takes longer.
    """
    fit = int(_CACHES * free) // cache_bytes(settings, dtype, row_shards(), context, own)
    return min(most, 1 << max(0, fit.bit_length() - 1)) * row_shards()
