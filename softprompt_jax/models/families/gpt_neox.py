"""GPT-NeoX (Pythia): `config.json` to settings and back. Query, key and value of a head lie side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softprompt_jax.models.causal_settings import CausalSettings, LayerKind
from softprompt_jax.models.families import common
from softprompt_jax.models.families.common import Opened, Share, Weight

MODEL_TYPES = ("gpt_neox",)
PREFIX, EMBEDDING, HEAD = "gpt_neox.", "gpt_neox.embed_in.weight", "embed_out.weight"


def settings_of(config: Mapping[str, Any], where: str) -> CausalSettings:
    """Return the settings that a config states; `complete` decides `tied`."""
    width, heads = common.count(config, where, "hidden_size"), common.count(config, where, "num_attention_heads")
    layers = common.layer_count(config, where, "num_hidden_layers")
    stated = {
        "rotary_pct": 0.25,
        **config,
        "rope_theta": config.get("rope_theta", config.get("rotary_emb_base", 10_000)),
    }
    bias = bool(config.get("attention_bias", True))
    return common.make(
        {
            "family": "gpt_neox",
            "vocabulary_rows": common.count(config, where, "vocab_size"),
            "d_model": width,
            "d_kv": width // heads,
            "d_ff": common.count(config, where, "intermediate_size"),
            "num_heads": heads,
            "num_key_heads": heads,
            "num_layers": layers,
            "activation": common.activation({"hidden_act": "gelu", **config}, where, "hidden_act"),
            "gated": False,
            "epsilon": config.get("layer_norm_eps", 1e-5),
            "norm": "layer",
            "parallel": bool(config.get("use_parallel_residual", True)),
            "attention_bias": bias,
            "output_bias": bias,
            "feed_forward_bias": True,
            "score_scale": (width // heads) ** -0.5,
            **common.ends(config),
            **common.by_kind([LayerKind(rope=common.read_rope(stated, where, 10_000.0))] * layers),
        },
        where,
    )


def complete(
    config: Mapping[str, Any],
    settings: CausalSettings,
    tensors: Mapping[str, Opened],
    equal: Callable[[Opened, Opened], bool],
    where: str,
) -> tuple[CausalSettings, dict[str, Opened]]:
    """Return the settings, completed from the weights, and these under the names of `names`."""
    found = common.clean(tensors, PREFIX, EMBEDDING)
    return common.tie(settings, config.get("tie_word_embeddings", False), found, HEAD, EMBEDDING, equal, where)


def config_of(settings: CausalSettings) -> dict[str, Any]:
    """Return the `config.json` of a model."""
    rope = settings.kinds[0].rope
    assert rope is not None
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": settings.vocabulary_rows,
        "hidden_size": settings.d_model,
        "intermediate_size": settings.d_ff,
        "num_attention_heads": settings.num_heads,
        "num_hidden_layers": settings.num_layers,
        "hidden_act": common.ACTIVATION_NAMES[settings.activation],
        "layer_norm_eps": settings.epsilon,
        "use_parallel_residual": settings.parallel,
        "attention_bias": settings.attention_bias,
        "rope_parameters": common.rope_config(rope),
        "rotary_pct": rope.share,
        "tie_word_embeddings": settings.tied,
        "eos_token_id": common.eos_token_id(settings),
    }


def names(settings: CausalSettings) -> dict[str, Weight]:
    """Map each weight of ours to its Hugging Face tensors."""
    table = {
        "embedding": Weight([EMBEDDING]),
        "decoder.norm.scale": Weight(["gpt_neox.final_layer_norm.weight"]),
        "decoder.norm.bias": Weight(["gpt_neox.final_layer_norm.bias"]),
    }
    if not settings.tied:
        table["head.kernel"] = Weight([HEAD], True)
    parts: dict[str, tuple[str, bool]] = {}
    for ours, theirs in (("attention_norm", "input_layernorm"), ("feed_forward_norm", "post_attention_layernorm")):
        parts[f"{ours}.scale"], parts[f"{ours}.bias"] = (f"{theirs}.weight", False), (f"{theirs}.bias", False)
    products = {
        "feed_forward.gate": "mlp.dense_h_to_4h",
        "feed_forward.down": "mlp.dense_4h_to_h",
        "attention.output": "attention.dense",
    }
    fused = {f"attention.{name}": "attention.query_key_value" for name in ("query", "key", "value")}
    for ours, theirs in (products | fused).items():
        parts[f"{ours}.kernel"] = (f"{theirs}.weight", True)
        if settings.attention_bias or ours.startswith("feed_forward"):
            parts[f"{ours}.bias"] = (f"{theirs}.bias", False)
    table |= common.layered(settings, "gpt_neox.layers", parts)
    for number, ours in enumerate(fused):
        for path in (f"decoder.layers.{ours}.kernel", f"decoder.layers.{ours}.bias"):
            if path in table:
                table[path] = table[path]._replace(share=Share(number, 3, settings.num_heads))
    return table
