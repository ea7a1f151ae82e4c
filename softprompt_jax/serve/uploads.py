"""Uploaded prompts: read from the bytes of a file, and kept in a folder where the server has one for them."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors.numpy import save

from softprompt_jax.checkpoints.artifact import ROWS
from softprompt_jax.config import UserError
from softprompt_jax.files import writable
from softprompt_jax.inference.bank import PromptBank
from softprompt_jax.inference.prompt_cache import HostPrompt
from softprompt_jax.serve.limits import RequestError

_NPY = b"\x93NUMPY"
_FILE, _PARTIAL = ".safetensors", ".upload"


class Store:
    """A folder with a file for each uploaded prompt, which are in the bank again when the server starts again."""

    def __init__(self, folder: str | Path):
        """Open the folder, which is made if there is none. Errors: UserError for one that cannot be written."""
        with writable(folder, folder=True) as self.folder:
            for path in self.folder.glob(f"*{_PARTIAL}"):  # of a server that was killed
                path.unlink()

    @property
    def names(self) -> set[str]:
        """The names of all prompts in it."""
        return {path.stem for path in self.folder.glob(f"*{_FILE}")}

    def load(self, bank: PromptBank) -> None:
        """Add its prompts to a bank, also in the place of those that have their names. Errors: UserError."""
        for name in sorted(self.names):
            path = self._file(name)
            try:
                bank.add(name, path)
            except UserError as error:
                raise UserError(f"{path}: {error}; move the file away to start without it") from None

    def write(self, data: bytes, prompt: HostPrompt) -> Path:
        """Write an uploaded file, and return where it lies until `keep`."""
        data = save({ROWS: prompt.rows}) if data.startswith(_NPY) else data
        with _no_room(), tempfile.NamedTemporaryFile(dir=self.folder, suffix=_PARTIAL, delete=False) as file:
            file.write(data)
        return Path(file.name)

    def keep(self, name: str, written: Path) -> None:
        """Give a written file the name of its prompt."""
        with _no_room():
            written.replace(self._file(name))

    def remove(self, name: str) -> None:
        """Forget a prompt; it may be none of the folder."""
        with _no_room():
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{_FILE}"


@contextlib.contextmanager
def _no_room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = f"server: its store cannot be written ({error.strerror})"
        raise RequestError(507, f"{found}; expected a folder with space; nothing has changed") from None


def read_prompt(bank: PromptBank, name: str, data: bytes) -> HostPrompt:
    """Read the bytes of a prompt file. Errors: RequestError, without a path of the server."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (f"{name}.npy" if data.startswith(_NPY) else f"{name}{_FILE}")
        path.write_bytes(data)
        try:
            return bank.read(name, path)
        except UserError as error:
            message = str(error).replace(f"{folder}/", "").replace(bank.backbone.identity, bank.bare)
        except Exception as error:  # whatever a hostile file does to what reads it, it is the sender's fault
            print(f"softprompt: upload of {path.name}: {type(error).__name__}: {error!s:.200}", file=sys.stderr)
            message = f"{path.name}: cannot be read ({type(error).__name__}); expected a prompt file of ours"
        raise RequestError(422, message.replace(str(bank.backbone.folder), bank.bare))
