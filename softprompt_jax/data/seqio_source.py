"""Examples of a registered seqio Task (extra `seqio`) as its own preprocessors, postprocessor and metrics make them.

The token ids are taken as they come out, so that preprocessors of every kind work; the Task's vocabulary must be the
backbone's. A finite split is gone through once and then lies in the token cache; one that never ends is read as it is
trained on. A Mixture is a mixture of its Tasks at its rates (`mixture.expand`).
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib
import importlib.util
import itertools
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic

from softprompt_jax.config import Settings, UserError, nearest
from softprompt_jax.data.packages import first_line
from softprompt_jax.data.tokenizer import SENTINEL, Tokenizer

SIDES = ("inputs", "targets")
_PRETOKENIZED = "_pretokenized"
_INFINITE = -1  # tf.data's number for it
_PROBED = 256  # examples whose ids are part of a stored split's name
# What tells tokenizers with equal pieces apart.
_SAMPLES = ("A quick brown fox, 3.14 times!", "  two   spaces\tand a tab", "naïve café — “quoted”", "ﬁne ½ ＡＢ")


class Seqio(Settings):
    """A seqio Task or Mixture by its name; `module` is imported first and registers it."""

    kind: Literal["seqio"] = "seqio"
    name: str
    module: str
    # Of inputs and targets, or of features by name, to which seqio trims; of these two the run's limits by default.
    lengths: tuple[int, int] | dict[str, int] | None = None
    endless: bool = False  # preprocess anew every epoch, for preprocessors that draw; else once
    seed: int = pydantic.Field(0, ge=0)  # of what preprocessors draw

    @pydantic.field_validator("lengths")
    @classmethod
    def _lengths_of_both_sides(cls, lengths: Any) -> Any:
        if isinstance(lengths, dict) and not lengths.keys() >= set(SIDES):
            raise ValueError(f"found lengths of {', '.join(lengths) or 'none'}; expected inputs and targets among them")
        return lengths

    @property
    def feature_lengths(self) -> dict[str, int] | None:
        """The tokens that each feature is trimmed to."""
        return dict(zip(SIDES, self.lengths, strict=True)) if isinstance(self.lengths, tuple) else self.lengths


class Row(NamedTuple):
    """One example: its place, texts and ids of both sides, whether seqio has cut them, and all its features."""

    where: str
    texts: tuple[str, str]
    ids: tuple[list[int], list[int]]
    cut: tuple[bool, bool]
    example: dict[str, Any]


def seqio_splits(source: Seqio) -> list[str]:
    """Return the splits that a seqio Task has."""
    return list(_registered(source).splits)


def is_endless(source: Seqio, split: str) -> bool:
    """Tell whether a split never ends: tf.data says so, or the settings do, of the train split."""
    return (source.endless and split == "train") or int(_dataset(source, split).cardinality()) == _INFINITE


def seqio_rows(source: Seqio, split: str, first: int = 0) -> Iterator[Row]:
    """Yield the examples of a split from number `first` on, those of an endless one shuffled by its seed.

    What comes before `first` is read and thrown away.
    """
    task, lengths = _task(source), source.feature_lengths
    rows = enumerate(_dataset(source, split).skip(first).as_numpy_iterator(), start=first + 1)
    while True:
        try:
            number, example = next(rows)
        except StopIteration:
            return
        except Exception as error:  # whatever a preprocessor or a file system has raised inside tf.data
            raise UserError(
                f"seqio {source.name}: split {split!r} could not be read ({first_line(error)}); expected a Task "
                "that seqio itself can read"
            ) from None
        where = f"seqio {source.name} {split} row {number}"
        texts, ids, cut = [], [], []
        for side in SIDES:
            feature, limit = task.output_features[side], lengths and lengths[side]
            ids.append(np.asarray(example[side]).tolist())
            text = example.get(side + _PRETOKENIZED)
            texts.append(text.decode("utf-8") if isinstance(text, bytes) else feature.vocabulary.decode(ids[-1]))
            full = limit is not None and isinstance(text, bytes) and len(ids[-1]) == limit
            cut.append(full and len(feature.vocabulary.encode(text.decode("utf-8"))) + feature.add_eos > limit)
        yield Row(where, (texts[0], texts[1]), (ids[0], ids[1]), (cut[0], cut[1]), example)


def mixture_rates(source: Seqio) -> dict[str, float] | None:
    """Return the rate of each Task of a Mixture, those with a train split; None for a Task."""
    registered = _registered(source)
    if not hasattr(registered, "get_rate"):
        return None
    return {task.name: float(registered.get_rate(task)) for task in registered.tasks if "train" in task.splits}


def digest(source: Seqio, split: str) -> str:
    """Return a name for what a split gives: of the settings, seqio, the module's source and the first examples.

    The source is that of all modules that it imports, directly or not, but for the standard library and installed
    packages; what these change far into the split is not seen.
    """
    _task(source)  # imports the module: before that its files are not known
    seqio = importlib.import_module("seqio")
    made = hashlib.sha256(f"{source!r} {split} {getattr(seqio, '__version__', '')}".encode())
    for path in sorted(_own_files(source.module)):
        made.update(Path(path).read_bytes())
    for row in itertools.islice(seqio_rows(source, split), _PROBED):
        made.update(repr(row.ids).encode())
    return made.hexdigest()


def _own_files(module: str) -> set[str]:
    """Return the source files of an imported module and of all that it imports, as far as they are not installed."""
    installed = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    pending, files = [module], {}
    while pending:
        name = pending.pop()
        loaded = sys.modules.get(name)
        path = getattr(loaded, "__file__", None) or ""
        if name in files or not path.endswith(".py") or path.startswith(installed):
            continue
        files[name] = path
        package = getattr(loaded, "__package__", None) or ""
        pending += [name.rpartition(".")[0]]  # importing a.b runs a
        for node in ast.walk(ast.parse(Path(path).read_bytes())):
            if isinstance(node, ast.Import):
                pending += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                base = importlib.util.resolve_name(base, package) if node.level else base
                pending += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return set(files.values())


def check_vocabulary(source: Seqio, tokenizer: Tokenizer) -> None:
    """Refuse a Task whose vocabulary gives other ids than the backbone's tokenizer."""
    for side in SIDES:
        vocabulary = _task(source).output_features[side].vocabulary
        different = _difference(vocabulary, tokenizer)
        if different is not None:
            raise UserError(
                f"seqio {source.name}: the vocabulary of {side!r} is not the backbone's: {different}; expected the "
                f"same; build it of the file that {tokenizer.source} has, in module {source.module!r}"
            )


def _difference(vocabulary: Any, tokenizer: Tokenizer) -> str | None:
    model: Any = getattr(vocabulary, "tokenizer", None)
    if hasattr(model, "id_to_piece"):
        found = [_piece(model.id_to_piece(id_)) for id_ in range(model.get_piece_size())]
        ours = [_piece(piece) for piece in tokenizer.pieces]
        if len(found) > len(ours):
            return f"it has {len(found)} pieces, the backbone {len(ours)}"
        for id_, (theirs, own) in enumerate(zip(found, ours, strict=False)):
            if theirs != own:
                return f"id {id_} is {theirs!r}, the backbone's {own!r}"
    if vocabulary.eos_id != tokenizer.eos_id:
        return f"its EOS is {vocabulary.eos_id}, the backbone's {tokenizer.eos_id}"
    for text in _SAMPLES:
        try:
            found = list(vocabulary.encode(text))
        except Exception:  # a vocabulary of something else than text
            return f"{type(vocabulary).__name__} does not read text"
        if found != tokenizer.encode(text):
            return f"{text!r} is {found[:8]}, the backbone's {tokenizer.encode(text)[:8]}"
    return None


def _piece(piece: str) -> str:
    bare = piece.removeprefix("▁")
    return bare if SENTINEL.fullmatch(bare) else piece


# --------------------------------------------------------------------------------------------- scores


class Outputs(NamedTuple):
    """What a model gave for each example: its answer's token ids up to EOS, their log-probability, the target's."""

    ids: Sequence[Sequence[int]]
    scores: Sequence[float]
    likelihoods: np.ndarray | None


def needs_likelihoods(source: Seqio) -> bool:
    """Tell whether a Task has metrics that look at the targets' log-probabilities."""
    return any(_kind(metric) == "SCORE" for metric in _task(source).metric_objs)


def check_metrics(source: Seqio) -> None:
    """Refuse metrics that ask for more than predictions and log-probabilities."""
    for metric in _task(source).metric_objs:
        if _kind(metric) not in ("PREDICTION", "PREDICTION_WITH_AUX", "SCORE"):
            name = getattr(metric, "__name__", type(metric).__name__)
            raise UserError(
                f"seqio {source.name}: the metric {name} wants {_kind(metric) or 'no model output that it names'}; "
                "expected PREDICTION, PREDICTION_WITH_AUX or SCORE, since what T5X's layers note on their way is not "
                "there; say which of ours instead, such as metrics: [accuracy]"
            )


def _kind(metric: Any) -> str:
    return getattr(getattr(metric, "model_output_type", None), "name", "")


def seqio_scores(
    source: Seqio, predictions: Sequence[str], examples: Sequence[dict[str, Any]], outputs: Outputs | None
) -> dict[str, float]:
    """Return what a Task's metrics, functions and objects, say of predictions; in their own units.

    They are called as seqio's Evaluator calls them. `examples` are all features of each. Without `outputs`, of several
    prompts together, the token ids are those of the texts, and there are no log-probabilities.
    """
    seqio, task = importlib.import_module("seqio"), _task(source)
    features, found, targets = dict(task.output_features), {}, None
    vocabulary = features["targets"].vocabulary
    ids = outputs.ids if outputs else [[*vocabulary.encode(text), vocabulary.eos_id] for text in predictions]
    tokens = np.zeros((len(ids), max(map(len, ids), default=0)), np.int32)
    for row, each in zip(tokens, ids, strict=True):
        row[: len(each)] = each
    for metric in task.metric_objs:
        kind = _kind(metric)
        numbers = None if outputs is None else outputs.likelihoods if kind == "SCORE" else outputs.scores
        if kind != "PREDICTION" and numbers is None:
            raise UserError(
                f"seqio {source.name}: its metrics want log-probabilities; expected an evaluation of one prompt; "
                "use softprompt eval"
            )
        scores = np.asarray(numbers, np.float32) if kind != "PREDICTION" else None
        output: Any = {"PREDICTION": tokens, "SCORE": scores}.get(kind, (tokens, {"scores": scores}))
        made = copy.deepcopy(metric).from_model_output(examples, output, features)  # some keep what they are given
        if isinstance(made, seqio.metrics.CollectingMetric):
            values, seen = made.actual_compute(examples, features, "targets", targets)
            targets = seen["targets"]
        else:
            values = made.compute()
        if twice := sorted(found.keys() & values.keys()):
            raise UserError(f"seqio {source.name}: two of its metrics give {twice[0]!r}; expected each name once")
        found |= values
    plain = {name: np.asarray(getattr(value, "value", value)) for name, value in found.items()}
    return {name: float(value) for name, value in plain.items() if value.ndim == 0 and value.dtype.kind in "biuf"}


# --------------------------------------------------------------------------------------------- seqio


def _dataset(source: Seqio, split: str) -> Any:
    endless = source.endless and split == "train"
    task = _task(source)
    settings = {"sequence_length": source.feature_lengths, "split": split, "seed": source.seed}
    settings["use_cached"] = task.requires_caching  # others need no cache of seqio's: the token cache has their ids
    try:
        made = task.get_dataset(**settings, shuffle=False, num_epochs=None if endless else 1)
        if int(made.cardinality()) == _INFINITE and task.shuffle_buffer_size is not None:
            made = task.get_dataset(**settings, shuffle=True, num_epochs=None if endless else 1)
        return made
    except Exception as error:  # preprocessors raise what they like
        raise UserError(
            f"seqio {source.name}: split {split!r} could not be prepared ({first_line(error)}); expected a Task "
            "that seqio itself can read, and its features within `lengths`"
        ) from None


def _task(source: Seqio) -> Any:
    registered = _registered(source)
    if hasattr(registered, "get_rate"):
        raise UserError(
            f"seqio {source.name}: is a Mixture; expected a Task here; name it as a run's task, or one of "
            f"{', '.join(task.name for task in registered.tasks)}"
        )
    features = {name: registered.output_features.get(name) for name in SIDES}
    if any(feature is None or feature.rank != 1 or not feature.dtype.is_integer for feature in features.values()):
        raise UserError(
            f"seqio {source.name}: has the features {', '.join(registered.output_features)}; expected inputs and "
            "targets among them, rows of ids: an encoder reads the ones, a decoder writes the others"
        )
    return registered


def _registered(source: Seqio) -> Any:
    """Import the module, and return the Task or Mixture."""
    try:
        seqio: Any = importlib.import_module("seqio")
    except ImportError as error:
        raise UserError(
            f"seqio {source.name}: seqio is not installed ({error}); expected the extra; pip install '.[seqio]'"
        ) from None
    try:
        importlib.import_module(source.module)
    except ImportError as error:
        raise UserError(
            f"seqio {source.name}: module {source.module!r} cannot be imported ({first_line(error)}); "
            "expected the module that registers the Task; set PYTHONPATH"
        ) from None
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        if source.name in registry.names():
            return registry.get(source.name)
    names = sorted([*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()])
    raise UserError(
        f"seqio {source.name}: no such Task or Mixture after importing {source.module!r}; expected one of "
        f"{', '.join(names[:10]) or 'those it registers'}{nearest(source.name, names)}"
    )
