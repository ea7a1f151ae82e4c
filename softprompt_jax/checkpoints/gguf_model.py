"""From GGUF to a model: metadata become a Hugging Face config, tensors get its names and the order of its rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from softprompt_jax.checkpoints.gguf import Gguf, open_gguf
from softprompt_jax.checkpoints.tensors import Tensor, same
from softprompt_jax.config import UserError, nearest
from softprompt_jax.models.causal_settings import Rope
from softprompt_jax.models.families import read
from softprompt_jax.models.settings import ModelSettings

# The architectures that are known, and their model_type. Mistral and SmolLM2 are stored as llama.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2"}
ARCHITECTURES |= {"gemma3": "gemma3_text"}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS = {
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    **{"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
}
_POST_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.([a-z_]+)\.(weight|bias)")
_ROPE_FREQUENCIES = "rope_freqs.weight"  # of Llama 3: divisors of the rotary frequencies
_LLAMA3_LENGTH = 8192  # of Llama 3's first training, which no file states


def open_model(source: str | Path) -> tuple[ModelSettings, dict[str, Tensor], Gguf]:
    """Return a file's settings, its tensors under Hugging Face names, and the opened file.

    Errors: UserError for a damaged file, and for an architecture or a tensor that is not known here.
    """
    file = open_gguf(source)
    return *read(config_of(file), tensors_of(file), same, file.where), file


def architecture_of(file: Gguf) -> str:
    """Return the architecture that a file names, one of `ARCHITECTURES`."""
    found = file.text("general.architecture")
    if found not in ARCHITECTURES:
        raise UserError(
            f"{file.where}: general.architecture is {found[:80]!r}; expected one of {', '.join(ARCHITECTURES)}"
            f"{nearest(found[:80], ARCHITECTURES)}"
        )
    return found


def config_of(file: Gguf) -> dict[str, Any]:
    """Return the `config.json` of a file's model.

    Errors: UserError for metadata that are missing, or do not fit the tensors.
    """
    kind = architecture_of(file)
    for key, known in (("split.count", 1), (f"{kind}.expert_count", 0)):
        if file.metadata.get(key, known) not in (0, known):
            raise UserError(
                f"{file.where}: {key} is {file.metadata[key]}; expected {known}; "
                "merge the parts of a split file first; mixtures of experts are not known here"
            )
    width, heads = file.number(f"{kind}.embedding_length"), file.number(f"{kind}.attention.head_count")
    head_width = file.number(f"{kind}.attention.key_length", max(1, width // heads))
    found: dict[str, Any] = {
        "model_type": ARCHITECTURES[kind],
        "vocab_size": _rows(file, "token_embd.weight", None, width),
        "hidden_size": width,
        "intermediate_size": file.number(f"{kind}.feed_forward_length"),
        "num_hidden_layers": file.number(f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.number(f"{kind}.attention.head_count_kv", heads),
        "head_dim": head_width,
        "rms_norm_eps": file.real(f"{kind}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": file.number(f"{kind}.context_length", 2048),
        "tie_word_embeddings": "output.weight" not in file.infos,
        "attention_bias": "blk.0.attn_q.bias" in file.infos,
        "mlp_bias": "blk.0.ffn_down.bias" in file.infos,
    }
    for name in ("bos", "eos", "pad"):
        key = f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id"
        if key in file.metadata:
            found[f"{name}_token_id"] = file.number(key, least=0)
    _check_sizes(file, found, file.number(f"{kind}.attention.value_length", head_width))
    rope = _rope(file, kind, head_width)
    return found | {"rope_parameters": rope} | _specials(file, kind, found, rope)


def _rows(file: Gguf, name: str, rows: int | None, columns: int) -> int:
    """Return how many rows a matrix has, which must be of this size."""
    if name not in file.infos:
        raise UserError(f"{file.where}: no tensor {name}; expected a complete model; download the file again")
    shape = file.infos[name].shape
    if len(shape) != 2 or shape[1] != columns or rows not in (None, shape[0]):
        expected = ["any" if rows is None else rows, columns]
        raise UserError(f"{file.where}: tensor {name}: found shape {list(shape)}; expected {expected} by the metadata")
    return shape[0]


def _check_sizes(file: Gguf, config: dict[str, Any], value_width: int) -> None:
    """Refuse sizes that are not those of the first layer, before anything is made by them."""
    head_width, width = config["head_dim"], config["hidden_size"]
    if config["num_hidden_layers"] > len(file.infos):
        raise UserError(
            f"{file.where}: block_count is {config['num_hidden_layers']}, but there are {len(file.infos)} tensors; "
            "expected a complete model; download the file again"
        )
    if value_width != head_width or head_width % 2:
        raise UserError(
            f"{file.where}: heads of keys are {head_width} wide, those of values {value_width}; "
            "expected the same, an even number"
        )
    keys = config["num_key_value_heads"] * head_width
    for name, rows in (("attn_q", config["num_attention_heads"] * head_width), ("attn_k", keys), ("attn_v", keys)):
        _rows(file, f"blk.0.{name}.weight", rows, width)
    _rows(file, "blk.0.ffn_up.weight", config["intermediate_size"], width)


def _rope(file: Gguf, kind: str, head_width: int) -> dict[str, Any]:
    """Return the `rope_parameters`: of Llama 3 those whose frequencies the file holds."""
    found: dict[str, Any] = {"rope_type": file.text(f"{kind}.rope.scaling.type", "none")}
    if found["rope_type"] == "none":
        found["rope_type"] = "default"
    else:
        found["factor"] = file.real(f"{kind}.rope.scaling.factor", 1.0)
    if f"{kind}.rope.freq_base" in file.metadata:
        found["rope_theta"] = file.real(f"{kind}.rope.freq_base")
    turned = file.number(f"{kind}.rope.dimension_count", head_width)
    if turned != head_width:
        found["partial_rotary_factor"] = turned / head_width
    if _ROPE_FREQUENCIES not in file.infos:
        return found
    base = found.get("rope_theta", 10_000.0)
    divisors = file.tensor(_ROPE_FREQUENCIES).read().reshape(-1)
    known = {"factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    known["original_max_position_embeddings"] = file.number(
        f"{kind}.rope.scaling.original_context_length", _LLAMA3_LENGTH
    )
    plain = Rope(base=base).frequencies(turned)
    if known["factor"] > 0 and found["rope_type"] == "default" and divisors.shape == plain.shape:
        scaled = Rope(
            base=base,
            kind="llama3",
            factor=known["factor"],
            original=int(known["original_max_position_embeddings"]),
        ).frequencies(turned)
        if np.allclose(scaled * divisors, plain, rtol=1e-4, atol=0):
            return found | {"rope_type": "llama3"} | known
    raise UserError(
        f"{file.where}: {_ROPE_FREQUENCIES} is not what Llama 3 divides its rotary frequencies by; expected factors "
        f"1 and 4 and a length of {_LLAMA3_LENGTH}; this rotary scaling is not known here"
    )


def _specials(file: Gguf, kind: str, config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Return what only some families state: windows, caps, two rotary bases."""
    found: dict[str, Any] = {}
    window = f"{kind}.attention.sliding_window"
    if file.metadata.get(window):
        found["sliding_window"] = file.number(window)
    if kind == "llama" and found:
        found["model_type"] = "mistral"
    if kind.startswith("qwen"):
        found["use_sliding_window"] = False
    if kind not in ("gemma2", "gemma3"):
        return found
    for key, name in (("attn_logit", "attn_logit_softcapping"), ("final_logit", "final_logit_softcapping")):
        if f"{kind}.{key}_softcapping" in file.metadata:
            found[name] = file.real(f"{kind}.{key}_softcapping")
    # As llama.cpp: only the models of 27 billion parameters scale by the width of the model.
    largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[kind]
    heads, width = config["num_attention_heads"], config["hidden_size"]
    found["query_pre_attn_scalar"] = width // heads if largest else config["head_dim"]
    if kind == "gemma3":
        local = file.real(f"{kind}.rope.freq_base_swa", 10_000.0)
        far = {"rope_theta": 1_000_000.0, **rope}
        near = {"rope_type": "default", "rope_theta": local}
        found["rope_parameters"] = {"full_attention": far, "sliding_attention": near}
        pattern = file.metadata.get(f"{kind}.attention.sliding_window_pattern", 6)
        if isinstance(pattern, np.ndarray):
            found["layer_types"] = ["sliding_attention" if near else "full_attention" for near in pattern]
        else:
            found["sliding_window_pattern"] = file.number(f"{kind}.attention.sliding_window_pattern", 6)
    return found


def tensors_of(file: Gguf) -> dict[str, Tensor]:
    """Return the tensors under Hugging Face names, as it has them.

    The rows of Llama's queries and keys are stored in pairs that turn together, and Gemma's norms plus one.
    """
    kind, found = architecture_of(file), {}
    heads = {"attn_q": file.number(f"{kind}.attention.head_count")}
    heads["attn_k"] = file.number(f"{kind}.attention.head_count_kv", heads["attn_q"])
    parts = _PARTS | (_POST_NORMS if kind in ("gemma2", "gemma3") else {})
    for name, info in file.infos.items():
        if name == _ROPE_FREQUENCIES:
            continue
        layer, order = _LAYER.fullmatch(name), None
        if name in _WHOLE:
            theirs = _WHOLE[name]
        elif layer is not None and layer[2] in parts:
            theirs = f"model.layers.{layer[1]}.{parts[layer[2]]}.{layer[3]}"
            if kind == "llama" and layer[2] in heads:
                order = _halves(file, name, info.shape[0], heads[layer[2]])
        else:
            raise UserError(f"{file.where}: tensor {name[:80]!r} is unknown; expected only those of {kind}")
        if len(info.shape) > 2:
            raise UserError(f"{file.where}: tensor {name} has {len(info.shape)} axes; expected a matrix or a vector")
        shift = -1.0 if kind.startswith("gemma") and name.endswith("norm.weight") else 0.0
        found[theirs] = file.tensor(name, order, shift)
    return found


def _halves(file: Gguf, name: str, rows: int, heads: int) -> np.ndarray:
    """Return the order of rows in which pairs that turn together stand in the two halves of a head."""
    if rows % (2 * heads):
        raise UserError(f"{file.where}: tensor {name} has {rows} rows; expected a multiple of {2 * heads}")
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
