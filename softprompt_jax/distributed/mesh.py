"""Devices as a mesh (data, fsdp, tensor), and how weights and batches are sharded over it.

Weights name their axes (`embed`, `heads`, ...); one table maps them to mesh axes. With the default mesh each device
holds all weights and a share of the batch, so devices exchange only the prompt's gradient. Whatever computes enters
its mesh with `entered`, where the functions here find it. Without a mesh everything is on one device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pydantic import Field, model_validator

from softprompt_jax.config import Settings, UserError, parse, read_text
from softprompt_jax.trees import flatten

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # mesh axes over which rows of a batch are sharded
# Logical axis of a weight -> mesh axis over which it is sharded; all others are replicated.
WEIGHTS = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp"}
Model = TypeVar("Model", bound=nnx.Module)


class Mesh(Settings):
    """Sizes of the mesh axes; -1 for one of them: all devices that the others leave."""

    data: int = Field(default=-1, ge=-1)  # rows of the batch; weights are whole on each; 1 if another axis is -1
    fsdp: int = Field(default=1, ge=-1)  # rows of the batch, and weights along the model width
    tensor: int = Field(default=1, ge=-1)  # weights along heads, feed-forward width and vocabulary

    @model_validator(mode="before")
    @classmethod
    def _rest_to_the_stated_axis(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "data" not in values and -1 in (values.get("fsdp"), values.get("tensor")):
            return {**values, "data": 1}
        return values

    @model_validator(mode="after")
    def _sizes(self) -> Mesh:
        sizes = [getattr(self, axis) for axis in AXES]
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError(f"mesh {sizes}: expected sizes of 1 or more, and -1 at most once")
        return self

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Return the size of each axis on so many devices."""
        sizes = [getattr(self, axis) for axis in AXES]
        rest = devices // math.prod(size for size in sizes if size > 0)
        sizes = [rest if size == -1 else size for size in sizes]
        if math.prod(sizes) != devices:
            wanted = " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)
            raise UserError(f"mesh: found {wanted} for {devices} device(s); expected a product of {devices}")
        return tuple(sizes)

    def build(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
        """Arrange the devices (default: those of all processes) as a mesh."""
        devices = jax.devices() if devices is None else list(devices)
        return jax.sharding.Mesh(
            arrange_devices(self.sizes(len(devices)), devices), AXES, axis_types=(AxisType.Auto,) * len(AXES)
        )


AnyMesh = Mesh | Mapping[str, Any] | str | jax.sharding.Mesh  # settings, also as YAML; or devices that are arranged


def make_mesh(given: AnyMesh | None, own: Mesh | None = None) -> jax.sharding.Mesh | None:
    """Return the devices as the mesh that is given, or else a run's `own`; None: one device, which needs no mesh.

    Where none is given, a mesh that has been entered goes before a run's own, and on a machine of one device there is
    nothing to divide. Errors: UserError if the devices do not make the mesh.
    """
    if isinstance(given, jax.sharding.Mesh):
        return None if _is_default_device(given) else given
    if given is None:
        if (current := current_mesh()) is not None or own is None or jax.device_count() == 1:
            return current
        try:
            built = own.build()
        except UserError as error:
            raise UserError(f"{error}; say another than the run's own with --mesh, such as '{{data: -1}}'") from None
    else:
        values = read_text(given, "mesh") if isinstance(given, str) else given
        built = (values if isinstance(values, Mesh) else parse(Mesh, values, "mesh")).build()
    return None if _is_default_device(built) else built


@contextlib.contextmanager
def entered(mesh: jax.sharding.Mesh | None) -> Iterator[None]:
    """Compute on a mesh inside the block; None, or inside a function that is being traced: where it is already."""
    opened = contextlib.nullcontext()
    if mesh is not None:
        with contextlib.suppress(ValueError):  # JAX refuses it while a function is traced
            opened = jax.set_mesh(mesh)
    with opened:
        yield


def process_block(mesh: jax.sharding.Mesh) -> tuple[jax.sharding.Mesh, int, int]:
    """Return the part of a mesh whose processes must compute together, its index, and how many such parts there are.

    Each part holds all weights, so that the parts need not hear of each other.
    """
    blocks, own = blocks_of_processes(mesh.devices), jax.process_index()
    index = next(i for i, block in enumerate(blocks) if any(device.process_index == own for device in block.flat))
    return jax.sharding.Mesh(blocks[index], AXES, axis_types=mesh.axis_types), index, len(blocks)


def blocks_of_processes(devices: np.ndarray) -> list[np.ndarray]:
    """Divide devices [data, fsdp, tensor] into the most equal blocks along `data` of which no process is in two."""
    for count in (count for count in range(len(devices), 0, -1) if len(devices) % count == 0):
        blocks = np.split(devices, count)
        owners = [{device.process_index for device in block.flat} for block in blocks]
        if len(set().union(*owners)) == sum(map(len, owners)):
            return blocks
    return [devices]


def arrange_devices(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Return the devices in the shape `sizes`: linked chips are neighbours, slices lie along the first axes.

    Errors: UserError if no arrangement of this shape follows the links between TPUs.
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

    Prompts and vectors are replicated: only matrices are worth the traffic. So is a vocabulary that the mesh does not
    divide, which is common where tokens were added. `check_divisible` refuses other axes that it does not divide.
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


def shardings(mesh: jax.sharding.Mesh, state: Any) -> dict[str, NamedSharding]:
    """Return the sharding of each variable of a state, by its path."""
    variables = nnx.to_pure_dict(state, extract_fn=lambda variable: variable)
    return {path: variable_sharding(mesh, variable) for path, variable in flatten(variables).items()}


def shard_model(model: Model) -> Model:
    """Return the model with its weights sharded over the mesh."""
    mesh = current_mesh()
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
    """Return the sharding of a training state, which may be abstract; None without a mesh.

    A leaf with the path and the shape of a weight is sharded as the weight; all others are replicated.
    """
    mesh = current_mesh()
    if mesh is None:
        return None
    known = {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    longest_first = sorted(known, key=len, reverse=True)
    whole = NamedSharding(mesh, PartitionSpec())

    def choose(keys: tuple, leaf: Any) -> Any:
        path = _path(keys)  # the weight's path is in it, behind what holds it and before what an optimizer adds
        weight = next((known[name] for name in longest_first if name in path), None)
        return whole if weight is None or weight.shape != leaf.shape else weight.sharding

    return jax.tree_util.tree_map_with_path(choose, state)


def check_divisible(rows: int, heads: int, width: int, inner: int, query_heads: int | None = None) -> None:
    """Refuse a mesh that does not divide the rows computed at a time, or a model's heads, width or feed-forward width.

    `heads`: of keys, the fewest; `query_heads` share them (default: as many). Without this a weight would silently be
    replicated.
    """
    mesh = current_mesh()
    if mesh is None:
        return
    grouped = query_heads is not None and query_heads != heads
    of_heads = f"{heads} key heads, which {query_heads} heads share" if grouped else f"{heads} heads"
    for axis, size, length, what, settings in (
        ("data x fsdp", row_shards(), rows, f"{rows} rows computed at a time", "batch_size, accumulate or mesh"),
        ("tensor", mesh.shape["tensor"], heads, f"backbone's {of_heads}", "mesh"),
        ("tensor", mesh.shape["tensor"], inner, f"feed-forward width {inner}", "mesh"),
        ("fsdp", mesh.shape["fsdp"], width, f"backbone's width {width}", "mesh"),
    ):
        if length % size:
            raise UserError(f"mesh: {axis} is {size}; expected a divisor of the {what}; change {settings}")


def with_sharding(state: Any, layout: Any) -> Any:
    """Return the abstract state with its sharding."""
    return state if layout is None else jax.tree.map(put_sharded, state, layout)


def local_bytes(tree: Any) -> int:
    """Return the bytes that one device holds of these arrays, which may be abstract with shardings."""

    def of(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(of(leaf) for leaf in jax.tree.leaves(tree))


def put_sharded(value: Any, sharding: NamedSharding) -> Any:
    """Shard an array. Every process holds it whole, or has its own shards of it. An abstract one gets the sharding."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    if sharding.is_fully_addressable or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return jax.device_put(value, sharding)
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Keep an activation sharded along its rows ("rows") and the named weight axes. Do nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x

    def cut(axis: str | None, length: Any) -> Any:
        names = ROWS if axis == "rows" else (WEIGHTS[axis],) if axis in WEIGHTS else ()
        size = math.prod(mesh.shape[name] for name in names)
        return names if size > 1 and length % size == 0 else None  # one text alone is whole everywhere

    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(cut, axes, x.shape)))


def constrain_cache(cache: jax.Array) -> jax.Array:
    """Keep keys or values [L, B, H, S, K] sharded along rows and heads."""
    return constrain(cache, None, "rows", "heads", None, None)


def constrain_rows(tree: Any) -> Any:
    """Keep arrays [B, ...] sharded along their rows, and numbers whole."""
    return jax.tree.map(lambda leaf: constrain(leaf, *["rows", *[None] * leaf.ndim][: leaf.ndim]), tree)


def replicated(tree: Any) -> Any:
    """Put arrays whole on every device of the mesh; every process has them whole. Do nothing without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return tree
    return jax.tree.map(lambda whole: put_sharded(whole, NamedSharding(mesh, PartitionSpec())), tree)


# ---------------------------------------------------------------------------------------------- batches


def round_rows(rows: int) -> int:
    """Round a number of rows up to one that the mesh divides."""
    shards = row_shards()
    return -(-rows // shards) * shards


def row_shards() -> int:
    """Return the number of shards of a batch's rows; also inside `jax.jit`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROWS)


def process_share() -> tuple[int, int]:
    """Return (index, count) of this process's equal share of every batch's rows.

    Processes that hold the same rows, as under tensor parallelism across hosts, have the same index. If the rows of a
    process are not one block, every process reads all rows: (0, 1). `describe` then says so.
    """
    mesh = current_mesh()
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
    """Make arrays sharded along the rows from the processes' shares of a batch (arrays [B / count, ...])."""
    mesh = current_mesh()
    if mesh is None:
        return rows
    sharding, count = NamedSharding(mesh, PartitionSpec(ROWS)), process_share()[1]

    def join(local: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, local, (count * len(local), *local.shape[1:]))

    return jax.tree.map(join, rows)


def shard_batch(rows: Any, stacked: bool = False) -> Any:
    """Shard arrays along their rows, or [N, B, ...] along B if they are `stacked`; every process holds them whole."""
    mesh, spec = current_mesh(), PartitionSpec(None, ROWS) if stacked else PartitionSpec(ROWS)
    return rows if mesh is None else jax.tree.map(lambda whole: put_sharded(whole, NamedSharding(mesh, spec)), rows)


def fill_batch(rows: Any, padding: int) -> Any:
    """Shard arrays [B, ...] along their rows, behind which rows of padding fill what the mesh does not divide."""
    if current_mesh() is None:
        return rows

    def filled(whole: Any) -> Any:
        missing = round_rows(len(whole)) - len(whole)
        return jnp.pad(jnp.asarray(whole), ((0, missing), *[(0, 0)] * (whole.ndim - 1)), constant_values=padding)

    return shard_batch(jax.tree.map(filled, rows))


def gather(x: jax.Array | np.ndarray) -> np.ndarray:
    """Return the whole array in every process."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def describe() -> str:
    """Describe the number and kind of a run's devices, and how it is sharded."""
    mesh = current_mesh()
    if mesh is None:
        return f"1 {platform()} device"
    sizes = ", ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES if mesh.shape[axis] > 1)
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    if processes and process_share() == (0, 1) and row_shards() > 1:
        processes += ", each of which reads whole batches"
    return f"{mesh.size} {platform()} devices{processes} ({sizes})"


def platform() -> str:
    """Return the kind of the mesh's devices (without a mesh, of the first device): cpu, gpu or tpu."""
    mesh = jax.sharding.get_mesh()
    return (jax.local_devices()[0] if mesh.empty else mesh.devices.flat[0]).platform


def current_mesh() -> jax.sharding.Mesh | None:
    """Return the mesh that has been entered; None if there is none, or if it is only the default device.

    While a function is traced there is none: XLA goes by its arguments, and by `constrain`.
    """
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:
        return None
    return None if mesh.empty or _is_default_device(mesh) else mesh


def _is_default_device(mesh: jax.sharding.Mesh) -> bool:
    return mesh.size == 1 and mesh.devices.item() == jax.local_devices()[0]


def _path(keys: tuple) -> str:
    return f".{jax.tree_util.keystr(keys, simple=True, separator='.')}."
