"""Writing to the local disk, whose refusals are the user's to mend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from softprompt_jax.config import UserError


@contextlib.contextmanager
def writable(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """Make the folder of a file (or `folder`: the folder itself) and give the path, to be written inside the block.

    Errors: UserError for every OSError of the block, in one line.
    """
    path = Path(path)
    try:
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        expected = "a writable folder" if folder else "a file in a writable folder"
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); expected {expected}") from None
