"""PyTorch's `.bin` files, read without torch and without running code that a file names.

Such a file is a zip: `data.pkl` says how tensors are made of storages, `data/0`, `data/1`, ... are the storages.
The pickle may name the function that rebuilds tensors, storage types and OrderedDict; any other name is refused.
"""

from __future__ import annotations

import collections
import functools
import io
import math
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from softprompt_jax.checkpoints.tensors import Index, Tensor, whole
from softprompt_jax.config import UserError

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_PICKLE_LIMIT = 1 << 26  # bytes; of a T5 XXL it is about 100 kB
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch before 1.6 begin
_NEEDED = "expected a file that torch.save wrote (1.6 or newer) with tensors only"


def open_torch(path: Path) -> dict[str, Tensor]:
    """Open a `.bin` or `.pt` file that holds a dictionary of tensors; no numbers are read yet.

    Raises UserError for anything else: other names in the pickle, compressed or truncated storages, old formats.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_LEGACY)) == _LEGACY:
                raise UserError(
                    f"{path}: the format of torch before 1.6; {_NEEDED}; load and save it again with a newer torch"
                )
            archive = zipfile.ZipFile(file)
            entries = {entry.filename: entry for entry in archive.infolist()}
            (name,) = [name for name in entries if name.endswith("/data.pkl")]
            folder = name.removesuffix("data.pkl")
            order = f"{folder}byteorder"
            if order in entries and _content(archive, order) != b"little":
                raise UserError(f"{path}: written on a big-endian machine; expected little-endian numbers")
            values = _Unpickler(_content(archive, name), path).load()
    except FileNotFoundError:
        raise UserError(f"{path}: missing; expected every file that the index names") from None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        raise UserError(f"{path}: not a complete file of torch ({error}); {_NEEDED}; download it again") from None
    storages = _Storages(path, folder, entries)
    tensors = {}
    for name, rebuilt in dict.items(values) if isinstance(values, dict) else [(None, None)]:
        if not isinstance(name, str) or not isinstance(rebuilt, tuple):
            raise UserError(f"{path}: holds other things than tensors by name; {_NEEDED}")
        try:
            storage, offset, shape, strides = rebuilt
            tensors[name] = storages.tensor(name, storage, offset, shape, strides)
        except (ValueError, TypeError, OSError) as error:
            raise UserError(f"{path}: tensor {name} cannot be read ({error}); {_NEEDED}") from None
    return tensors


# Opcodes that no tensor needs: what hashes values of the file's choice, and an allocation before its bytes are there.
_REFUSED = (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8)


class _Unpickler(pickle._Unpickler):
    """An unpickler that knows three kinds of names and makes only tuples and strings of them.

    These are what the file says of a tensor; they are checked when the tensor is made. Of the two that Python has this
    is the one in Python: the one in C would hash any key of a dictionary, and a tuple of tuples can take years.
    """

    dispatch: ClassVar[Any] = {
        code: function for code, function in pickle._Unpickler.dispatch.items() if bytes([code]) not in _REFUSED
    }

    def __init__(self, pickled: bytes, path: Path):
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self._path = path

    stack: list[Any]
    pop_mark: Any

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, str) for key in items[::2]):
            raise ValueError("a key that is no text")
        dict.update(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    dispatch |= {pickle.DICT[0]: load_dict, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}

    def load(self) -> Any:
        try:
            return super().load()
        except UserError:
            raise
        except Exception as error:  # a pickle that was tampered with may fail in any way
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{self._path}: its pickle cannot be read ({reason}); {_NEEDED}") from None

    def find_class(self, module_name: str, global_name: str) -> Any:
        match module_name, global_name:
            case "collections", "OrderedDict":
                return lambda: collections.OrderedDict()
            case "torch._utils", "_rebuild_tensor_v2":
                return lambda *parts: parts[:4]  # a new function each time: what a file sets on it dies with it
            case "torch._utils", "_rebuild_parameter":
                return lambda *parts: parts[0]
            case "torch" | "torch.storage", name if name in _STORAGES:
                return name
        raise UserError(
            f"{self._path}: asks for {module_name}.{global_name}, which no tensor needs; {_NEEDED}; "
            "nothing of it was run; use another source of these weights"
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _Storages:
    """The storages of an archive, memory-mapped."""

    def __init__(self, path: Path, folder: str, entries: dict[str, zipfile.ZipInfo]):
        self._path, self._folder, self._entries = path, folder, entries
        self._file = np.asarray(np.memmap(path, np.uint8, "r"))
        self._bytes, self._confirm = functools.cache(self._map), functools.cache(self._compare)

    def tensor(self, name: str, storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """Return the tensor that lies in a storage with these strides, which count numbers."""
        kind, type_name, key, _, count = storage
        if kind != "storage" or not isinstance(type_name, str) or type_name not in _STORAGES:
            raise ValueError("its storage has no known type")
        for number in (offset, count, *shape, *strides):
            if type(number) is not int or not 0 <= number < 1 << 40:
                raise ValueError("its shape is no list of numbers")
        if not isinstance(key, str):
            raise ValueError("its storage has no name")
        dtype = np.dtype(_STORAGES[type_name])
        entry = self._entry(key, count * dtype.itemsize)
        numbers = self._bytes(entry.filename).view(dtype)
        last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        # The second condition: with strides of 0 a small storage could give an array of any size.
        if math.prod(shape) and (last >= count or math.prod(shape) > count):
            raise ValueError(f"its shape {list(shape)} does not fit its storage of {count} numbers")
        view = np.lib.stride_tricks.as_strided(
            numbers[offset:], shape, [stride * dtype.itemsize for stride in strides], writeable=False
        )

        def part(index: Index) -> np.ndarray:
            if index == whole(shape):
                self._confirm(entry.filename)
            return np.array(view[index], order="C")

        return Tensor(name, tuple(shape), part, entry.CRC != 0, str(self._path))

    def _entry(self, key: str, size: int) -> zipfile.ZipInfo:
        name = f"{self._folder}data/{key}"
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"no storage {name}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size:
            raise ValueError(f"its storage {name} is compressed or has {entry.file_size} bytes instead of {size}")
        return entry

    def _map(self, name: str) -> np.ndarray:
        """Return an entry's bytes, which begin behind a header of its own, whose name and extra field vary."""
        entry = self._entries[name]
        header = self._file[entry.header_offset :][:30].tobytes()
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"no header for {name}")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if len(found := self._file[start : start + entry.file_size]) < entry.file_size:
            raise ValueError(f"the file ends within its storage {name}")
        return found

    def _compare(self, name: str) -> None:
        """Compare a storage with its checksum; torch can be told to write none (0)."""
        if self._entries[name].CRC not in (0, zlib.crc32(self._bytes(name).data)):
            raise ValueError("its checksum does not fit: numbers were changed")


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a small entry's content, which its checksum confirms."""
    entry = archive.getinfo(name)
    if entry.file_size > _PICKLE_LIMIT:
        raise ValueError(f"{name} has {entry.file_size} bytes")
    return archive.read(entry)
