"""What the families of decoder-only models share: reading `config.json`, rotary positions, names of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from softprompt_jax.config import UserError, parse
from softprompt_jax.models.causal_settings import CausalSettings, LayerKind, Rope
from softprompt_jax.models.settings import ModelSettings

Opened = TypeVar("Opened")  # a tensor on disk; what it is, `checkpoints/` knows
ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu"},
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"},
}
ACTIVATION_NAMES = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# Constants that old files hold beside the weights: masks and rotary frequencies.
_BUFFERS = re.compile(r"(\.attn\.bias|\.attention\.bias|masked_bias|rotary_emb\.inv_freq)$")


class Share(NamedTuple):
    """One of `of` weights that share a tensor: number `number`, in each of `groups` along the last axis."""

    number: int
    of: int
    groups: int = 1

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Return the tensor of all parts, in order."""
        cut = [part.reshape(*part.shape[:-1], self.groups, -1) for part in parts]
        return np.stack(cut, -2).reshape(*parts[0].shape[:-1], -1)

    def part(self, whole: np.ndarray) -> np.ndarray:
        """Return this weight's part of the tensor."""
        cut = whole.reshape(*whole.shape[:-1], self.groups, self.of, -1)
        return cut[..., self.number, :].reshape(*whole.shape[:-1], -1)


class Weight(NamedTuple):
    """Where a weight of ours lies in Hugging Face's layout: its tensors, one a layer if it is stacked."""

    tensors: list[str]
    transposed: bool = False
    share: Share | None = None  # which part of the tensors, once transposed


def field(config: Mapping[str, Any], where: str, *names: str) -> Any:
    """Return the first of these fields that a config states.

    Errors: UserError where it states none.
    """
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise UserError(f"{where}: no {names[0]!r}; expected it in the config of a {config.get('model_type')} model")


def count(config: Mapping[str, Any], where: str, *names: str) -> int:
    """Return a size that a config states. Errors: UserError for what is no number from 1 to 10 million."""
    found = field(config, where, *names)
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= 10_000_000:
        raise UserError(f"{where}: {names[0]} is {found!r}; expected a whole number from 1 to 10,000,000")
    return found


def layer_count(config: Mapping[str, Any], where: str, *names: str) -> int:
    """Return the number of layers, before a list of so many is made. Errors: UserError for more than 10,000."""
    found = count(config, where, *names)
    if found > 10_000:
        raise UserError(f"{where}: {names[0]} is {found}; expected at most 10,000 layers")
    return found


def activation(config: Mapping[str, Any], where: str, *names: str) -> str:
    """Return our name of the activation that a config states."""
    name = field(config, where, *names)
    if name not in ACTIVATIONS:
        raise UserError(f"{where}: {names[0]} is {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def read_rope(config: Mapping[str, Any], where: str, base: float, layers: str | None = None) -> Rope:
    """Return the rotary positions that a config states, in the spelling of transformers 4 or 5.

    `base`: where it states none. `layers`: a key of `rope_parameters` that holds those of some layers.
    Errors: UserError for a scaling that is not known here.
    """
    stated = config.get("rope_parameters") or {}
    if layers is not None and layers in stated:
        stated = stated[layers]
    old = config.get("rope_scaling") or {}
    scaling = {**old, **stated}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    share = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct", 1.0)))
    values = {"kind": kind, "base": scaling.get("rope_theta", config.get("rope_theta", base)), "share": share}
    if kind in ("linear", "llama3"):
        values["factor"] = field(scaling, where, "factor")
    if kind == "llama3":
        for ours, theirs in (
            *(("low", "low_freq_factor"), ("high", "high_freq_factor")),
            ("original", "original_max_position_embeddings"),
        ):
            values[ours] = field(scaling, where, theirs)
    if kind not in ("default", "linear", "llama3"):
        raise UserError(
            f"{where}: rope_type is {kind!r}; expected default, linear or llama3; this rotary scaling is not known here"
        )
    return parse(Rope, values, where)


def rope_config(rope: Rope) -> dict[str, Any]:
    """Return the `rope_parameters` of a config."""
    found: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.base}
    if rope.share != 1:
        found["partial_rotary_factor"] = rope.share
    if rope.kind != "default":
        found["factor"] = rope.factor
    if rope.kind == "llama3":
        found |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
        found["original_max_position_embeddings"] = rope.original
    return found


def by_kind(layers: Iterable[LayerKind]) -> dict[str, Any]:
    """Return the settings `kinds` and `pattern` of a model with these layers."""
    layers = list(layers)
    kinds = tuple(dict.fromkeys(layers))
    return {"kinds": kinds, "pattern": tuple(kinds.index(layer) for layer in layers)}


def ends(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings `eos`, the first id that ends answers, and `other_eos`. 0 where the config states none."""
    stated: Any = config.get("eos_token_id") or 0
    first, *others = stated if isinstance(stated, list) else [stated]
    return {"eos": int(first), "other_eos": tuple(int(each) for each in others)}


def eos_token_id(settings: ModelSettings) -> int | list[int]:
    """Return what a config.json states as the ids that end answers."""
    return [settings.eos, *settings.other_eos] if settings.other_eos else settings.eos


def make(values: dict[str, Any], where: str) -> CausalSettings:
    """Return validated settings whose sizes fit each other."""
    settings = parse(CausalSettings, values, where)
    if settings.num_heads % settings.num_key_heads:
        raise UserError(
            f"{where}: {settings.num_heads} heads share {settings.num_key_heads} key heads; expected a divisor"
        )
    if len(settings.pattern) != settings.num_layers:
        raise UserError(
            f"{where}: found {len(settings.pattern)} layer_types; expected {settings.num_layers}, one for each layer"
        )
    return settings


def layered(settings: CausalSettings, prefix: str, parts: Mapping[str, tuple[str, bool]]) -> dict[str, Weight]:
    """Return the weights of all layers: our path in a layer -> the tensors at `prefix`.i.name, and "is transposed"."""
    return {
        f"decoder.layers.{ours}": Weight([f"{prefix}.{i}.{name}" for i in range(settings.num_layers)], transposed)
        for ours, (name, transposed) in parts.items()
    }


def clean(
    tensors: Mapping[str, Opened],
    prefix: str,
    embedding: str,
    wrappers: Sequence[str] = (),
    skipped: Sequence[str] = (),
) -> dict[str, Opened]:
    """Return the tensors of a text model under their full names, without buffers and towers for other media.

    `prefix`: what stands before all names but the head's, and may be missing. `wrappers`: prefixes of a model in which
    the text model is a part. `skipped`: beginnings of names that are no part of the text model.
    """
    found = {}
    for name, tensor in tensors.items():
        if _BUFFERS.search(name) or name.startswith(tuple(skipped)):
            continue
        for wrapper in wrappers:
            if name.startswith(wrapper):
                name = prefix + name.removeprefix(wrapper).removeprefix(prefix)
                break
        found[name] = tensor
    if embedding not in found and embedding.removeprefix(prefix) in found:
        found = {(name if name.startswith(("lm_head", "embed_out")) else prefix + name): t for name, t in found.items()}
    return found


def tie(
    settings: CausalSettings,
    stated: bool | None,
    tensors: dict[str, Opened],
    head: str,
    embedding: str,
    equal: Callable[[Opened, Opened], bool],
    where: str,
) -> tuple[CausalSettings, dict[str, Opened]]:
    """Decide whether the head is the embedding table: it is where the config says so, and where the two are equal."""
    if not stated and head not in tensors:
        raise UserError(
            f"{where}: says untied (tie_word_embeddings: false) but there is no {head}; expected it; "
            "download the weights again, or set tie_word_embeddings to true if the model is tied"
        )
    if stated and head in tensors and embedding in tensors and equal(tensors[head], tensors[embedding]):
        del tensors[head]
    return settings.model_copy(update={"tied": head not in tensors}), tensors
