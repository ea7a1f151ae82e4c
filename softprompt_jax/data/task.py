"""A task is its settings: where rows come from, how a row becomes text, how predictions are scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import pydantic

from softprompt_jax.config import Settings, UserError, WrongSetting, nearest
from softprompt_jax.data.examples import Example, template_fields, text_of
from softprompt_jax.data.few_shot import FewShot
from softprompt_jax.data.metrics import METRICS
from softprompt_jax.data.preprocessors import POSTPROCESSORS, PREPROCESSORS
from softprompt_jax.data.sources import AnySource
from softprompt_jax.data.tokenizer import Tokenizer


def _words(value: Any) -> Any:
    """YAML reads the labels 0 or true as numbers and booleans; rows are looked up by their text."""
    return {text_of(key): word for key, word in value.items()} if isinstance(value, Mapping) else value


def _known(name: str | None, known: Mapping[str, Any]) -> str | None:
    if name is not None and name not in known:
        raise ValueError(f"expected one of {', '.join(sorted(known))}{nearest(name, known)}")
    return name


class Task(Settings):
    """A text-to-text task. A named one can be changed in part: `{name: boolq, with_prefix: true}`.

    `input` and `target` are templates over the fields of a row, such as
    `"premise: {premise} hypothesis: {hypothesis}"` (`{{` is a brace, `{score:.1f}` formats,
    `{translation.de}` looks inside). Instead `target` may map each value of `target_field` to its label word.
    """

    name: str = "task"  # name in results and messages
    source: AnySource  # place that rows come from
    input: str = "{text}"  # template of the input
    prefix: str = ""  # prefix that T5 was trained on the task with; Lester et al. (2021) leave it out
    with_prefix: bool = False  # whether the input begins with the prefix
    target: Annotated[str | dict[str, str], pydantic.BeforeValidator(_words)] = (
        "{label}"  # template, or words of labels
    )
    target_field: str = "label"  # field whose values `target` maps to words
    label_words: list[str] | None = None  # legal targets, in order; default: the words of `target`
    positive: str | None = None  # label word that f1 counts; default: the second
    metrics: list[str] = pydantic.Field(default=["accuracy"])  # scores, whose mean selects the best checkpoint
    predict_by: Literal["decoding", "likelihood", "likelihood_per_token"] = "decoding"  # choice among the label words
    keep: dict[str, str] = pydantic.Field(default={})  # values that fields must have, or the row is left out
    few_shot: FewShot | None = None  # number of examples that are taken of the train split
    prepare: str | None = None  # preprocessor of rows, for what a template cannot do (data/preprocessors.py)
    one_space: bool = False  # whether each run of white space in the input becomes one space
    answers_field: str | None = None  # field with a list of acceptable answers, of which metrics take the best
    group_fields: list[str] = pydantic.Field(default=[])  # fields that say which examples metrics take together
    postprocess: str | None = None  # postprocessor of predictions before they are scored (data/preprocessors.py)
    hidden: list[str] = pydantic.Field(default=[])  # splits whose labels are not public: predicted, never scored
    submission: str | None = None  # benchmark and file of its server's form, such as glue/CoLA

    @pydantic.field_validator("input", "target")
    @classmethod
    def _templates_parse(cls, value: Any) -> Any:
        if isinstance(value, str):
            template_fields(value)
        elif not value:
            raise ValueError("expected at least one value with its label word")
        return value

    @pydantic.field_validator("metrics")
    @classmethod
    def _some_metric(cls, names: list[str]) -> list[str]:
        if not names:
            raise ValueError("expected at least one metric; the mean of all selects the best checkpoint")
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
    def _source_agrees(self) -> Task:
        for name in self.metrics:
            if name not in METRICS and name != self.source.own_metrics:
                raise WrongSetting(
                    "metrics",
                    self.metrics,
                    f"unknown metric {name!r}; expected some of {', '.join(METRICS)}{nearest(name, METRICS)}",
                )
        for name, value in self.source.fixed.items():
            if (found := getattr(self, name)) != value:
                kind = self.source.kind
                raise WrongSetting(name, found, f"a source of kind {kind} makes its own texts; leave it out")
        return self

    @pydantic.model_validator(mode="after")
    def _words_agree(self) -> Task:
        words, labels = self.words, self.label_words
        if labels is not None and len(set(labels)) != len(labels):
            raise WrongSetting("label_words", labels, "a word is repeated; expected each once")
        if labels is not None and isinstance(self.target, dict):
            strangers = sorted(set(self.target.values()) - set(labels))
            if strangers:
                raise WrongSetting("target", self.target, f"{strangers[0]!r} is not one of the label_words {labels}")
        if self.positive is not None and self.positive not in (words or [self.positive]):
            raise WrongSetting("positive", self.positive, f"expected one of the label words {words}")
        if "f1" in self.metrics and self.positive is None and len(words or []) != 2:
            raise self._wrong_metrics("the metric f1 needs two label words or `positive`; f1_macro takes any number")
        if "f1_macro" in self.metrics and not words:
            raise self._wrong_metrics("the metric f1_macro needs label_words")
        if self.answers_field and (strict := {"f1", "f1_macro", "matthews"} & set(self.metrics)):
            raise self._wrong_metrics(
                f"the metric {min(strict)} wants one answer; expected no answers_field, or other metrics"
            )
        if self.predict_by != "decoding" and not words:
            raise WrongSetting("predict_by", self.predict_by, "this chooses among label words; expected label_words")
        return self

    def _wrong_metrics(self, message: str) -> WrongSetting:
        return WrongSetting("metrics", self.metrics, message)

    @property
    def input_fields(self) -> list[str]:
        """The fields of a row that the input template takes."""
        return template_fields(self.input)

    @property
    def words(self) -> list[str] | None:
        """The legal targets in order, or None when any text is legal."""
        if self.label_words is not None:
            return self.label_words
        return list(dict.fromkeys(self.target.values())) if isinstance(self.target, dict) else None

    @property
    def scored_by_source(self) -> bool:
        """Whether the metrics of the source itself are among the task's."""
        return self.source.own_metrics in self.metrics

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer or metrics that the task's source cannot work with."""
        self.source.check(tokenizer, self.scored_by_source)


def load(task: Task, split: str) -> list[Example]:
    """Return all examples of a split in the source's order; an empty split is a UserError."""
    if split in task.hidden:
        raise UserError(
            f"task {task.name}: the labels of split {split!r} are not public; expected one of "
            f"{', '.join(splits(task))}; `softprompt submit` writes its predictions for the benchmark's server"
        )
    if split in splits(task) and task.source.is_endless(split):
        raise UserError(
            f"task {task.name}: split {split!r} never ends; expected a finite one; take some of it in the seqio Task"
        )
    examples = list(iterate(task, split))
    if not examples:
        raise UserError(f"task {task.name}: split {split!r} is empty; expected at least one example; check the source")
    return examples


def iterate(task: Task, split: str, labelled: bool = True, first: int = 0) -> Iterator[Example]:
    """Yield the examples of a split from number `first` on, one by one, for sets that are too large for a list."""
    task.source.check_split(split, f"task {task.name}")
    found = task.source.examples(task, split, labelled, first)
    if task.few_shot is None or split != "train" or not labelled:
        return found
    if task.source.is_endless(split):
        raise UserError(f"task {task.name}: few_shot of a split that never ends; expected a finite one; leave it out")
    every = list(found)
    chosen = task.few_shot.choose([e.target for e in every], task.words, f"task {task.name}: {split}")
    return iter([every[number] for number in chosen])


def with_limits(task: Task, max_input_tokens: int, max_target_tokens: int) -> Task:
    """Return a task whose source knows the limits of a run, if it is one that cuts its examples itself."""
    return task.model_copy(update={"source": task.source.with_limits(max_input_tokens, max_target_tokens)})


def splits(task: Task) -> list[str]:
    """Return the names of the splits that the task's source has with labels."""
    return [split for split in task.source.split_names() if split not in task.hidden]
