"""From a run's settings to a model with its methods attached, its tokenizer and its task."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
from flax import nnx

from softprompt_jax import methods
from softprompt_jax.checkpoints import quantized_folder
from softprompt_jax.checkpoints.artifact import CONFIG_FILE, Artifact, load_artifact, named_backbone
from softprompt_jax.checkpoints.backbone import (
    Backbone,
    abstract_backbone,
    as_dtype,
    find_folder,
    fingerprint,
    load_backbone,
    local_folder,
)
from softprompt_jax.config import UserError, parse
from softprompt_jax.data.prompt_layout import NO_PROMPT, PromptLayout
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
    def layout(self) -> PromptLayout:
        """Where the ids of the prompt's rows, from V on, stand around a text."""
        return layout_of(self.model)


def layout_of(model: T5) -> PromptLayout:
    """Return where the ids of a model's prompt rows, from V on, stand around a text; empty without a prompt."""
    return NO_PROMPT if model.prompt is None else model.prompt.layout


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
        attach_methods(run, model, tokenizer, backbone)
        return model

    model = nnx.eval_shape(attach, model) if backbone.is_abstract else attach(model)
    return Assembly(model, tokenizer, backbone.identity, backbone.folder)


def attach_methods(run: Run, model: T5, tokenizer: Tokenizer, backbone: Backbone) -> None:
    """Attach the methods of a run to a model, in place."""
    methods.attach(run.methods, model, jax.random.key(run.seed), context(run, tokenizer, backbone))
    check_own_prompts(run, model)


def run_of(artifact: Artifact) -> Run | None:
    """Return the settings of the run that has left an artifact; None where it does not say."""
    if artifact.settings is None:
        return None
    saved = None if artifact.folder is None else artifact.folder / CONFIG_FILE
    return parse(Run, artifact.settings, artifact.source if saved is None or not saved.exists() else str(saved))


def assemble_trained(
    artifact: Artifact, run: Run, backbone: Backbone | str | None = None, any_backbone: bool = False
) -> Assembly:
    """Return a run's model with what it has trained, and without what only training needed.

    `backbone`: another than the run names (its name), or the one that is loaded. Errors: UserError for values that the
    run's methods have no place for, and for a backbone on which it was not trained, unless `any_backbone`.
    """
    # Of an unfinished run, what only training needs is among the values; it answers on whatever devices there are.
    run = run.finished() if artifact.step is None else run.model_copy(update={"attention": "auto"})
    if isinstance(backbone, str):
        run, backbone = run.model_copy(update={"backbone": backbone}), None
    assembly = assemble(run, backbone)
    methods.put_trained(assembly.model, artifact.tree, artifact.source)
    if not any_backbone:  # after the values: a run that trained everything brings its backbone along
        artifact.check_backbone(fingerprint(assembly.model), assembly.identity)
    return dataclasses.replace(assembly, model=methods.finish(assembly.model))


def backbone_of_prompts(
    artifacts: Sequence[Artifact], runs: Sequence[Run | None], given: str | None = None
) -> Backbone:
    """Load the backbone that prompts were trained on, or the one that is given, as the first of their runs had it."""
    source = named_backbone(artifacts, given)
    run = next((run for run in runs if run is not None), None)
    dtype, quantize = ("float32", None) if run is None else (run.dtype, run.quantize)
    return load_backbone(source, dtype, quantize=None if quantized_folder.is_quantized_folder(source) else quantize)


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

    def checked(source: str) -> Artifact:
        artifact = load_artifact(source)
        if not backbone.is_abstract:
            artifact.check_backbone(backbone.fingerprint(), backbone.identity, hint)
        return artifact

    each = tuple(tuple(task.words or ()) for task in run.tasks)
    words = tuple(dict.fromkeys(itertools.chain.from_iterable(each)))
    return methods.Context(
        tokenizer.encode,
        frozenset(tokenizer.special_ids),
        words,
        [i for i, piece in enumerate(tokenizer.pieces) if piece.startswith("▁") and piece[1:].isalpha()],
        lambda source: checked(source).prompt,
        each if run.own_prompts else (),
        lambda source: checked(source).tree,
    )


def check_own_prompts(run: Run, model: T5) -> None:
    """Refuse methods that do not give each task of a mixture with `prompts: own` a prompt."""
    if not run.own_prompts:
        return
    first, found = model.settings.vocabulary_rows, set()
    if model.prompt is not None:
        layout = model.prompt.layout
        found = {int(i) for ids in layout.parts for i in ids.flat if i >= first} if layout.tasks else set()
    if model.prompt is None or not found or len(found) != jax.eval_shape(model.prompt.table).shape[0]:
        raise UserError(
            f"task.prompts: own, but no method gives each of the {len(run.tasks)} tasks a prompt; "
            "expected one that does, such as kind: prompt; or use prompts: shared"
        )
