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
from softprompt_jax.checkpoints.backbone import Backbone, find_folder, load_backbone
from softprompt_jax.config import UserError
from softprompt_jax.data.prompt_layout import Placement
from softprompt_jax.data.tokenizer import Tokenizer, load_tokenizer
from softprompt_jax.distributed import mesh
from softprompt_jax.models.quantized import quantization_of, quantized
from softprompt_jax.models.t5 import T5
from softprompt_jax.run import Run, Scratch


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A model ready to train, and what reads and writes its text."""

    model: T5
    tokenizer: Tokenizer
    identity: str  # of the backbone
    tokenizer_folder: Path

    @property
    def prompt_ids(self) -> Placement | None:
        """Where the ids of the prompt's rows, from V on, stand around a text; None without a prompt."""
        return prompt_ids(self.model)


def prompt_ids(model: T5) -> Placement | None:
    """Return where the ids of a model's prompt rows, from V on, stand around a text; None without a prompt."""
    return None if model.prompt is None else model.prompt.placement


def check_mesh(run: Run, assembly: Assembly) -> None:
    """Refuse a mesh that does not divide a run's batch or heads."""
    rows = mesh.row_shards() if run.packing else run.batch_size // run.accumulate  # packed rows follow the mesh
    mesh.check_divisible(rows, assembly.model.settings.num_heads)


def assemble(run: Run, backbone: Backbone | None = None) -> Assembly:
    """Load the backbone (or take this one, which stays as it is) and attach the run's methods.

    The same run gives the same bits.
    """
    if backbone is None:
        backbone = backbone_of(run)
    model = with_settings(backbone.model, **run.backbone_overrides)
    model.dtype = run.dtype
    if run.quantize is not None and isinstance(run.backbone, Scratch):
        quantized(model, run.quantize)
    tokenizer = load_tokenizer(backbone.folder)
    methods.attach(run.methods, model, jax.random.key(run.seed), context(run, tokenizer, backbone))
    check_own_prompts(run, model)
    return Assembly(model, tokenizer, backbone.identity, backbone.folder)


def backbone_of(run: Run) -> Backbone:
    """Load the run's backbone, or make it."""
    if isinstance(run.backbone, Scratch):
        return new_backbone(run.backbone, run.seed)
    return load_backbone(run.backbone, run.dtype, mesh.weight_sharding_fn(), run.quantize)


def new_backbone(scratch: Scratch, seed: int) -> Backbone:
    """Build a backbone with random weights."""
    model = T5(scratch.settings, jax.random.fold_in(jax.random.key(seed), 1))
    return Backbone(model, find_folder(scratch.tokenizer), "scratch")


def with_settings(model: T5, **changes) -> T5:
    """Return the model with other dropout or remat, sharing its weights."""
    settings, quantize = model.settings.model_copy(update=changes), quantization_of(model)

    def build() -> T5:
        shell = T5(settings, jax.random.key(0), model.dtype)
        return shell if quantize is None else quantized(shell, quantize)

    return nnx.merge(nnx.graphdef(nnx.eval_shape(build)), nnx.state(model))


def context(run: Run, tokenizer: Tokenizer, backbone: Backbone) -> methods.Context:
    """Collect what prompt initialisations look at; what others have trained must be of the same backbone."""
    hint = "carry a prompt over with softprompt recycle, or give bare rows (.npy)"

    def prompt_rows(source: str) -> np.ndarray:
        rows, metadata = read_prompt(source)
        check_backbone(metadata, backbone.model, source, backbone.identity, hint)
        return rows

    def trained(source: str) -> dict[str, Any]:
        values, metadata = read_trained(source)
        check_backbone(metadata, backbone.model, source, backbone.identity, hint)
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
    """Refuse methods that do not give each task of a mixture the prompt of its own that it asks for."""
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
