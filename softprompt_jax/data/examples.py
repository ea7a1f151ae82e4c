"""From rows to examples: templates over the fields of a row, label words, and what every source of rows can do.

`task` is everywhere a `Task`, whose class (task.py) needs those of all sources and is made after this.
"""

from __future__ import annotations

import itertools
import math
import re
import string
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from softprompt_jax.config import Settings, UserError, nearest
from softprompt_jax.data.metrics import Outputs
from softprompt_jax.data.preprocessors import PREPROCESSORS, Row, one_space
from softprompt_jax.data.tokenizer import Tokenizer

_UNLABELLED = (None, "", -1, "-1")  # hubs hide labels as -1


@dataclass(frozen=True, slots=True)
class Example:
    """One row as text; `fields` keeps the row itself, `answers` what is right if not just the target.

    `ids` are those of input and target where the source has them, which seqio may have `cut` to its lengths.
    """

    input: str
    target: str
    fields: dict[str, Any] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    group: Hashable | None = None  # what metrics of groups take together, such as the answers to a question
    ids: tuple[list[int], list[int]] | None = None
    cut: tuple[bool, bool] = (False, False)

    @property
    def accepted(self) -> str | list[str]:
        """What a prediction is scored against."""
        return list(self.answers) or self.target


class Source(Settings):
    """Where a task's rows come from. A kind of source says which splits and rows it has; the rest it may change.

    `makes_ids`: its examples come with token ids. `own_metrics`: the name that stands in `metrics` for those of the
    source itself. `fixed`: settings of a task that the source decides, and what a task of it has there.
    """

    makes_ids: ClassVar[bool] = False
    own_metrics: ClassVar[str | None] = None
    fixed: ClassVar[Mapping[str, Any]] = {}

    def split_names(self) -> list[str]:
        """Return the splits that the source has, in the order train, validation, test, others."""
        raise NotImplementedError

    def rows(self, split: str, where: str) -> Iterator[tuple[str, Row]]:
        """Return (place, row) for every row of a split it has; the place is "file:line" or "source split row"."""
        raise NotImplementedError

    def examples(self, task: Any, split: str, labelled: bool = True, first: int = 0) -> Iterator[Example]:
        """Yield the examples of a split in the source's order, from number `first` on."""
        rows = self.rows(split, f"task {task.name}")
        return itertools.islice(examples(task, rows, labelled, split), first, None)

    def is_endless(self, split: str) -> bool:
        """Tell whether a split never ends."""
        return False

    def pinned(self, where: str) -> Source:
        """Return the source at the revision that is read now, if it has revisions and states none."""
        return self

    def with_limits(self, max_input_tokens: int, max_target_tokens: int) -> Source:
        """Return the source with the limits of a run, if it is one that cuts its examples itself."""
        return self

    def mixture(self) -> list[tuple[str, Source, float]]:
        """Return the name, source and rate of each task, if the source stands for a mixture of tasks."""
        return []

    def check(self, tokenizer: Tokenizer, metrics: bool) -> None:
        """Refuse a tokenizer that does not fit the source's ids and, if they are used, metrics that cannot be had."""

    def wants_likelihoods(self) -> bool:
        """Tell whether the source's own metrics look at the log-probabilities of the targets."""
        return False

    def own_scores(
        self, predictions: Sequence[str], examples: Sequence[Example], outputs: Outputs | None
    ) -> dict[str, float]:
        """Return what the source's own metrics say of predictions, in their own units."""
        return {}

    def check_split(self, split: str, where: str) -> None:
        """Refuse a split that the source lacks, with those it has."""
        known = self.split_names()
        if split not in known:
            raise UserError(
                f"{where}: no split {split!r}; found {', '.join(known) or 'none'}; "
                f"add it to the source{nearest(split, known)}"
            )


def examples(task: Any, rows: Iterable[tuple[str, Row]], labelled: bool = True, split: str = "") -> Iterator[Example]:
    """Turn rows, each with the place it came from, into examples; unlabelled ones get the target ""."""
    words = frozenset(task.words or ())
    for where, row in rows:
        where = f"task {task.name}: {where}"
        if any(text_of(_field(row, name, where)) != value for name, value in task.keep.items()):
            continue
        for prepared in _prepared(task, row, split, where):
            target = _target(task, prepared, where) if labelled else ""
            if words and labelled and target not in words:
                raise UserError(
                    f"{where}: found the label {target!r}; expected one of {', '.join(task.words or ())}; "
                    "correct the row or the label_words"
                )
            answers = _answers(task.answers_field, prepared, where) if task.answers_field and labelled else ()
            group = tuple(_hashable(_field(prepared, name, where)) for name in task.group_fields) or None
            text = _input(task, prepared, where)
            if labelled and not text.strip():
                raise UserError(f"{where}: the input is empty; expected a text; complete or drop the row")
            yield Example(text, target, dict(prepared), answers, group)


def input_text(task: Any, row: Row, where: str) -> str:
    """Return the input text of one row, labelled or not, as `examples` makes it."""
    (prepared,) = _prepared(task, row, "", where)
    return _input(task, prepared, where)


def _prepared(task: Any, row: Row, split: str, where: str) -> list[Row]:
    if task.prepare is None:
        return [row]
    try:
        return list(PREPROCESSORS[task.prepare](row, split))
    except KeyError as error:
        raise _no_field(row, str(error.args[0]), where) from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{where}: does not fit the preprocessor {task.prepare!r} ({error}); expected a row of that data set"
        ) from None


def _input(task: Any, row: Row, where: str) -> str:
    text = (task.prefix if task.with_prefix else "") + fill(task.input, row, where)
    return one_space(text) if task.one_space else text


def fill(template: str, row: Row, where: str) -> str:
    """Put the fields of a row into a template; a field that the row lacks is a UserError."""
    parts = []
    for literal, name, format_spec, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        value = _field(row, name, where)
        if value is None:
            raise UserError(f"{where}: the field {name!r} is empty; expected a value; complete or drop the row")
        if isinstance(value, list | dict) or (isinstance(value, float) and not math.isfinite(value)):
            found = value if isinstance(value, float) else f"a {type(value).__name__}"
            raise UserError(f"{where}: the field {name!r} holds {found}; expected a text or a number; correct the row")
        try:
            parts.append(format(value, format_spec) if format_spec else text_of(value))
        except (ValueError, TypeError):
            raise UserError(
                f"{where}: the field {name!r} holds {value!r}; expected a value for {{{name}:{format_spec}}}"
            ) from None
    return "".join(parts)


def _target(task: Any, row: Row, where: str) -> str:
    if isinstance(task.target, dict):
        value = _field(row, task.target_field, where)
        if not isinstance(value, (list, dict)) and text_of(value) in task.target:
            return task.target[text_of(value)]
        if value in _UNLABELLED:
            raise _unlabelled(where, task.target_field, value)
        raise UserError(
            f"{where}: found {task.target_field} = {value!r}; expected one of {', '.join(task.target)}; "
            "add it to the task's target"
        )
    for name in template_fields(task.target):
        if (value := _field(row, name, where)) in (None, ""):
            raise _unlabelled(where, name, value)
    return fill(task.target, row, where)


def known_target(task: Any, row: Row, where: str) -> str | None:
    """Return the target of a row that `examples` has prepared, or None if it has none.

    Errors: UserError for one that is no label word.
    """
    names = [task.target_field] if isinstance(task.target, dict) else template_fields(task.target)
    for name in names:
        try:
            value = _field(row, name, where)
        except UserError:
            return None
        hidden = _UNLABELLED if isinstance(task.target, dict) else (None, "")  # -1 may be the answer to a sum
        if not isinstance(value, list | dict) and value in hidden:
            return None
    target = _target(task, row, where)
    if task.words and target not in task.words:
        raise UserError(f"{where}: found the label {target!r}; expected one of {', '.join(task.words)}")
    return target


def _answers(name: str, row: Row, where: str) -> tuple[str, ...]:
    value = _field(row, name, where)
    answers = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(answers, list | tuple) or any(isinstance(answer, list | dict | None) for answer in answers):
        raise UserError(f"{where}: found {name} = {value!r}; expected a text or a list of texts")
    return tuple(map(text_of, answers))


def _unlabelled(where: str, name: str, value: Any) -> UserError:
    return UserError(
        f"{where}: unlabelled ({name} = {value!r}); expected a label; choose a split whose labels are public"
    )


def _field(row: Row, name: str, where: str) -> Any:
    if name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    if inner and isinstance(row.get(outer), Mapping):
        return _field(row[outer], inner, where)
    raise _no_field(row, name, where)


def _no_field(row: Row, name: str, where: str) -> UserError:
    return UserError(f"{where}: no field {name!r}; found {', '.join(map(str, row))}{nearest(name, row)}")


def template_fields(template: str) -> list[str]:
    """Return the field names of a template; a ValueError tells what is wrong with it."""
    try:
        parsed = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"not a template ({error}); write {{field}}, and {{{{ for a brace") from None
    for name, format_spec, conversion in parsed:
        if not name:
            raise ValueError("a field without a name; write {field}, and {{ }} for braces")
        if conversion or "{" in (format_spec or ""):
            raise ValueError(f"{{{name}}} has a conversion or a nested format; expected {{{name}}} or {{{name}:.1f}}")
        if re.search(r"\d{4}", format_spec or ""):
            raise ValueError(f"{{{name}}} has a format of a thousand places or more; expected fewer")
    return [str(name) for name, _, _ in parsed]


def _hashable(value: Any) -> Hashable:
    return value if isinstance(value, Hashable) else str(value)


def text_of(value: Any) -> str:
    """The text of a value; 1.0 and 1 are the same label, since some readers turn integers into floats."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else str(value)
