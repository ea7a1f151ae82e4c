"""Gemma (gemma, gemma2, gemma3_text): `config.json` to settings and back. Tensors are named as Llama's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softprompt_jax.models.causal_settings import CausalSettings, LayerKind
from softprompt_jax.models.families import common, llama
from softprompt_jax.models.families.common import Opened, field
from softprompt_jax.models.families.llama import names as names

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "gemma3")
PREFIX, EMBEDDING, HEAD = llama.PREFIX, llama.EMBEDDING, llama.HEAD
_WRAPPERS = ("language_model.", "model.language_model.")
_TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def settings_of(config: Mapping[str, Any], where: str) -> CausalSettings:
    """Return the settings that a config states; `complete` decides `tied`. Of a gemma3, those of its text part."""
    config = text_config(config, where)
    family = config["model_type"]
    if config.get("use_bidirectional_attention"):
        raise common.UserError(f"{where}: use_bidirectional_attention is true; expected a causal model")
    layers = common.layer_count(config, where, "num_hidden_layers")
    kinds = [LayerKind(rope=common.read_rope(config, where, 10_000.0))] * layers
    if family != "gemma":
        window = config.get("sliding_window") or 4096
        far, near = LayerKind(rope=kinds[0].rope), LayerKind(rope=kinds[0].rope, window=window)
        pattern = 2
        if family == "gemma3_text":
            pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
            local = {"rope_theta": config.get("rope_local_base_freq", 10_000.0)}
            local["rope_parameters"] = (config.get("rope_parameters") or {}).get("sliding_attention")
            far = LayerKind(rope=common.read_rope(config, where, 1_000_000.0, "full_attention"))
            near = LayerKind(rope=common.read_rope(local, where, 10_000.0), window=window)
        types = config.get("layer_types")
        if types is None:
            types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
        kinds = [near if kind == "sliding_attention" else far for kind in types]
    values = llama.sizes(config, where)
    stated = {"hidden_activation": "gelu_pytorch_tanh", **{k: v for k, v in config.items() if v is not None}}
    if family == "gemma":  # its old configs say gelu and mean the approximation
        stated["hidden_activation"] = "gelu_pytorch_tanh"
    return common.make(
        values
        | common.by_kind(kinds)
        | {
            "activation": common.activation(stated, where, "hidden_activation"),
            "norm": "rms_offset",
            "post_norms": family != "gemma",
            "query_key_norm": family == "gemma3_text",
            "attention_bias": bool(config.get("attention_bias", False)),
            "output_bias": bool(config.get("attention_bias", False)),
            "score_scale": config.get("query_pre_attn_scalar", 256) ** -0.5
            if family != "gemma"
            else values["score_scale"],
            "score_cap": config.get("attn_logit_softcapping", 50.0 if family == "gemma2" else None),
            "logit_cap": config.get("final_logit_softcapping", 30.0 if family == "gemma2" else None),
            "embedding_scale": values["d_model"] ** 0.5,
        },
        where,
    )


def text_config(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the config of the text part."""
    if config["model_type"] != "gemma3":
        return config
    text = {**field(config, where, "text_config"), "model_type": "gemma3_text"}
    defaults = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    return {"eos_token_id": config.get("eos_token_id"), **defaults, **text}


def complete(
    config: Mapping[str, Any],
    settings: CausalSettings,
    tensors: Mapping[str, Opened],
    equal: Callable[[Opened, Opened], bool],
    where: str,
) -> tuple[CausalSettings, dict[str, Opened]]:
    """Return the settings, completed from the weights, and these under the names of `names`."""
    found = common.clean(tensors, PREFIX, EMBEDDING, _WRAPPERS, _TOWERS)
    if f"{PREFIX}{HEAD}" in found:
        found[HEAD] = found.pop(f"{PREFIX}{HEAD}")
    return common.tie(settings, config.get("tie_word_embeddings", True), found, HEAD, EMBEDDING, equal, where)


def config_of(settings: CausalSettings) -> dict[str, Any]:
    """Return the `config.json` of a model."""
    family = settings.family
    architecture = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}[family]
    act = "hidden_act" if family == "gemma" else "hidden_activation"
    found = {
        **llama.size_config(settings, architecture),
        act: common.ACTIVATION_NAMES[settings.activation],
        "attention_bias": settings.attention_bias,
    }
    ropes = {bool(kind.window): common.rope_config(kind.rope) for kind in settings.kinds if kind.rope}
    if family == "gemma":
        return found | {"rope_parameters": ropes[False]}
    windows = [settings.kinds[i].window for i in settings.pattern]
    found |= {
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "sliding_window": next((window for window in windows if window), None),
        "query_pre_attn_scalar": round(settings.score_scale**-2),  # transformers takes whole numbers only
        "attn_logit_softcapping": settings.score_cap,
        "final_logit_softcapping": settings.logit_cap,
        "rope_parameters": next(iter(ropes.values())),
    }
    if family == "gemma3_text":
        any_rope = next(iter(ropes.values()))
        found["rope_parameters"] = {
            "full_attention": ropes.get(False, any_rope),
            "sliding_attention": ropes.get(True, any_rope),
        }
    return found
