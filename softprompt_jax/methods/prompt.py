"""Prompt tuning (Lester et al., 2021): P trainable embeddings, read as P more entries of the vocabulary.

The file has three parts: what rows start from (`Init`), the settings of methods with prompt rows (`PromptMethod`,
`Prompt`), and the module that looks rows up (`PromptTable`, `SoftPrompt`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int
from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from softprompt_jax.config import Settings, UserError, WrongSetting, by_kind
from softprompt_jax.data import prompt_layout
from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.in_memory import Held, find, hold
from softprompt_jax.methods import peft_names
from softprompt_jax.methods.base import AdapterConfig, Context, MethodSettings, Tensors, check_free
from softprompt_jax.methods.reparameterization import Reparameterization
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.presets import published
from softprompt_jax.models.settings import ModelSettings
from softprompt_jax.models.t5 import T5Settings

# Root mean square of a published T5's embeddings, for which the paper's widths and learning rate were found; 1 in a
# T5 that has not been trained.
T5_EMBEDDING_RMS = 10.7


class Uniform(Settings):
    """Rows drawn evenly from [low, high], times the backbone's embedding scale. The paper's code has low 0."""

    kind: Literal["random"] = "random"
    low: float = -0.5  # smallest value, times the embedding scale
    high: float = 0.5  # largest value, times the embedding scale

    @model_validator(mode="after")
    def _in_order(self) -> Uniform:
        if self.low >= self.high:
            raise WrongSetting("high", self.high, f"expected more than low, {self.low}")
        return self

    def rows(self, length: int, model: LanguageModel, key: jax.Array, context: Context) -> Array:
        shape = (length, model.settings.d_model)
        return embedding_scale(model) * jax.random.uniform(key, shape, minval=self.low, maxval=self.high)


class Vocabulary(Settings):
    """Embeddings of common pieces, drawn from the first ids that are neither special nor sentinels."""

    kind: Literal["vocabulary"] = "vocabulary"
    first: int = Field(default=5000, gt=0)  # pieces to draw from, in the order of their ids

    def rows(self, length: int, model: LanguageModel, key: jax.Array, context: Context) -> Array:
        ids = [i for i in range(model.settings.vocabulary_rows) if i not in context.special_ids][: self.first]
        drawn = jax.random.choice(key, jnp.asarray(ids), (length,), replace=length > len(ids))
        return model.word_rows(drawn)


class Labels(Settings):
    """Embeddings of the task's label words (the mean of a word's pieces), then of sampled vocabulary."""

    kind: Literal["labels"] = "labels"

    def rows(self, length: int, model: LanguageModel, key: jax.Array, context: Context) -> Array:
        if not context.label_words:
            raise UserError(
                "methods: prompt init 'labels' but the task has no label words; "
                "expected a task with label_words; use init=vocabulary"
            )
        encode = context.encode_label or context.encode
        ids = [found for word in context.label_words if (found := encode(word))]  # a word may be empty
        words = [model.word_rows(jnp.asarray(pieces)).mean(0, keepdims=True) for pieces in ids]
        return jnp.concatenate([*words, Vocabulary().rows(length, model, key, context)])[:length]


class Text(Settings):
    """Embeddings of a text's tokens, repeated or cut to the prompt's length."""

    kind: Literal["text"] = "text"
    text: str  # words to start from

    def rows(self, length: int, model: LanguageModel, key: jax.Array, context: Context) -> Array:
        ids = context.encode(self.text)
        if not ids:
            raise UserError("methods: prompt init text is empty; expected words to start from")
        return model.word_rows(jnp.resize(jnp.asarray(ids), (length,)))


class File(Settings):
    """Rows of a saved prompt of the same length and width; prompts of other tasks too (SPoT, Vu et al., 2022)."""

    kind: Literal["file"] = "file"
    path: str  # run folder, or prompt file

    def rows(self, length: int, model: LanguageModel, key: jax.Array, context: Context) -> Array:
        assert context.load_rows is not None
        rows = context.load_rows(self.path)
        if rows.shape != (length, model.settings.d_model):
            raise UserError(
                f"{self.path}: a prompt of shape {list(rows.shape)}; expected [{length}, {model.settings.d_model}] "
                "(prompt length, width of the backbone)"
            )
        return jnp.asarray(rows, jnp.float32)


class ArrayInit(Settings):
    """Rows of an array in memory, which `init` was given in Python; a config names it by shape and hash only."""

    kind: Literal["array"] = "array"
    shape: tuple[int, int]  # rows and width
    sha256: str  # hash of its float32 numbers
    _held: Held | None = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        self._held = find(self.sha256)

    def rows(self, length: int, model: LanguageModel, key: jax.Array, context: Context) -> Array:
        if self._held is None:
            raise UserError(
                f"methods: init is an array {list(self.shape)} that was in memory where the run was made; expected it "
                "again; pass the same array from Python"
            )
        if self.shape != (length, model.settings.d_model):
            raise UserError(
                f"methods: init is an array {list(self.shape)}; expected [{length}, {model.settings.d_model}] "
                "(prompt length, width of the backbone)"
            )
        return jnp.asarray(self._held.value)


def array_init(value: Any) -> ArrayInit:
    """Return the settings of rows in memory. Errors: UserError for what are no finite rows [P, D]."""
    try:
        with np.errstate(over="ignore"):  # infinity is refused below
            rows = np.array(value, np.float32)
    except (ValueError, TypeError) as error:
        raise UserError(f"init: found {type(value).__name__} ({error}); expected an array of rows [P, D]") from None
    if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        raise UserError(f"init: found an array of shape {list(rows.shape)}; expected finite rows [P, D]")
    sha256 = hashlib.sha256(rows.tobytes()).hexdigest()
    held = hold(sha256, rows)  # kept until the settings have found it
    return ArrayInit(shape=held.value.shape, sha256=sha256)


def _init(value: Any) -> Any:
    return array_init(value) if isinstance(value, np.ndarray | jax.Array) else by_kind(value)


Init = Annotated[
    Annotated[Uniform | Vocabulary | Labels | Text | File | ArrayInit, Field(discriminator="kind")],
    BeforeValidator(_init),
]


LENGTHS = [10, 20, 50]  # that `softprompt tune` tries


class PromptMethod(MethodSettings):
    """Settings of methods with prompt rows: how many rows, where they stand, what they start from.

    `place`: "before" the text, "after" it (before its EOS), on the "decoder" side (before its first input), "both"
    (`length` rows before the text, `length` others before the decoder's input), or a template with anchor words
    such as "{prompt:10} {text} it was {prompt:5}", where {text} is the task's input.
    """

    one_for_all: ClassVar[str | None] = None  # what all tasks share, so that they cannot have own prompts
    length: int = Field(default=100, ge=1)  # rows of the prompt
    place: str = "before"  # place of the rows: before, after, decoder, both, or a template with `{text}` and
    # `{prompt:N}`
    init: Init | None = None  # rows to start from; null: label words where the task has some, else vocabulary

    @model_validator(mode="after")
    def _place_fits(self) -> PromptMethod:
        prompt_layout.check(self.place, self.length)
        return self

    @property
    def row_count(self) -> int:
        """How many rows there are in all, those of both sides counted."""
        return prompt_layout.rows(self.place, self.length)

    def without_sources(self) -> MethodSettings:
        start = isinstance(self.init, File | ArrayInit) and not self.draws_frozen
        return self.model_copy(update={"init": Uniform()}) if start else self

    def space(self, labelled: bool) -> dict[str, list[Any]]:
        """Return starts from real words, unless the settings name another start, and lengths, unless a template has."""
        inits = (
            {"init": ["labels", "vocabulary"]} if labelled and isinstance(self.init, Labels | Vocabulary | None) else {}
        )
        return inits if "{" in self.place else {**inits, "length": LENGTHS}

    def attach(self, model: LanguageModel, key: jax.Array, context: Context) -> None:
        """Give the model this method's prompt, or one for each task.

        Errors: UserError if another method has given the model a prompt.
        """
        check_free(model.prompt, "the prompt")
        if context.words_by_task and self.one_for_all:
            raise UserError(f"methods: {self.kind} has one {self.one_for_all} for all tasks; expected prompts: shared")  # type: ignore[attr-defined]
        first = model.settings.vocabulary_rows
        layout = layout_in(model, self.place, self.length, context.encode)
        if context.words_by_task:
            layout = layout.for_tasks(len(context.words_by_task), first, self.row_count)
        model.prompt = self.prompt(model, key, context).at(self.place, layout)

    def prompt(self, model: LanguageModel, key: jax.Array, context: Context) -> PromptTable:
        """Return the rows, as training starts from them."""
        raise NotImplementedError

    def first_rows(self, model: LanguageModel, key: jax.Array, context: Context) -> Float[Array, "*N P D"]:
        """Return the rows that training starts from: [P, D], or [N, P, D] if each of N tasks has its own prompt."""
        if context.words_by_task:
            alone = [
                dataclasses.replace(context, label_words=words, words_by_task=()) for words in context.words_by_task
            ]
            return jnp.stack([self.first_rows(model, jax.random.fold_in(key, n), c) for n, c in enumerate(alone)])
        init = self.init or (Labels() if context.label_words else Vocabulary())
        return init.rows(self.row_count, model, key, context)

    def finished(self) -> MethodSettings:
        """Return the settings of the plain rows, whose start needs neither a task nor a file."""
        return Prompt(length=self.length, place=self.place, init=Uniform())

    def per_example_state(self, model: LanguageModel) -> Tensors:
        """Return nothing: prompt rows are looked up by id, so that examples differ in them anyway.

        Errors: UserError for rows at every layer.
        """
        return {} if all(stack.deep is None for stack in model.stacks.values()) else super().per_example_state(model)


class Prompt(PromptMethod):
    """Prompt tuning: `length` trainable rows, by default before the encoder's input."""

    paper: ClassVar[str] = "Lester et al., 2021"
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    kind: Literal["prompt"] = "prompt"
    # numbers that the rows are made of while they train: residual (rows plus a network of them), ulpt (a few dimensions
    # and a frozen projection); null: the rows themselves
    reparameterization: Reparameterization | None = Field(default=None, exclude_if=lambda value: value is None)

    def prompt(self, model: LanguageModel, key: jax.Array, context: Context) -> PromptTable:
        """Return trainable rows, or what makes them."""
        rows, scale = self.first_rows(model, key, context), embedding_scale(model)
        if self.reparameterization is None:
            return SoftPrompt(rows, scale)
        own = jax.random.fold_in(key, 1)
        return MadePrompt(self.reparameterization.build(rows, embedding_rms(model), scale, own))

    def to_peft(self, model: LanguageModel) -> tuple[AdapterConfig, Tensors]:
        """Return P rows with one submodule; with PEFT's default of two, P more would be saved and never read.

        Errors: UserError for rows that do not stand before the text, and for a prompt of each task.
        """
        rows = np.asarray(model.prompt.table())
        if len(rows) > self.row_count:
            raise UserError("methods: a prompt for each task; expected one; export the files in the run's prompts/")
        if self.place != "before":
            raise UserError(
                f"methods: place is {self.place!r}; expected before, since PEFT knows no other; keep the run folder"
            )
        return peft_names.prompt_config(model.settings, self.length), {"prompt_embeddings": rows}

    @classmethod
    def from_peft(
        cls, config: AdapterConfig, tensors: Tensors, settings: ModelSettings
    ) -> tuple[MethodSettings, Tensors]:
        """Return the first P rows of a prompt; by default PEFT saves 2P for a T5, of which P are never read."""
        rows, length = tensors["prompt_embeddings"], config["num_virtual_tokens"]
        if rows.ndim != 2 or len(rows) not in (length, 2 * length):
            raise UserError(
                f"prompt_embeddings: found shape {list(rows.shape)}; expected [{length} or {2 * length}, its width]"
            )
        return cls(length=length, init=Uniform()), {"prompt.rows": rows[:length]}


class PromptTable(nnx.Module):
    """The prompt of a model: `table()` returns the embeddings of the ids V onwards, which stand at `layout`."""

    place: str
    layout: PromptLayout

    def at(self, place: str, layout: PromptLayout) -> PromptTable:
        """Say where the rows stand, and return the prompt."""
        self.place, self.layout = place, layout
        return self

    def table(self) -> Float[Array, "P D"]:
        """Return all rows, in float32."""
        raise NotImplementedError

    def compact(self) -> tuple[Tensors, dict[str, str]] | None:
        """Return tensors and metadata of a smaller file than the rows, where there is one (ULPT)."""
        return None

    def finished(self) -> PromptTable:
        """Return a plain table of the same rows: [P, D], or [N, P, D] if each of N tasks has its own prompt."""
        rows, tasks = self.table(), self.layout.tasks
        rows = rows.reshape(tasks, -1, rows.shape[-1]) if tasks else rows
        return SoftPrompt(rows).at(self.place, self.layout)

    def __call__(
        self, indices: Int[Array, "B T"], virtual: Bool[Array, "B T"], key: jax.Array | None = None
    ) -> Float[Array, "B T D"]:
        """Look rows up as a one-hot product, whose gradient is a product too and not a scatter."""
        table = self.table()
        one_hot = jax.nn.one_hot(jnp.where(virtual, indices, -1), len(table), dtype=jnp.float32)
        # A copy of the table for every row of the batch: in one long product XLA transposes the gradient first.
        tables = jnp.broadcast_to(table, (indices.shape[0], *table.shape))
        return jnp.matmul(one_hot, tables, precision=jax.lax.Precision.HIGHEST)


class SoftPrompt(PromptTable):
    """P trainable rows of width D for the ids V to V + P - 1.

    [N, P, D] are N prompts, one after the other; the optimizer updates each as a weight of its own.
    """

    def __init__(self, rows: Float[Array, "*N P D"], learning_rate_scale: float = 1.0):
        self.rows = Trainable(
            jnp.asarray(rows, jnp.float32), axes=("prompt", "embed"), learning_rate_scale=learning_rate_scale
        )

    def table(self) -> Float[Array, "NP D"]:
        rows = self.rows[...]
        return rows.reshape(-1, rows.shape[-1])


class MadePrompt(PromptTable):
    """Rows that a module makes while it trains (reparameterization.py)."""

    def __init__(self, rows: nnx.Module):
        self.rows: Any = rows

    def table(self) -> Float[Array, "NP D"]:
        rows = self.rows()
        return rows.reshape(-1, rows.shape[-1])

    def compact(self) -> tuple[Tensors, dict[str, str]] | None:
        return self.rows.compact() if hasattr(self.rows, "compact") else None


def embedding_scale(model: LanguageModel) -> float:
    """Return the unit of the rows' learning rate and random start: the root mean square of the backbone's embeddings.

    A T5's is divided by that of a published T5, so that the paper's 0.3 is the paper's, and is exactly 1 where the
    shapes are a published T5's and the embeddings nearer (by ratio) to a published one's than to new ones: the
    published sizes differ among each other (11.6 in T5 1.1 small), and the paper has one recipe. 1 without weights.
    """
    if isinstance(model.embedding.get_value(), Tracer | jax.ShapeDtypeStruct):
        return 1.0
    rms = embedding_rms(model)
    if not isinstance(model.settings, T5Settings):
        return rms
    scale = rms / T5_EMBEDDING_RMS
    close = T5_EMBEDDING_RMS**-0.5 < scale < T5_EMBEDDING_RMS**0.5
    return 1.0 if close and published(model.settings) else scale


def embedding_rms(model: LanguageModel) -> float:
    """Return the root mean square of the embeddings as a prompt's rows would have it; a published T5's if abstract."""
    table = model.embedding.get_value()
    if isinstance(table, Tracer | jax.ShapeDtypeStruct):
        return T5_EMBEDDING_RMS
    return float(_root_mean_square(table)) * model.word_factor


@jax.jit
def _root_mean_square(table: Float[Array, "V D"]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(jnp.square(table.astype(jnp.float32))))


def layout_in(model: LanguageModel, place: str, length: int, encode: Callable[[str], list[int]]) -> PromptLayout:
    """Return where prompt rows stand around a model's texts.

    Errors: UserError for a place that the model has not.
    """
    try:
        return prompt_layout.place(place, length, model.settings.vocabulary_rows, encode, model.text_end)
    except ValueError as error:
        raise UserError(f"prompt: {error}") from None


def attach_rows(
    model: LanguageModel,
    rows: np.ndarray | Array,
    place: str = "before",
    encode: Callable[[str], list[int]] | None = None,
) -> None:
    """Give a model prompt rows [P, D] in place of those that it has; `encode` reads a template's anchor words."""
    rows = jnp.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] != model.settings.d_model:
        raise UserError(
            f"prompt: found shape {list(rows.shape)}; expected [P, {model.settings.d_model}], "
            "the width of this backbone; use a prompt that was trained on it"
        )
    if not isinstance(rows, Tracer) and not jnp.isfinite(rows).all():
        raise UserError("prompt: holds NaN or infinity; expected finite numbers; train it again")
    try:
        length = len(rows) // prompt_layout.rows(place, 1)
    except ValueError as error:
        raise UserError(f"prompt: {error}") from None
    layout = layout_in(model, place, length, encode or _no_anchors)
    model.prompt = SoftPrompt(rows).at(place, layout)


def _no_anchors(text: str) -> list[int]:
    raise UserError(f"prompt: its place has the words {text!r}; expected the backbone's tokenizer to read them")
