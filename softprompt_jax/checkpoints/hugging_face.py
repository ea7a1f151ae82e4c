"""Hugging Face's layout of a T5: its `config.json`, what it calls each weight, and the files that these are in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flax import nnx

from softprompt_jax.checkpoints.tensors import Tensor, flatten, open_safetensors
from softprompt_jax.checkpoints.torch_file import open_torch
from softprompt_jax.config import UserError, parse
from softprompt_jax.models.t5 import T5Settings, abstract

EMBEDDING_ALIASES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HEAD = "lm_head.weight"
# Written by old versions of transformers, read by nobody.
_IGNORED = re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu", "swish": "silu"}


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


def write_settings(settings: T5Settings, dtype: str) -> dict[str, Any]:
    """Return what `config.json` says of a T5 whose weights are stored as `dtype`."""
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


def _block(stack: str, depth: int, name: str) -> list[str]:
    return [f"{stack}.block.{i}.layer.{name}.weight" for i in range(depth)]


def names(settings: T5Settings) -> dict[str, tuple[list[str], bool]]:
    """Map each weight of ours to its Hugging Face tensors (one a layer if stacked) and "is transposed"."""
    table: dict[str, tuple[list[str], bool]] = {"embedding": ([EMBEDDING_ALIASES[0]], False)}
    if not settings.tied:
        table["head.kernel"] = ([HEAD], True)
    depths = {"encoder": settings.num_layers, "decoder": settings.num_decoder_layers}
    for stack, depth in depths.items():
        table[f"{stack}.norm.scale"] = ([f"{stack}.final_layer_norm.weight"], False)
        own_bias = settings.bias_in_every_layer
        bias = _block(stack, depth if own_bias else 1, "0.SelfAttention.relative_attention_bias")
        table[f"{stack}.layers.bias.table" if own_bias else f"{stack}.bias.table"] = (bias, False)
        attentions = [("attention", "0.SelfAttention", "0")]
        if stack == "decoder":
            attentions.append(("cross", "1.EncDecAttention", "1"))
        for ours, theirs, index in attentions:
            for part, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
                table[f"{stack}.layers.{ours}.{part}.kernel"] = (_block(stack, depth, f"{theirs}.{letter}"), True)
            table[f"{stack}.layers.{ours}_norm.scale"] = (_block(stack, depth, f"{index}.layer_norm"), False)
        last = len(attentions)
        parts = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if settings.gated else {"gate": "wi", "down": "wo"}
        for ours, theirs in parts.items():
            kernel = _block(stack, depth, f"{last}.DenseReluDense.{theirs}")
            table[f"{stack}.layers.feed_forward.{ours}.kernel"] = (kernel, True)
        table[f"{stack}.layers.feed_forward_norm.scale"] = (_block(stack, depth, f"{last}.layer_norm"), False)
    return table


def check(settings: T5Settings, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Refuse tensors that are not those of a T5 of these settings: missing, surplus, or of another shape."""
    table = names(settings)
    check_names(table, tensors, source)
    for path, leaf in flatten(nnx.to_pure_dict(nnx.state(abstract(settings)))):
        parts_of(tensors, *table[path], leaf.shape[1:] if is_stacked(path) else leaf.shape)


def embedding_name(tensors: dict[str, Tensor]) -> str:
    """Return what the shared table is called here."""
    return next((name for name in EMBEDDING_ALIASES if name in tensors), EMBEDDING_ALIASES[0])


def check_names(table: dict[str, tuple[list[str], bool]], tensors: dict[str, Tensor], source: str | Path) -> None:
    """Refuse tensors of which some are missing, or which are more than a T5's."""
    expected = {name for tensor_names, _ in table.values() for name in tensor_names}
    found = tensors.keys() | ({EMBEDDING_ALIASES[0]} if embedding_name(tensors) in tensors else set())
    missing = sorted(expected - found)
    if missing:
        raise UserError(f"{source}: {len(missing)} weights are missing, first {missing[0]}; expected a complete T5")
    surplus = sorted(n for n in found - expected - {*EMBEDDING_ALIASES, HEAD} if not _IGNORED.fullmatch(n))
    if surplus:
        raise UserError(f"{source}: {len(surplus)} weights are unknown, first {surplus[0]}; expected only a T5's")


def parts_of(tensors: dict[str, Tensor], tensor_names: list[str], transposed: bool, shape: tuple) -> list[Tensor]:
    """Return the tensors, one a layer, that make up a weight of ours of this shape."""
    parts = []
    for name in tensor_names:
        tensor = tensors[embedding_name(tensors) if name == EMBEDDING_ALIASES[0] else name]
        tensor = tensor.transposed() if transposed else tensor
        if tensor.shape != shape:
            raise UserError(
                f"tensor {tensor.name}: found shape {list(tensor.shape)}; expected {list(shape)} as the settings say"
            )
        parts.append(tensor)
    return parts


def is_stacked(path: str) -> bool:
    """Tell whether a weight of ours has a leading axis of layers."""
    return ".layers." in path


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
