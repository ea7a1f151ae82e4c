"""GPT-2: `config.json` to settings and back. Its products are stored as [in, out], query, key and value in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softprompt_jax.models.causal_settings import CausalSettings, LayerKind
from softprompt_jax.models.families import common
from softprompt_jax.models.families.common import Opened, Share, Weight

MODEL_TYPES = ("gpt2",)
PREFIX, EMBEDDING, HEAD = "transformer.", "transformer.wte.weight", "lm_head.weight"


def settings_of(config: Mapping[str, Any], where: str) -> CausalSettings:
    """Return the settings that a config states; `complete` decides `tied`."""
    layers, width, heads = (
        common.layer_count(config, where, "n_layer"),
        *(common.count(config, where, n) for n in ("n_embd", "n_head")),
    )
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise common.UserError(f"{where}: scale_attn_by_inverse_layer_idx is true; expected false; not known here")
    return common.make(
        {
            "family": "gpt2",
            "vocabulary_rows": common.count(config, where, "vocab_size"),
            "d_model": width,
            "d_kv": width // heads,
            "d_ff": config.get("n_inner") or 4 * width,
            "num_heads": heads,
            "num_key_heads": heads,
            "num_layers": layers,
            "activation": common.activation(
                {"activation_function": "gelu_new", **config}, where, "activation_function"
            ),
            "gated": False,
            "epsilon": config.get("layer_norm_epsilon", 1e-5),
            "norm": "layer",
            "attention_bias": True,
            "output_bias": True,
            "feed_forward_bias": True,
            "score_scale": (width // heads) ** -0.5 if config.get("scale_attn_weights", True) else 1.0,
            "learned_positions": config.get("n_positions", 1024),
            **common.ends({"eos_token_id": 50256, **config}),
            **common.by_kind([LayerKind()] * layers),
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
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": settings.vocabulary_rows,
        "n_embd": settings.d_model,
        "n_inner": settings.d_ff,
        "n_head": settings.num_heads,
        "n_layer": settings.num_layers,
        "n_positions": settings.learned_positions,
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
    parts = {}
    for ours, theirs in (("attention_norm", "ln_1"), ("feed_forward_norm", "ln_2")):
        parts[f"{ours}.scale"], parts[f"{ours}.bias"] = (f"{theirs}.weight", False), (f"{theirs}.bias", False)
    products = {"attention.output": "attn.c_proj", "feed_forward.gate": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}
    fused = {f"attention.{name}": "attn.c_attn" for name in ("query", "key", "value")}
    for ours, theirs in (products | fused).items():
        parts[f"{ours}.kernel"], parts[f"{ours}.bias"] = (f"{theirs}.weight", False), (f"{theirs}.bias", False)
    table |= common.layered(settings, "transformer.h", parts)
    for number, ours in enumerate(fused):
        for kind in ("kernel", "bias"):
            path = f"decoder.layers.{ours}.{kind}"
            table[path] = table[path]._replace(share=Share(number, 3))
    return table
