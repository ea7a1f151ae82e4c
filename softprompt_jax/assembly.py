"""From a run's settings to a model with its methods attached, its tokenizer and its task."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from softprompt_jax import methods
from softprompt_jax.checkpoints.artifact import check_backbone, read_prompt, read_trained
from softprompt_jax.checkpoints.backbone import (
    Backbone,
    abstract_backbone,
    as_dtype,
    find_folder,
    load_backbone,
    local_folder,
)
from softprompt_jax.config import UserError
from softprompt_jax.data.prompt_layout import Placement
from softprompt_jax.data.tokenizer import Tokenizer, load_tokenizer
from softprompt_jax.distributed import mesh
from softprompt_jax.models.flash import check_model
from softprompt_jax.models.presets import published_size
from softprompt_jax.models.quantized import abstract_quantized, quantization_of, quantized
from softprompt_jax.models.t5 import T5
from softprompt_jax.run import Run, Scratch


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A model with its methods, and its tokenizer."""

    model: T5
    tokenizer: Tokenizer
    identity: str  # of the backbone
    tokenizer_folder: Path

    @property
    def prompt_ids(self) -> Placement | None:
        """Where the ids of the prompt's embeddings, from V on, stand around a text; None without a prompt."""
        return prompt_ids(self.model)


def prompt_ids(model: T5) -> Placement | None:
    """Return where the ids of a model's prompt embeddings, from V on, stand around a text; None without a prompt."""
    return None if model.prompt is None else model.prompt.placement


def check_devices(run: Run, assembly: Assembly, platform: str | None = None) -> None:
    """Refuse a mesh that does not divide a run's batch or backbone, and `attention: flash` where it cannot be had.

    `platform`: the kind of the devices that will compute (default: of the mesh).
    """
    settings = assembly.model.settings
    rows = mesh.row_shards() if run.packing else run.batch_size // run.accumulate  # packed rows follow the mesh
    mesh.check_divisible(rows, settings.num_heads, settings.d_model, settings.d_ff)
    check_model(run.attention, platform or mesh.platform(), run.dtype, settings.d_kv, run.packing is not None)


def assemble(
    run: Run, backbone: Backbone | None = None, platform: str | None = None, tokenizer: Tokenizer | None = None
) -> Assembly:
    """Load the backbone (or take this one, which stays as it is) and attach the run's methods.

    An abstract backbone (see `abstract_backbone_of`) gives an abstract model. `platform`: the kind of the devices that
    will compute (default: of the mesh). `tokenizer`: the backbone's by default. The same run gives the same bits.
    """
    if backbone is None:
        backbone = backbone_of(run)
    model = with_settings(backbone.model, platform=platform or mesh.platform(), **run.of_the_backbone)
    model.dtype = run.dtype
    tokenizer = tokenizer or load_tokenizer(backbone.folder)

    def attach(model: T5) -> T5:
        methods.attach(run.methods, model, jax.random.key(run.seed), context(run, tokenizer, backbone))
        check_own_prompts(run, model)
        return model

    model = nnx.eval_shape(attach, model) if backbone.is_abstract else attach(model)
    return Assembly(model, tokenizer, backbone.identity, backbone.folder)


def backbone_of(run: Run) -> Backbone:
    """Load the run's backbone, or make it."""
    if isinstance(run.backbone, Scratch):
        return new_backbone(run)
    return load_backbone(run.backbone, run.dtype, sharding=mesh.weight_sharding_fn(), quantize=run.quantize)


def new_backbone(run: Run) -> Backbone:
    """Build a backbone with random weights."""
    assert isinstance(run.backbone, Scratch)
    model = as_dtype(T5(run.backbone.settings, jax.random.fold_in(jax.random.key(run.seed), 1)), run.dtype)
    if run.quantize is not None:
        quantized(model, run.quantize)
    return Backbone(model, find_folder(run.backbone.tokenizer), "scratch")


def abstract_backbone_of(run: Run) -> Backbone:
    """Return the run's backbone as shapes and dtypes only; a published one is known without its files."""
    settings, source = None, run.backbone
    if isinstance(source, Scratch):
        settings, source = source.settings, source.tokenizer
    elif not Path(source).exists():
        settings = published_size(source)
    if settings is None:
        return abstract_backbone(source, run.dtype, run.quantize)
    model = as_dtype(abstract_quantized(settings, run.dtype, run.quantize), run.dtype)
    if isinstance(run.backbone, Scratch):
        return Backbone(model, local_folder(source) or Path(source), "scratch")
    return Backbone(model, Path(source), source)


def with_settings(model: T5, **changes) -> T5:
    """Return the model with other settings of how it computes, sharing its weights."""
    shell = abstract_quantized(model.settings.model_copy(update=changes), model.dtype, quantization_of(model))
    return nnx.merge(nnx.graphdef(shell), nnx.state(model))


def context(run: Run, tokenizer: Tokenizer, backbone: Backbone) -> methods.Context:
    """Collect what initialisations look at; prompts of other runs must be of the same backbone.

    An abstract backbone has no fingerprint to compare.
    """
    hint = "carry a prompt over with softprompt recycle, or give bare rows (.npy)"

    def check(metadata: dict[str, str], source: str) -> None:
        if not backbone.is_abstract:
            check_backbone(metadata, backbone.model, source, backbone.identity, hint)

    def prompt_rows(source: str) -> np.ndarray:
        rows, metadata = read_prompt(source)
        check(metadata, source)
        return rows

    def trained(source: str) -> dict[str, Any]:
        values, metadata = read_trained(source)
        check(metadata, source)
        return values

    each = tuple(tuple(task.words or ()) for task in run.tasks)
    words = tuple(dict.fromkeys(itertools.chain.from_iterable(each)))
    return methods.Context(
        tokenizer.encode,
        frozenset(tokenizer.special_ids),
        words,
        [i for i, piece in enumerate(tokenizer.pieces) if piece.startswith("▁") and piece[1:].isalpha()],
        prompt_rows,
        each if run.own_prompts else (),
        trained,
    )


def check_own_prompts(run: Run, model: T5) -> None:
    """Refuse methods that do not give each task of a mixture with `prompts: own` a prompt."""
    if not run.own_prompts:
        return
    first, found = model.settings.vocabulary_rows, set()
    if model.prompt is not None:
        around = [np.atleast_2d(ids) for ids in dataclasses.astuple(model.prompt.placement)]
        found = {int(i) for ids in around if len(ids) == len(run.tasks) for i in ids.flat if i >= first}
    if model.prompt is None or not found or len(found) != jax.eval_shape(model.prompt.table).shape[0]:
        raise UserError(
            f"task.prompts: own, but no method gives each of the {len(run.tasks)} tasks a prompt; "
            "expected one that does, such as kind: prompt; or use prompts: shared"
        )
