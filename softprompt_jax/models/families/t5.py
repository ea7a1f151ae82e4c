"""The T5 family (t5, mt5, umt5): `config.json` to settings and back, and Hugging Face's name of each weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softprompt_jax.config import UserError, parse
from softprompt_jax.models.families.common import Opened, Weight
from softprompt_jax.models.t5 import T5Settings

MODEL_TYPES = ("t5", "mt5", "umt5")
EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
_EMBEDDING_ALIASES = (EMBEDDING, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Written by old versions of transformers, never read.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu", "swish": "silu"}


def settings_of(config: Mapping[str, Any], where: str) -> T5Settings:
    """Return the settings that a config states; `complete` decides `tied` and `scale_output`.

    Errors: UserError names the field, at `where`.
    """
    kind, pad = config["model_type"], config.get("pad_token_id", 0)
    try:
        projection = str(config.get("feed_forward_proj", "relu"))
        gated = projection.startswith("gated-")
        activation = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
        if activation not in _ACTIVATIONS:
            raise UserError(f"{where}: feed_forward_proj is {projection!r}; expected one of {', '.join(_ACTIVATIONS)}")
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
            "padding": 0 if pad == 0 else -1,  # where padding is a word's id, batches have -1
            "eos": config.get("eos_token_id", 1),
            "start": config.get("decoder_start_token_id", pad),
        }
    except KeyError as error:
        raise UserError(f"{where}: no {error.args[0]!r}; expected it in a T5 config") from None
    return parse(T5Settings, values, where)


def complete(
    config: Mapping[str, Any],
    settings: T5Settings,
    tensors: Mapping[str, Opened],
    equal: Callable[[Opened, Opened], bool],
    where: str,
) -> tuple[T5Settings, dict[str, Opened]]:
    """Return the settings, completed from the weights, and these under the names of `names`.

    A model is untied if and only if it has a head that differs from the embedding table, which `equal` decides.
    """
    headed = config.get("tie_word_embeddings", True) is False  # true says nothing: transformers 5 writes it always
    old = config["model_type"] == "t5"
    scaled = config.get("scale_decoder_outputs", False if headed else None) if old else False
    alias = next((name for name in _EMBEDDING_ALIASES if name in tensors), None)
    found = {name: tensor for name, tensor in tensors.items() if name not in (*_EMBEDDING_ALIASES, _UNUSED)}
    if alias is not None:
        found[EMBEDDING] = tensors[alias]
    if headed and HEAD not in found:
        raise UserError(
            f"{where}: config.json says untied (tie_word_embeddings: false) but there is no {HEAD}; expected it; "
            "download the weights again, or set tie_word_embeddings to true if the model is tied"
        )
    tied = HEAD not in found or (alias is not None and equal(found[HEAD], found[EMBEDDING]))
    if tied:
        found.pop(HEAD, None)
    return settings.model_copy(update={"tied": tied, "scale_output": tied if scaled is None else scaled}), found


def config_of(settings: T5Settings) -> dict[str, Any]:
    """Return the `config.json` of a T5."""
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
        "pad_token_id": 0 if settings.padding == 0 else 1,
        "eos_token_id": settings.eos,
        "decoder_start_token_id": settings.start,
        "dropout_rate": 0.1,
    }


def _block(stack: str, depth: int, name: str) -> list[str]:
    return [f"{stack}.block.{i}.layer.{name}.weight" for i in range(depth)]


def names(settings: T5Settings) -> dict[str, Weight]:
    """Map each weight of ours to its Hugging Face tensors."""
    table = {"embedding": Weight([EMBEDDING])}
    if not settings.tied:
        table["head.kernel"] = Weight([HEAD], True)
    depths = {"encoder": settings.num_layers, "decoder": settings.num_decoder_layers}
    for stack, depth in depths.items():
        table[f"{stack}.norm.scale"] = Weight([f"{stack}.final_layer_norm.weight"])
        own_bias = settings.bias_in_every_layer
        bias = _block(stack, depth if own_bias else 1, "0.SelfAttention.relative_attention_bias")
        table[f"{stack}.layers.bias.table" if own_bias else f"{stack}.bias.table"] = Weight(bias)
        attentions = [("attention", "0.SelfAttention", "0")]
        if stack == "decoder":
            attentions.append(("cross", "1.EncDecAttention", "1"))
        for ours, theirs, index in attentions:
            for part, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
                table[f"{stack}.layers.{ours}.{part}.kernel"] = Weight(_block(stack, depth, f"{theirs}.{letter}"), True)
            table[f"{stack}.layers.{ours}_norm.scale"] = Weight(_block(stack, depth, f"{index}.layer_norm"))
        last = len(attentions)
        parts = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if settings.gated else {"gate": "wi", "down": "wo"}
        for ours, theirs in parts.items():
            kernel = _block(stack, depth, f"{last}.DenseReluDense.{theirs}")
            table[f"{stack}.layers.feed_forward.{ours}.kernel"] = Weight(kernel, True)
        table[f"{stack}.layers.feed_forward_norm.scale"] = Weight(_block(stack, depth, f"{last}.layer_norm"))
    return table
