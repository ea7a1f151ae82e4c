"""Weights on disk: a Hugging Face folder or hub name in and out, without torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from softprompt_jax.backbone import stored, t5x
from softprompt_jax.backbone.presets import hub_name
from softprompt_jax.backbone.quantized import Quantization, pack_layers, quantized
from softprompt_jax.backbone.t5 import T5, T5Settings, abstract
from softprompt_jax.backbone.tensors import Tensor, flatten, open_safetensors, read_stacked, same, unflatten
from softprompt_jax.backbone.torch_file import open_torch
from softprompt_jax.config import UserError, parse
from softprompt_jax.sharding import collect

EMBEDDED = Path(__file__).parent.parent / "embedded"
_EMBEDDING_ALIASES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEAD = "lm_head.weight"
_IDENTITY = (
    *("vocabulary_rows", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers"),
    *("activation", "gated", "tied", "scale_output", "bias_in_every_layer", "relative_buckets"),
)
# Written by old versions of transformers, read by nobody.
_IGNORED = re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu", "swish": "silu"}
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
        """Hash the shapes and a sample of the embedding table: equal for every dtype and sharding."""
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
    if stored.is_stored(source):
        return Backbone(stored.load(source, dtype, sharding, quantize), Path(source).expanduser(), str(source))
    settings, tensors, folder = open_source(source)
    model = abstract(settings, dtype)
    graphdef, state = nnx.split(model)
    table = names(settings)
    _check_names(table, tensors, source)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def load(path: str, variable: nnx.Variable) -> jax.Array:
        shape = variable.shape
        tensor_names, transposed = table[path]
        parts = _parts(tensors, tensor_names, transposed, shape[1:] if _stacked(path) else shape)
        return jax.make_array_from_callback(
            shape,
            one_device if sharding is None else sharding(variable),
            lambda index: read_stacked(parts, shape, index, jnp.dtype(dtype)),
        )

    loaded = {}
    for path, variable in flatten(nnx.to_pure_dict(state, extract_fn=lambda variable: variable)):
        loaded[path] = load(path, variable)
        if quantize is not None and _stacked(path) and path.endswith(".kernel"):
            loaded[path], loaded[f"{path.removesuffix('.kernel')}.scale"] = pack_layers(loaded[path], quantize)
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
            slots.setdefault(path, {})[slot] = np.stack(arrays) if _stacked(path) else arrays[0]
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


def read_settings(folder: Path) -> tuple[T5Settings, bool | None, bool]:
    """Read `config.json`; also return whether it asks for a scaled output (None: it does not say), and for a head."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json; expected a T5 in Hugging Face layout") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); expected a T5 config") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}; expected a T5 config, a JSON object")
    kind = config.get("model_type")
    if kind not in ("t5", "mt5", "umt5"):
        raise UserError(f"{path}: model_type is {kind!r}; expected t5, mt5 or umt5 (this project is about T5)")
    try:
        projection = str(config.get("feed_forward_proj", "relu"))
        gated = projection.startswith("gated-")
        activation = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
        if activation not in _ACTIVATIONS:
            raise UserError(f"{path}: feed_forward_proj is {projection!r}; expected one of {', '.join(_ACTIVATIONS)}")
        values = {
            "vocabulary_rows": config["vocab_size"],
            "d_model": config["d_model"],
            "d_kv": config["d_kv"],
            "d_ff": config["d_ff"],
            "num_heads": config["num_heads"],
            "num_layers": config["num_layers"],
            "num_decoder_layers": config.get("num_decoder_layers") or config["num_layers"],
            "activation": _ACTIVATIONS[activation],
            "gated": gated,
            "bias_in_every_layer": kind == "umt5",
            "relative_buckets": config.get("relative_attention_num_buckets", 32),
            "relative_max_distance": config.get("relative_attention_max_distance", 128),
            "epsilon": config.get("layer_norm_epsilon", 1e-6),
        }
    except KeyError as error:
        raise UserError(f"{path}: no {error.args[0]!r}; expected it in a T5 config") from None
    settings = parse(T5Settings, values, str(path))
    headed = config.get("tie_word_embeddings", True) is False  # true says nothing: transformers 5 writes it always
    scaled = False if kind != "t5" else config.get("scale_decoder_outputs", False if headed else None)
    return settings, scaled, headed


def names(settings: T5Settings) -> dict[str, tuple[list[str], bool]]:
    """Map each weight of ours to its Hugging Face tensors (one a layer if stacked) and "is transposed"."""

    def block(stack: str, depth: int, name: str) -> list[str]:
        return [f"{stack}.block.{i}.layer.{name}.weight" for i in range(depth)]

    table: dict[str, tuple[list[str], bool]] = {"embedding": ([_EMBEDDING_ALIASES[0]], False)}
    if not settings.tied:
        table["head.kernel"] = ([_HEAD], True)
    depths = {"encoder": settings.num_layers, "decoder": settings.num_decoder_layers}
    for stack, depth in depths.items():
        table[f"{stack}.norm.scale"] = ([f"{stack}.final_layer_norm.weight"], False)
        own_bias = settings.bias_in_every_layer
        bias = block(stack, depth if own_bias else 1, "0.SelfAttention.relative_attention_bias")
        table[f"{stack}.layers.bias.table" if own_bias else f"{stack}.bias.table"] = (bias, False)
        attentions = [("attention", "0.SelfAttention", "0")]
        if stack == "decoder":
            attentions.append(("cross", "1.EncDecAttention", "1"))
        for ours, theirs, index in attentions:
            for part, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
                table[f"{stack}.layers.{ours}.{part}.kernel"] = (block(stack, depth, f"{theirs}.{letter}"), True)
            table[f"{stack}.layers.{ours}_norm.scale"] = (block(stack, depth, f"{index}.layer_norm"), False)
        last = len(attentions)
        parts = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if settings.gated else {"gate": "wi", "down": "wo"}
        for ours, theirs in parts.items():
            kernel = block(stack, depth, f"{last}.DenseReluDense.{theirs}")
            table[f"{stack}.layers.feed_forward.{ours}.kernel"] = (kernel, True)
        table[f"{stack}.layers.feed_forward_norm.scale"] = (block(stack, depth, f"{last}.layer_norm"), False)
    return table


def save_backbone(model: T5, folder: str | Path, dtype: str = "bfloat16") -> None:
    """Write `config.json` and `model.safetensors` in Hugging Face layout (no tokenizer)."""
    settings, folder = model.settings, Path(folder)
    config = json.dumps(_config(settings, dtype), indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    table, tensors = names(settings), {}
    for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))):
        tensor_names, transposed = table[path]
        values = np.asarray(leaf)
        for name, value in zip(tensor_names, values if _stacked(path) else [values], strict=True):
            tensors[name] = np.ascontiguousarray((value.T if transposed else value).astype(jnp.dtype(dtype)))
    temporary = folder / "model.safetensors.partial"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(config)


def check(settings: T5Settings, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Refuse tensors that are not those of a T5 of these settings: missing, surplus, or of another shape."""
    table = names(settings)
    _check_names(table, tensors, source)
    for path, leaf in flatten(nnx.to_pure_dict(nnx.state(abstract(settings)))):
        _parts(tensors, *table[path], leaf.shape[1:] if _stacked(path) else leaf.shape)


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
        save_file(shard, folder / f"model-{files:05d}.safetensors", metadata={"format": "pt"})
        names_in.update(dict.fromkeys(shard, files))
        shard, size = {}, 0

    for name in wanted:
        tensor = tensors[_embedding(tensors) if name == _EMBEDDING_ALIASES[0] else name]
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
    (folder / "config.json").write_text(json.dumps(_config(settings, dtype or found), indent=2) + "\n")
    embedding = tensors[_embedding(tensors)]
    step = _sample_step(settings.vocabulary_rows)
    rows = [embedding.read((slice(row, row + 1), slice(0, 16))) for row in range(0, settings.vocabulary_rows, step)]
    return _hashed(settings, np.concatenate(rows).astype(jnp.bfloat16))


def fingerprint(model: T5) -> str:
    """Hash a model's shapes and a sample of its embedding table as bfloat16."""
    table = model.embedding[...]
    return _hashed(model.settings, collect(table[:: _sample_step(table.shape[0]), :16].astype(jnp.bfloat16)))


def _sample_step(rows: int) -> int:
    return max(1, rows // 64)


def _hashed(settings: T5Settings, sample: np.ndarray) -> str:
    what_it_is = {name: getattr(settings, name) for name in _IDENTITY}  # by name: new settings change no hash
    return hashlib.sha256(json.dumps(what_it_is).encode() + sample.tobytes()).hexdigest()[:16]


def load_settings(source: str | Path) -> T5Settings:
    """Read what a source is, without its weights."""
    return stored.read_about(source).settings if stored.is_stored(source) else open_source(source)[0]


def open_source(source: str | Path) -> tuple[T5Settings, dict[str, Tensor], Path]:
    """Return a source's settings, its tensors under Hugging Face names, and the folder of its tokenizer."""
    if stored.is_stored(source):
        raise UserError(f"{source}: is quantised; expected float weights; give what it was made from")
    checkpoint = t5x.find_checkpoint(source)
    if checkpoint is not None:
        opened = t5x.Checkpoint(checkpoint)
        return opened.settings(), opened.tensors, Path(hub_name(checkpoint) or source)
    folder = find_folder(source)
    settings, scaled, headed = read_settings(folder)
    tensors = open_folder(folder)
    if headed and _HEAD not in tensors:
        raise UserError(
            f"{folder}: config.json says untied (tie_word_embeddings: false) but there is no {_HEAD}; expected it; "
            "download the weights again, or set tie_word_embeddings to true if the model is tied"
        )
    # Untied if and only if there is a head that differs from the shared table.
    shared = tensors.get(_embedding(tensors))
    tied = _HEAD not in tensors or (shared is not None and same(tensors[_HEAD], shared))
    settings = settings.model_copy(update={"tied": tied, "scale_output": tied if scaled is None else scaled})
    return settings, tensors, folder


def open_folder(folder: Path) -> dict[str, Tensor]:
    """Open the weights of a Hugging Face folder, in one file or several, safetensors before torch's `.bin`."""
    for single, open_file in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_torch)):
        index = folder / f"{single}.index.json"
        if index.exists():
            return {name: tensor for path in _listed(index) for name, tensor in open_file(path).items()}
        if (folder / single).exists():
            return open_file(folder / single)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{folder}: found {found}; expected weights: model.safetensors, pytorch_model.bin or their sharded forms"
    )


def _listed(index: Path) -> list[Path]:
    """Return the files that an index of sharded weights names; they lie beside it."""
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(name).name != name for name in files):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: not an index of weights; expected a JSON 'weight_map' of files beside it") from None
    return [index.parent / name for name in files]


def _embedding(tensors: dict[str, Tensor]) -> str:
    return next((name for name in _EMBEDDING_ALIASES if name in tensors), _EMBEDDING_ALIASES[0])


def _check_names(table: dict[str, tuple[list[str], bool]], tensors: dict[str, Tensor], source: str | Path) -> None:
    expected = {name for tensor_names, _ in table.values() for name in tensor_names}
    found = tensors.keys() | ({_EMBEDDING_ALIASES[0]} if _embedding(tensors) in tensors else set())
    missing = sorted(expected - found)
    if missing:
        raise UserError(f"{source}: {len(missing)} weights are missing, first {missing[0]}; expected a complete T5")
    surplus = sorted(n for n in found - expected - {*_EMBEDDING_ALIASES, _HEAD} if not _IGNORED.fullmatch(n))
    if surplus:
        raise UserError(f"{source}: {len(surplus)} weights are unknown, first {surplus[0]}; expected only a T5's")


def _parts(tensors: dict[str, Tensor], tensor_names: list[str], transposed: bool, shape: tuple) -> list[Tensor]:
    """Return the tensors, one a layer, that make up a weight of ours of this shape."""
    parts = []
    for name in tensor_names:
        tensor = tensors[_embedding(tensors) if name == _EMBEDDING_ALIASES[0] else name]
        tensor = tensor.transposed() if transposed else tensor
        if tensor.shape != shape:
            raise UserError(
                f"tensor {tensor.name}: found shape {list(tensor.shape)}; expected {list(shape)} as the settings say"
            )
        parts.append(tensor)
    return parts


def _stacked(path: str) -> bool:
    return ".layers." in path


def _config(settings: T5Settings, dtype: str) -> dict[str, Any]:
    if settings.gated:
        projections = {"gelu_tanh": "gated-gelu", "relu": "gated-relu", "silu": "gated-silu"}
    else:
        projections = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}
    if settings.activation not in projections:
        raise UserError("backbone: gated exact gelu; a T5 config has no name for it; use gelu_tanh")
    return {
        "architectures": [
            "UMT5ForConditionalGeneration" if settings.bias_in_every_layer else "T5ForConditionalGeneration"
        ],
        "model_type": "umt5" if settings.bias_in_every_layer else "t5",
        "vocab_size": settings.vocabulary_rows,
        "d_model": settings.d_model,
        "d_kv": settings.d_kv,
        "d_ff": settings.d_ff,
        "num_heads": settings.num_heads,
        "num_layers": settings.num_layers,
        "num_decoder_layers": settings.num_decoder_layers,
        "feed_forward_proj": projections[settings.activation],
        "relative_attention_num_buckets": settings.relative_buckets,
        "relative_attention_max_distance": settings.relative_max_distance,
        "layer_norm_epsilon": settings.epsilon,
        "tie_word_embeddings": settings.tied,
        "scale_decoder_outputs": settings.scale_output,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "dtype": dtype,
    }
