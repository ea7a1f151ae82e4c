"""Prompt tuning (Lester et al., 2021): P trainable embeddings, read as P more entries of the vocabulary.

The file has three parts: what rows start from (`Init`), the settings of methods with prompt rows (`PromptMethod`,
`Prompt`), and the module that looks rows up (`PromptTable`, `SoftPrompt`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int
from pydantic import BeforeValidator, Field, model_validator

from softprompt_jax.config import Settings, UserError
from softprompt_jax.data import prompt_layout
from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.methods.base import Context, MethodSettings, Tensors
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.presets import published
from softprompt_jax.models.t5 import T5, T5Settings

# Root mean square of a published T5's embeddings, for which the paper's widths and learning rate were found; 1 in a
# T5 that has not been trained.
T5_EMBEDDING_RMS = 10.7


class Uniform(Settings):
    """Rows drawn evenly from [low, high], times the backbone's embedding scale. The paper's code has low 0."""

    kind: Literal["random"] = "random"
    low: float = -0.5  # smallest value, times the embedding scale
    high: float = 0.5  # largest value, times the embedding scale

    def rows(self, length: int, model: T5, key: jax.Array, context: Context) -> Array:
        shape = (length, model.settings.d_model)
        return embedding_scale(model) * jax.random.uniform(key, shape, minval=self.low, maxval=self.high)


class Vocabulary(Settings):
    """Embeddings of common pieces, drawn from the first ids that are neither special nor sentinels."""

    kind: Literal["vocabulary"] = "vocabulary"
    first: int = Field(default=5000, gt=0)  # pieces to draw from, in the order of their ids

    def rows(self, length: int, model: T5, key: jax.Array, context: Context) -> Array:
        ids = [i for i in range(model.settings.vocabulary_rows) if i not in context.special_ids][: self.first]
        drawn = jax.random.choice(key, jnp.asarray(ids), (length,), replace=length > len(ids))
        return model.embedding[...][drawn].astype(jnp.float32)


class Labels(Settings):
    """Embeddings of the task's label words (the mean of a word's pieces), then of sampled vocabulary."""

    kind: Literal["labels"] = "labels"

    def rows(self, length: int, model: T5, key: jax.Array, context: Context) -> Array:
        if not context.label_words:
            raise UserError(
                "methods: prompt init 'labels' but the task has no label words; "
                "expected a task with label_words; use init=vocabulary"
            )
        table = model.embedding[...]
        ids = [found for word in context.label_words if (found := context.encode(word))]  # a word may be empty
        words = [table[jnp.asarray(pieces)].astype(jnp.float32).mean(0, keepdims=True) for pieces in ids]
        return jnp.concatenate([*words, Vocabulary().rows(length, model, key, context)])[:length]


class Text(Settings):
    """Embeddings of a text's tokens, repeated or cut to the prompt's length."""

    kind: Literal["text"] = "text"
    text: str  # words to start from

    def rows(self, length: int, model: T5, key: jax.Array, context: Context) -> Array:
        ids = context.encode(self.text)
        if not ids:
            raise UserError("methods: prompt init text is empty; expected words to start from")
        return model.embedding[...][jnp.resize(jnp.asarray(ids), (length,))].astype(jnp.float32)


class File(Settings):
    """Rows of a saved prompt of the same length and width; prompts of other tasks too (SPoT, Vu et al., 2022)."""

    kind: Literal["file"] = "file"
    path: str  # run folder, or prompt file

    def rows(self, length: int, model: T5, key: jax.Array, context: Context) -> Array:
        assert context.load_rows is not None
        rows = context.load_rows(self.path)
        if rows.shape != (length, model.settings.d_model):
            raise UserError(
                f"{self.path}: a prompt of shape {list(rows.shape)}; expected [{length}, {model.settings.d_model}] "
                "(prompt length, width of the backbone)"
            )
        return jnp.asarray(rows, jnp.float32)


def _named(value):
    """Let `init: vocabulary` stand for `init: {kind: vocabulary}`."""
    return {"kind": value} if isinstance(value, str) else value


Init = Annotated[
    Annotated[Uniform | Vocabulary | Labels | Text | File, Field(discriminator="kind")], BeforeValidator(_named)
]


class PromptMethod(MethodSettings):
    """Settings of methods with prompt rows: how many rows, where they stand, what they start from.

    `place`: "before" the text, "after" it (before its EOS), on the "decoder" side (before its first input), "both"
    (`length` rows before the text, `length` others before the decoder's input), or a template with anchor words
    such as "{prompt:10} {text} it was {prompt:5}", where {text} is the task's input.
    """

    length: int = Field(default=100, ge=1)  # rows of the prompt
    place: str = "before"  # place of the rows: before, after, decoder, both, or a template with `{text}` and
    # `{prompt:N}`
    init: Init | None = None  # rows to start from; null: label words where the task has some, else vocabulary

    @model_validator(mode="after")
    def _place_fits(self) -> PromptMethod:
        prompt_layout.check(self.place, self.length)
        return self

    def find_placement(self, model: T5, context: Context) -> PromptLayout:
        """Return where the rows stand.

        Errors: UserError if another method has given the model a prompt.
        """
        if model.prompt is not None:
            raise UserError("methods: two methods want the prompt; expected one; remove the other")
        first = model.settings.vocabulary_rows
        layout = prompt_layout.place(self.place, self.length, first, context.encode)
        rows = prompt_layout.rows(self.place, self.length)
        return layout.for_tasks(len(context.words_by_task), first, rows) if context.words_by_task else layout

    def first_rows(self, model: T5, key: jax.Array, context: Context) -> Float[Array, "*N P D"]:
        """Return the rows that training starts from: [P, D], or [N, P, D] if each of N tasks has its own prompt."""
        if context.words_by_task:
            alone = [
                dataclasses.replace(context, label_words=words, words_by_task=()) for words in context.words_by_task
            ]
            return jnp.stack([self.first_rows(model, jax.random.fold_in(key, n), c) for n, c in enumerate(alone)])
        init = self.init or (Labels() if context.label_words else Vocabulary())
        return init.rows(prompt_layout.rows(self.place, self.length), model, key, context)

    def per_example_state(self, model: T5) -> Tensors:
        """Return nothing: prompt rows are looked up by id, so that examples differ in them anyway.

        Errors: UserError for rows at every layer.
        """
        return {} if model.encoder.deep is None and model.decoder.deep is None else super().per_example_state(model)

    def peft_rows(self, model: T5) -> tuple[dict[str, Any], Tensors]:
        """Return the settings and the rows of a prompt as PEFT saves them.

        Errors: UserError for rows that do not stand before the text, and for a prompt of each task.
        """
        if len(model.prompt.table()) > prompt_layout.rows(self.place, self.length):
            raise UserError("methods: a prompt for each task; expected one; export the files in the run's prompts/")
        if self.place != "before":
            raise UserError(
                f"methods: place is {self.place!r}; expected before, since PEFT knows no other; keep the run folder"
            )
        settings = model.settings
        config = {
            "num_virtual_tokens": self.length,
            "num_transformer_submodules": 1,
            "token_dim": settings.d_model,
            "num_layers": settings.num_layers,
            "num_attention_heads": settings.num_heads,
        }
        return config, {"prompt_embeddings": np.asarray(model.prompt.table())}


class Prompt(PromptMethod):
    """Prompt tuning: `length` trainable rows, by default before the encoder's input."""

    paper: ClassVar[str] = "Lester et al., 2021"
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    kind: Literal["prompt"] = "prompt"

    def attach(self, model: T5, key: jax.Array, context: Context) -> None:
        """Give the model a trainable prompt."""
        layout = self.find_placement(model, context)
        rows = self.first_rows(model, key, context)
        model.prompt = SoftPrompt(rows, embedding_scale(model), self.place, layout)

    def finished(self) -> MethodSettings:
        """Return the settings without the start, which needs a task or a file."""
        return self.model_copy(update={"init": Uniform()})

    def to_peft(self, model: T5) -> tuple[dict[str, Any], Tensors]:
        """Return P rows with one submodule; with PEFT's default of two, P more would be saved and never read."""
        return self.peft_rows(model)

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], tensors: Tensors, settings: T5Settings
    ) -> tuple[MethodSettings, Tensors]:
        """Return the settings and the rows of a prompt that PEFT has saved."""
        rows = peft_rows(config, tensors)
        return cls(length=len(rows), init=Uniform()), {"prompt.rows": rows}


class PromptTable(nnx.Module):
    """The prompt of a model: `table()` returns the embeddings of the ids V onwards, which stand at `layout`."""

    place: str
    layout: PromptLayout

    def table(self) -> Float[Array, "P D"]:
        """Return all rows, in float32."""
        raise NotImplementedError

    def finished(self) -> SoftPrompt:
        """Return a plain table of the same rows: [P, D], or [N, P, D] if each of N tasks has its own prompt."""
        rows, tasks = self.table(), self.layout.tasks
        return SoftPrompt(rows.reshape(tasks, -1, rows.shape[-1]) if tasks else rows, 1.0, self.place, self.layout)

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

    def __init__(
        self,
        rows: Float[Array, "*N P D"],
        learning_rate_scale: float = 1.0,
        place: str = "before",
        layout: PromptLayout | None = None,
    ):
        self.rows = Trainable(
            jnp.asarray(rows, jnp.float32), axes=("prompt", "embed"), learning_rate_scale=learning_rate_scale
        )
        self.place, self.layout = place, layout or PromptLayout()

    def table(self) -> Float[Array, "NP D"]:
        rows = self.rows[...]
        return rows.reshape(-1, rows.shape[-1])


def embedding_scale(model: T5) -> float:
    """Return the root mean square of the backbone's embeddings over that of a published T5; 1 where it has no weights.

    Exactly 1 for a backbone that has the shapes of a published T5 and embeddings nearer (by ratio) to a published one's
    than to new ones. The published sizes differ among each other (11.6 in T5 1.1 small), and the paper has one recipe.
    """
    table = model.embedding.get_value()
    if isinstance(table, Tracer | jax.ShapeDtypeStruct):
        return 1.0
    scale = float(_root_mean_square(table)) / T5_EMBEDDING_RMS
    close = T5_EMBEDDING_RMS**-0.5 < scale < T5_EMBEDDING_RMS**0.5
    return 1.0 if close and published(model.settings) else scale


@jax.jit
def _root_mean_square(table: Float[Array, "V D"]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(jnp.square(table.astype(jnp.float32))))


def peft_rows(config: dict[str, Any], tensors: Tensors) -> np.ndarray:
    """Return the first P rows of a PEFT prompt; by default PEFT saves 2P for a T5, of which P are never read."""
    rows, length = tensors["prompt_embeddings"], config["num_virtual_tokens"]
    if rows.ndim != 2 or len(rows) not in (length, 2 * length):
        raise UserError(
            f"prompt_embeddings: found shape {list(rows.shape)}; expected [{length} or {2 * length}, its width]"
        )
    return rows[:length]


def attach_rows(
    model: T5, rows: np.ndarray | Array, place: str = "before", encode: Callable[[str], list[int]] | None = None
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
        layout = prompt_layout.place(place, length, model.settings.vocabulary_rows, encode or _no_anchors)
    except ValueError as error:
        raise UserError(f"prompt: {error}") from None
    model.prompt = SoftPrompt(rows, 1.0, place, layout)


def _no_anchors(text: str) -> list[int]:
    raise UserError(f"prompt: its place has the words {text!r}; expected the backbone's tokenizer to read them")
