"""Arrays on disk, read by slices: what the loader asks of every file format."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from softprompt_jax.config import UserError

Index = tuple[slice, ...]  # one slice an axis, each with a start and a stop
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16  # of rows that have a checksum
CHECKSUMS = "crc32"  # in a file's metadata, as JSON: of the tensors that this library has written


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array on disk; `part(index)` reads what the slices of an index, one an axis, select.

    `checked`: what is read is compared with checksums.
    """

    name: str
    shape: tuple[int, ...]
    part: Callable[[Index], np.ndarray]
    checked: bool = False

    def read(self, index: Index | None = None) -> np.ndarray:
        """Read a part (default: all), as an array of the file's dtype whose numbers are all finite."""
        index = whole(self.shape) if index is None else index
        try:
            values = np.asarray(self.part(index))
        except UserError:
            raise
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"tensor {self.name}: cannot be read ({reason}); download the weights again") from None
        if not finite(values):
            raise UserError(
                f"tensor {self.name}: holds numbers that are not finite; expected weights; download them again"
            )
        return values

    def transposed(self) -> Tensor:
        """Return the view of a matrix with its two axes exchanged."""
        return Tensor(self.name, self.shape[::-1], lambda index: self.part(index[::-1]).T)

    def layer(self, number: int, axis: int) -> Tensor:
        """Return the view of one layer of an array that stacks them along `axis`."""

        def part(index: Index) -> np.ndarray:
            return self.part((*index[:axis], slice(number, number + 1), *index[axis:])).squeeze(axis)

        return Tensor(f"{self.name}[{number}]", self.shape[:axis] + self.shape[axis + 1 :], part)

    def merged(self, axis: int) -> Tensor:
        """Return the view in which `axis` and the one after it, heads and their width, are one."""
        heads, width = self.shape[axis : axis + 2]

        def part(index: Index) -> np.ndarray:
            start, stop = index[axis].start, index[axis].stop
            first, last = start // width, -(-stop // width)
            values = self.part((*index[:axis], slice(first, last), slice(0, width), *index[axis + 1 :]))
            values = values.reshape(*values.shape[:axis], -1, *values.shape[axis + 2 :])
            wanted = slice(start - first * width, stop - first * width)
            return values[(*[slice(None)] * axis, wanted)]

        return Tensor(self.name, (*self.shape[:axis], heads * width, *self.shape[axis + 2 :]), part)


def in_memory(name: str, array: np.ndarray) -> Tensor:
    """Return a tensor that is in memory already."""
    return Tensor(name, array.shape, lambda index: np.asarray(array[index]))


def whole(shape: Sequence[int]) -> Index:
    """Return the index of everything."""
    return tuple(slice(0, length) for length in shape)


def read_stacked(parts: Sequence[Tensor], shape: tuple[int, ...], index: Index | None, dtype: np.dtype) -> np.ndarray:
    """Read an index of the array [len(parts), ...], or of the only part if `shape` has its axes, as `dtype`."""
    index = whole(shape) if index is None else index
    index = tuple(slice(*where.indices(length)[:2]) for where, length in zip(index, shape, strict=True))
    values = np.empty([where.stop - where.start for where in index], dtype)
    if len(shape) == len(parts[0].shape):
        _fill(values, parts[0].read(index))
        return values
    for position, part in enumerate(parts[index[0]]):
        _fill(values[position], part.read(index[1:]))
    return values


def _fill(target: np.ndarray, values: np.ndarray) -> None:
    """Copy and convert; a transposed view 16 columns at a time, since whole ones miss the cache at every number."""
    if values.ndim < 2 or not values.flags.f_contiguous:
        target[...] = values
        return
    values = values.astype(target.dtype, copy=False)
    for start in range(0, values.shape[1], 16):
        target[:, start : start + 16] = values[:, start : start + 16]


def same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two matrices are equal, some rows at a time: 16, 32, ... 4096, stopping at the first difference."""
    if first.shape != second.shape:
        return False
    start, rows = 0, 16
    while start < first.shape[0]:
        index = (slice(start, min(start + rows, first.shape[0])), *whole(first.shape[1:]))
        if not np.array_equal(first.read(index), second.read(index)):
            return False
        start, rows = start + rows, min(2 * rows, 4096)
    return True


def finite(values: np.ndarray) -> bool:
    """Tell whether an array has neither infinities nor NaN; bfloat16 by its bits, which is faster."""
    if values.dtype == jnp.bfloat16:
        return not ((values.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(values).all())


def checksum(values: np.ndarray) -> int:
    """Return the CRC-32 of an array's bytes, first index slowest."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the metadata by which `open_safetensors` sees that numbers of a file were changed.

    Of each tensor: how many rows of the outer axis are a block, then the checksum of each block. There are at most 64,
    so that the shares of 2, 4, ... 64 processes are whole blocks, and none under 64 KiB.
    """

    def blocks(values: np.ndarray) -> list[int]:
        table = np.atleast_1d(values)
        rows = max(1, -(-len(table) // _BLOCKS), -(-_BLOCK_BYTES * len(table) // max(1, table.nbytes)))
        return [rows, *(checksum(table[start : start + rows]) for start in range(0, len(table), rows))]

    return {CHECKSUMS: json.dumps({name: blocks(values) for name, values in sorted(arrays.items())})}


def _compare(values: np.ndarray, start: int, shape: tuple[int, ...], known: list[int]) -> None:
    """Raise ValueError if a block of rows that lies wholly in `values`, those of a tensor from `start` on, differs."""
    rows, *sums = known
    table = np.atleast_1d(values)
    length = shape[0] if shape else 1
    for number in range(-(-start // rows), len(sums)):
        first, last = number * rows, min((number + 1) * rows, length)
        if last > start + len(table):
            return
        if checksum(table[first - start : last - start]) != sums[number]:
            raise ValueError("its checksum does not fit: numbers were changed")


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Open a safetensors file; nothing is read yet.

    What is read of a tensor with checksums in the metadata is compared with those of the blocks of whole rows in it.
    Slices along inner axes are not, since the rest of each row would have to be read too, and files of others have no
    checksums: a flipped bit that leaves a finite number goes unseen there.
    """
    try:
        opened = safe_open(path, framework="numpy")
        known = dict(json.loads((opened.metadata() or {}).get(CHECKSUMS, "{}")))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; expected every file that the index names") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}); download it again") from None

    found = {}
    for name in opened.keys():  # noqa: SIM118
        shape = tuple(opened.get_slice(name).get_shape())
        read = functools.partial(_read, opened, name, shape, known.get(name))
        found[name] = Tensor(name, shape, read, name in known)
    return found


def _read(opened: Any, name: str, shape: tuple[int, ...], sums: Any, index: Index) -> np.ndarray:
    """Read a part of a tensor and compare it with its checksums, one for each block of rows, if there are any."""
    values = opened.get_slice(name)[index] if shape else opened.get_tensor(name)
    if sums is not None and values.shape[1:] == shape[1:]:
        start = index[0].start or 0 if shape else 0
        # In files of before there were blocks: a number.
        _compare(values, start, shape, sums if isinstance(sums, list) else [shape[0] if shape else 1, sums])
    return values
