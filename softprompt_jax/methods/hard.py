"""Hard prompts (Schick and Schütze, 2021): words around the text, written by hand or searched for. The floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field, field_validator

from softprompt_jax.config import UserError
from softprompt_jax.methods.base import Context, MethodSettings, check_free
from softprompt_jax.methods.prompt import PromptTable, embedding_scale, layout_in
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.optim.gradient_free import TEXT, GreedyWords, words_of
from softprompt_jax.optim.optimizers import Optimizer


class Hard(MethodSettings):
    """Hard prompts: the words of `template` stand around the text as they would if they were part of it.

    The optimizer `none` keeps them. The default, `greedy_words`, searches for better ones. With a gradient-based
    optimizer they become a soft prompt that starts from the template.
    """

    paper: ClassVar[str] = "Schick and Schütze, 2021"
    default_optimizer: ClassVar[Optimizer] = GreedyWords()
    kind: Literal["hard"] = "hard"
    template: str = "{text} it was"  # words around `{text}`, the place of the text
    most_common: int = Field(default=5000, ge=1)  # words of the vocabulary that a search may use, the most common first

    @field_validator("template")
    @classmethod
    def _has_words(cls, template: str) -> str:
        try:
            words_of(template)
        except UserError as error:
            raise ValueError(str(error)) from None
        return template

    def attach(self, model: LanguageModel, key: jax.Array, context: Context) -> None:
        """Give the model a prompt of the template's pieces."""
        check_free(model.prompt, "the prompt")
        if context.words_by_task:
            raise UserError("methods: hard has one template for all tasks; expected prompts: shared")
        before, _, after = self.template.partition(TEXT)
        sides = [context.encode(side.strip()) if side.strip() else [] for side in (before, after)]
        ids = [*sides[0], *sides[1]]
        place = "{text}".join(f"{{prompt:{len(side)}}}" if side else "" for side in sides)
        layout = layout_in(model, place, len(ids), context.encode)
        words = context.word_ids or [i for i in range(model.settings.vocabulary_rows) if i not in context.special_ids]
        rows = model.word_rows(jnp.asarray(ids))
        known = jnp.asarray(words[: self.most_common], jnp.int32)
        model.prompt = HardPrompt(rows, known, embedding_scale(model), model.word_factor).at(place, layout)


class HardPrompt(PromptTable):
    """P words as rows of the embedding, and the ids of the words that may take their places.

    `factor`: of a row of the table that is read as a prompt's.
    """

    def __init__(self, words: Float[Array, "P D"], known: Array, scale: float, factor: float = 1.0):
        self.words = Trainable(
            words, axes=("prompt", "embed"), learning_rate_scale=scale, word_ids="prompt.known", word_factor=factor
        )
        self.known = nnx.Param(known, axes=("prompt",))

    def table(self) -> Float[Array, "P D"]:
        return self.words[...]

    def finished(self) -> HardPrompt:
        return self

    def template(self, model: LanguageModel, decode: Callable[[Sequence[int]], str]) -> str:
        """Return the words around `{text}`, those of the nearest rows of the embedding."""
        table = np.asarray(model.word_rows(jnp.arange(model.settings.vocabulary_rows)))
        before = np.shape(self.layout.before)[-1]
        ids = [int(np.argmin(np.square(table - row).sum(1))) for row in np.asarray(self.words[...])]
        return " ".join(part for part in (decode(ids[:before]), TEXT, decode(ids[before:])) if part)
