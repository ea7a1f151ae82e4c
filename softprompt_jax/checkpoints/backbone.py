"""Load and save backbones, slice by slice: a Hugging Face folder or hub name, a T5X checkpoint, a quantised folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt_jax.checkpoints import hugging_face, quantized_folder, t5x
from softprompt_jax.checkpoints.tensors import Tensor, read_stacked, same, write_sharded
from softprompt_jax.config import UserError
from softprompt_jax.distributed.mesh import gather, platform
from softprompt_jax.models.families import t5 as family
from softprompt_jax.models.families.t5 import is_stacked, names
from softprompt_jax.models.presets import hub_name
from softprompt_jax.models.quantized import Quantization, abstract_quantized, pack_layers
from softprompt_jax.models.t5 import T5, T5Settings
from softprompt_jax.trees import flatten, unflatten

EMBEDDED = Path(__file__).parent.parent / "embedded"
_IDENTITY = (
    *("vocabulary_rows", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers"),
    *("activation", "gated", "tied", "scale_output", "bias_in_every_layer", "relative_buckets"),
)
_PATTERNS = ("config.json", "model*.safetensors", "model.safetensors.index.json", "*.model", "tokenizer*", "special_*")
_OLD_PATTERNS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")  # where there are no safetensors
Sharding = Callable[[nnx.Variable], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A model and where it came from; `folder` holds its tokenizer."""

    model: T5
    folder: Path
    identity: str

    @property
    def settings(self) -> T5Settings:
        return self.model.settings

    @property
    def is_abstract(self) -> bool:
        """Whether it is shapes and dtypes only, without weights."""
        return isinstance(self.model.embedding.get_value(), jax.ShapeDtypeStruct)

    def fingerprint(self) -> str:
        """Hash the shapes and a sample of the embedding table, once: equal for every dtype and sharding."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.model)


def load_backbone(
    source: str | Path = "embedded",
    dtype: str = "float32",
    adapter: str | Path | None = None,
    sharding: Sharding | None = None,
    quantize: Quantization | None = None,
) -> Backbone:
    """Load a T5: `embedded` (the small one that ships here), a Hugging Face folder or hub name, a T5X checkpoint.

    A T5X checkpoint is a local folder or `gs://`. Weights become `dtype` on the way in; norms, softmax and logits
    compute in float32 regardless. `adapter`: a folder that PEFT has written; its method is attached with its values,
    as what trains. `sharding` tells where each weight lies (default: one device): slices go straight there, and no
    process reads more than its own. `quantize` packs the kernels of the layers into int8 or nf4 as they come in, so
    that the model is never whole in `dtype`. A folder of `softprompt import --quantize` is quantised already.
    Errors: UserError names the folder, tensor or setting that does not fit.
    """
    settings, stored, parts, folder = _open(source, quantize)
    quantize = stored or quantize
    settings = settings.model_copy(update={"platform": platform()})
    loaded = {}
    for path, weight in read_weights(abstract_quantized(settings, dtype, stored), parts, dtype, sharding):
        loaded[path] = weight
        if quantize is not None and stored is None and is_stacked(path) and path.endswith(".kernel"):
            # Reading must not run ahead of packing: the floats of many stacks would wait in memory.
            packed = jax.block_until_ready(pack_layers(weight, quantize))
            loaded[path], loaded[f"{path.removesuffix('.kernel')}.scale"] = packed
    graphdef, state = nnx.split(abstract_quantized(settings, dtype, quantize))
    nnx.replace_by_pure_dict(state, unflatten(loaded))
    backbone = Backbone(nnx.merge(graphdef, state), folder, str(source))
    if adapter is not None:
        from softprompt_jax.checkpoints.peft import attach_adapter  # which asks for fingerprints here

        attach_adapter(backbone.model, adapter)
    return backbone


def abstract_backbone(source: str | Path, dtype: str = "float32", quantize: Quantization | None = None) -> Backbone:
    """Return what `load_backbone` loads as shapes and dtypes only; no weight is read.

    Errors: UserError as `load_backbone`, but for weights that cannot be read or are not finite.
    """
    settings, stored, _, folder = _open(source, quantize)
    return Backbone(as_dtype(abstract_quantized(settings, dtype, stored or quantize), dtype), folder, str(source))


def _open(
    source: str | Path, quantize: Quantization | None
) -> tuple[T5Settings, Quantization | None, Mapping[str, Sequence[Tensor]], Path]:
    """Return a source's settings, how it is quantised on disk, the tensors of its weights, its tokenizer's folder."""
    if quantized_folder.is_quantized_folder(source):
        about = quantized_folder.read_about(source, quantize)
        parts = quantized_folder.weight_parts(source, about)
        return about.settings, about.quantize, parts, Path(source).expanduser()
    settings, tensors, folder = open_source(source)
    return settings, None, hugging_face.weight_parts(settings, tensors, source), folder


def as_dtype(model: T5, dtype: str) -> T5:
    """Return the model with its weights as `dtype`, but for packed integers and their scales; it may be abstract."""
    graphdef, state = nnx.split(model)
    weights = flatten(nnx.to_pure_dict(state))

    def converted(path: str, leaf: Any) -> Any:
        if path in _packed(weights):
            return leaf
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)) if abstract else leaf.astype(dtype)

    nnx.replace_by_pure_dict(state, unflatten({path: converted(path, leaf) for path, leaf in weights.items()}))
    return nnx.merge(graphdef, state)


def _packed(weights: Mapping[str, Any]) -> set[str]:
    """Return the paths of packed integers and of their scales."""
    kernels = [path for path, leaf in weights.items() if leaf.dtype.kind in "iu"]
    return {*kernels, *(f"{path.removesuffix('.kernel')}.scale" for path in kernels)}


def read_weights(
    model: T5, parts: Mapping[str, Sequence[Tensor]], dtype: str, sharding: Sharding | None
) -> Iterator[tuple[str, jax.Array]]:
    """Read the weights of an abstract model one after the other, slices straight to where they lie.

    `parts`: the tensors that a weight is made of, one a layer. Packed integers and their scales are read as they are,
    all else as `dtype`.
    """
    variables = flatten(nnx.to_pure_dict(nnx.state(model), extract_fn=lambda variable: variable))
    packed = _packed(variables)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def load(path: str, variable: Any) -> jax.Array:
        wanted = variable.dtype if path in packed else jnp.dtype(dtype)
        return jax.make_array_from_callback(
            variable.shape,
            one_device if sharding is None else sharding(variable),
            lambda index: read_stacked(parts[path], variable.shape, index, wanted),
        )

    for path, variable in variables.items():
        yield path, load(path, variable)


def load_adafactor(source: str | Path) -> tuple[int, dict[str, dict[str, np.ndarray]]]:
    """Return the step of a T5X checkpoint, and Adafactor's slots in float32 by the path of our weight, layers stacked.

    Slots: `v` [as the weight], or `v_row` and `v_col`, and `m` if there was momentum. Weights that were frozen have
    none; a prompt's are under `prompt.rows`. The paper's model tuning starts from these.
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


def local_folder(source: str | Path) -> Path | None:
    """Return the local folder of a source; None for a hub name. A path where no folder lies is a UserError."""
    if str(source) == "embedded":
        return EMBEDDED
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
        raise UserError(f"backbone {source}: no such folder; expected a Hugging Face folder or a hub name")
    return None


def find_folder(source: str | Path) -> Path:
    """Return the local folder of a source, fetching a hub name into the hub's cache."""
    if (folder := local_folder(source)) is not None:
        return folder
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
    table = names(model.settings)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items():
            tensor_names, transposed = table[path]
            values = np.asarray(leaf)
            for name, value in zip(tensor_names, values if is_stacked(path) else [values], strict=True):
                yield name, (value.T if transposed else value).astype(jnp.dtype(dtype))

    _write(model.settings, tensors(), Path(folder), dtype)


def write_backbone(settings: T5Settings, tensors: dict[str, Tensor], folder: Path, dtype: str | None = None) -> str:
    """Write opened tensors in Hugging Face layout, a file at a time, and return the fingerprint.

    `dtype`: of the weights (default: as they are). Errors: UserError for tensors that do not fit the settings.
    """
    hugging_face.weight_parts(settings, tensors, folder)
    found = dtype or tensors[family.EMBEDDING].read((slice(0, 1), slice(0, 1))).dtype.name
    wanted = (name for tensor_names, _ in names(settings).values() for name in tensor_names)
    values = ((name, tensors[name].read()) for name in wanted)
    written = ((name, value if dtype is None else value.astype(jnp.dtype(dtype))) for name, value in values)
    _write(settings, written, folder, found)
    step = _sample_step(settings.vocabulary_rows)
    rows = range(0, settings.vocabulary_rows, step)
    sample = [tensors[family.EMBEDDING].read((slice(row, row + 1), slice(0, 16))) for row in rows]
    return _hashed(settings, np.concatenate(sample).astype(jnp.bfloat16))


def _write(settings: T5Settings, tensors: Iterator[tuple[str, np.ndarray]], folder: Path, dtype: str) -> None:
    """Write weights, then `config.json`, which a folder that was left half written lacks."""
    config = json.dumps(family.config_of(settings, dtype), indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_sharded(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(config)


def fingerprint(model: T5) -> str:
    """Hash a model's shapes and a sample of its embedding table as bfloat16."""
    table = model.embedding[...]
    return _hashed(model.settings, gather(table[:: _sample_step(table.shape[0]), :16].astype(jnp.bfloat16)))


def _sample_step(rows: int) -> int:
    return max(1, rows // 64)


def _hashed(settings: T5Settings, sample: np.ndarray) -> str:
    what_it_is = {name: getattr(settings, name) for name in _IDENTITY}  # by name: new settings change no hash
    return hashlib.sha256(json.dumps(what_it_is).encode() + sample.tobytes()).hexdigest()[:16]


def open_source(source: str | Path) -> tuple[T5Settings, dict[str, Tensor], Path]:
    """Return a source's settings, its tensors under Hugging Face names, and the folder of its tokenizer."""
    if quantized_folder.is_quantized_folder(source):
        raise UserError(f"{source}: is quantised; expected float weights; give what it was made from")
    checkpoint = t5x.find_checkpoint(source)
    if checkpoint is not None:
        opened = t5x.Checkpoint(checkpoint)
        return opened.settings(), opened.tensors, Path(hub_name(checkpoint) or source)
    folder = find_folder(source)
    where = str(folder / "config.json")
    read = family.settings_of(hugging_face.read_config(folder), where)
    return *family.complete(read, hugging_face.open_folder(folder), same, where), folder
