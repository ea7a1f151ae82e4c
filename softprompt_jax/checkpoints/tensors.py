"""Arrays on disk that are read by slices, whatever the file format, and safetensors files."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from softprompt_jax.config import UserError
from softprompt_jax.files import parse_json, read_object

Index = tuple[slice, ...]  # one slice an axis, each with a start and a stop
CHECKSUMS = "crc32"  # in the metadata of files that this library writes: the CRC-32 of each tensor, as JSON
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "uint8": "U8", "int32": "I32"}
_FILE_BYTES = 2 << 30  # of weights in a file that is written; more go to several files


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array on disk. `part(index)` reads what the slices of an index, one for each axis, select.

    `checked`: a checksum is compared when the tensor is read whole. `file` is named in errors.
    """

    name: str
    shape: tuple[int, ...]
    part: Callable[[Index], np.ndarray]
    checked: bool = False
    file: str = ""

    def read(self, index: Index | None = None) -> np.ndarray:
        """Read a part (default: all), as an array of the file's dtype whose numbers are all finite."""
        index = whole(self.shape) if index is None else index
        where = f"{self.file}{': ' if self.file else ''}tensor {self.name}"
        try:
            values = np.asarray(self.part(index))
        except UserError:
            raise
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{where}: cannot be read ({reason}); download the weights again") from None
        if not finite(values):
            raise UserError(f"{where}: holds numbers that are not finite; expected weights; download them again")
        return values

    def _view(self, name: str, shape: tuple[int, ...], part: Callable[[Index], np.ndarray]) -> Tensor:
        return Tensor(name, shape, part, file=self.file)

    def transposed(self) -> Tensor:
        """Return the view of a matrix with its two axes exchanged."""
        return self._view(self.name, self.shape[::-1], lambda index: self.part(index[::-1]).T)

    def layer(self, number: int, axis: int) -> Tensor:
        """Return the view of one layer of an array that stacks them along `axis`."""

        def part(index: Index) -> np.ndarray:
            return self.part((*index[:axis], slice(number, number + 1), *index[axis:])).squeeze(axis)

        return self._view(f"{self.name}[{number}]", self.shape[:axis] + self.shape[axis + 1 :], part)

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

        return self._view(self.name, (*self.shape[:axis], heads * width, *self.shape[axis + 2 :]), part)

    def share(self, number: int, of: int, groups: int) -> Tensor:
        """Return the view of one of `of` arrays that lie side by side, in each of `groups`, along the last axis."""
        width = self.shape[-1] // (of * groups)

        def part(index: Index) -> np.ndarray:
            values = self.part((*index[:-1], slice(0, self.shape[-1])))
            values = values.reshape(*values.shape[:-1], groups, of, width)[..., number, :]
            return values.reshape(*values.shape[:-2], -1)[..., index[-1]]

        return self._view(self.name, (*self.shape[:-1], groups * width), part)


def whole(shape: Sequence[int]) -> Index:
    """Return the index of a whole array."""
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
    """Copy and convert. A transposed view goes 16 columns at a time, since the cache holds no more."""
    if values.ndim < 2 or not values.flags.f_contiguous:
        target[...] = values
        return
    values = values.astype(target.dtype, copy=False)
    for start in range(0, values.shape[1], 16):
        target[:, start : start + 16] = values[:, start : start + 16]


def same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two matrices are equal; reads 16, 32, ... 4096 rows at a time, up to the first difference."""
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
    """Tell whether all numbers are finite; bfloat16 by its bits, which is faster."""
    if values.dtype == jnp.bfloat16:
        return not ((values.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(values).all())


def finite_float32(values: np.ndarray, where: str) -> np.ndarray:
    """Return trained numbers as float32. Errors: UserError for what is not finite there, such as 1e300."""
    with np.errstate(over="ignore"):
        values = np.asarray(values, np.float32)
    if not finite(values):
        raise UserError(f"{where}: not an array of finite numbers in float32; expected trained ones")
    return values


def checksum(values: np.ndarray) -> int:
    """Return the CRC-32 of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the metadata by which `open_safetensors` sees that numbers of a file were changed."""
    return {CHECKSUMS: json.dumps({name: checksum(values) for name, values in sorted(arrays.items())})}


def _check(values: np.ndarray, known: int | list[int]) -> None:
    """Raise ValueError if a whole tensor differs from its checksum.

    Files of version 1 have a checksum for each block of rows: [rows of a block, checksum, checksum, ...].
    """
    table = np.atleast_1d(values) if values.size else np.empty(0)  # which may be [10**12, 0]
    rows, *sums = known if isinstance(known, list) else [max(1, len(table)), known]
    if sums != [checksum(table[start : start + rows]) for start in range(0, max(1, len(table)), rows)]:
        raise ValueError("its checksum does not fit: numbers were changed")


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Open a safetensors file; nothing is read yet.

    A tensor with a checksum in the metadata is compared with it when it is read whole. Files of others have none: a
    flipped bit that leaves a finite number goes unseen there.
    """
    try:
        opened = safe_open(path, framework="numpy")
        known = _known(parse_json((opened.metadata() or {}).get(CHECKSUMS, "{}")))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; expected every file that the index names") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}); download it again") from None

    found = {}
    for name in opened.keys():  # noqa: SIM118
        shape = tuple(opened.get_slice(name).get_shape())
        part = functools.partial(_read, opened, name, shape, known.get(name))
        found[name] = Tensor(name, shape, part, name in known, str(path))
    return found


def _known(sums: Any) -> dict[str, int | list[int]]:
    """Return the checksums of tensors by name. Errors: ValueError for what are none."""
    for known in sums.values() if isinstance(sums, dict) else [None]:
        numbers = known if isinstance(known, list) else [1, known]
        if not numbers or not all(type(number) is int for number in numbers) or numbers[0] < 1:
            raise ValueError("its checksums are no numbers")
    return sums


def _read(opened: Any, name: str, shape: tuple[int, ...], known: int | list[int] | None, index: Index) -> np.ndarray:
    values = opened.get_slice(name)[index] if shape else opened.get_tensor(name)
    if known is not None and values.shape == shape:
        _check(values, known)
    return values


def open_sharded(path: Path, open_file: Callable[[Path], dict[str, Tensor]] = open_safetensors) -> dict[str, Tensor]:
    """Open `path`, or the files beside it that `path`.index.json names; no tensors where neither exists."""
    index = path.with_name(f"{path.name}.index.json")
    if not index.exists():
        return open_file(path) if path.exists() else {}
    try:
        files = sorted(set(read_object(index, "an index of weights")["weight_map"].values()))
        if any(Path(name).name != name for name in files):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError):  # a file's name may be a list, or be none
        raise UserError(f"{index}: not an index of weights; expected a JSON 'weight_map' of files beside it") from None
    return {name: tensor for file in files for name, tensor in open_file(path.parent / file).items()}


def write_one_by_one(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a safetensors file of arrays that may be sharded; one is in memory at a time."""
    header, start = {}, 0
    for name, array in arrays.items():
        end = start + array.size * array.dtype.itemsize
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": [*array.shape], "data_offsets": [start, end]}
        start = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_sharded(path: Path, arrays: Iterable[tuple[str, np.ndarray]], metadata: Mapping[str, str]) -> None:
    """Write `path`, or for more than 2 GiB several files and `path`.index.json; one file is in memory at a time.

    Files have their names once all are written.
    """
    written: list[list[str]] = []  # names of the tensors of each file
    shard: dict[str, np.ndarray] = {}

    def partial(number: int) -> Path:
        return path.with_name(f"{path.stem}-{number:05d}.partial")

    def write() -> None:
        save_file(shard, partial(len(written)), metadata=dict(metadata) | checksums(shard))
        written.append(list(shard))
        shard.clear()

    for name, values in arrays:
        if shard and sum(array.nbytes for array in shard.values()) + values.nbytes > _FILE_BYTES:
            write()
        shard[name] = np.ascontiguousarray(values)
    write()
    index = path.with_name(f"{path.name}.index.json")
    if len(written) == 1:
        partial(0).replace(path)
        index.unlink(missing_ok=True)  # of a larger model that was here before
        return
    files = [f"{path.stem}-{number + 1:05d}-of-{len(written):05d}{path.suffix}" for number in range(len(written))]
    for number, file in enumerate(files):
        partial(number).replace(path.with_name(file))
    names = {name: file for file, names in zip(files, written, strict=True) for name in names}
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}, indent=2) + "\n")
