"""Llama and its relatives (llama, mistral, qwen2, qwen3, smollm3): `config.json` to settings and back, and names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softprompt_jax.models.causal_settings import CausalSettings, LayerKind
from softprompt_jax.models.families import common
from softprompt_jax.models.families.common import Opened, Weight

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
PREFIX, EMBEDDING, HEAD = "model.", "model.embed_tokens.weight", "lm_head.weight"
_BASES = {"smollm3": 2_000_000.0}


def settings_of(config: Mapping[str, Any], where: str) -> CausalSettings:
    """Return the settings that a config states; `complete` decides `tied`.

    Errors: UserError names the field.
    """
    family = config["model_type"]
    rope = common.read_rope(config, where, _BASES.get(family, 10_000.0))
    windows, turns = windows_of(config, where), [True] * common.layer_count(config, where, "num_hidden_layers")
    if family == "smollm3":
        interval = config.get("no_rope_layer_interval") or 4
        turns = config.get("no_rope_layers") or [(i + 1) % interval for i in range(len(turns))]
    if len(windows) != len(turns):
        raise common.UserError(f"{where}: found {len(windows)} layer types; expected {len(turns)}, one a layer")
    bias = bool(config.get("attention_bias", False))
    return common.make(
        {
            **sizes(config, where),
            **common.by_kind(
                LayerKind(window=w, rope=rope if t else None) for w, t in zip(windows, turns, strict=True)
            ),
            "activation": common.activation({"hidden_act": "silu", **config}, where, "hidden_act"),
            "attention_bias": family == "qwen2" or bias,
            "output_bias": family != "qwen2" and bias,
            "feed_forward_bias": bool(config.get("mlp_bias", False)),
            "query_key_norm": family == "qwen3",
        },
        where,
    )


def sizes(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings that all models with Llama's field names state alike."""
    heads, width = common.count(config, where, "num_attention_heads"), common.count(config, where, "hidden_size")
    defaults = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
    head_width = config.get("head_dim") or defaults.get(config["model_type"]) or width // heads
    return {
        "family": config["model_type"],
        "vocabulary_rows": common.count(config, where, "vocab_size"),
        "d_model": width,
        "d_kv": head_width,
        "d_ff": common.count(config, where, "intermediate_size"),
        "num_heads": heads,
        "num_key_heads": config.get("num_key_value_heads") or heads,
        "num_layers": common.layer_count(config, where, "num_hidden_layers"),
        "epsilon": config.get("rms_norm_eps", 1e-6),
        "score_scale": head_width**-0.5,
        **common.ends(config),
    }


def windows_of(config: Mapping[str, Any], where: str) -> list[int | None]:
    """Return the window of each layer's attention, None for all of the past."""
    layers, family, size = (
        common.layer_count(config, where, "num_hidden_layers"),
        config["model_type"],
        config.get("sliding_window"),
    )
    if family == "mistral":
        return [size] * layers
    if family == "llama" or not config.get("use_sliding_window", False):
        return [None] * layers
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        types = ["sliding_attention" if size and i >= first else "full_attention" for i in range(layers)]
    return [size if kind == "sliding_attention" else None for kind in types]


def complete(
    config: Mapping[str, Any],
    settings: CausalSettings,
    tensors: Mapping[str, Opened],
    equal: Callable[[Opened, Opened], bool],
    where: str,
) -> tuple[CausalSettings, dict[str, Opened]]:
    """Return the settings, completed from the weights, and these under the names of `names`."""
    tied = config.get("tie_word_embeddings", settings.family == "smollm3")
    found = common.clean(tensors, PREFIX, EMBEDDING)
    return common.tie(settings, tied, found, HEAD, EMBEDDING, equal, where)


def config_of(settings: CausalSettings) -> dict[str, Any]:
    """Return the `config.json` of a model."""
    names = {"smollm3": "SmolLM3"}
    ropes = [kind.rope for kind in settings.kinds]
    windows = [settings.kinds[i].window for i in settings.pattern]
    found = {
        **size_config(settings, names.get(settings.family, settings.family.capitalize())),
        "hidden_act": common.ACTIVATION_NAMES[settings.activation],
        "rope_parameters": common.rope_config(next(rope for rope in ropes if rope is not None)),
        "attention_bias": settings.attention_bias,
        "mlp_bias": settings.feed_forward_bias,
    }
    if any(windows):
        found |= {"sliding_window": next(w for w in windows if w), "use_sliding_window": True}
    if settings.family == "mistral":
        found.setdefault("sliding_window", None)
    elif settings.family in ("qwen2", "qwen3", "smollm3"):
        found["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    if settings.family == "smollm3":
        found["no_rope_layers"] = [int(settings.kinds[i].rope is not None) for i in settings.pattern]
        found |= {"pad_token_id": None, "bos_token_id": None}  # transformers' defaults are ids of the published size
    return found


def size_config(settings: CausalSettings, architecture: str) -> dict[str, Any]:
    """Return what `sizes` reads."""
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": settings.family,
        "vocab_size": settings.vocabulary_rows,
        "hidden_size": settings.d_model,
        "head_dim": settings.d_kv,
        "intermediate_size": settings.d_ff,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_key_heads,
        "num_hidden_layers": settings.num_layers,
        "rms_norm_eps": settings.epsilon,
        "tie_word_embeddings": settings.tied,
        "eos_token_id": common.eos_token_id(settings),
    }


def names(settings: CausalSettings) -> dict[str, Weight]:
    """Map each weight of ours to its Hugging Face tensors."""
    parts: dict[str, tuple[str, bool]] = {}
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        parts[f"attention.{ours}.kernel"] = (f"self_attn.{theirs}_proj.weight", True)
        if settings.output_bias if ours == "output" else settings.attention_bias:
            parts[f"attention.{ours}.bias"] = (f"self_attn.{theirs}_proj.bias", False)
    for part in ("gate", "up", "down"):
        parts[f"feed_forward.{part}.kernel"] = (f"mlp.{part}_proj.weight", True)
        if settings.feed_forward_bias:
            parts[f"feed_forward.{part}.bias"] = (f"mlp.{part}_proj.bias", False)
    if settings.query_key_norm:
        parts["attention.query_norm.scale"] = ("self_attn.q_norm.weight", False)
        parts["attention.key_norm.scale"] = ("self_attn.k_norm.weight", False)
    parts["attention_norm.scale"] = ("input_layernorm.weight", False)
    if settings.post_norms:
        parts["attention_post_norm.scale"] = ("post_attention_layernorm.weight", False)
        parts["feed_forward_norm.scale"] = ("pre_feedforward_layernorm.weight", False)
        parts["feed_forward_post_norm.scale"] = ("post_feedforward_layernorm.weight", False)
    else:
        parts["feed_forward_norm.scale"] = ("post_attention_layernorm.weight", False)
    table = {"embedding": Weight([EMBEDDING]), "decoder.norm.scale": Weight(["model.norm.weight"])}
    if not settings.tied:
        table["head.kernel"] = Weight([HEAD], True)
    return table | common.layered(settings, "model.layers", parts)
