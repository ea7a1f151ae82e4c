"""T5Gemma 1 and 2 (text): `config.json` to settings and back, and Hugging Face's name of each weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softprompt_jax.config import UserError, parse
from softprompt_jax.models.causal_settings import LayerKind
from softprompt_jax.models.families import common, gemma, llama
from softprompt_jax.models.families.common import Opened, Weight, field
from softprompt_jax.models.t5gemma import T5GemmaSettings

MODEL_TYPES = ("t5gemma", "t5gemma2")
EMBEDDING, DECODER_EMBEDDING = "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"
HEAD = "lm_head.out_proj.weight"
_TOWERS = ("model.encoder.vision_tower.", "model.encoder.multi_modal_projector.")
_IMAGE_END = "embed_tokens.eoi_embedding"  # embedding of the token that ends an image; text has none
_SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def settings_of(config: Mapping[str, Any], where: str) -> T5GemmaSettings:
    """Return the settings that a config states; `complete` decides `tied`.

    Errors: UserError for an encoder and a decoder of unlike widths.
    """
    second = config["model_type"] == "t5gemma2"
    encoder, decoder = field(config, where, "encoder"), field(config, where, "decoder")
    if second:
        encoder = field(encoder, where, "text_config")
    for name in _SAME:
        if encoder.get(name) != decoder.get(name):
            raise UserError(
                f"{where}: {name} is {encoder.get(name)} in the encoder and {decoder.get(name)} in the decoder; "
                "expected one width for both"
            )
    parts = []
    for part in (encoder, decoder):
        text = {**part, "model_type": "gemma3_text" if second else "gemma2"}
        parts.append(gemma.settings_of(text, where))
    first, last = parts
    window = encoder.get("sliding_window") or 4096
    back, ahead = ((window + 1) // 2, window // 2) if second else (window + 1, window)
    kinds = [
        kind if kind.window is None else LayerKind(window=back, ahead=ahead, rope=kind.rope) for kind in first.kinds
    ]
    values = last.model_dump() | {
        "family": config["model_type"],
        "num_layers": first.num_layers,
        "encoder_kinds": [kind.model_dump() for kind in kinds],
        "encoder_pattern": first.pattern,
        "merged": second,
        "own_embeddings": not second,
        "scales_prompt": not second,
        "padding": 0 if config.get("pad_token_id", 0) == 0 else -1,
        **common.ends({"eos_token_id": 1, **config}),
        "start": field({"bos_token_id": 2, **config}, where, "decoder_start_token_id", "bos_token_id"),
    }
    return parse(T5GemmaSettings, values, where)


def complete(
    config: Mapping[str, Any],
    settings: T5GemmaSettings,
    tensors: Mapping[str, Opened],
    equal: Callable[[Opened, Opened], bool],
    where: str,
) -> tuple[T5GemmaSettings, dict[str, Opened]]:
    """Return the settings, completed from the weights, and these under the names of `names`."""
    found = {
        name.replace("encoder.text_model.", "encoder."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(_TOWERS) and not name.endswith(_IMAGE_END)
    }
    if settings.merged and DECODER_EMBEDDING in found:
        if not equal(found[DECODER_EMBEDDING], found[EMBEDDING]):
            raise UserError(f"{where}: {DECODER_EMBEDDING} differs from the encoder's; expected one table for both")
        del found[DECODER_EMBEDDING]
    stated = config.get("tie_word_embeddings", True)
    table = DECODER_EMBEDDING if settings.own_embeddings else EMBEDDING
    made, found = common.tie(settings, stated, found, HEAD, table, equal, where)
    assert isinstance(made, T5GemmaSettings)
    return made, found


def config_of(settings: T5GemmaSettings) -> dict[str, Any]:
    """Return the `config.json` of a model."""
    family, inner = ("gemma3_text", "t5gemma2") if settings.merged else ("gemma2", "t5_gemma_module")
    parts = {}
    for name, source in (("encoder", settings.encoder), ("decoder", settings)):
        depth = len(source.pattern)
        text = gemma.config_of(source.model_copy(update={"family": family, "num_layers": depth}))
        windows = [kind for kind in source.kinds if kind.window]
        if name == "encoder" and windows:
            back, ahead = windows[0].window or 0, windows[0].ahead or 0
            text["sliding_window"] = back + ahead if settings.merged else ahead
        text["model_type"] = f"{inner}_{'text' if name == 'encoder' else 'decoder'}" if settings.merged else inner
        del text["architectures"]
        parts[name] = text | {"is_decoder": name == "decoder"}
    if settings.merged:
        parts["encoder"] = {"model_type": "t5gemma2_encoder", "text_config": parts["encoder"]}
    return {
        "architectures": [f"T5Gemma{'2' if settings.merged else ''}ForConditionalGeneration"],
        "model_type": settings.family,
        **parts,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "bos_token_id": settings.start,
        "eos_token_id": common.eos_token_id(settings),
        "vocab_size": settings.vocabulary_rows,
        "tie_word_embeddings": settings.tied,
    }


def names(settings: T5GemmaSettings) -> dict[str, Weight]:
    """Map each weight of ours to its Hugging Face tensors."""
    table = {"embedding": Weight([EMBEDDING])}
    if settings.own_embeddings:
        table["decoder_embedding"] = Weight([DECODER_EMBEDDING])
    if not settings.tied:
        table["head.kernel"] = Weight([HEAD], True)
    renamed = {"input_layernorm": "pre_self_attn_layernorm", "post_attention_layernorm": "post_self_attn_layernorm"}
    for stack, source in (("encoder", settings.encoder), ("decoder", settings)):
        table[f"{stack}.norm.scale"] = Weight([f"model.{stack}.norm.weight"])
        layers = range(len(source.pattern))
        for ours, weight in llama.names(settings).items():
            if not ours.startswith("decoder.layers."):
                continue
            ours, theirs = ours.replace("decoder.", f"{stack}.", 1), weight.tensors[0].removeprefix("model.layers.0.")
            for old, new in renamed.items():
                theirs = theirs.replace(old, new)
            table[ours] = weight._replace(tensors=[f"model.{stack}.layers.{i}.{theirs}" for i in layers])
            if stack == "decoder" and not settings.merged and "self_attn." in theirs:
                crossed = theirs.replace("self_attn.", "cross_attn.")
                path = ours.replace(".attention.", ".cross.")
                table[path] = weight._replace(tensors=[f"model.decoder.layers.{i}.{crossed}" for i in layers])
        if stack == "decoder" and not settings.merged:
            for ours, theirs in (("cross_norm", "pre_cross_attn"), ("cross_post_norm", "post_cross_attn")):
                places = [f"model.decoder.layers.{i}.{theirs}_layernorm.weight" for i in layers]
                table[f"decoder.layers.{ours}.scale"] = Weight(places)
    return table
