"""The small T5 1.1 of shared/fixtures/t5x in our layout, with its inputs and what t5x made of them."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization

from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models.build import abstract
from softprompt_jax.models.t5 import T5, T5Settings
from softprompt_jax.trees import flatten, unflatten

SETTINGS = T5Settings(
    vocabulary_rows=256, d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=2, num_decoder_layers=2
)
_NORMS = {"attention_norm": "pre_attention_layer_norm", "feed_forward_norm": "pre_mlp_layer_norm"}
_PARTS = {"query": "query", "key": "key", "value": "value", "output": "out"}


@functools.cache
def golden(fixtures: Path) -> Mapping[str, np.ndarray]:
    with np.load(fixtures / "t5x" / "golden.npz") as arrays:
        return dict(arrays)


@functools.cache
def _weights(fixtures: Path) -> dict[str, np.ndarray]:
    """Return the parameters under our paths: layers stacked, relative biases [buckets, heads]."""
    theirs = parameters(fixtures)
    ours = {"embedding": theirs["token_embedder/embedding"], "head.kernel": theirs["decoder/logits_dense/kernel"]}
    for stack in ("encoder", "decoder"):

        def layers(name, stack=stack):
            return np.stack([theirs[f"{stack}/layers_{i}/{name}"] for i in range(2)])

        ours[f"{stack}.norm.scale"] = theirs[f"{stack}/{stack}_norm/scale"]
        ours[f"{stack}.bias.table"] = theirs[f"{stack}/relpos_bias/rel_embedding"].T
        attentions, norms = {"attention": "attention"}, dict(_NORMS)
        if stack == "decoder":
            attentions = {"attention": "self_attention", "cross": "encoder_decoder_attention"}
            norms |= {
                "attention_norm": "pre_self_attention_layer_norm",
                "cross_norm": "pre_cross_attention_layer_norm",
            }
        for name, their_name in attentions.items():
            for part, their_part in _PARTS.items():
                ours[f"{stack}.layers.{name}.{part}.kernel"] = layers(f"{their_name}/{their_part}/kernel")
        for part, their_part in {"gate": "wi_0", "up": "wi_1", "down": "wo"}.items():
            ours[f"{stack}.layers.feed_forward.{part}.kernel"] = layers(f"mlp/{their_part}/kernel")
        for name, their_name in norms.items():
            ours[f"{stack}.layers.{name}.scale"] = layers(f"{their_name}/scale")
    assert sum(array.size for array in ours.values()) == sum(array.size for array in theirs.values())
    return ours


def model(fixtures: Path, prompted: bool = False, dtype: str = "float32") -> T5:
    graphdef, state = nnx.split(abstract(SETTINGS, dtype))
    nnx.replace_by_pure_dict(state, unflatten({k: jnp.asarray(v, dtype) for k, v in _weights(fixtures).items()}))
    made = nnx.merge(graphdef, state)
    if prompted:
        attach_rows(made, golden(fixtures)["prompt"])
    return made


def batch(fixtures: Path, prompted: bool = False) -> dict[str, jnp.ndarray]:
    arrays = golden(fixtures)
    encoder = arrays["short/encoder_input_tokens"]
    if prompted:
        ids = np.tile(np.arange(256, 261, dtype=np.int32), (len(encoder), 1))
        encoder = np.concatenate([ids, encoder], 1)
    return {
        "encoder_tokens": jnp.asarray(encoder),
        "decoder_inputs": jnp.asarray(arrays["short/decoder_input_tokens"]),
        "decoder_targets": jnp.asarray(arrays["short/decoder_target_tokens"]),
    }


def real_targets(fixtures: Path) -> np.ndarray:
    """Tell where logits are compared, [B, U]."""
    return golden(fixtures)["short/decoder_loss_weights"] > 0


def parameters(fixtures: Path) -> dict[str, np.ndarray]:
    """Return t5x's own parameters, `a/b/c` to array."""
    with np.load(fixtures / "t5x" / "tiny_params_flat.npz") as arrays:
        return dict(arrays)


def weights(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items()}


def copied(fixtures: Path, name: str, to: Path) -> Path:
    """Return a writable copy of a fixture's checkpoint folder."""
    (source,) = (fixtures / "t5x" / name).glob("checkpoint_*")
    shutil.copytree(source, to / source.name)
    for path in [to / source.name, *(to / source.name).rglob("*")]:
        path.chmod(0o755)
    return to / source.name


def write(folder: Path, parameters: dict[str, np.ndarray], slots: dict | None = None) -> Path:
    """Write parameters `a/b/c` as T5X's msgpack file with all arrays inline."""
    folder.mkdir(parents=True, exist_ok=True)
    target: dict = {}
    for name, value in parameters.items():
        *parents, last = name.split("/")
        functools.reduce(lambda place, part: place.setdefault(part, {}), parents, target)[last] = value
    tree = {"version": 3, "optimizer": {"target": target, "state": {"step": np.int32(7), "param_states": slots or {}}}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    return folder


def scanned(arrays: Mapping[str, np.ndarray], axis: int) -> dict[str, np.ndarray]:
    """Return arrays `a/b/c` with those of the two layers stacked as T5X's scanned models have them."""
    return {
        name.replace("layers_0", "layers"): np.stack([value, arrays[name.replace("layers_0", "layers_1")]], axis)
        if "layers_0" in name
        else value
        for name, value in arrays.items()
        if "layers_1" not in name
    }
