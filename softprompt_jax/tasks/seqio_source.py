"""Rows out of a registered seqio Task (extra `seqio`): its source and text preprocessors, run once over a finite split.

The texts are taken before seqio tokenises them and tokenised by the backbone's own tokenizer, so that limits,
caches and batches are those of any task. A Task whose preprocessors go on to change tokens is refused, and so are
Mixtures (state `kind: mixture` with a task each) and endless splits. Postprocessor and metric functions are
seqio's own affair: the metrics are those that the task's settings name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from softprompt_jax.config import Settings, UserError, nearest
from softprompt_jax.tasks.packages import Row, first_line

_PRETOKENIZED = "_pretokenized"
_INFINITE = -1  # tf.data's number for it


class Seqio(Settings):
    """A seqio Task by its name; `module` is imported first and registers it. Rows have `inputs` and `targets`."""

    kind: Literal["seqio"] = "seqio"
    name: str
    module: str


def seqio_splits(source: Seqio) -> list[str]:
    """Return the splits that a seqio Task has."""
    return list(_registered(source).splits)


def seqio_rows(source: Seqio, split: str) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) for every example of a split; a row has `inputs`, `targets` and the Task's other features."""
    task = _registered(source)
    examples = task.get_dataset(sequence_length=None, split=split, shuffle=False, num_epochs=1)
    if int(examples.cardinality()) == _INFINITE:
        raise UserError(
            f"seqio {source.name}: split {split!r} never ends; expected a finite one; take some of it first"
        )
    for number, example in enumerate(examples.as_numpy_iterator(), start=1):
        where = f"seqio {source.name} {split} row {number}"
        row = {name: _plain(value) for name, value in example.items() if not name.endswith(_PRETOKENIZED)}
        for side in ("inputs", "targets"):
            row[side] = _text(task, side, example, where)
        yield where, row


def _text(task: Any, side: str, example: dict[str, Any], where: str) -> str:
    """Return a text before tokenising, once sure that nothing but tokenising and EOS came after it."""
    if side + _PRETOKENIZED not in example or side not in example:
        raise UserError(
            f"{where}: no text {side!r} before tokenising; expected a Task with the preprocessor `tokenize` "
            "for inputs and targets; write the rows to a file and use kind: files"
        )
    text = example[side + _PRETOKENIZED].decode("utf-8")
    feature = task.output_features[side]
    ids = feature.vocabulary.encode(text) + ([feature.vocabulary.eos_id] if feature.add_eos else [])
    if ids != np.asarray(example[side]).tolist():
        raise UserError(
            f"{where}: the tokens of {side!r} are not those of its text and EOS; expected no preprocessor that "
            "changes tokens; write the rows to a file and use kind: files"
        )
    return text


def _registered(source: Seqio) -> Any:
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
    if source.name in seqio.MixtureRegistry.names():
        raise UserError(
            f"seqio {source.name}: is a Mixture; expected a Task; state kind: mixture with a seqio task for each of "
            f"{', '.join(task.name for task in seqio.MixtureRegistry.get(source.name).tasks)}"
        )
    if source.name not in seqio.TaskRegistry.names():
        names = sorted(seqio.TaskRegistry.names())
        raise UserError(
            f"seqio {source.name}: no such Task after importing {source.module!r}; expected one of "
            f"{', '.join(names[:10]) or 'those it registers'}{nearest(source.name, names)}"
        )
    return seqio.TaskRegistry.get(source.name)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list) else value
