"""Devices as a mesh (data, fsdp, tensor), and how weights and batches are sharded over it.

Weights name their axes (`embed`, `heads`, ...); one table maps them to mesh axes. With the default mesh the devices
share the batch and each holds all weights, so that only a prompt's gradient travels. A run enters its mesh with
`jax.set_mesh`; the functions here find it there. Without a mesh everything is on one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pydantic import Field, model_validator

from softprompt_jax.config import Settings, UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # mesh axes that rows of a batch are sharded over
# Logical axis of a weight -> mesh axis that it is sharded over; all others are whole on every device.
WEIGHTS = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp"}
Model = TypeVar("Model", bound=nnx.Module)


class Mesh(Settings):
    """Sizes of the mesh axes; -1 for one of them: all devices that the others leave."""

    data: int = Field(default=-1, ge=-1)  # rows of the batch; weights are whole on each
    fsdp: int = Field(default=1, ge=-1)  # rows of the batch, and weights along the model width
    tensor: int = Field(default=1, ge=-1)  # weights along heads, feed-forward width and vocabulary

    @model_validator(mode="after")
    def _sizes(self) -> Mesh:
        sizes = [getattr(self, axis) for axis in AXES]
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError(f"mesh {sizes}: expected sizes of 1 or more, and -1 at most once")
        return self

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Return the size of each axis on so many devices."""
        sizes = [getattr(self, axis) for axis in AXES]
        rest = devices // int(np.prod([size for size in sizes if size > 0]))
        sizes = [rest if size == -1 else size for size in sizes]
        if int(np.prod(sizes)) != devices:
            wanted = " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)
            raise UserError(f"mesh: found {wanted} for {devices} device(s); expected a product of {devices}")
        return tuple(sizes)

    def build(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
        """Lay the devices (default: all of all processes) out as a mesh."""
        devices = jax.devices() if devices is None else list(devices)
        return jax.sharding.Mesh(
            arrange_devices(self.sizes(len(devices)), devices), AXES, axis_types=(AxisType.Auto,) * len(AXES)
        )


def arrange_devices(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Return the devices in the shape `sizes`, neighbours by the chips' own links, slices apart on the first axes.

    Errors: UserError where no such arrangement of TPUs follows the links.
    """
    slices, across = len({getattr(device, "slice_index", 0) for device in devices}), []
    for size in sizes:  # between slices the network is slow: rows of the batch are shared over it first
        across.append(math.gcd(size, slices // math.prod(across)))
    within = tuple(size // apart for size, apart in zip(sizes, across, strict=True))
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(
            within, tuple(across), devices, allow_split_physical_axes=True, should_sort_granules_by_key=True
        )
    except NotImplementedError:
        shape = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"mesh: no arrangement of {len(devices)} devices as {shape} follows their links; "
            "expected sizes that divide the slice's sides; use others"
        ) from None


def weight_spec(sizes: Mapping[str, int], axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """Return how an array [*stacked, *axes] is sharded over mesh axes of these sizes.

    Prompts and vectors stay whole: only matrices are worth the traffic. So does a vocabulary that the mesh does not
    divide, which is common where tokens were added; `check_divisible` refuses other axes.
    """
    stacked = [None] * (len(shape) - len(axes))
    if len(axes) < 2 or "prompt" in axes:
        return PartitionSpec()
    cut = [WEIGHTS.get(axis) for axis in axes]
    lengths = shape[len(stacked) :]
    return PartitionSpec(*stacked, *(n if n and d % sizes[n] == 0 else None for n, d in zip(cut, lengths, strict=True)))


def variable_sharding(mesh: jax.sharding.Mesh, variable: nnx.Variable) -> NamedSharding:
    """Return the sharding of a weight, by the axes that it names."""
    axes = variable.get_metadata().get("axes", ())
    return NamedSharding(mesh, weight_spec(mesh.shape, axes, variable.shape))


def weight_sharding_fn() -> Callable[[nnx.Variable], NamedSharding] | None:
    """Return a function from a weight to its sharding, for a loader; None without a mesh."""
    mesh = _mesh()
    return None if mesh is None else lambda variable: variable_sharding(mesh, variable)


def shard_model(model: Model) -> Model:
    """Return the model with its weights sharded over the mesh."""
    mesh = _mesh()
    if mesh is None:
        return model
    graphdef, state = nnx.split(model)
    placed = jax.tree.map(
        lambda variable: variable.replace(put_sharded(variable.get_value(), variable_sharding(mesh, variable))),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return nnx.merge(graphdef, placed)


def state_sharding(state: Any, weights: Any) -> Any:
    """Return the sharding of a training state: as a weight for what has its path and shape, else whole.

    `state` may be abstract. None without a mesh.
    """
    mesh = _mesh()
    if mesh is None:
        return None
    known = {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(weights)[0]}
    whole = NamedSharding(mesh, PartitionSpec())

    def choose(keys: tuple, leaf: Any) -> Any:
        path = _path(keys)  # the weight's path is in it, behind what holds it and before what an optimizer adds
        parts = (path[start:end] for start in range(len(path)) for end in range(len(path), start, -1))
        weight = next((known[part] for part in parts if part in known), None)
        return whole if weight is None or weight.shape != leaf.shape else weight.sharding

    return jax.tree_util.tree_map_with_path(choose, state)


def check_divisible(rows: int, heads: int, width: int, inner: int) -> None:
    """Refuse a mesh that does not divide the rows computed at a time, or a model's heads, width or feed-forward width.

    Without this a weight would silently stay whole on every device.
    """
    mesh = _mesh()
    if mesh is None:
        return
    shards, fsdp, tensor = row_shards(), mesh.shape["fsdp"], mesh.shape["tensor"]
    if rows % shards:
        raise UserError(
            f"mesh: data x fsdp is {shards}; expected a divisor of the {rows} rows computed at a time; "
            "change batch_size, accumulate or mesh"
        )
    if heads % tensor:
        raise UserError(f"mesh: tensor is {tensor}; expected a divisor of the backbone's {heads} heads; change mesh")
    if inner % tensor:
        raise UserError(f"mesh: tensor is {tensor}; expected a divisor of the feed-forward width {inner}; change mesh")
    if width % fsdp:
        raise UserError(f"mesh: fsdp is {fsdp}; expected a divisor of the backbone's width {width}; change mesh")


def with_sharding(state: Any, layout: Any) -> Any:
    """Return an abstract state with its sharding."""
    return state if layout is None else jax.tree.map(put_sharded, state, layout)


def local_bytes(tree: Any) -> int:
    """Return the bytes that one device holds of arrays, or of abstract arrays with shardings."""

    def of(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(of(leaf) for leaf in jax.tree.leaves(tree))


def put_sharded(value: Any, sharding: NamedSharding) -> Any:
    """Shard an array that every process holds whole or has its shards of; an abstract one gets the sharding."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    if sharding.is_fully_addressable or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return jax.device_put(value, sharding)
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Keep an activation sharded along its rows ("rows") and named weight axes; without a mesh nothing happens."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    names = [ROWS if axis == "rows" else WEIGHTS.get(axis) if axis else None for axis in axes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*names))


# ---------------------------------------------------------------------------------------------- batches


def row_shards() -> int:
    """Return over how many shards the rows of a batch go; also inside `jax.jit`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROWS)


def process_share() -> tuple[int, int]:
    """Return (index, count) of this process's equal share of every batch's rows.

    Processes that hold the same rows, as under tensor parallelism across hosts, have the same index. Where a process's
    rows are not one block, each process reads all rows: (0, 1), which `describe` says.
    """
    mesh = _mesh()
    if mesh is None:
        return 0, 1
    shards = row_shards()
    by_rows = mesh.devices.reshape(shards, -1)
    own = jax.process_index()
    owned = [row for row in range(shards) if any(device.process_index == own for device in by_rows[row])]
    first, count = owned[0], len(owned)
    if owned != list(range(first, first + count)) or first % count or shards % count:
        return 0, 1
    return first // count, shards // count


def shard_local_batch(rows: Any) -> Any:
    """Join the processes' shares of a batch (arrays [B / count, ...]) to arrays sharded along the rows."""
    mesh = _mesh()
    if mesh is None:
        return rows
    sharding, (index, count) = NamedSharding(mesh, PartitionSpec(ROWS)), process_share()

    def join(local: np.ndarray) -> jax.Array:
        before = index * len(local)

        def part(where: Any) -> np.ndarray:
            start, stop, _ = where[0].indices(count * len(local))
            return local[start - before : stop - before]

        return jax.make_array_from_callback((count * len(local), *local.shape[1:]), sharding, part)

    return jax.tree.map(join, rows)


def shard_batch(rows: Any) -> Any:
    """Shard arrays along their rows; every process holds them whole."""
    mesh = _mesh()
    if mesh is None:
        return rows
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    return jax.tree.map(lambda whole: put_sharded(whole, sharding), rows)


def shard_stacked_batch(rows: Any) -> Any:
    """Shard arrays [N, B, ...] along B; every process holds them whole."""
    mesh = _mesh()
    if mesh is None:
        return rows
    sharding = NamedSharding(mesh, PartitionSpec(None, ROWS))
    return jax.tree.map(lambda whole: put_sharded(whole, sharding), rows)


def gather(x: jax.Array | np.ndarray) -> np.ndarray:
    """Gather an array, whole, in every process."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def describe() -> str:
    """Say on how many devices of what kind a run computes, and how it is sharded."""
    mesh = _mesh()
    if mesh is None:
        return f"1 {platform()} device"
    sizes = ", ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES if mesh.shape[axis] > 1)
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    if processes and process_share() == (0, 1) and row_shards() > 1:
        processes += ", each of which reads whole batches"
    return f"{mesh.size} {platform()} devices{processes} ({sizes})"


def platform() -> str:
    """Return the kind of the devices that compute, cpu, gpu or tpu: those of the mesh, or else the first device's."""
    mesh = jax.sharding.get_mesh()
    return (jax.local_devices()[0] if mesh.empty else mesh.devices.flat[0]).platform


def _mesh() -> jax.sharding.Mesh | None:
    """Return the mesh that is entered; None if it is only the device that everything is on anyway."""
    mesh = jax.sharding.get_mesh()
    alone = not mesh.empty and mesh.size == 1 and mesh.devices.item() == jax.local_devices()[0]
    return None if mesh.empty or alone else mesh


def _path(keys: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)
