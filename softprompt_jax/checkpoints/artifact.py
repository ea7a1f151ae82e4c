"""What a run has trained, as files: how they are written, and the one way in which all of them are read.

load_artifact(source)   anything: a run's folder, finished or not, a prompt file, a T5X prompt tuning run, a hub name
load_prompt(source)     the rows [P, D] of what is a prompt
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tokenize
from collections.abc import Callable, Mapping
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
from softprompt_jax.checkpoints import hugging_face, t5x
from softprompt_jax.checkpoints.backbone import fingerprint
from softprompt_jax.checkpoints.tensors import CHECKSUMS, Tensor, checksums, finite_float32, open_safetensors
from softprompt_jax.checkpoints.training_state import best_or_latest
from softprompt_jax.config import UserError, first_line
from softprompt_jax.distributed import cloud_files
from softprompt_jax.distributed.mesh import put_sharded
from softprompt_jax.files import parse_json, read_object, written_whole
from softprompt_jax.methods import Trainable
from softprompt_jax.methods.reparameterization import expanded, is_compact
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.trees import flatten, unflatten

CONFIG_FILE, PROMPT_FILE, TRAINED_FILE = "config.yaml", "prompt.safetensors", "trained.safetensors"
COMPACT_FILE = "prompt_compact.safetensors"  # of a prompt that follows from fewer numbers and a seed (ULPT)
PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Of a repository on the hub: what a run leaves, and what PEFT writes.
_HUB_FILES = (CONFIG_FILE, "result.json", PROMPT_FILE, COMPACT_FILE, TRAINED_FILE, PEFT_CONFIG, PEFT_TENSORS)
ROWS = "prompt"
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_DEEPEST = 64  # parts of a tensor's path
# What NumPy raises for the header of a file that is none: it is read as a Python literal.
_NO_ARRAY = (ValueError, OSError, EOFError, SyntaxError, TypeError, OverflowError, RecursionError, MemoryError)
_NO_ARRAY += (tokenize.TokenError, KeyError)


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
    tensors: Callable[[], dict[str, Tensor]] | None = None  # trained arrays by their paths; None: the rows are all

    @functools.cached_property
    def tree(self) -> dict[str, Any]:
        """All trained arrays, nested by their paths in the model; they are read when they are first asked for."""
        if self.tensors is None:
            return {"prompt": {"rows": jnp.asarray(self.rows)}}
        return self._nested(lambda path, tensor: jnp.asarray(self._float32(path, tensor.read())))

    @property
    def abstract_tree(self) -> dict[str, Any]:
        """The shapes of all trained arrays, nested as in `tree`; nothing is read."""
        if self.tensors is None:
            return jax.eval_shape(lambda: self.tree)
        return self._nested(lambda path, tensor: jax.ShapeDtypeStruct(tensor.shape, jnp.float32))

    def sharded_tree(self, shardings: Mapping[str, jax.sharding.NamedSharding]) -> dict[str, Any]:
        """Read all trained arrays, slices straight to where the sharding of each path says that they lie."""
        if self.tensors is None:
            return unflatten({path: put_sharded(rows, shardings[path]) for path, rows in flatten(self.tree).items()})

        def placed(path: str, tensor: Tensor) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                limits = zip(index, tensor.shape, strict=True)
                return self._float32(path, tensor.read(tuple(slice(*cut.indices(size)[:2]) for cut, size in limits)))

            return jax.make_array_from_callback(tensor.shape, shardings[path], part)

        return self._nested(placed)

    def _float32(self, path: str, values: np.ndarray) -> np.ndarray:
        return finite_float32(values, f"{self.source}: {path}")

    def _nested(self, made: Callable[[str, Tensor], Any]) -> dict[str, Any]:
        assert self.tensors is not None
        arrays = {path: made(path, tensor) for path, tensor in self.tensors().items()}
        try:
            if all(path.count(".") < _DEEPEST for path in arrays):
                return unflatten(arrays)
        except TypeError:  # `a` beside `a.b`
            pass
        raise UserError(
            f"{self.source}: its tensors have no paths of a model; expected what a run trained; export it again"
        )

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
            found = parse_json(self.metadata.get("settings", "null"))
            if not isinstance(found, dict | None):
                raise ValueError(f"found {type(found).__name__}")
        except ValueError as error:
            raise UserError(
                f"{self.source}: its settings are not JSON ({error}); expected those of a run; export it again"
            ) from None
        return found

    @property
    def backbone(self) -> str | None:
        """The name of the backbone that it was trained on; None: it does not say, or it was one of random weights."""
        named = self.metadata.get("backbone") if self.settings is None else self.settings.get("backbone", "embedded")
        return named if isinstance(named, str) else None

    def check_backbone(self, found: str, backbone: str, hint: str = "", where: str | None = None) -> None:
        """Refuse a backbone with the fingerprint `found`, called `backbone`, if it is not the one of the training."""
        known = self.metadata.get("fingerprint")
        if known is not None and known != found:
            raise UserError(
                f"{where or self.source}: trained on backbone {self.metadata.get('backbone', '?')} ({known}), used on "
                f"{backbone} ({found}); expected the same backbone; "
                f"{hint or 'give the one it was trained on, or say --any-backbone'}"
            )


def load_artifact(source: str | Path) -> Artifact:
    """Read what a run has trained.

    `source`: a run's folder (of one that has not finished its best checkpoint, or else its latest), a prompt file
    (`.npy`, `.safetensors`), a file of trained arrays (`.safetensors`), or a T5X prompt tuning run; here or on gs://;
    the folder of a prompt by PEFT; or OWNER/NAME on the hub, of a repository that holds one of these folders.
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
    open_trained = functools.partial(open_safetensors, trained) if trained.exists() else None
    if own.exists():
        return dataclasses.replace(_read_file(own, name), folder=path, tensors=open_trained)
    if open_trained is not None:
        return Artifact(name, read_metadata(trained), folder=path, tensors=open_trained)
    if (path / CONFIG_FILE).exists():
        tree, step = best_or_latest(source if cloud_files.is_remote(source) else path)
        return Artifact(name, {}, step=step, folder=path, tensors=lambda: _in_memory(tree))
    if (checkpoint := t5x.find_checkpoint(source)) is not None:
        opened = t5x.Checkpoint(checkpoint)
        return Artifact(name, {"step": str(opened.step)}, opened.prompt())
    if (path / PEFT_CONFIG).exists():
        return _read_peft(path, name)
    if not path.exists() and path.suffix not in (".npy", ".safetensors") and hugging_face.is_hub_name(source):
        expected = "a prompt file, a run folder, or OWNER/NAME of a prompt on the hub"
        return dataclasses.replace(
            load_artifact(hugging_face.download(source, _HUB_FILES, name, expected)), source=name
        )
    if path.is_dir():
        raise UserError(
            f"{source}: no {PROMPT_FILE} or {TRAINED_FILE} (it is not a run folder); expected the folder of a run"
        )
    raise UserError(f"{source}: no such file; expected prompt rows as .npy, .safetensors or a run folder")


def load_prompt(source: str | Path) -> Float[np.ndarray, "P D"]:
    """Return prompt rows, float32 [P, D].

    `source`: a `.npy` or safetensors file, a run folder, a T5X prompt tuning run, the folder of a prompt by PEFT, or
    OWNER/NAME of one that was pushed to the hub. Errors: UserError for what is no prompt.
    """
    return load_artifact(source).prompt


def _read_file(path: Path, name: str) -> Artifact:
    if path.suffix == ".safetensors":
        if is_compact(opened := open_safetensors(path)):
            arrays, metadata = read_tensors(path)
            arrays = {part: finite_float32(value, f"{path}: {part}") for part, value in arrays.items()}
            rows = expanded(arrays, metadata, str(path))
        elif ROWS not in opened:
            return Artifact(name, read_metadata(path), tensors=functools.partial(open_safetensors, path))
        else:
            arrays, metadata = read_tensors(path)
            rows = arrays[ROWS]
    else:
        metadata = {}
        try:
            rows = _read_npy(path)
        except _NO_ARRAY as error:
            raise UserError(f"{path}: not a .npy array ({first_line(error)[:200]}); expected prompt rows") from None
        if rows.dtype.kind not in "fiu":
            raise UserError(f"{path}: not an array of finite numbers; expected prompt rows as .npy or .safetensors")
    if rows.ndim != 2 or not rows.size:
        raise UserError(f"{path}: found shape {list(rows.shape)}; expected prompt rows [P, D]")
    return Artifact(name, metadata, finite_float32(rows, str(path)))


def _read_peft(folder: Path, name: str) -> Artifact:
    """Read the rows of PEFT's PROMPT_TUNING and P_TUNING; of a T5 the first half of what is saved is used."""
    about = read_object(folder / PEFT_CONFIG, "what PEFT has written")
    kind, length, backbone = (about.get(key) for key in ("peft_type", "num_virtual_tokens", "base_model_name_or_path"))
    if kind not in ("PROMPT_TUNING", "P_TUNING") or not isinstance(length, int) or length < 1:
        raise UserError(
            f"{name}: an adapter of PEFT of kind {kind!r} with {length!r} rows; expected PROMPT_TUNING or P_TUNING, "
            "which are prompts; load_backbone(BACKBONE, adapter=FOLDER) loads the others"
        )
    arrays, metadata = read_tensors(folder / PEFT_TENSORS)
    rows = arrays.get("prompt_embeddings")
    if rows is None or rows.ndim != 2 or len(rows) not in (length, 2 * length):
        found = "none" if rows is None else list(rows.shape)
        raise UserError(f"{name}: prompt_embeddings of shape {found}; expected [{length} or {2 * length}, its width]")
    if isinstance(backbone, str):
        metadata = {"backbone": backbone} | metadata
    return Artifact(name, metadata, finite_float32(rows[:length], name))


def _read_npy(path: Path) -> np.ndarray:
    """Read an array whose header states no more numbers than the file has. Errors: those of _NO_ARRAY."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in _NPY_HEADERS:
            raise ValueError(f"of format {version}")
        stated = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")  # NumPy makes room for so many
        if stated > path.stat().st_size:
            raise ValueError(f"its header of {stated} bytes is not in its {path.stat().st_size}")
        file.seek(np.lib.format.MAGIC_LEN)
        shape, _, dtype = _NPY_HEADERS[version](file)
        if max(math.prod(shape) * dtype.itemsize, *shape, 0) > path.stat().st_size:  # 0 x 2^64 is much, too
            raise ValueError(f"its shape {list(shape)} is not in its {path.stat().st_size} bytes")
    return np.load(path, allow_pickle=False)


def _in_memory(tree: dict[str, Any]) -> dict[str, Tensor]:
    """Return arrays of a checkpoint, which has been read, as what is read by slices."""
    return {path: Tensor(path, values.shape, values.__getitem__) for path, values in flatten(tree).items()}


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
    try:
        with safe_open(path, framework="numpy") as opened:
            return {name: value for name, value in (opened.metadata() or {}).items() if name != CHECKSUMS}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}); download it again") from None


# ------------------------------------------------------------------------------------------------------- writing


def save_trained(model: LanguageModel, path: Path, metadata: dict[str, str]) -> None:
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
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    with written_whole(path) as temporary:
        save_file(arrays, temporary, metadata=metadata | checksums(arrays))
        _sort_metadata(temporary)


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
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
