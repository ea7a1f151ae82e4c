"""The local disk, whose refusals are the user's to mend."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from softprompt_jax.config import UserError, cache_folder

_JSON_BYTES, _JSON_LEVELS = 1 << 26, 64
CHECKSUM_FILE = "checksums.json"


@contextlib.contextmanager
def writable(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """Make the folder of a file (or `folder`: the folder itself) and give the path, to be written inside the block.

    Errors: UserError for every OSError of the block, also one that safetensors wraps, in one line.
    """
    path = Path(path)
    with refusals(path, folder):
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        yield path


@contextlib.contextmanager
def refusals(path: Path, folder: bool = False) -> Iterator[None]:
    """Tell every OSError of the block as `writable` does; nothing is made."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        expected = f"a {'' if folder else 'file in a '}writable folder with space"
        expected += "; set SOFTPROMPT_CACHE" if path.is_relative_to(cache_folder()) else ""
        raise UserError(f"{path}: cannot be written ({reason}); expected {expected}") from None


@contextlib.contextmanager
def written_whole(path: Path, shared: bool = False) -> Iterator[Path]:
    """Give a path to write instead of `path`; the file takes its own name when the block ends without an error.

    So other processes see the whole file or none. What a killed process leaves is written over by the next one, except
    where several may write at the same time (`shared`). Errors: as `writable`.
    """
    with writable(path), contextlib.ExitStack() as opened:
        partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        if shared:
            partial = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=path.parent))) / path.name
        yield partial
        partial.replace(path)


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write the CRC-32 of small files of a folder, beside them, for `check_files`; weights have their own."""
    sums = {name: zlib.crc32((folder / name).read_bytes()) for name in sorted(names)}
    (folder / CHECKSUM_FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def check_files(folder: Path) -> None:
    """Refuse a folder in which a file is no longer what was written. Errors: UserError names the file."""
    if not (folder / CHECKSUM_FILE).exists():
        return
    for name, known in read_object(folder / CHECKSUM_FILE, "the checksums of the files beside it").items():
        if not (path := folder / Path(name).name).is_file() or zlib.crc32(path.read_bytes()) != known:
            raise UserError(
                f"{path}: is not as it was written ({CHECKSUM_FILE}); expected the same bytes; write the folder again, "
                f"or delete {CHECKSUM_FILE} if you have changed the file"
            )


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON that somebody else wrote.

    Errors: ValueError, too for more than 64 MiB or 64 levels, which no settings and no index have.
    """
    if len(text) > _JSON_BYTES:
        raise ValueError(f"of more than {_JSON_BYTES} bytes")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [found]
    for _ in range(_JSON_LEVELS):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        if not (level := list(itertools.chain.from_iterable(inner))):
            return found
    raise ValueError("nested too deeply")


def read_object(path: Path, expected: str) -> dict[str, Any]:
    """Read a JSON object. Errors: UserError, which says what was `expected`, for any other file."""
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise ValueError(f"of more than {_JSON_BYTES} bytes")
        found = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name}; expected {expected}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); expected {expected}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type(found).__name__}; expected {expected}, a JSON object")
    return found
