"""Finished runs of several methods over one backbone, with random numbers in the place of trained ones."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import small_runs
import tiny
import tiny_lm
from flax import nnx

from softprompt_jax import Run
from softprompt_jax.assembly import assemble, layout_of
from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.backbone import Backbone, load_backbone, save_backbone
from softprompt_jax.config import parse
from softprompt_jax.data.prompt_layout import EOS
from softprompt_jax.methods import finish, put_trained, split
from softprompt_jax.models import decode
from softprompt_jax.models.t5 import T5, T5Settings
from softprompt_jax.trust import remember

PREFIX = {"kind": "prefix", "network": None}
# What a bank holds side by side: every kind, of unlike lengths, and some at once. Each model is a compilation.
METHODS: dict[str, list[dict[str, Any]]] = {
    "prefix": [PREFIX | {"length": 2}],
    "prefix placed, rows": [
        PREFIX | {"length": 4, "positions": "before"},
        {"kind": "prompt", "length": 2, "place": "both"},
    ],
    "ia3": [{"kind": "ia3"}],
}
MORE: dict[str, list[dict[str, Any]]] = {
    "rows": [{"kind": "prompt", "length": 3}],
    "rows both": [{"kind": "prompt", "length": 3, "place": "both"}],
    "rows decoder": [{"kind": "prompt", "length": 5, "place": "decoder"}],
    "p_tuning": [{"kind": "p_tuning", "length": 4, "network": "mlp", "hidden": 8}],
    "prefix longer": [PREFIX | {"length": 5, "attentions": ["decoder", "cross"]}],
    "prefix placed": [PREFIX | {"length": 3, "positions": "before"}],
    "ia3 everywhere": [{"kind": "ia3", "outputs": ["*"], "inputs": ["query"]}, {"kind": "prompt", "length": 1}],
    "dept": [{"kind": "dept", "length": 2, "rank": 3, "positions": 4}],
    "dept around": [{"kind": "dept", "length": 3, "rank": 2, "positions": 9, "place": "{prompt:2} {text} {prompt:1}"}],
}


# On decoder-only models: what has a place there.
DECODER_ONLY: dict[str, list[dict[str, Any]]] = METHODS | {
    "prefix placed, rows": [
        PREFIX | {"length": 4, "positions": "before"},
        {"kind": "prompt", "length": 2, "place": "after"},
    ],
    **{name: MORE[name] for name in ("rows", "p_tuning", "prefix placed", "ia3 everywhere", "dept", "dept around")},
    "rows around": [{"kind": "prompt", "length": 3, "place": "{prompt:2} {text} {prompt:1}"}],
    "prefix longer": [PREFIX | {"length": 5, "attentions": ["decoder"]}],
}


def write_backbone(folder: Path, of: str = "t5") -> Backbone:
    """Write a T5 with more than one layer, and unlike depths; or a small model of another family."""
    if of != "t5":
        return load_backbone(str(tiny_lm.folder(folder, tiny.settings(of, vocabulary_rows=416, eos=2))))
    small_runs.write_tokenizer(folder)
    settings = T5Settings(
        vocabulary_rows=small_runs.ROWS, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, num_decoder_layers=3
    )
    model = T5(settings, jax.random.key(0))
    model.head.kernel[...] = (4 * model.head.kernel[...]).at[:, EOS].set(0)  # answers of several tokens
    save_backbone(model, folder, "float32")
    return load_backbone(str(folder))


def write_runs(
    folder: Path, backbone: Backbone, task: dict[str, Any], wanted: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Write a run folder of each of these methods; return the model that each has left."""
    models = {}
    for number, (name, methods) in enumerate(wanted.items()):
        settings = {"task": task, "backbone": str(backbone.folder), "methods": methods}
        run = parse(Run, settings, name)
        model = assemble(run, backbone).model
        put_trained(model, _drawn(split(model).trainable, name, number), name)
        model = finish(model)
        remember(run)
        (folder / name).mkdir(parents=True)
        metadata = {"settings": json.dumps(run.model_dump(mode="json")), "backbone": str(backbone.folder)}
        metadata["fingerprint"] = artifact.fingerprint(model)
        artifact.save_trained(model, folder / name / artifact.TRAINED_FILE, metadata)
        if split(model).trains_prompt_only:
            rows, place = np.asarray(model.prompt.table()), model.prompt.place
            artifact.save_prompt(rows, folder / name / artifact.PROMPT_FILE, metadata | {"place": place})
        models[name] = model
    return models


def _drawn(trainable: Any, name: str, seed: int) -> Any:
    """Return numbers of other sizes than at the start, so that every method changes the answers."""
    draw, deviation = np.random.default_rng(seed), 0.5 if name.startswith(("ia3", "p_tuning")) else 3.0
    start = 1.0 if name.startswith("ia3") else 0.0
    return jax.tree.map(
        lambda leaf: jnp.asarray(start + deviation * draw.normal(size=leaf.shape), leaf.dtype), trainable
    )


def answered(model: Any, ids: list[int], max_tokens: int, how: decode.Decoding, number: int) -> tuple[Any, Any]:
    """Decode one text under one model by itself, without any of what a bank does."""
    layout = layout_of(model)
    tokens = np.full((1, 48), min(model.settings.padding, 0), np.int32)  # one shape: each model is compiled once
    around = layout.around([*ids, *([] if model.text_end is None else [model.text_end])])
    tokens[0, : len(around)] = around
    graphdef, state = nnx.split(model)
    before = layout.decoder
    found, scores = _answered(graphdef, state, tokens, before, np.asarray([number]), max_tokens, how)
    return np.asarray(found)[0], np.asarray(scores)[0]


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _answered(graphdef, state, tokens, before, numbers, max_tokens, how):
    return decode.answers(nnx.merge(graphdef, state), tokens, max_tokens, how, numbers, before)


@dataclasses.dataclass(frozen=True)
class Many:
    """A bank's folder, its backbone, and each run's own model."""

    folder: Path
    backbone: Backbone
    task: dict[str, Any]
    models: dict[str, Any]


def write(folder: Path, wanted: dict[str, list[dict[str, Any]]], of: str = "t5") -> Many:
    """Write backbone and runs; "nothing", the bare backbone, has no folder."""
    backbone, task = write_backbone(folder / "backbone", of), small_runs.write_task(folder)
    models = write_runs(folder / "bank", backbone, task, wanted) | {"nothing": backbone.model}
    return Many(folder / "bank", backbone, task, models)
