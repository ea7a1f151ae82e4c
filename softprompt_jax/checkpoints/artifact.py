"""What a run has trained, as files: how they are written, and the one way in which all of them are read.

load_artifact(source)   anything: a run's folder, finished or not, a prompt file, a T5X prompt tuning run
load_prompt(source)     the rows [P, D] of what is a prompt
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from softprompt_jax import config
from softprompt_jax.checkpoints import t5x
from softprompt_jax.checkpoints.backbone import fingerprint
from softprompt_jax.checkpoints.tensors import CHECKSUMS, checksums, open_safetensors
from softprompt_jax.checkpoints.training_state import best_or_latest
from softprompt_jax.config import UserError
from softprompt_jax.distributed import cloud_files
from softprompt_jax.methods import Trainable
from softprompt_jax.models.t5 import T5
from softprompt_jax.trees import flatten, unflatten

CONFIG_FILE, PROMPT_FILE, TRAINED_FILE = "config.yaml", "prompt.safetensors", "trained.safetensors"
ROWS = "prompt"


# ------------------------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What a run has trained, and what it says of itself.

    `rows` are a prompt's, float32; None: it trained anything else, which is in `tree`. `step` is that of a checkpoint,
    from which a run is read that has not finished.
    """

    source: str
    metadata: dict[str, str]
    rows: Float[np.ndarray, "P D"] | None = None
    step: int | None = None
    folder: Path | None = None  # of the run
    read_tree: Callable[[], dict[str, Any]] | None = None  # None: the rows are all

    @functools.cached_property
    def tree(self) -> dict[str, Any]:
        """All trained arrays, nested by their paths in the model; they are read when they are first asked for."""
        return {"prompt": {"rows": jnp.asarray(self.rows)}} if self.read_tree is None else self.read_tree()

    @property
    def prompt(self) -> Float[np.ndarray, "P D"]:
        """The prompt rows. Errors: UserError where it is no prompt."""
        if self.rows is not None:
            return self.rows
        if own := self.own_prompts:
            names = ", ".join(path.name for path in own)
            raise UserError(
                f"{self.source}: has a prompt for each task ({names}); expected one prompt; give one of the files in "
                f"{own[0].parent}"
            )
        if self.folder is None:
            found = ", ".join([*flatten(self.tree)][:3])
            raise UserError(f"{self.source}: holds {found}; expected a tensor named {ROWS!r}")
        why = "it trained no prompt" if self.step is None else f"its run has not finished, it is at step {self.step}"
        raise UserError(f"{self.source}: no {PROMPT_FILE} ({why}); expected the folder of a finished prompt run")

    @property
    def place(self) -> str:
        """Where the rows stand."""
        return self.metadata.get("place", "before")

    @property
    def own_prompts(self) -> list[Path]:
        """The files of a run that has trained a prompt for each of its tasks."""
        return [] if self.folder is None else sorted(own_prompt_file(self.folder, "*").parent.glob("*.safetensors"))

    @functools.cached_property
    def settings(self) -> dict[str, Any] | None:
        """The settings of the run; None: it does not say. Errors: UserError for settings that cannot be read."""
        if self.folder is not None and (self.folder / CONFIG_FILE).exists():
            return config.read(self.folder / CONFIG_FILE)
        try:
            return json.loads(self.metadata["settings"]) if "settings" in self.metadata else None
        except ValueError as error:
            raise UserError(
                f"{self.source}: its settings are not JSON ({error}); expected those of a run; export it again"
            ) from None

    @property
    def backbone(self) -> str | None:
        """The name of the backbone that it was trained on; None: it does not say, or it was one of random weights."""
        named = self.metadata.get("backbone") if self.settings is None else self.settings.get("backbone", "embedded")
        return named if isinstance(named, str) else None

    def check_backbone(self, found: str, backbone: str, hint: str = "", where: str | None = None) -> None:
        """Refuse a backbone with the fingerprint `found`, called `backbone`, if it is not the one of the training."""
        check_fingerprint(self.metadata, found, where or self.source, backbone, hint)


def load_artifact(source: str | Path) -> Artifact:
    """Read what a run has trained.

    `source`: a run's folder (of one that has not finished its best checkpoint, or else its latest), a prompt file
    (`.npy`, `.safetensors`), a file of trained arrays (`.safetensors`), or a T5X prompt tuning run; here or on gs://.
    Errors: UserError for what is none of these, or damaged; rows must be finite.
    """
    path, name = Path(source), str(source)
    if cloud_files.is_remote(source) and (
        path.suffix in (".npy", ".safetensors") or cloud_files.exists(f"{source}/{CONFIG_FILE}")
    ):
        path = cloud_files.local(source)
    if path.is_file():
        return _read_file(path, name)
    own, trained = path / PROMPT_FILE, path / TRAINED_FILE
    read_trained = functools.partial(_read_tree, trained) if trained.exists() else None
    if own.exists():
        return dataclasses.replace(_read_file(own, name), folder=path, read_tree=read_trained)
    if read_trained is not None:
        return Artifact(name, read_metadata(trained), folder=path, read_tree=read_trained)
    if (path / CONFIG_FILE).exists():
        tree, step = best_or_latest(source if cloud_files.is_remote(source) else path)
        return Artifact(name, {}, step=step, folder=path, read_tree=lambda: jax.tree.map(jnp.asarray, tree))
    if (checkpoint := t5x.find_checkpoint(source)) is not None:
        opened = t5x.Checkpoint(checkpoint)
        return Artifact(name, {"step": str(opened.step)}, opened.prompt())
    if path.is_dir():
        raise UserError(
            f"{source}: no {PROMPT_FILE} or {TRAINED_FILE} (it is not a run folder); expected the folder of a run"
        )
    raise UserError(f"{source}: no such file; expected prompt rows as .npy, .safetensors or a run folder")


def load_prompt(source: str | Path) -> Float[np.ndarray, "P D"]:
    """Return prompt rows, float32 [P, D], of a `.npy` or safetensors file, a run folder or a T5X prompt tuning run."""
    return load_artifact(source).prompt


def named_backbone(artifacts: Sequence[Artifact], given: str | None = None) -> str:
    """Return the backbone that is given, or the first that one of some artifacts says that it was trained on."""
    found = given or next((name for one in artifacts if (name := one.backbone) is not None), None)
    if found is None:
        raise UserError(
            f"{artifacts[0].source}: says no backbone; expected one; add --backbone with a folder or hub name"
        )
    return found


def check_fingerprint(metadata: dict[str, str], found: str, where: str, backbone: str, hint: str = "") -> None:
    """Refuse what says that it was trained on a backbone of another fingerprint."""
    known = metadata.get("fingerprint")
    if known is not None and known != found:
        raise UserError(
            f"{where}: trained on backbone {metadata.get('backbone', '?')} ({known}), used on {backbone} ({found}); "
            f"expected the same backbone; {hint or 'give the one it was trained on, or say --any-backbone'}"
        )


def _read_file(path: Path, name: str) -> Artifact:
    if path.suffix == ".safetensors":
        if ROWS not in open_safetensors(path):
            return Artifact(name, read_metadata(path), read_tree=functools.partial(_read_tree, path))
        arrays, metadata = read_tensors(path)
        rows = arrays[ROWS]
    else:
        metadata = {}
        try:
            rows = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: not a .npy array ({error}); expected prompt rows") from None
        if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "fiu":
            raise UserError(f"{path}: not an array of finite numbers; expected prompt rows as .npy or .safetensors")
    if rows.ndim != 2 or not len(rows):
        raise UserError(f"{path}: found shape {list(rows.shape)}; expected prompt rows [P, D]")
    rows = np.asarray(rows, np.float32)
    if not np.isfinite(rows).all():
        raise UserError(f"{path}: not an array of finite numbers; expected prompt rows [P, D]")
    return Artifact(name, metadata, rows)


def _read_tree(path: Path) -> dict[str, Any]:
    return unflatten({name: jnp.asarray(value) for name, value in read_tensors(path)[0].items()})


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


# ------------------------------------------------------------------------------------------------------- writing


def save_trained(model: T5, path: Path, metadata: dict[str, str]) -> None:
    """Write everything that trains as float32 under its path in the model, with `metadata`."""
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(nnx.to_pure_dict(nnx.state(model, Trainable))).items()}
    if "fingerprint" not in metadata:
        metadata = metadata | {"fingerprint": fingerprint(model)}
    write_tensors(arrays, path, metadata)


def save_prompt(rows: Float[np.ndarray, "P D"], path: Path, metadata: dict[str, str]) -> None:
    """Write prompt rows (never ids, so that they fit every tokenizer and table size)."""
    write_tensors({ROWS: np.asarray(rows, np.float32)}, path, metadata | {"length": str(len(rows))})


def own_prompt_file(folder: Path, task: str) -> Path:
    """Return where a run with a prompt for each task leaves that of one task."""
    return folder / "prompts" / f"{task}.safetensors"


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


def dump(value: Any, path: Path) -> None:
    """Write JSON at once or not at all."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
