"""From a run's settings to a model with its methods attached, its tokenizer and its task."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from softprompt_jax import methods
from softprompt_jax.checkpoints import quantized_folder
from softprompt_jax.checkpoints.artifact import CONFIG_FILE, Artifact, load_artifact
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
from softprompt_jax.models.build import build
from softprompt_jax.models.flash import check_model
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.presets import published_size
from softprompt_jax.models.quantized import abstract_quantized, quantization_of, quantized
from softprompt_jax.models.settings import ModelSettings
from softprompt_jax.run import Run, Scratch
from softprompt_jax.trust import check_backbone, named_backbone, reader

_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx")  # what config.json of Hugging Face calls them
_LARGE = 100_000  # a method's length or width from which its weights are counted before they are made


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A model with its methods, and its tokenizer."""

    model: LanguageModel
    tokenizer: Tokenizer
    identity: str  # of the backbone
    tokenizer_folder: Path

    @property
    def layout(self) -> PromptLayout:
        """Where the ids of the prompt's rows, from V on, stand around a text."""
        return layout_of(self.model)


def layout_of(model: LanguageModel) -> PromptLayout:
    """Return where the ids of a model's prompt rows, from V on, stand around a text; empty without a prompt."""
    return NO_PROMPT if model.prompt is None else model.prompt.layout


def positions_of(settings: ModelSettings, folder: Path) -> int | None:
    """Return how many positions a model says that it knows: those it has learned, or those of its `config.json`."""
    if (learned := getattr(settings, "learned_positions", None)) is not None:
        return learned
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return next((int(about[name]) for name in _POSITIONS if about.get(name) is not None), None)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def own_mesh(artifacts: Iterable[Artifact]) -> mesh.Mesh:
    """Return the mesh of the first run whose settings state one; of none the default, all devices as `data`."""
    for artifact in artifacts if jax.device_count() > 1 else ():  # one device makes no other
        if "mesh" in (settings := artifact.settings or {}):
            return parse(mesh.Mesh, settings["mesh"], f"{artifact.source}: mesh")
    return mesh.Mesh()


def longest_input(settings: ModelSettings, most: int, others: int) -> int:
    """Return how many tokens an input may have: `most`, or what `others` leave of the positions that are learned.

    Errors: UserError where they leave none.
    """
    learned = getattr(settings, "learned_positions", None)
    if learned is not None and others >= learned:
        raise UserError(
            f"max_tokens: with the prompt's rows {others} positions; expected fewer than {learned}, which this "
            "backbone has learned; ask for fewer"
        )
    return most if learned is None else min(most, learned - others)


def check_devices(run: Run, assembly: Assembly, platform: str | None = None) -> None:
    """Refuse a mesh that does not divide a run's batch or backbone, and `attention: flash` where it cannot be had.

    Refuse texts, too, that are longer than the positions that a backbone has learned.

    `platform`: the kind of the devices that will compute (default: of the mesh).
    """
    settings = assembly.model.settings
    rows = mesh.row_shards() if run.packing else run.batch_size // run.accumulate  # packed rows follow the mesh
    mesh.check_divisible(rows, settings.num_key_heads, settings.d_model, settings.d_ff, settings.num_heads)
    most = getattr(settings, "learned_positions", None)
    longest = run.max_input_tokens + sum(assembly.layout.lengths) + run.max_target_tokens
    if most is not None and longest > most:
        raise UserError(
            f"max_input_tokens {run.max_input_tokens}: with prompt and target {longest} positions; expected at most "
            f"{most}, which this backbone has learned; set max_input_tokens or max_target_tokens lower"
        )
    devices, packed = platform or mesh.platform(), run.packing is not None
    check_model(run.attention, devices, run.dtype, settings.d_kv, settings.always_plain, packed)


def assemble(
    run: Run,
    backbone: Backbone | None = None,
    platform: str | None = None,
    tokenizer: Tokenizer | None = None,
    read: Callable[[str], Artifact] = load_artifact,
) -> Assembly:
    """Load the backbone (or take this one, which stays as it is) and attach the run's methods.

    An abstract backbone (see `abstract_backbone_of`) gives an abstract model. `platform`: the kind of the devices that
    will compute (default: of the mesh). `tokenizer`: the backbone's by default. `read` reads the prompts and runs that
    the methods begin with. The same run gives the same bits.
    """
    if backbone is None:
        backbone = backbone_of(run)
    if not backbone.is_abstract:
        check_memory(run, backbone.model.settings, _bytes(nnx.state(backbone.model)))
    tokenizer = tokenizer or load_tokenizer(backbone.folder, backbone.text_format, run.text)
    overrides = run.backbone_overrides(backbone.model.settings)
    model = with_settings(
        backbone.model, platform=platform or mesh.platform(), **_ends(backbone.model, tokenizer), **overrides
    )
    model.dtype = run.dtype
    known = context(run, tokenizer, backbone, read)

    def attach(model: LanguageModel) -> LanguageModel:
        methods.attach(run.methods, model, jax.random.key(run.seed), known)
        check_own_prompts(run, model)
        return model

    sizes = [value for method in run.methods for value in method.model_dump().values() if isinstance(value, int)]
    if backbone.is_abstract:
        model = nnx.eval_shape(attach, model)
    else:
        if max(sizes, default=0) > _LARGE:  # the trace takes time, too
            check_memory(run, model.settings, _bytes(nnx.state(nnx.eval_shape(attach, model))))
        model = attach(model)
    return Assembly(model, tokenizer, backbone.identity, backbone.folder)


def check_memory(run: Run, settings: ModelSettings, weights: int, memory: int | None = None) -> None:
    """Refuse a run that cannot fit into `memory` bytes, whatever the mesh (default: those of all devices together).

    Only what certainly has to be held counts: `weights`, in bytes, once; the prompt's rows; the ids of a batch; and the
    embeddings of the part of it that is computed at once, with one token of text each.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = memory or (jax.device_count() * limit if limit else jax.process_count() * host)
    prompt = sum(getattr(method, "row_count", 0) for method in run.methods)
    rows, positions = run.batch_size, prompt + 1
    if run.packing is not None:
        rows, positions = run.accumulate, max(prompt + 1, run.packing.length or 1, run.packing.target_length or 1)
    embedded = rows // run.accumulate * positions * settings.d_model * (4 if run.dtype == "float32" else 2)
    parts = {
        "the backbone, and the methods on it": weights,
        "the prompt's length": 4 * prompt * settings.d_model,
        "batch_size, or the rows' length": 4 * rows * positions + embedded,
    }
    if (needed := sum(parts.values())) > memory:
        raise UserError(
            f"run: needs at least {needed / 2**30:,.1f} GiB; found {memory / 2**30:,.1f} GiB of memory in all; "
            f"expected a run that fits; make {max(parts, key=lambda name: parts[name])} smaller"
        )


def _bytes(state: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if hasattr(leaf, "shape"))


def run_of(artifact: Artifact) -> Run | None:
    """Return the settings of the run that has left an artifact; None where it does not say."""
    if artifact.settings is None:
        return None
    saved = None if artifact.folder is None else artifact.folder / CONFIG_FILE
    return parse(Run, artifact.settings, artifact.source if saved is None or not saved.exists() else str(saved))


def assemble_trained(
    artifact: Artifact,
    run: Run,
    backbone: Backbone | str | None = None,
    any_backbone: bool = False,
    trust: bool = False,
) -> Assembly:
    """Return a run's model with what it has trained, and without what only training needed.

    `backbone`: another than the run names (its name), or the one that is loaded. Errors: UserError for values that the
    run's methods have no place for, for a backbone on which it was not trained, unless `any_backbone`, and for what the
    settings ask for beyond what is done without `trust` (trust.py).
    """
    # Of an unfinished run, what only training needs is among the values; it answers on whatever devices there are.
    kept = [method.without_sources() for method in run.methods]
    run = run.finished() if artifact.step is None else run.model_copy(update={"attention": "auto", "methods": kept})
    if isinstance(backbone, str):
        run, backbone = run.model_copy(update={"backbone": backbone}), None
    elif backbone is None:
        check_backbone(run.backbone, artifact.source, trust)
    assembly = with_trained(artifact, run, backbone or backbone_of(run), reader(artifact.source, trust))
    if not any_backbone:  # after the values: a run that trained everything brings its backbone along
        artifact.check_backbone(fingerprint(assembly.model), assembly.identity)
    return dataclasses.replace(assembly, model=mesh.shard_model(methods.finish(assembly.model)))


def with_trained(
    artifact: Artifact,
    run: Run,
    backbone: Backbone,
    read: Callable[[str], Artifact],
    tokenizer: Tokenizer | None = None,
) -> Assembly:
    """Attach a run's methods with what they have trained; `read` and `tokenizer` as in `assemble`.

    The settings may claim no more than the file holds: shapes are compared before anything is built.
    """
    here, trained = mesh.current_mesh(), artifact.tree if mesh.current_mesh() is None else artifact.abstract_tree
    methods.check_lengths(run.methods, trained, artifact.source)
    abstract = dataclasses.replace(backbone, model=nnx.eval_shape(lambda: backbone.model))
    expected = assemble(run, abstract, tokenizer=tokenizer, read=read)
    methods.check_trained(methods.split(expected.model).trainable, trained, artifact.source)
    assembly = assemble(run, backbone, tokenizer=tokenizer, read=read)
    if here is not None:
        trained = artifact.sharded_tree(mesh.shardings(here, nnx.state(expected.model, methods.Trainable)))
    methods.put_trained(assembly.model, trained, artifact.source)
    return assembly


def backbone_of_prompts(
    artifacts: Sequence[Artifact], runs: Sequence[Run | None], given: str | None = None, trust: bool = False
) -> Backbone:
    """Load the backbone that prompts were trained on, or the one that is given, as the first of their runs had it."""
    source = named_backbone(artifacts, given, trust)
    run = next((run for run in runs if run is not None), None)
    dtype, quantize = ("float32", None) if run is None else (run.dtype, run.quantize)
    return load_backbone(source, dtype, quantize=None if quantized_folder.is_quantized_folder(source) else quantize)


def backbone_of(run: Run) -> Backbone:
    """Load the run's backbone, or make one with random weights."""
    if not isinstance(run.backbone, Scratch):
        return load_backbone(run.backbone, run.dtype, quantize=run.quantize)
    least = 0.5 if run.quantize is not None else 4  # bytes of a weight, which is made in float32
    check_memory(run, run.backbone.settings, int(least * run.backbone.settings.parameters()))
    model = as_dtype(build(run.backbone.settings, jax.random.fold_in(jax.random.key(run.seed), 1)), run.dtype)
    if run.quantize is not None:
        quantized(model, run.quantize)
    return Backbone(mesh.shard_model(model), find_folder(run.backbone.tokenizer), "scratch", mesh.current_mesh())


def abstract_backbone_of(run: Run) -> Backbone:
    """Return the run's backbone as shapes and dtypes only; a published one is known without its files."""
    source, identity = run.backbone, "scratch"
    if isinstance(source, Scratch):
        settings, folder = source.settings, local_folder(source.tokenizer) or Path(source.tokenizer)
    else:
        settings, folder, identity = published_size(source), Path(source), source
        if settings is None or folder.exists():
            return abstract_backbone(source, run.dtype, run.quantize)
    return Backbone(as_dtype(abstract_quantized(settings, run.dtype, run.quantize), run.dtype), folder, identity)


def with_settings(model: LanguageModel, **changes) -> LanguageModel:
    """Return the model with other settings of how it computes, sharing its weights."""
    shell = abstract_quantized(model.settings.model_copy(update=changes), model.dtype, quantization_of(model))
    return nnx.merge(nnx.graphdef(shell), nnx.state(model))


def ended_by(model: LanguageModel, tokenizer: Tokenizer) -> LanguageModel:
    """Return the model, sharing its weights, whose answers end at the tokenizer's EOS, as what it is trained on."""
    model = nnx.merge(*nnx.split(model))
    model.settings = model.settings.model_copy(update=_ends(model, tokenizer))
    return model


def _ends(model: LanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings of what ends answers; what config.json states beside the tokenizer's EOS ends them, too."""
    first, eos = model.settings.eos, tokenizer.eos_id
    stated = dict.fromkeys([*([first] if first else ()), *model.settings.other_eos])  # 0: it states none
    return {"eos": eos, "other_eos": tuple(id_ for id_ in stated if id_ != eos), "ends": tokenizer.stop_ids}


def context(
    run: Run, tokenizer: Tokenizer, backbone: Backbone, read: Callable[[str], Artifact] = load_artifact
) -> methods.Context:
    """Collect what initialisations look at; prompts of other runs, which `read` reads, must be of the same backbone.

    An abstract backbone has no fingerprint to compare.
    """
    hint = "carry a prompt over with softprompt recycle, or give bare rows (.npy)"

    def checked(source: str) -> Artifact:
        artifact = read(source)
        if not backbone.is_abstract:
            artifact.check_backbone(backbone.fingerprint(), backbone.identity, hint)
        return artifact

    each = tuple(tuple(task.words or ()) for task in run.tasks)
    words = tuple(dict.fromkeys(itertools.chain.from_iterable(each)))
    return methods.Context(
        encode=tokenizer.encode,
        special_ids=frozenset(tokenizer.special_ids),
        label_words=words,
        # A space is "▁" in SentencePiece's pieces, "Ġ" in byte-level ones.
        word_ids=[i for i, piece in enumerate(tokenizer.pieces) if piece[:1] in ("▁", "Ġ") and piece[1:].isalpha()],
        load_rows=lambda source: checked(source).prompt,
        words_by_task=each if run.own_prompts else (),
        load_trained=lambda source: checked(source).tree,
        encode_label=lambda word: tokenizer.target_ids(word)[:-1],
        bos=tokenizer.bos,
    )


def check_own_prompts(run: Run, model: LanguageModel) -> None:
    """Refuse methods that do not give each task of a mixture with `prompts: own` a prompt."""
    if not run.own_prompts:
        return
    layout, first = layout_of(model), model.settings.vocabulary_rows
    found = {int(i) for ids in layout.parts for i in ids.flat if i >= first} if layout.tasks else set()
    if model.prompt is None or not found or len(found) != jax.eval_shape(model.prompt.table).shape[0]:
        raise UserError(
            f"task.prompts: own, but no method gives each of the {len(run.tasks)} tasks a prompt; "
            "expected one that does, such as kind: prompt; or use prompts: shared"
        )
