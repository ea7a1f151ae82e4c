"""Weights on disk: a Hugging Face folder or hub name in and out, without torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from softprompt_jax.backbone.t5 import T5, T5Settings, abstract
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
_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.model", "tokenizer*", "special_tokens*")


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


def load_backbone(source: str | Path = "embedded", dtype: str = "float32") -> Backbone:
    """Load a T5 from a Hugging Face folder, a hub name, or `embedded` (the small one that ships here).

    Weights become `dtype` on the way in; norms, softmax and logits compute in float32 regardless.
    Errors: UserError names the folder, tensor or setting that does not fit.
    """
    folder = find_folder(source)
    settings, embedded_head = read_settings(folder)
    tensors = _Tensors(folder)
    settings = _with_head(settings, embedded_head, tensors)
    model = abstract(settings, dtype)
    graphdef, state = nnx.split(model)
    table = names(settings)
    leaves = nnx.to_pure_dict(state)
    _check_names(table, tensors, folder)
    loaded = {path: _read(tensors, *table[path], _stacked(path), leaf.shape, dtype) for path, leaf in flatten(leaves)}
    nnx.replace_by_pure_dict(state, unflatten(loaded))
    return Backbone(nnx.merge(graphdef, state), folder, str(source))


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
        return Path(snapshot_download(str(source), allow_patterns=list(_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"backbone {source}: neither a folder nor reachable on the hub ({reason}); "
            "expected a Hugging Face folder or a hub name; download it first and give its folder"
        ) from None


def read_settings(folder: Path) -> tuple[T5Settings, bool | None]:
    """Read `config.json`; also return whether it asks for a scaled output (None: it does not say)."""
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
    if kind != "t5":
        return settings, False
    return settings, config.get("scale_decoder_outputs", None if config.get("tie_word_embeddings", True) else False)


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


def fingerprint(model: T5) -> str:
    """Hash a model's shapes and a sample of its embedding table as bfloat16."""
    table = model.embedding[...]
    step = max(1, table.shape[0] // 64)
    sample = collect(table[::step, :16].astype(jnp.bfloat16)).tobytes()
    what_it_is = {name: getattr(model.settings, name) for name in _IDENTITY}  # by name: new settings change no hash
    return hashlib.sha256(json.dumps(what_it_is).encode() + sample).hexdigest()[:16]


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("a.b.c", leaf) of a nested dictionary."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """Undo `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return tree


class _Tensors:
    """The tensors of a folder's safetensors files, read one at a time from mapped memory."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.exists():
            try:
                files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, AttributeError):
                raise UserError(f"{index}: not an index of weights; expected a JSON 'weight_map'") from None
        else:
            files = [folder / "model.safetensors"]
        if index.exists() is False and not files[0].exists():
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise UserError(f"{folder}: found {found}; expected model.safetensors (or its sharded form) with weights")
        self._files: dict[str, Any] = {}
        for path in files:
            try:
                opened = safe_open(path, framework="numpy")
            except FileNotFoundError:
                raise UserError(f"{path}: missing; expected every file that the index names") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a complete safetensors file ({error}); download it again") from None
            self._files |= dict.fromkeys(opened.keys(), opened)
        self.names = set(self._files)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def embedding(self) -> str:
        return next((name for name in _EMBEDDING_ALIASES if name in self.names), _EMBEDDING_ALIASES[0])


def _with_head(settings: T5Settings, scaled: bool | None, tensors: _Tensors) -> T5Settings:
    """Untied if and only if there is a head that differs from the shared table."""
    shared = tensors.embedding()
    tied = _HEAD not in tensors.names or (shared in tensors.names and np.array_equal(tensors[_HEAD], tensors[shared]))
    return settings.model_copy(update={"tied": tied, "scale_output": tied if scaled is None else scaled})


def _check_names(table: dict[str, tuple[list[str], bool]], tensors: _Tensors, folder: Path) -> None:
    expected = {name for tensor_names, _ in table.values() for name in tensor_names}
    shared = _EMBEDDING_ALIASES[0]
    missing = sorted(expected - tensors.names - ({shared} if tensors.embedding() in tensors.names else set()))
    if missing:
        raise UserError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}; expected a complete T5")
    surplus = sorted(n for n in tensors.names - expected - {*_EMBEDDING_ALIASES, _HEAD} if not _IGNORED.fullmatch(n))
    if surplus:
        raise UserError(f"{folder}: {len(surplus)} weights are unknown, first {surplus[0]}; expected only a T5's")


def _read(
    tensors: _Tensors, tensor_names: list[str], transposed: bool, stacked: bool, shape: tuple, dtype: str
) -> jax.Array:
    """Read one weight of ours, stacking its layers in `dtype`."""
    if tensor_names[0] == _EMBEDDING_ALIASES[0]:
        tensor_names = [tensors.embedding()]
    part_shape = shape[1:] if stacked else shape
    values = np.empty((len(tensor_names), *part_shape), jnp.dtype(dtype))
    for index, name in enumerate(tensor_names):
        try:
            tensor = tensors[name]
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"tensor {name}: cannot be read ({error}); download the weights again") from None
        tensor = tensor.T if transposed else tensor
        if tensor.shape != part_shape:
            raise UserError(
                f"tensor {name}: found shape {list(tensor.shape)}; expected {list(part_shape)} as config.json says"
            )
        values[index] = tensor.astype(jnp.dtype(dtype))
    return jnp.asarray(values.reshape(shape))


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
