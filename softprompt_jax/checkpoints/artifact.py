"""What a run leaves for others: prompt rows and trained weights as files, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from softprompt_jax.checkpoints import t5x
from softprompt_jax.checkpoints.backbone import fingerprint
from softprompt_jax.checkpoints.tensors import CHECKSUMS, checksums, open_safetensors
from softprompt_jax.config import UserError
from softprompt_jax.distributed import cloud_files
from softprompt_jax.methods import Trainable
from softprompt_jax.models.t5 import T5
from softprompt_jax.trees import flatten, unflatten

PROMPT_FILE, TRAINED_FILE = "prompt.safetensors", "trained.safetensors"
ROWS = "prompt"


def save_trained(model: T5, path: Path, metadata: dict[str, str]) -> None:
    """Write everything that trains as float32 under its path in the model, with `metadata`."""
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(nnx.to_pure_dict(nnx.state(model, Trainable))).items()}
    if "fingerprint" not in metadata:
        metadata = metadata | {"fingerprint": fingerprint(model)}
    write_tensors(arrays, path, metadata)


def load_trained(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read `trained.safetensors` back as a nested dictionary and its metadata."""
    arrays, metadata = read_tensors(path)
    return unflatten({name: jnp.asarray(value) for name, value in arrays.items()}), metadata


def read_trained(source: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a finished run has trained, by its folder or the file in it, as `load_trained` does."""
    path = Path(source)
    return load_trained(path / TRAINED_FILE if path.is_dir() else path)


def save_prompt(rows: Float[np.ndarray, "P D"], path: Path, metadata: dict[str, str]) -> None:
    """Write prompt rows (never ids, so that they fit every tokenizer and table size)."""
    write_tensors({ROWS: np.asarray(rows, np.float32)}, path, metadata | {"length": str(len(rows))})


def own_prompt_file(folder: Path, task: str) -> Path:
    """Return where a run with a prompt for each task leaves that of one task."""
    return folder / "prompts" / f"{task}.safetensors"


def load_prompt(source: str | Path) -> Float[np.ndarray, "P D"]:
    """Return prompt rows, float32 [P, D], of a `.npy` or safetensors file, a run folder or a T5X prompt tuning run."""
    return read_prompt(source)[0]


def read_prompt(source: str | Path) -> tuple[Float[np.ndarray, "P D"], dict[str, str]]:
    """Return prompt rows and the metadata that stands with them (none in a `.npy`)."""
    if cloud_files.is_remote(source) and (
        str(source).endswith((".npy", ".safetensors")) or cloud_files.exists(f"{source}/config.yaml")
    ):
        source = cloud_files.local(source)
    path = Path(source)
    if not (path / PROMPT_FILE).exists() and (checkpoint := t5x.find_checkpoint(source)) is not None:
        opened = t5x.Checkpoint(checkpoint)
        return opened.prompt(), {"step": str(opened.step)}
    if path.is_dir():
        path = path / PROMPT_FILE
        if not path.exists():
            made = {file.name for file in Path(source).iterdir()}
            own = sorted(file.name for file in own_prompt_file(Path(source), "").parent.glob("*.safetensors"))
            if own:
                raise UserError(
                    f"{source}: has a prompt for each task ({', '.join(own)}); expected one prompt; "
                    f"give one of the files in {own_prompt_file(Path(source), '').parent}"
                )
            hint = "it trained no prompt" if "result.json" in made else "its run has not finished"
            hint = hint if "config.yaml" in made else "it is not a run folder"
            raise UserError(f"{source}: no {PROMPT_FILE} ({hint}); expected the folder of a finished prompt run")
    if not path.exists():
        raise UserError(f"{source}: no such file; expected prompt rows as .npy, .safetensors or a run folder")
    if path.suffix == ".safetensors":
        arrays, metadata = read_tensors(path)
        if ROWS not in arrays:
            raise UserError(f"{path}: holds {', '.join(list(arrays)[:3])}; expected a tensor named {ROWS!r}")
        rows = arrays[ROWS]
    else:
        metadata = {}
        try:
            rows = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: not a .npy array ({error}); expected prompt rows") from None
        if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "fiu" or not np.isfinite(rows).all():
            raise UserError(f"{path}: not an array of finite numbers; expected prompt rows as .npy or .safetensors")
    if rows.ndim != 2 or not len(rows):
        raise UserError(f"{path}: found shape {list(rows.shape)}; expected prompt rows [P, D]")
    return np.asarray(rows, np.float32), metadata


def check_backbone(
    metadata: dict[str, str],
    model: T5,
    where: str,
    backbone: str,
    hint: str = "give the one it was trained on, or say --any-backbone",
) -> None:
    """Refuse a prompt or adapter that was trained on another backbone."""
    known, found = metadata.get("fingerprint"), fingerprint(model)
    if known is not None and known != found:
        raise UserError(
            f"{where}: trained on backbone {metadata.get('backbone', '?')} ({known}), used on {backbone} ({found}); "
            f"expected the same backbone; {hint}"
        )


def write_tensors(arrays: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors with metadata at once or not at all; equal content gives equal bits."""
    temporary = path.with_suffix(".partial")
    try:
        arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        save_file(arrays, temporary, metadata=metadata | checksums(arrays))
        _sort_metadata(temporary)
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be written ({error}); expected a writable folder with space") from None


def _sort_metadata(path: Path) -> None:
    """Sort a file's metadata, which safetensors writes in another order each time: equal content, equal bits."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        assert len(content) == size
        file.seek(8)
        file.write(content)


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors of a safetensors file, checked if it has checksums, and its metadata without these."""
    if not path.exists():
        raise UserError(f"{path}: no such file; expected a safetensors file")
    tensors = open_safetensors(path)
    try:
        arrays = {name: tensor.read() for name, tensor in tensors.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return arrays, read_metadata(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Read what a safetensors file says of itself, but for its checksums."""
    with safe_open(path, framework="numpy") as opened:
        return {name: value for name, value in (opened.metadata() or {}).items() if name != CHECKSUMS}


def dump(value: Any, path: Path) -> None:
    """Write JSON at once or not at all."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
