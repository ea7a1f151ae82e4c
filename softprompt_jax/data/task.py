"""A task is its settings: where rows come from, how a row becomes text, how predictions are scored."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic

from softprompt_jax.config import Settings, UserError, WrongSetting, nearest
from softprompt_jax.data.examples import Example, template_fields, text_of
from softprompt_jax.data.few_shot import FewShot
from softprompt_jax.data.metrics import METRICS
from softprompt_jax.data.preprocessors import POSTPROCESSORS, PREPROCESSORS
from softprompt_jax.data.rows import source_of
from softprompt_jax.data.sources import AnySource
from softprompt_jax.data.tokenizer import Tokenizer


def _words(value: Any) -> Any:
    """YAML reads the labels 0 or true as numbers and booleans; rows are looked up by their text."""
    if not isinstance(value, Mapping):
        return value
    if len(words := {text_of(key): word for key, word in value.items()}) < len(value):
        raise ValueError("two of the values are the same label; expected each once")
    return words


class Task(Settings):
    """A text-to-text task. A named one can be changed in part: `{name: boolq, with_prefix: true}`.

    `input` and `target` are templates over the fields of a row, such as
    `"premise: {premise} hypothesis: {hypothesis}"` (`{{` is a brace, `{score:.1f}` formats,
    `{translation.de}` looks inside). Instead `target` may map each value of `target_field` to its label word.
    """

    name: str = pydantic.Field("task", min_length=1)  # name in results and messages
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
    validation: float | None = pydantic.Field(default=None, gt=0, lt=1)  # share of train rows that validate, where the
    # source has no validation split; chosen by a hash of the input, so that rows with the same input stay together
    few_shot: FewShot | None = None  # number of examples that are taken of the train split
    prepare: str | None = None  # preprocessor of rows, for what a template cannot do (data/preprocessors.py)
    one_space: bool = False  # whether each run of white space in the input becomes one space
    answers_field: str | None = None  # field with a list of acceptable answers, of which metrics take the best
    group_fields: list[str] = pydantic.Field(default=[])  # fields that say which examples metrics take together
    postprocess: str | None = None  # postprocessor of predictions before they are scored (data/preprocessors.py)
    hidden: list[str] = pydantic.Field(default=[])  # splits whose labels are not public: predicted, never scored
    submission: str | None = None  # benchmark and file of its server's form, such as glue/CoLA

    @classmethod
    def from_rows(
        cls,
        rows: Any,
        input: str = "{text}",
        target: str | dict[str, str] = "{label}",
        validation: Any = None,
        test: Any = None,
        **settings: Any,
    ) -> Task:
        """Return a task on rows in memory.

        `rows`: a list of dictionaries, a DataFrame, a datasets.Dataset, any iterable of dictionaries; or a mapping of
        these by split, such as a DatasetDict. `validation`: rows to validate on, or the share of `rows` that is taken
        for it, by a hash of the input. `test`: rows that the result is measured on. `input` and `target` are templates
        over the fields of a row; `settings` are the other fields of a task, such as `label_words`. Errors: UserError
        for rows that do not fit them.
        """
        share = validation if isinstance(validation, int | float) else None
        given = dict(rows) if isinstance(rows, Mapping) else {"train": rows}
        others = {"validation": validation if share is None else None, "test": test}
        source = source_of(given | {split: value for split, value in others.items() if value is not None})
        task = cls(source=source, input=input, target=target, validation=share, **settings)
        for split in splits(task):
            if next(iterate(task, split), None) is None:  # a wrong field is said here
                raise empty_split(task, split)
        return task

    @pydantic.field_validator("input", "target")
    @classmethod
    def _templates_parse(cls, value: Any) -> Any:
        if isinstance(value, str):
            if not template_fields(value):
                raise ValueError("the same text for every row; expected a field of the row, such as {text}")
        elif not value:
            raise ValueError("expected at least one value with its label word")
        return value

    @pydantic.field_validator("prepare", "postprocess")
    @classmethod
    def _exists(cls, name: str | None, field: Any) -> str | None:
        known = PREPROCESSORS if field.field_name == "prepare" else POSTPROCESSORS
        if name is not None and name not in known:
            raise ValueError(known.expected(name))
        return name

    @pydantic.model_validator(mode="after")
    def _settings_agree(self) -> Task:
        for key, message in self._disagreements():
            raise WrongSetting(key, getattr(self, key), message)
        return self

    def _disagreements(self) -> Iterator[tuple[str, str]]:
        """Yield each setting that does not fit another one, and what is wrong with it."""
        words, labels = self.words, self.label_words
        if not self.metrics:
            yield "metrics", "expected at least one metric; the mean of all selects the best checkpoint"
        if len(set(self.metrics)) < len(self.metrics):
            yield "metrics", "a metric is repeated; expected each once"
        for name in self.metrics:
            if name not in METRICS and name != self.source.own_metrics:
                yield (
                    "metrics",
                    f"unknown metric {name!r}; expected some of {', '.join(METRICS)}{nearest(name, METRICS)}",
                )
        for name, value in self.source.fixed.items():
            if getattr(self, name) != value:
                yield name, f"a source of kind {self.source.kind} makes its own texts; leave it out"
        if labels == []:
            yield "label_words", "expected two words or more; leave it out where any text may be a target"
        if labels is not None and len(set(labels)) != len(labels):
            yield "label_words", "a word is repeated; expected each once"
        if any(not word or word != word.strip() for word in words or ()):
            key = "target" if labels is None else "label_words"
            yield key, "a word is empty or has spaces around it, which no answer has; expected a word"
        if isinstance(self.target, dict) and (strangers := sorted({*self.target.values()} - {*(words or ())})):
            yield "target", f"{strangers[0]!r} is not one of the label_words {labels}"
        if self.positive is not None and self.positive not in (words or [self.positive]):
            yield "positive", f"expected one of the label words {words}"
        if "f1" in self.metrics and self.positive is None and len(words or []) != 2:
            yield "metrics", "the metric f1 needs two label words or `positive`; f1_macro takes any number"
        if "f1_macro" in self.metrics and not words:
            yield "metrics", "the metric f1_macro needs label_words"
        if self.answers_field and (strict := {"f1", "f1_macro", "matthews"} & set(self.metrics)):
            yield "metrics", f"the metric {min(strict)} wants one answer; expected no answers_field, or other metrics"
        if self.predict_by != "decoding" and not words:
            yield "predict_by", "this chooses among label words; expected label_words"

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
    def choices(self) -> list[str]:
        """The label words of which the likeliest is predicted; none where answers are decoded."""
        return (self.words or []) if self.predict_by != "decoding" else []

    @property
    def scored_by_source(self) -> bool:
        """Whether the metrics of the source itself are among the task's."""
        return self.source.own_metrics in self.metrics

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer or metrics that the task's source cannot work with."""
        self.source.check(tokenizer, self.scored_by_source)


class Distill(Task):
    """A task that a teacher answers: the same frozen model, with a long text (`context`) before every input.

    What trains learns to answer as if the context were there (context distillation; Snell et al., 2022): the loss is
    the KL divergence from the teacher's distribution over the vocabulary at every token of the answers. `inputs: FILE`
    stands for `source: {kind: inputs, path: FILE}`; with the name of a task, its rows are the inputs. Rows need
    no targets. Scores are `agreement`, the share of answers that equal the teacher's, and where rows have targets the
    metrics of the student, whose target is then the row's, and `teacher_accuracy`.
    """

    kind: Literal["distill"] = "distill"
    context: str = pydantic.Field(min_length=1)  # text file that the teacher reads before every input
    answers: Literal["given", "sampled", "greedy"] = "given"  # answers of the train split: given, the rows' targets,
    # sampled where a row has none; sampled or greedy, always the teacher's
    name: str = pydantic.Field("distill", min_length=1)  # name in results and messages
    input: str = "{inputs}"  # template of the input
    target: Annotated[str | dict[str, str], pydantic.BeforeValidator(_words)] = (
        "{targets}"  # template, or words of labels; a row may lack it
    )

    @pydantic.model_validator(mode="after")
    def _has_texts(self) -> Distill:
        if self.few_shot is not None:
            raise WrongSetting("few_shot", self.few_shot, "a task with a teacher takes all rows; leave it out")
        if self.source.makes_ids or self.source.is_endless("train"):
            raise WrongSetting("source", self.source.kind, "expected rows of text that end, for a teacher to answer")
        return self

    def compare(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Return the agreement with the teacher, and where all rows have targets the teacher's accuracy."""
        if not all(TEACHER in example.fields for example in examples):
            return {}  # answered without a teacher, as by `softprompt eval`
        answers = [example.fields[TEACHER] for example in examples]
        found = {"agreement": _share(predictions, answers)}
        if all(example.fields[LABELLED] for example in examples):
            found["teacher_accuracy"] = _share(answers, [example.target for example in examples])
        return found


TEACHER, LABELLED = "answer of the teacher", "has a target"  # fields of examples that a teacher has answered


def _share(found: Sequence[str], expected: Sequence[str]) -> float:
    return sum(one == other for one, other in zip(found, expected, strict=True)) / len(found)


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
        raise empty_split(task, split)
    return examples


def empty_split(task: Task, split: str) -> UserError:
    """Return what is wrong with a split that has no examples."""
    if _is_shared(task, split):
        return UserError(
            f"task {task.name}: validation: {task.validation:g} of the train rows leaves split {split!r} empty; "
            "expected at least one example on both sides; give more rows, or another share"
        )
    return UserError(f"task {task.name}: split {split!r} is empty; expected at least one example; check the source")


def iterate(task: Task, split: str, labelled: bool = True, first: int = 0) -> Iterator[Example]:
    """Yield the examples of a split from number `first` on, one by one, for sets that are too large for a list."""
    if _is_shared(task, split):
        splits(task)  # which refuses what cannot be shared
        every = task.source.examples(task, "train", labelled)
        found = (e for e in every if (split == "validation") == is_held_out(e.input, task.validation or 0))
        found = itertools.islice(found, first, None)
    else:
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
    """Return the names of the splits that the task has with labels."""
    found = task.source.split_names()
    if task.validation is not None:
        if "validation" in found:
            raise UserError(
                f"task {task.name}: validation: {task.validation:g}, but the source has a validation split; expected "
                "one of them; leave `validation` out"
            )
        if "train" not in found or task.source.is_endless("train"):
            raise UserError(
                f"task {task.name}: validation: {task.validation:g} of a train split that "
                f"{'never ends' if 'train' in found else 'is not there'}; expected a finite one; leave `validation` out"
            )
        found = [name for each in found for name in ([each, "validation"] if each == "train" else [each])]
    return [split for split in found if split not in task.hidden]


def is_held_out(text: str, share: float) -> bool:
    """Tell whether an example with this input is in the share for validation: the same everywhere and always."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _is_shared(task: Task, split: str) -> bool:
    return task.validation is not None and split in ("train", "validation")
