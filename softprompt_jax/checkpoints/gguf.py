"""GGUF, the format of llama.cpp: metadata and tensors of a file, mapped into memory and dequantised by rows.

The file is not trusted: counts, lengths and offsets are compared with its size before anything is allocated. How a
model's metadata become settings stands in `gguf_model.py`.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from softprompt_jax.checkpoints.tensors import Index, Tensor
from softprompt_jax.config import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Kinds of metadata values by their number: format of `struct`.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_CHUNK = 1 << 20  # numbers that are dequantised at a time, so that the temporary arrays stay small
Blocks = np.ndarray  # [N, bytes of a block], uint8


def _unpack(packed: Blocks, width: int, bits: int) -> np.ndarray:
    """Return the numbers of `bits` bits: of `width` bytes first all low parts, then all next ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = packed.reshape(len(packed), -1, 1, width) >> shifts
    return (parts & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _float16(blocks: Blocks, start: int) -> np.ndarray:
    return blocks[:, start : start + 2].view("<f2").astype(np.float32)


def _f32(blocks: Blocks) -> np.ndarray:
    return blocks.view("<f4")


def _f16(blocks: Blocks) -> np.ndarray:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Blocks) -> np.ndarray:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(blocks: Blocks) -> np.ndarray:
    numbers = _unpack(blocks[:, 2:], 16, 4).astype(np.float32) - 8
    return _float16(blocks, 0) * numbers


def _q4_1(blocks: Blocks) -> np.ndarray:
    return _float16(blocks, 0) * _unpack(blocks[:, 4:], 16, 4).astype(np.float32) + _float16(blocks, 2)


def _five_bits(blocks: Blocks, start: int) -> np.ndarray:
    high = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    return (_unpack(blocks[:, start + 4 :], 16, 4) | (high << 4)).astype(np.float32)


def _q5_0(blocks: Blocks) -> np.ndarray:
    return _float16(blocks, 0) * (_five_bits(blocks, 2) - 16)


def _q5_1(blocks: Blocks) -> np.ndarray:
    return _float16(blocks, 0) * _five_bits(blocks, 4) + _float16(blocks, 2)


def _q8_0(blocks: Blocks) -> np.ndarray:
    return _float16(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _scaled(blocks: Blocks, numbers: np.ndarray) -> np.ndarray:
    """Scale the numbers of Q4_K and Q5_K: 8 groups of 32, each with a scale and a minimum of 6 bits."""
    first, second, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 0x3F, (mixed & 0x0F) | ((first >> 2) & 0x30)], axis=1)
    minima = np.concatenate([second & 0x3F, (mixed >> 4) | ((second >> 2) & 0x30)], axis=1)
    scale = (_float16(blocks, 0) * scales.astype(np.float32))[..., None]
    minimum = (_float16(blocks, 2) * minima.astype(np.float32))[..., None]
    numbers = numbers.reshape(len(blocks), 8, 32).astype(np.float32)
    return (scale * numbers - minimum).reshape(len(blocks), 256)


def _q4_k(blocks: Blocks) -> np.ndarray:
    return _scaled(blocks, _unpack(blocks[:, 16:], 32, 4))


def _q5_k(blocks: Blocks) -> np.ndarray:
    return _scaled(blocks, _unpack(blocks[:, 48:], 32, 4) | (_unpack(blocks[:, 16:48], 32, 1) << 4))


def _q6_k(blocks: Blocks) -> np.ndarray:
    numbers = _unpack(blocks[:, :128], 64, 4) | (_unpack(blocks[:, 128:192], 32, 2) << 4)
    numbers = (numbers.astype(np.float32) - 32).reshape(len(blocks), 16, 16)
    scales = _float16(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[..., None] * numbers).reshape(len(blocks), 256)


class TensorType(NamedTuple):
    """A number format of tensors: rows are cut into blocks of so many numbers, kept in so many bytes."""

    name: str
    numbers: int
    size: int
    dequantize: Callable[[Blocks], np.ndarray]  # blocks -> float32 [N, numbers of a block]


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4, _f32),
    1: TensorType("F16", 1, 2, _f16),
    2: TensorType("Q4_0", 32, 18, _q4_0),
    3: TensorType("Q4_1", 32, 20, _q4_1),
    6: TensorType("Q5_0", 32, 22, _q5_0),
    7: TensorType("Q5_1", 32, 24, _q5_1),
    8: TensorType("Q8_0", 32, 34, _q8_0),
    12: TensorType("Q4_K", 256, 144, _q4_k),
    13: TensorType("Q5_K", 256, 176, _q5_k),
    14: TensorType("Q6_K", 256, 210, _q6_k),
    30: TensorType("BF16", 1, 2, _bf16),
}


class _Reader:
    """Reads the head of a file from its first byte on, and never past its last."""

    def __init__(self, data: np.ndarray, where: str):
        self.data, self.where, self.position = memoryview(data), where, 0  # pyright: ignore[reportArgumentType]

    def fail(self, message: str) -> NoReturn:
        raise UserError(f"{self.where}: {message}; download the file again")

    def need(self, size: int, what: str) -> None:
        """Refuse what would end behind the file."""
        left = len(self.data) - self.position
        if size > left:
            self.fail(f"{what} takes {size} bytes at {self.position}; expected at most the {left} that are left")

    def number(self, form: str, what: str) -> Any:
        size = struct.calcsize(form)
        self.need(size, what)
        (found,) = struct.unpack_from(f"<{form}", self.data, self.position)
        self.position += size
        return found

    def count(self, what: str, smallest: int) -> int:
        """Read how many things follow, each of which takes at least `smallest` bytes."""
        found = self.number("Q", what)
        self.need(found * smallest, f"{what}, {found},")
        return found

    def text(self, what: str) -> str:
        size = self.count(f"the length of {what}", 1)
        start, self.position = self.position, self.position + size
        try:
            return str(self.data[start : self.position], "utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8; expected a text")

    def value(self, kind: int, what: str) -> Any:
        """Read a value of the metadata: a number, a truth value, a text, an array of numbers or a list of texts."""
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            self.fail(f"{what} has a value of kind {kind}; expected one of 0 to 12")
        found = self.number(_SCALARS[kind], what)
        if kind == _FLOAT32:
            return float(str(np.float32(found)))  # 1e-05, not 9.999999747378752e-06
        return bool(found) if kind == _BOOL else found

    def array(self, what: str) -> np.ndarray | list[str]:
        kind = self.number("I", what)
        if kind == _STRING:
            return [self.text(what) for _ in range(self.count(f"the number of texts in {what}", 8))]
        if kind not in _SCALARS:
            self.fail(f"{what} is an array of kind {kind}; expected numbers or texts")
        dtype = np.dtype("?" if kind == _BOOL else f"<{_SCALARS[kind]}")
        size = self.count(f"the number of values in {what}", dtype.itemsize)
        found = np.frombuffer(self.data, np.uint8, size * dtype.itemsize, self.position)
        self.position += found.nbytes
        return found != 0 if kind == _BOOL else found.view(dtype)


class Info(NamedTuple):
    """Where a tensor lies: its shape, rows first, its format, and its first byte in the file."""

    shape: tuple[int, ...]
    type: TensorType
    start: int


@dataclasses.dataclass(frozen=True)
class Gguf:
    """An opened file. `number`, `real`, `text` and `flag` return metadata; a value of another kind is a UserError."""

    where: str
    metadata: dict[str, Any]
    infos: dict[str, Info]
    data: np.ndarray

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], expected: str) -> Any:
        found = self.metadata.get(key, default)
        if found is None:
            raise UserError(f"{self.where}: no {key}; expected {expected}; convert the model again")
        if type(found) not in kinds:
            raise UserError(f"{self.where}: {key} is of type {type(found).__name__}; expected {expected}")
        return found

    def number(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return a count or an id."""
        found = self._get(key, default, (int,), "an integer")
        if not least <= found < 1 << 31:
            raise UserError(f"{self.where}: {key} is {found}; expected {least} to {(1 << 31) - 1}")
        return found

    def real(self, key: str, default: float | None = None) -> float:
        """Return a positive number."""
        found = self._get(key, default, (int, float), "a number")
        if not 0 < found < math.inf:
            raise UserError(f"{self.where}: {key} is {found}; expected a positive number")
        return float(found)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text."""
        return self._get(key, default, (str,), "a text")

    def flag(self, key: str, default: bool) -> bool:
        """Return a truth value."""
        return self._get(key, default, (bool,), "true or false")

    def tensor(self, name: str, order: np.ndarray | None = None, shift: float = 0.0) -> Tensor:
        """Return a tensor as float32. Its row `i` is the file's row `order[i]`, and `shift` is added to its numbers."""
        shape, kind, start = self.infos[name]
        columns = shape[-1] // kind.numbers
        rows = math.prod(shape[:-1])
        stored = self.data[start : start + rows * columns * kind.size].reshape(rows, columns, kind.size)

        def part(index: Index) -> np.ndarray:
            if len(shape) == 1:
                values = _dequantize(kind, stored, 0, columns)[0]
                values = (values if order is None else values[order])[index[0]]
            else:
                first, last = index[1].start // kind.numbers, -(-index[1].stop // kind.numbers)
                chosen, skipped = stored[index[0] if order is None else order[index[0]]], first * kind.numbers
                values = _dequantize(kind, chosen, first, last)
                values = values[:, index[1].start - skipped : index[1].stop - skipped]
            return values + np.float32(shift) if shift else values

        return Tensor(name, shape, part)


def _dequantize(kind: TensorType, stored: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return rows of blocks [R, blocks of a row, bytes] as float32 [R, numbers], only those of some blocks."""
    width = (last - first) * kind.numbers
    values = np.empty((len(stored), width), np.float32)
    step = max(1, _CHUNK // max(1, width))
    with np.errstate(invalid="ignore", over="ignore"):  # `Tensor.read` refuses what is not finite
        for row in range(0, len(stored), step):
            blocks = np.ascontiguousarray(stored[row : row + step, first:last]).reshape(-1, kind.size)
            values[row : row + step] = kind.dequantize(blocks).reshape(-1, width)
    return values


def is_gguf(source: str | Path) -> bool:
    """Tell whether a source is a GGUF file, by its name or its first bytes."""
    path = Path(source).expanduser()
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return path.suffix == ".gguf" or file.read(4) == MAGIC
    except OSError:
        return False


def open_gguf(source: str | Path) -> Gguf:
    """Open a GGUF file of version 2 or 3; its tensors stay on disk until they are read.

    Errors: UserError for a file that is none, of another version, damaged, or with tensors in a format unknown here.
    """
    where = str(source)
    try:
        data = np.asarray(np.memmap(Path(source).expanduser(), np.uint8, "r"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: cannot be read ({reason}); expected a GGUF file; download it again") from None
    reader = _Reader(data, where)
    if bytes(data[:4]) != MAGIC:
        reader.fail(f"begins with {bytes(data[:4])!r}; expected {MAGIC!r}, a GGUF file")
    reader.position = 4
    version = reader.number("I", "the version")
    if version not in VERSIONS:
        raise UserError(f"{where}: GGUF version {version}; expected 2 or 3, little-endian; convert the model again")
    tensors, entries = reader.number("Q", "the number of tensors"), reader.count("the number of metadata", 13)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = reader.text("a name in the metadata")
        if key in metadata:
            reader.fail(f"{key[:80]!r} stands twice in the metadata; expected it once")
        metadata[key] = reader.value(reader.number("I", key[:80]), key[:80])
    reader.need(tensors * 24, f"the number of tensors, {tensors},")
    found = [_read_info(reader) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        reader.fail("general.alignment is no power of two from 8 on; expected one, such as 32")
    begin = -(-reader.position // alignment) * alignment
    infos: dict[str, Info] = {}
    for name, shape, kind, offset in found:
        end = begin + offset + math.prod(shape) // kind.numbers * kind.size
        if name in infos or offset % alignment or end > len(data):
            reader.fail(
                f"tensor {name[:80]!r} of {kind.name} {list(shape)} at {offset}: its name stands twice, or it is not "
                f"aligned, or ends at {end} in a file of {len(data)} bytes; expected a whole file"
            )
        infos[name] = Info(shape, kind, begin + offset)
    return Gguf(where, metadata, infos, data)


def _read_info(reader: _Reader) -> tuple[str, tuple[int, ...], TensorType, int]:
    """Read a tensor's name, shape, format and offset."""
    name = reader.text("the name of a tensor")
    what = f"tensor {name[:80]!r}"
    axes = reader.number("I", what)
    if not 1 <= axes <= 4:
        reader.fail(f"{what} has {axes} axes; expected 1 to 4")
    shape = tuple(reader.number("Q", what) for _ in range(axes))[::-1]
    number, offset = reader.number("I", what), reader.number("Q", what)
    if number not in TENSOR_TYPES:
        known = ", ".join(kind.name for kind in TENSOR_TYPES.values())
        raise UserError(f"{reader.where}: {what} is of type {number}; expected one of {known}; quantise it otherwise")
    kind = TENSOR_TYPES[number]
    if not all(shape) or shape[-1] % kind.numbers:
        reader.fail(f"{what} of {kind.name} has shape {list(shape)}; expected rows of whole blocks of {kind.numbers}")
    return name, shape, kind, offset
