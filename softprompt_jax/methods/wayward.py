"""Wayward prompts (Khashabi et al., 2022): prompt tuning held near a given text."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from softprompt_jax.methods.base import Context
from softprompt_jax.methods.prompt import Init, PromptMethod, PromptTable, SoftPrompt, Text, embedding_scale
from softprompt_jax.models.language_model import LanguageModel


class Wayward(PromptMethod):
    """Prompt tuning with a penalty on the distance of the rows from the words of `text`, repeated or cut to the length.

    The distance is the mean squared difference over the mean square of the words, times `weight` for every target
    token.
    """

    paper: ClassVar[str] = "Khashabi et al., 2022"
    one_for_all: ClassVar[str | None] = "text"
    kind: Literal["wayward"] = "wayward"
    length: int = Field(default=20, ge=1)  # rows of the prompt
    init: Init | None = None  # rows to start from; null: the words of `text`
    text: str = Field(default="Answer the question about this text.", min_length=1)  # text whose words the rows are
    # held near
    weight: float = Field(default=0.01, ge=0)  # weight of the distance in the loss of each target token

    def prompt(self, model: LanguageModel, key: jax.Array, context: Context) -> PromptTable:
        """Return trainable rows and the words that they are held near."""
        words = Text(text=self.text).rows(self.row_count, model, key, context)
        rows = words if self.init is None else self.first_rows(model, key, context)
        return WaywardPrompt(rows, words, embedding_scale(model))

    def penalty(self, model: LanguageModel, batch: dict[str, Array], hidden: Array, logits: Array) -> Array:
        """Return `weight` times the distance, for every real target token."""
        return self.weight * model.prompt.distance() * jnp.sum(model.is_real(batch["decoder_targets"]))


class WaywardPrompt(SoftPrompt):
    """P trainable rows and the frozen words [P, D] that they are held near."""

    def __init__(self, rows: Float[Array, "P D"], words: Float[Array, "P D"], scale: float):
        super().__init__(rows, scale)
        self.words = nnx.Param(jnp.asarray(words, jnp.float32), axes=("prompt", "embed"))

    def distance(self) -> Float[Array, ""]:
        """Return the mean squared difference of rows and words over the mean square of the words."""
        words = jax.lax.stop_gradient(self.words[...])
        return jnp.mean(jnp.square(self.rows[...] - words)) / jnp.mean(jnp.square(words))
