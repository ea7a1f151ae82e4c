"""Examples of a registered seqio Task (extra `seqio`) as its own preprocessors, postprocessor and metrics make them.

The token ids are taken as they come out, so that preprocessors of every kind work; the Task's vocabulary must be the
backbone's. A finite split is gone through once and then lies in the token cache; one that never ends is read as it is
trained on. A Mixture is a mixture of its Tasks at its rates (`mixture.expand`).
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic

from softprompt_jax.config import Settings, UserError, nearest
from softprompt_jax.tasks.packages import first_line
from softprompt_jax.tasks.tokenizer import SENTINEL, Tokenizer

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
    lengths: tuple[int, int] | None = None  # of inputs and targets, to which seqio trims; the run's limits by default
    endless: bool = False  # preprocess anew every epoch, for preprocessors that draw; else once
    seed: int = pydantic.Field(0, ge=0)  # of what preprocessors draw


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
    task, limits = _task(source), source.lengths or (None, None)
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
        for side, limit in zip(SIDES, limits, strict=True):
            feature = task.output_features[side]
            ids.append(np.asarray(example[side]).tolist())
            text = example.get(side + _PRETOKENIZED)
            texts.append(text.decode("utf-8") if isinstance(text, bytes) else feature.vocabulary.decode(ids[-1]))
            full = isinstance(text, bytes) and len(ids[-1]) == limit
            cut.append(full and len(feature.vocabulary.encode(text.decode("utf-8"))) + feature.add_eos > limit)
        yield Row(where, (texts[0], texts[1]), (ids[0], ids[1]), (cut[0], cut[1]), example)


def mixture_rates(source: Seqio) -> dict[str, float] | None:
    """Return the rate of each Task of a Mixture, those with a train split; None for a Task."""
    registered = _registered(source)
    if not hasattr(registered, "get_rate"):
        return None
    return {task.name: float(registered.get_rate(task)) for task in registered.tasks if "train" in task.splits}


def digest(source: Seqio, split: str) -> str:
    """Return a name for what a split gives: of the settings, seqio, the module's content and the first examples.

    What an imported module of the module changes far into the split is not seen: delete the token cache then.
    """
    seqio, module = importlib.import_module("seqio"), importlib.import_module(source.module)
    made = hashlib.sha256(f"{source!r} {split} {getattr(seqio, '__version__', '')}".encode())
    if (file := getattr(module, "__file__", None)) is not None:
        made.update(Path(file).read_bytes())
    for row in itertools.islice(seqio_rows(source, split), _PROBED):
        made.update(repr(row.ids).encode())
    return made.hexdigest()


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


def needs_likelihoods(source: Seqio) -> bool:
    """Tell whether a Task has metric functions that look at the targets' log-probabilities."""
    return bool(_task(source).score_metric_fns)


def check_metrics(source: Seqio) -> None:
    """Refuse metrics that ask for more than predictions and log-probabilities."""
    task = _task(source)
    odd = [function.__name__ for function in task.predict_with_aux_metric_fns]
    if odd or len(task.metric_objs) > len(task.metric_fns):
        raise UserError(
            f"seqio {source.name}: found {', '.join(odd) or 'metric objects'}; expected metric functions of (targets, "
            "predictions) or (targets, scores); say which of ours instead, such as metrics: [accuracy]"
        )


def seqio_scores(
    source: Seqio, predictions: Sequence[str], examples: Sequence[dict[str, Any]], likelihoods: np.ndarray | None
) -> dict[str, float]:
    """Return what a Task's metric functions say of predictions, after its postprocessor; in their own units.

    `examples` are all features of each; `likelihoods` the summed log-probabilities of their targets.
    """
    task = _task(source)
    vocabulary = task.output_features["targets"].vocabulary
    truth, guess = [], []
    for prediction, example in zip(predictions, examples, strict=True):
        text = example.get("targets" + _PRETOKENIZED)
        text = vocabulary.decode(np.asarray(example["targets"]).tolist()) if text is None else text
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        truth.append(task.postprocess_fn(text, example=example, is_target=True))
        guess.append(task.postprocess_fn(prediction, example=example, is_target=False))
    found: dict[str, Any] = {}
    for function in task.predict_metric_fns:
        found |= function(truth, guess)
    if task.score_metric_fns and likelihoods is None:
        raise UserError(
            f"seqio {source.name}: its metric functions want log-probabilities; expected an evaluation of one prompt; "
            "use softprompt eval"
        )
    for function in task.score_metric_fns:
        found |= function(truth, [float(value) for value in np.asarray(likelihoods)])
    numbers = {name: getattr(value, "value", value) for name, value in found.items()}
    return {name: float(value) for name, value in numbers.items() if np.ndim(value) == 0 and not isinstance(value, str)}


# --------------------------------------------------------------------------------------------- seqio


def _dataset(source: Seqio, split: str) -> Any:
    lengths = None if source.lengths is None else dict(zip(SIDES, source.lengths, strict=True))
    endless = source.endless and split == "train"
    task = _task(source)
    settings = {"sequence_length": lengths, "split": split, "seed": source.seed}
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
    features = registered.output_features
    if set(features) != set(SIDES) or any(feature.rank != 1 for feature in features.values()):
        raise UserError(
            f"seqio {source.name}: has the features {', '.join(features)}; expected inputs and targets, rows of ids"
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
