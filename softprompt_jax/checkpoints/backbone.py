"""Backbones from where they lie, slice by slice, and back: a Hugging Face folder or hub name, a T5X checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from softprompt_jax.checkpoints import quantized_folder, t5x
from softprompt_jax.checkpoints.hugging_face import (
    check,
    check_names,
    embedding_name,
    open_folder,
    parts_of,
    read_settings,
)
from softprompt_jax.checkpoints.tensors import Tensor, checksums, read_stacked, same
from softprompt_jax.config import UserError
from softprompt_jax.distributed.mesh import gather
from softprompt_jax.models.families.t5 import EMBEDDING_ALIASES, HEAD, config_of, is_stacked, names
from softprompt_jax.models.presets import hub_name
from softprompt_jax.models.quantized import Quantization, pack_layers, quantized
from softprompt_jax.models.t5 import T5, T5Settings, abstract
from softprompt_jax.trees import flatten, unflatten

EMBEDDED = Path(__file__).parent.parent / "embedded"
_IDENTITY = (
    *("vocabulary_rows", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers"),
    *("activation", "gated", "tied", "scale_output", "bias_in_every_layer", "relative_buckets"),
)
_SHARD_BYTES = 2 << 30  # of a file that is written
_PATTERNS = ("config.json", "model*.safetensors", "model.safetensors.index.json", "*.model", "tokenizer*", "special_*")
_OLD_PATTERNS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")  # where there are no safetensors


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A model with where it came from. `folder` also holds its tokenizer."""

    model: T5
    folder: Path
    identity: str

    @property
    def settings(self) -> T5Settings:
        return self.model.settings

    def fingerprint(self) -> str:
        """Hash the shapes and a sample of the embedding table, once: equal for every dtype and sharding."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.model)


def load_backbone(
    source: str | Path = "embedded",
    dtype: str = "float32",
    sharding: Callable[[nnx.Variable], jax.sharding.Sharding] | None = None,
    quantize: Quantization | None = None,
) -> Backbone:
    """Load a T5: `embedded` (the small one that ships here), a Hugging Face folder or hub name, a T5X checkpoint.

    A T5X checkpoint is a local folder or `gs://`. Weights become `dtype` on the way in; norms, softmax and
    logits compute in float32 regardless. `sharding` tells where each weight lies (default: one device): slices
    go straight there, and no process reads more than its own. `quantize` packs the kernels of the layers into int8
    or nf4 as they come in, so that the model is never whole in `dtype`. A folder that holds it quantised is one too.
    Errors: UserError names the folder, tensor or setting that does not fit.
    """
    if quantized_folder.is_quantized_folder(source):
        return Backbone(
            quantized_folder.load(source, dtype, sharding, quantize), Path(source).expanduser(), str(source)
        )
    settings, tensors, folder = open_source(source)
    model = abstract(settings, dtype)
    graphdef, state = nnx.split(model)
    table = names(settings)
    check_names(table, tensors, source)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def load(path: str, variable: nnx.Variable) -> jax.Array:
        shape = variable.shape
        tensor_names, transposed = table[path]
        parts = parts_of(tensors, tensor_names, transposed, shape[1:] if is_stacked(path) else shape)
        return jax.make_array_from_callback(
            shape,
            one_device if sharding is None else sharding(variable),
            lambda index: read_stacked(parts, shape, index, jnp.dtype(dtype)),
        )

    loaded = {}
    for path, variable in flatten(nnx.to_pure_dict(state, extract_fn=lambda variable: variable)).items():
        loaded[path] = load(path, variable)
        if quantize is not None and is_stacked(path) and path.endswith(".kernel"):
            # Reading must not run ahead of packing: the floats of many stacks would wait in memory.
            packed = jax.block_until_ready(pack_layers(loaded[path], quantize))
            loaded[path], loaded[f"{path.removesuffix('.kernel')}.scale"] = packed
    if quantize is not None:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: quantized(T5(settings, jax.random.key(0), dtype), quantize)))
    nnx.replace_by_pure_dict(state, unflatten(loaded))
    return Backbone(nnx.merge(graphdef, state), folder, str(source))


def load_adafactor(source: str | Path) -> tuple[int, dict[str, dict[str, np.ndarray]]]:
    """Return the step of a T5X checkpoint and Adafactor's slots by the path of our weight, layers stacked, float32.

    Slots are `v` [as the weight], or `v_row` and `v_col`, and `m` if there was momentum. Weights that were frozen
    have none; those of a prompt are under `prompt.rows`. The paper's model tuning starts from them.
    """
    checkpoint = t5x.find_checkpoint(source)
    if checkpoint is None:
        raise UserError(f"{source}: no T5X checkpoint; expected one, since only these hold optimizer slots")
    opened = t5x.Checkpoint(checkpoint)
    found, slots = opened.adafactor(), {}
    for path, (tensor_names, transposed) in names(opened.settings()).items():
        layers = [found.get(name, {}) for name in tensor_names]
        if any(layer.keys() != layers[0].keys() for layer in layers):
            raise UserError(f"{source}: unlike optimizer slots for the layers of {path}; expected the same for each")
        for slot in layers[0]:
            turned = transposed and not slot.startswith("v_")
            arrays = [(layer[slot].transposed() if turned else layer[slot]).read() for layer in layers]
            slots.setdefault(path, {})[slot] = np.stack(arrays) if is_stacked(path) else arrays[0]
    for name, tensors in found.items():
        if name in opened.prompts:
            slots["prompt.rows"] = {slot: tensor.read() for slot, tensor in tensors.items()}
    return opened.step, slots


def find_folder(source: str | Path) -> Path:
    """Return the local folder of a source, fetching a hub name into the hub's cache."""
    if str(source) == "embedded":
        return EMBEDDED
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
        raise UserError(f"backbone {source}: no such folder; expected a Hugging Face folder or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(source), allow_patterns=list(_PATTERNS)))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=list(_OLD_PATTERNS)))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"backbone {source}: neither a folder nor reachable on the hub ({reason}); "
            "expected a Hugging Face folder or a hub name; download it first and give its folder"
        ) from None


def save_backbone(model: T5, folder: str | Path, dtype: str = "bfloat16") -> None:
    """Write `config.json` and `model.safetensors` in Hugging Face layout (no tokenizer)."""
    settings, folder = model.settings, Path(folder)
    config = json.dumps(config_of(settings, dtype), indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    table, tensors = names(settings), {}
    for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items():
        tensor_names, transposed = table[path]
        values = np.asarray(leaf)
        for name, value in zip(tensor_names, values if is_stacked(path) else [values], strict=True):
            tensors[name] = np.ascontiguousarray((value.T if transposed else value).astype(jnp.dtype(dtype)))
    temporary = folder / "model.safetensors.partial"
    save_file(tensors, temporary, metadata={"format": "pt"} | checksums(tensors))
    temporary.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(config)


def write_backbone(settings: T5Settings, tensors: dict[str, Tensor], folder: Path, dtype: str | None = None) -> str:
    """Write opened tensors in Hugging Face layout, a file at a time, and return the fingerprint.

    `dtype`: of the weights (default: as they are). Folders that were left half written have no `config.json`.
    """
    check(settings, tensors, folder)
    wanted = [name for tensor_names, _ in names(settings).values() for name in tensor_names]
    size, files, names_in = 0, 0, {}
    shard: dict[str, np.ndarray] = {}
    found = "float32"

    def write() -> None:
        nonlocal shard, size, files
        files += 1
        save_file(shard, folder / f"model-{files:05d}.safetensors", metadata={"format": "pt"} | checksums(shard))
        names_in.update(dict.fromkeys(shard, files))
        shard, size = {}, 0

    for name in wanted:
        tensor = tensors[embedding_name(tensors) if name == EMBEDDING_ALIASES[0] else name]
        values = tensor.read()
        values = np.ascontiguousarray(values if dtype is None else values.astype(jnp.dtype(dtype)))
        found = values.dtype.name
        if shard and size + values.nbytes > _SHARD_BYTES:
            write()
        shard[name], size = values, size + values.nbytes
    write()
    if files == 1:
        (folder / "model-00001.safetensors").replace(folder / "model.safetensors")
    else:
        finals = {number: f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)}
        for number, final in finals.items():
            (folder / f"model-{number:05d}.safetensors").replace(folder / final)
        index = {"metadata": {}, "weight_map": {name: finals[number] for name, number in names_in.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config_of(settings, dtype or found), indent=2) + "\n")
    embedding = tensors[embedding_name(tensors)]
    step = _sample_step(settings.vocabulary_rows)
    rows = [embedding.read((slice(row, row + 1), slice(0, 16))) for row in range(0, settings.vocabulary_rows, step)]
    return _hashed(settings, np.concatenate(rows).astype(jnp.bfloat16))


def fingerprint(model: T5) -> str:
    """Hash a model's shapes and a sample of its embedding table as bfloat16."""
    table = model.embedding[...]
    return _hashed(model.settings, gather(table[:: _sample_step(table.shape[0]), :16].astype(jnp.bfloat16)))


def _sample_step(rows: int) -> int:
    return max(1, rows // 64)


def _hashed(settings: T5Settings, sample: np.ndarray) -> str:
    what_it_is = {name: getattr(settings, name) for name in _IDENTITY}  # by name: new settings change no hash
    return hashlib.sha256(json.dumps(what_it_is).encode() + sample.tobytes()).hexdigest()[:16]


def load_settings(source: str | Path) -> T5Settings:
    """Read what a source is, without its weights."""
    return (
        quantized_folder.read_about(source).settings
        if quantized_folder.is_quantized_folder(source)
        else open_source(source)[0]
    )


def open_source(source: str | Path) -> tuple[T5Settings, dict[str, Tensor], Path]:
    """Return a source's settings, its tensors under Hugging Face names, and the folder of its tokenizer."""
    if quantized_folder.is_quantized_folder(source):
        raise UserError(f"{source}: is quantised; expected float weights; give what it was made from")
    checkpoint = t5x.find_checkpoint(source)
    if checkpoint is not None:
        opened = t5x.Checkpoint(checkpoint)
        return opened.settings(), opened.tensors, Path(hub_name(checkpoint) or source)
    folder = find_folder(source)
    settings, scaled, headed = read_settings(folder)
    tensors = open_folder(folder)
    if headed and HEAD not in tensors:
        raise UserError(
            f"{folder}: config.json says untied (tie_word_embeddings: false) but there is no {HEAD}; expected it; "
            "download the weights again, or set tie_word_embeddings to true if the model is tied"
        )
    # Untied if and only if there is a head that differs from the shared table.
    shared = tensors.get(embedding_name(tensors))
    tied = HEAD not in tensors or (shared is not None and same(tensors[HEAD], shared))
    settings = settings.model_copy(update={"tied": tied, "scale_output": tied if scaled is None else scaled})
    return settings, tensors, folder
