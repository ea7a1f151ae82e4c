"""Examples of a registered seqio Task (extra `seqio`) as its own preprocessors, postprocessor and metrics make them.

All that knows seqio stands here, behind `Source`. The token ids are taken as they come out, so that preprocessors of
every kind work; the Task's vocabulary must be the backbone's. A finite split is gone through once at each start of a
run; one that never ends is read as it is trained on. A Mixture is a mixture of its Tasks at its rates.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pydantic

from softprompt_jax.config import UserError, first_line, nearest
from softprompt_jax.data.examples import Example, Source
from softprompt_jax.data.metrics import Outputs
from softprompt_jax.data.tokenizer import SENTINEL, Tokenizer

SIDES = ("inputs", "targets")
_PRETOKENIZED = "_pretokenized"
_INFINITE = -1  # tf.data's number for it
# What tells tokenizers with equal pieces apart.
_SAMPLES = ("A quick brown fox, 3.14 times!", "  two   spaces\tand a tab", "naïve café — “quoted”", "ﬁne ½ ＡＢ")


class Seqio(Source):
    """A seqio Task or Mixture by its name; `module` is imported first and registers it."""

    kind: Literal["seqio"] = "seqio"
    name: str
    module: str
    # Tokens of inputs and targets, or of features by name, to which seqio trims. Default: the run's limits.
    lengths: tuple[int, int] | dict[str, int] | None = None
    endless: bool = False  # whether examples are preprocessed anew every epoch, for preprocessors that draw; else once
    seed: int = pydantic.Field(0, ge=0)  # seed of what preprocessors draw

    makes_ids: ClassVar[bool] = True
    own_metrics: ClassVar[str | None] = "seqio"
    fixed: ClassVar[Mapping[str, Any]] = {
        **{"input": "{inputs}", "target": "{targets}", "with_prefix": False, "keep": {}, "prepare": None},
        **{"one_space": False, "answers_field": None, "group_fields": []},
    }

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

    def split_names(self) -> list[str]:
        return list(_registered(self).splits)

    def is_endless(self, split: str) -> bool:
        """Tell whether a split never ends: tf.data says so, or the settings do, of the train split."""
        return (self.endless and split == "train") or int(_dataset(self, split).cardinality()) == _INFINITE

    def with_limits(self, max_input_tokens: int, max_target_tokens: int) -> Seqio:
        lengths = (max_input_tokens, max_target_tokens)
        return self.model_copy(update={"lengths": lengths}) if self.lengths is None else self

    def mixture(self) -> list[tuple[str, Source, float]]:
        """Return the Tasks of a Mixture that have a train split, at the Mixture's rates."""
        registered = _registered(self)
        if not hasattr(registered, "get_rate"):
            return []
        tasks = [task for task in registered.tasks if "train" in task.splits]
        return [
            (task.name, self.model_copy(update={"name": task.name}), float(registered.get_rate(task))) for task in tasks
        ]

    def examples(self, task: Any, split: str, labelled: bool = True, first: int = 0) -> Iterator[Example]:
        """Yield examples with their own ids, those of an endless split shuffled by its seed.

        `fields` are all features of an example. What comes before `first` is read and thrown away.
        """
        registered, lengths = _task(self), self.feature_lengths
        rows = enumerate(_dataset(self, split).skip(first).as_numpy_iterator(), start=first + 1)
        while True:
            try:
                number, features = next(rows)
            except StopIteration:
                return
            except Exception as error:  # whatever a preprocessor or a file system has raised inside tf.data
                raise UserError(
                    f"seqio {self.name}: split {split!r} could not be read ({first_line(error)}); expected a Task "
                    "that seqio itself can read"
                ) from None
            texts, ids, cut = [], [], []
            for side in SIDES:
                feature, limit = registered.output_features[side], lengths and lengths[side]
                ids.append(np.asarray(features[side]).tolist())
                text = features.get(side + _PRETOKENIZED)
                texts.append(text.decode("utf-8") if isinstance(text, bytes) else feature.vocabulary.decode(ids[-1]))
                full = limit is not None and isinstance(text, bytes) and len(ids[-1]) == limit
                cut.append(full and len(feature.vocabulary.encode(text.decode("utf-8"))) + feature.add_eos > limit)
            if labelled and task.words and texts[1] not in task.words:
                raise UserError(
                    f"seqio {self.name} {split} row {number}: found the target {texts[1]!r}; expected one of "
                    f"{', '.join(task.words)}; correct the label_words"
                )
            target, known = (texts[1], (ids[0], ids[1])) if labelled else ("", None)
            yield Example(texts[0], target, features, ids=known, cut=(cut[0], cut[1]))

    def check(self, tokenizer: Tokenizer, metrics: bool) -> None:
        """Refuse a vocabulary that gives other ids than the backbone's tokenizer, and metrics that cannot be had."""
        for side in SIDES:
            vocabulary = _task(self).output_features[side].vocabulary
            different = _difference(vocabulary, tokenizer)
            if different is not None:
                raise UserError(
                    f"seqio {self.name}: the vocabulary of {side!r} is not the backbone's: {different}; expected the "
                    f"same; build it of the file that {tokenizer.source} has, in module {self.module!r}"
                )
        if metrics:
            _check_metrics(self)

    def wants_likelihoods(self) -> bool:
        return any(_kind(metric) == "SCORE" for metric in _task(self).metric_objs)

    def own_scores(
        self, predictions: Sequence[str], examples: Sequence[Example], outputs: Outputs | None
    ) -> dict[str, float]:
        """Return what a Task's metrics, functions and objects, say of predictions; in their own units.

        They are called as seqio's Evaluator calls them. Without `outputs`, of several prompts together, the token ids
        are those of the texts, and there are no log-probabilities.
        """
        _check_metrics(self)
        seqio, task, rows = importlib.import_module("seqio"), _task(self), [example.fields for example in examples]
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
                    f"seqio {self.name}: its metrics want log-probabilities; expected an evaluation of one prompt; "
                    "use softprompt eval"
                )
            scores = np.asarray(numbers, np.float32) if kind != "PREDICTION" else None
            output: Any = {"PREDICTION": tokens, "SCORE": scores}.get(kind, (tokens, {"scores": scores}))
            made = copy.deepcopy(metric).from_model_output(rows, output, features)  # some keep what they are given
            if isinstance(made, seqio.metrics.CollectingMetric):
                values, seen = made.actual_compute(rows, features, "targets", targets)
                targets = seen["targets"]
            else:
                values = made.compute()
            if twice := sorted(found.keys() & values.keys()):
                raise UserError(f"seqio {self.name}: two of its metrics give {twice[0]!r}; expected each name once")
            found |= values
        plain = {name: np.asarray(getattr(value, "value", value)) for name, value in found.items()}
        return {name: float(value) for name, value in plain.items() if value.ndim == 0 and value.dtype.kind in "biuf"}


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


def _check_metrics(source: Seqio) -> None:
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
