"""Files on gs:// and s3://, through fsspec and the extra `cloud`: data and runs in, exports and runs out."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from softprompt_jax.config import UserError, cache_folder
from softprompt_jax.files import writable

SCHEMES = ("gs://", "s3://")
CHECKPOINTS, LOCK_FILE = "checkpoints", "lock.json"
# Where the errors of the clouds' clients are defined, besides OSError and ValueError.
_CLIENTS = {"aiohttp", "botocore", "fsspec", "gcsfs", "google", "s3fs", "urllib3"}


def is_remote(place: str | Path) -> bool:
    """Is it on gs:// or s3://?"""
    return str(place).startswith(SCHEMES)


def local(place: str | Path) -> Path:
    """Return the path itself, or that of a copy of a remote file or folder, which stays until the remote one changes.

    Checkpoints are left out. Errors: UserError where there is nothing, or nothing that may be read.
    """
    if not is_remote(place):
        return Path(place)
    with explain_errors(place, "read"):
        files = _files(place)
        if not files:
            raise UserError(f"{place}: nothing there; expected a file or a folder")
        state = hashlib.sha256(repr(sorted((name, version) for name, (_, version) in files.items())).encode())
        copy = cache_folder() / "remote" / f"{state.hexdigest()[:16]}" / PurePosixPath(str(place)).name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=copy.parent) as partial:
                made = Path(partial) / copy.name
                _download(place, files, made)
                with contextlib.suppress(OSError):  # another process was faster
                    made.replace(copy)
        return copy


@contextlib.contextmanager
def writing(place: str | Path) -> Iterator[Path]:
    """Give the path itself, or a local one that goes to the remote place when all is written; see `files.writable`."""
    if not is_remote(place):
        with writable(place) as path:
            yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        with writable(Path(temporary) / PurePosixPath(str(place)).name) as made:
            yield made
        with explain_errors(place, "written"):
            for file in [made] if made.is_file() else sorted(path for path in made.rglob("*") if path.is_file()):
                _upload(file, _join(place, file.relative_to(made)))


class RunFolder:
    """A run's folder: local, or gs:// behind a local one of this process, whose files follow.

    `path` is where files are read and written, `checkpoints` where Orbax writes by itself. `check` is called before
    anything is sent.
    """

    def __init__(self, place: str | Path):
        if str(place).startswith("s3://"):
            raise UserError(
                f"{place}: a run's checkpoints cannot go to s3, which Orbax does not know; expected a folder or gs://; "
                "train there, then export to s3://"
            )
        self.place, self.remote = str(place), is_remote(place)
        self.checkpoints = f"{self.place.rstrip('/')}/{CHECKPOINTS}"
        self._temporary = tempfile.TemporaryDirectory() if self.remote else None
        self.path = Path(place if self._temporary is None else self._temporary.name)
        self._known: dict[Path, tuple[int, int]] = {}
        self.check: Callable[[], None] = lambda: None

    def fetch(self) -> None:
        """Bring what the remote folder holds."""
        if self.remote:
            with explain_errors(self.place, "read"):
                _download(self.place, _files(self.place), self.path)
            self._known = {file: _state(file) for file in self._files()}

    def send(self) -> None:
        """Write what has changed since to the remote folder, and remove there what is gone here."""
        self.check()
        if self.remote:
            for file in [file for file in self._known if not file.exists()]:
                remove_object(_join(self.place, file.relative_to(self.path)))
                del self._known[file]
            for file in sorted(self._files(), key=lambda file: file.name == "result.json"):  # last: it says finished
                if self._known.get(file) != (state := _state(file)):
                    with explain_errors(self.place, "written"):
                        _upload(file, _join(self.place, file.relative_to(self.path)))
                    self._known[file] = state

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Name the place, not the local folder, in what is refused; end without leaving one."""
        try:
            yield
        except UserError as error:
            error.args = (str(error).replace(str(self.path), self.place),)
            raise
        finally:
            if self._temporary is not None:
                self._temporary.cleanup()

    def _files(self) -> list[Path]:
        return sorted(path for path in self.path.rglob("*") if path.is_file() and path.suffix != ".partial")


def exists(place: str) -> bool:
    """Is there a file of this name? Without the extra `cloud` nothing is."""
    try:
        filesystem = _filesystem(place)
    except ImportError:
        return False
    with explain_errors(place, "read"):
        return filesystem.exists(_key(place))


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _join(place: str | Path, path: Path) -> str:
    return str(place).rstrip("/") + ("" if path == Path() else f"/{path.as_posix()}")


def _filesystem(place: str | Path) -> Any:
    import fsspec

    return fsspec.filesystem(str(place).partition("://")[0])


def _key(place: str | Path) -> str:
    return str(place).partition("://")[2].rstrip("/")


def _files(place: str | Path) -> dict[str, tuple[str, str]]:
    """Return (key, version) of every file below a place by its name from there ("" if it is a file itself).

    Checkpoints and the lock of a run folder are left out.
    """
    filesystem = _filesystem(place)
    filesystem.invalidate_cache()
    root = _key(place)
    found = {}
    for key, about in filesystem.find(root, detail=True).items():
        name = key.lstrip("/")[len(root) :].strip("/")
        if about["type"] == "file" and CHECKPOINTS not in PurePosixPath(name).parts and name != LOCK_FILE:
            version = about.get("etag") or about.get("ETag") or about.get("generation") or about.get("size")
            found[name] = (key, f"{place} {version}")
    return found


def _download(place: str | Path, files: dict[str, tuple[str, str]], to: Path) -> None:
    filesystem = _filesystem(place)
    for name, (key, _) in files.items():
        path = (to / name).resolve()
        if not path.is_relative_to(to.resolve()):
            raise UserError(f"{place}: holds the name {name!r}; expected names below it; rename the file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.open(key, "rb") as source, path.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 22)


def _upload(file: Path, place: str) -> None:
    _filesystem(place).put_file(os.fspath(file), _key(place))


def read_object(place: str) -> bytes | None:
    """Return the content of one remote file as it is now; None if there is no such file."""
    with explain_errors(place, "read"):
        try:
            return _filesystem(place).cat_file(_key(place))
        except FileNotFoundError:
            return None


def create_object(place: str, content: bytes) -> bool:
    """Write a remote file unless there is one already, and tell whether it now holds this content."""
    with explain_errors(place, "written"):
        try:
            _filesystem(place).pipe_file(_key(place), content, mode="create")
            return True
        except FileExistsError:  # also where the answer to our own request was lost, and it was sent again
            return read_object(place) == content


def write_object(place: str, content: bytes) -> None:
    """Write a remote file, whether or not there is one."""
    with explain_errors(place, "written"):
        _filesystem(place).pipe_file(_key(place), content)


def remove_object(place: str) -> None:
    """Remove a remote file, if it is there."""
    with explain_errors(place, "written"), contextlib.suppress(FileNotFoundError):
        _filesystem(place).rm_file(_key(place))


@contextlib.contextmanager
def explain_errors(place: str | Path, done: str) -> Iterator[None]:
    """Say in one line why a remote place cannot be `done`: read or written. Other errors are defects and pass."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{place}: needs the extra `cloud` ({error}); make install EXTRAS=dev,cloud") from None
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{place}: cannot be {done} ({reason}); expected a bucket that exists and credentials for it; "
            "see `gcloud auth application-default login` or `aws configure`"
        ) from None
