"""GPT-Neo: `config.json` to settings and back. Scores are not scaled, and some layers see a window only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softprompt_jax.models.causal_settings import CausalSettings, LayerKind
from softprompt_jax.models.families import common
from softprompt_jax.models.families.common import Opened, Weight, field

MODEL_TYPES = ("gpt_neo",)
PREFIX, EMBEDDING, HEAD = "transformer.", "transformer.wte.weight", "lm_head.weight"


def settings_of(config: Mapping[str, Any], where: str) -> CausalSettings:
    """Return the settings that a config states; `complete` decides `tied`."""
    width, heads = (common.count(config, where, name) for name in ("hidden_size", "num_heads"))
    layers = common.layer_count(config, where, "num_layers")
    types = config.get("attention_layers")
    if types is None:  # the lengths are judged before the list is made
        pairs = field(config, where, "attention_types")
        try:
            total = sum(len(kinds) * max(0, int(times)) for kinds, times in pairs)
        except (TypeError, ValueError):
            raise common.UserError(
                f"{where}: attention_types {pairs!r:.80}; expected [[[kinds], times], ...]"
            ) from None
        if total != layers:
            raise common.UserError(f"{where}: attention_types names {total} layers; expected {layers}")
        types = [kind for kinds, times in pairs for _ in range(times) for kind in kinds]
    if len(types) != layers or set(types) - {"global", "local"}:
        raise common.UserError(
            f"{where}: attention_layers {types}; expected global or local for each of {layers} layers"
        )
    window = config.get("window_size", 256)
    return common.make(
        {
            "family": "gpt_neo",
            "vocabulary_rows": common.count(config, where, "vocab_size"),
            "d_model": width,
            "d_kv": width // heads,
            "d_ff": config.get("intermediate_size") or 4 * width,
            "num_heads": heads,
            "num_key_heads": heads,
            "num_layers": layers,
            "activation": common.activation(
                {"activation_function": "gelu_new", **config}, where, "activation_function"
            ),
            "gated": False,
            "epsilon": config.get("layer_norm_epsilon", 1e-5),
            "norm": "layer",
            "output_bias": True,
            "feed_forward_bias": True,
            "score_scale": 1.0,
            "learned_positions": config.get("max_position_embeddings", 2048),
            **common.ends({"eos_token_id": 50256, **config}),
            **common.by_kind(LayerKind(window=window if kind == "local" else None) for kind in types),
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
    return common.tie(settings, config.get("tie_word_embeddings", True), found, HEAD, EMBEDDING, equal, where)


def config_of(settings: CausalSettings) -> dict[str, Any]:
    """Return the `config.json` of a model."""
    types = ["local" if settings.kinds[i].window else "global" for i in settings.pattern]
    return {
        "architectures": ["GPTNeoForCausalLM"],
        "model_type": "gpt_neo",
        "vocab_size": settings.vocabulary_rows,
        "hidden_size": settings.d_model,
        "intermediate_size": settings.d_ff,
        "num_heads": settings.num_heads,
        "num_layers": settings.num_layers,
        "attention_types": [[[kind], 1] for kind in types],
        "window_size": next((kind.window for kind in settings.kinds if kind.window), 256),
        "max_position_embeddings": settings.learned_positions,
        "activation_function": "gelu_new" if settings.activation == "gelu_tanh" else settings.activation,
        "layer_norm_epsilon": settings.epsilon,
        "tie_word_embeddings": settings.tied,
        "eos_token_id": common.eos_token_id(settings),
    }


def names(settings: CausalSettings) -> dict[str, Weight]:
    """Map each weight of ours to its Hugging Face tensors."""
    table = {
        "embedding": Weight([EMBEDDING]),
        "positions": Weight(["transformer.wpe.weight"]),
        "decoder.norm.scale": Weight(["transformer.ln_f.weight"]),
        "decoder.norm.bias": Weight(["transformer.ln_f.bias"]),
    }
    if not settings.tied:
        table["head.kernel"] = Weight([HEAD], True)
    parts: dict[str, tuple[str, bool]] = {}
    for ours, theirs in (("attention_norm", "ln_1"), ("feed_forward_norm", "ln_2")):
        parts[f"{ours}.scale"], parts[f"{ours}.bias"] = (f"{theirs}.weight", False), (f"{theirs}.bias", False)
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "out_proj")):
        parts[f"attention.{ours}.kernel"] = (f"attn.attention.{theirs}.weight", True)
    parts["attention.output.bias"] = ("attn.attention.out_proj.bias", False)
    for ours, theirs in (("gate", "c_fc"), ("down", "c_proj")):
        parts[f"feed_forward.{ours}.kernel"] = (f"mlp.{theirs}.weight", True)
        parts[f"feed_forward.{ours}.bias"] = (f"mlp.{theirs}.bias", False)
    return table | common.layered(settings, "transformer.h", parts)
