"""A task is its settings: where rows come from, how a row becomes text, how predictions are scored."""

from __future__ import annotations

import string
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic

from softprompt_jax.config import Settings, UserError, nearest
from softprompt_jax.data.few_shot import FewShot
from softprompt_jax.data.metrics import METRICS
from softprompt_jax.data.preprocessors import POSTPROCESSORS, PREPROCESSORS, one_space
from softprompt_jax.data.seqio_source import Seqio, is_endless, seqio_rows
from softprompt_jax.data.sources import Source, available_splits, check_split, read_rows

_UNLABELLED = (None, "", -1, "-1")  # hubs hide labels as -1
SEQIO = "seqio"  # in the place of metrics: those of the seqio Task itself
# What a seqio Task does itself.
_OF_SEQIO = {"input": "{inputs}", "target": "{targets}", "with_prefix": False, "keep": {}, "prepare": None}
_OF_SEQIO |= {"one_space": False, "answers_field": None, "group_fields": []}


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


def _words(value: Any) -> Any:
    """YAML reads the labels 0 or true as numbers and booleans; rows are looked up by their text."""
    return {_text(key): word for key, word in value.items()} if isinstance(value, Mapping) else value


def _known(name: str | None, known: Mapping[str, Any]) -> str | None:
    if name is not None and name not in known:
        raise ValueError(f"expected one of {', '.join(sorted(known))}{nearest(name, known)}")
    return name


class Task(Settings):
    """A text-to-text task, by name (`tasks.get`) or inline in a run's settings.

    `input` and `target` are templates over the fields of a row, such as
    `"premise: {premise} hypothesis: {hypothesis}"` (`{{` is a brace, `{score:.1f}` formats,
    `{translation.de}` looks inside). Instead `target` may map each value of `target_field` to its label
    word. `label_words` are the legal targets, in order; `positive` is the word `f1` counts (default: the
    second). A task by name can be changed in part: `{name: boolq, with_prefix: true}`.
    """

    name: str = "task"
    source: Source
    input: str = "{text}"
    prefix: str = ""  # the name that T5 was told the task by; Lester et al. (2021) leave it out
    with_prefix: bool = False
    target: Annotated[str | dict[str, str], pydantic.BeforeValidator(_words)] = "{label}"
    target_field: str = "label"
    label_words: list[str] | None = None
    positive: str | None = None
    metrics: list[str] = pydantic.Field(default=["accuracy"])
    predict_by: Literal["decoding", "likelihood", "likelihood_per_token"] = "decoding"  # of the label words
    keep: dict[str, str] = pydantic.Field(default={})  # only rows whose fields have these values
    few_shot: FewShot | None = None  # so many examples of the train split only
    prepare: str | None = None  # what a template cannot do, see preprocessors.py
    one_space: bool = False  # make one space of each run of white space in the input
    answers_field: str | None = None  # a list of acceptable answers, of which metrics take the best
    group_fields: list[str] = pydantic.Field(default=[])
    postprocess: str | None = None  # what a prediction goes through before it is scored, see preprocessors.py
    hidden: list[str] = pydantic.Field(default=[])  # splits without public labels: never scored, only predicted
    submission: str | None = None  # of which benchmark and in which file, see submission.py

    @pydantic.field_validator("input", "target")
    @classmethod
    def _templates_parse(cls, value: Any) -> Any:
        if isinstance(value, str):
            _template_fields(value)
        elif not value:
            raise ValueError("expected at least one value with its label word")
        return value

    @pydantic.field_validator("metrics")
    @classmethod
    def _metrics_exist(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in METRICS and name != SEQIO:
                raise ValueError(
                    f"unknown metric {name!r}; expected some of {', '.join(METRICS)}{nearest(name, METRICS)}"
                )
        if not names:
            raise ValueError("expected at least one metric; the first one selects the best checkpoint")
        return names

    @pydantic.field_validator("prepare")
    @classmethod
    def _preprocessor_exists(cls, name: str | None) -> str | None:
        return _known(name, PREPROCESSORS)

    @pydantic.field_validator("postprocess")
    @classmethod
    def _postprocessor_exists(cls, name: str | None) -> str | None:
        return _known(name, POSTPROCESSORS)

    @pydantic.model_validator(mode="after")
    def _seqio_brings_its_texts(self) -> Task:
        if not isinstance(self.source, Seqio):
            if SEQIO in self.metrics:
                raise ValueError(f"the metric {SEQIO!r} is of kind: seqio only; expected some of {', '.join(METRICS)}")
            return self
        changed = [name for name, value in _OF_SEQIO.items() if getattr(self, name) != value]
        if changed:
            raise ValueError(f"found {changed[0]}; a seqio Task makes its own texts; leave it out, say kind: seqio")
        return self

    @pydantic.model_validator(mode="after")
    def _words_agree(self) -> Task:
        if self.label_words is not None and len(set(self.label_words)) != len(self.label_words):
            raise ValueError(f"label_words {self.label_words} repeat a word; expected each once")
        words = self.words
        if self.label_words is not None and isinstance(self.target, dict):
            strangers = sorted(set(self.target.values()) - set(self.label_words))
            if strangers:
                raise ValueError(f"target {strangers[0]!r} is not one of the label_words {self.label_words}")
        if self.positive is not None and self.positive not in (words or [self.positive]):
            raise ValueError(f"positive {self.positive!r} is not one of the label words {words}")
        if "f1" in self.metrics and self.positive is None and len(words or []) != 2:
            raise ValueError("the metric f1 needs two label words or `positive`; f1_macro takes any number")
        if "f1_macro" in self.metrics and not words:
            raise ValueError("the metric f1_macro needs label_words")
        if self.answers_field and (strict := {"f1", "f1_macro", "matthews"} & set(self.metrics)):
            raise ValueError(f"the metric {min(strict)} wants one answer; expected no answers_field, or other metrics")
        if self.predict_by != "decoding" and not words:
            raise ValueError(f"predict_by {self.predict_by!r} chooses among label words; expected label_words")
        return self

    @property
    def input_fields(self) -> list[str]:
        """The fields of a row that the input template takes."""
        return _template_fields(self.input)

    @property
    def words(self) -> list[str] | None:
        """The legal targets in order, or None when any text is legal."""
        if self.label_words is not None:
            return self.label_words
        return list(dict.fromkeys(self.target.values())) if isinstance(self.target, dict) else None


def load(task: Task, split: str) -> list[Example]:
    """Return all examples of a split in the source's order; an empty split is a UserError."""
    if split in task.hidden:
        raise UserError(
            f"task {task.name}: the labels of split {split!r} are not public; expected one of "
            f"{', '.join(splits(task))}; `softprompt submit` writes its predictions for the benchmark's server"
        )
    if isinstance(task.source, Seqio) and split in splits(task) and is_endless(task.source, split):
        raise UserError(
            f"task {task.name}: split {split!r} never ends; expected a finite one; take some of it in the seqio Task"
        )
    examples = list(iterate(task, split))
    if not examples:
        raise UserError(f"task {task.name}: split {split!r} is empty; expected at least one example; check the source")
    return examples


def iterate(task: Task, split: str, labelled: bool = True) -> Iterator[Example]:
    """Yield the examples of a split one by one, for sets that are too large for a list."""
    if isinstance(task.source, Seqio):
        check_split(task.source, split, f"task {task.name}")
        found = seqio_examples(task, split, labelled)
    else:
        found = examples(task, read_rows(task.source, split, f"task {task.name}"), labelled, split)
    if task.few_shot is None or split != "train" or not labelled:
        return found
    if isinstance(task.source, Seqio) and is_endless(task.source, split):
        raise UserError(f"task {task.name}: few_shot of a split that never ends; expected a finite one; leave it out")
    every = list(found)
    chosen = task.few_shot.choose([e.target for e in every], task.words, f"task {task.name}: {split}")
    return iter([every[number] for number in chosen])


def seqio_examples(task: Task, split: str, labelled: bool = True, first: int = 0) -> Iterator[Example]:
    """Yield the examples of a seqio Task with its own ids, from number `first` on; `fields` are all their features."""
    assert isinstance(task.source, Seqio)
    for row in seqio_rows(task.source, split, first):
        if labelled and task.words and row.texts[1] not in task.words:
            raise UserError(
                f"{row.where}: found the target {row.texts[1]!r}; expected one of {', '.join(task.words)}; "
                "correct the label_words"
            )
        target, ids = (row.texts[1], row.ids) if labelled else ("", None)
        yield Example(row.texts[0], target, row.example, ids=ids, cut=row.cut)


def within(task: Task, max_input_tokens: int, max_target_tokens: int) -> Task:
    """Return a task whose source knows the limits that it must keep, if it is one that asks: seqio's."""
    if not isinstance(task.source, Seqio) or task.source.lengths is not None:
        return task
    source = task.source.model_copy(update={"lengths": (max_input_tokens, max_target_tokens)})
    return task.model_copy(update={"source": source})


def splits(task: Task) -> list[str]:
    """Return the names of the splits that the task's source has with labels."""
    return [split for split in available_splits(task.source) if split not in task.hidden]


def examples(
    task: Task, rows: Iterable[tuple[str, Mapping[str, Any]]], labelled: bool = True, split: str = ""
) -> Iterator[Example]:
    """Turn rows, each with the place it came from, into examples; unlabelled ones get the target ""."""
    words = frozenset(task.words or ())
    for where, row in rows:
        where = f"task {task.name}: {where}"
        if any(_text(_field(row, name, where)) != value for name, value in task.keep.items()):
            continue
        for prepared in _prepared(task, row, split, where):
            target = _target(task, prepared, where) if labelled else ""
            if words and labelled and target not in words:
                raise UserError(
                    f"{where}: found the label {target!r}; expected one of {', '.join(task.words or ())}; "
                    "correct the row or the label_words"
                )
            answers = _answers(task.answers_field, prepared, where) if task.answers_field and labelled else ()
            group = tuple(_field(prepared, name, where) for name in task.group_fields) or None
            yield Example(_input(task, prepared, where), target, dict(prepared), answers, group)


def input_text(task: Task, row: Mapping[str, Any], where: str) -> str:
    """Return the input text of one row, labelled or not, as `examples` makes it."""
    (prepared,) = _prepared(task, row, "", where)
    return _input(task, prepared, where)


def _prepared(task: Task, row: Mapping[str, Any], split: str, where: str) -> list[Mapping[str, Any]]:
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


def _input(task: Task, row: Mapping[str, Any], where: str) -> str:
    text = (task.prefix if task.with_prefix else "") + fill(task.input, row, where)
    return one_space(text) if task.one_space else text


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """Put the fields of a row into a template; a field that the row lacks is a UserError."""
    parts = []
    for literal, name, format_spec, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        value = _field(row, name, where)
        if value is None:
            raise UserError(f"{where}: the field {name!r} is empty; expected a value; complete or drop the row")
        try:
            parts.append(format(value, format_spec) if format_spec else _text(value))
        except (ValueError, TypeError):
            raise UserError(
                f"{where}: the field {name!r} holds {value!r}; expected a value for {{{name}:{format_spec}}}"
            ) from None
    return "".join(parts)


def _target(task: Task, row: Mapping[str, Any], where: str) -> str:
    if isinstance(task.target, dict):
        value = _field(row, task.target_field, where)
        if not isinstance(value, (list, dict)) and _text(value) in task.target:
            return task.target[_text(value)]
        if value in _UNLABELLED:
            raise _unlabelled(where, task.target_field, value)
        raise UserError(
            f"{where}: found {task.target_field} = {value!r}; expected one of {', '.join(task.target)}; "
            "add it to the task's target"
        )
    for name in _template_fields(task.target):
        if (value := _field(row, name, where)) in (None, ""):
            raise _unlabelled(where, name, value)
    return fill(task.target, row, where)


def _answers(name: str, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    value = _field(row, name, where)
    answers = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(answers, list | tuple) or any(isinstance(answer, list | dict | None) for answer in answers):
        raise UserError(f"{where}: found {name} = {value!r}; expected a text or a list of texts")
    return tuple(map(_text, answers))


def _unlabelled(where: str, name: str, value: Any) -> UserError:
    return UserError(
        f"{where}: unlabelled ({name} = {value!r}); expected a label; choose a split whose labels are public"
    )


def _field(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    if inner and isinstance(row.get(outer), Mapping):
        return _field(row[outer], inner, where)
    raise _no_field(row, name, where)


def _no_field(row: Mapping[str, Any], name: str, where: str) -> UserError:
    return UserError(f"{where}: no field {name!r}; found {', '.join(map(str, row))}{nearest(name, row)}")


def _template_fields(template: str) -> list[str]:
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
    return [str(name) for name, _, _ in parsed]


def _text(value: Any) -> str:
    """The text of a value; 1.0 and 1 are the same label, since some readers turn integers into floats."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else str(value)
