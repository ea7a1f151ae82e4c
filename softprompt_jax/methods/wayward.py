"""Wayward prompts (Khashabi et al., 2022): prompt tuning held near a text that says something of its own."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from softprompt_jax.config import UserError
from softprompt_jax.data import prompt_layout
from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.methods.base import Context, MethodSettings
from softprompt_jax.methods.prompt import Prompt, PromptMethod, SoftPrompt, Text, Uniform, embedding_scale
from softprompt_jax.models.t5 import T5


class Wayward(PromptMethod):
    """Prompt tuning whose rows also pay for their distance from the words of `text`, repeated or cut to the length.

    The distance is the mean squared difference over the mean square of the words, times `weight` for every target
    token. The rows start at the words unless `init` says otherwise.
    """

    paper: ClassVar[str] = "Khashabi et al., 2022"
    kind: Literal["wayward"] = "wayward"
    length: int = Field(default=20, ge=1)  # rows of the prompt
    text: str = Field(default="Answer the question about this text.", min_length=1)  # text whose words the rows are
    # held near
    weight: float = Field(default=0.01, ge=0)  # weight of the distance in the loss of each target token

    def attach(self, model: T5, key: jax.Array, context: Context) -> None:
        """Give the model a trainable prompt and the words that it is held near."""
        layout = self.find_placement(model, context)
        if context.words_by_task:
            raise UserError("methods: wayward has one text for all tasks; expected prompts: shared")
        words = Text(text=self.text).rows(prompt_layout.rows(self.place, self.length), model, key, context)
        rows = words if self.init is None else self.first_rows(model, key, context)
        model.prompt = WaywardPrompt(rows, words, embedding_scale(model), self.place, layout)

    def penalty(self, model: T5, batch: dict[str, Array], hidden: Array, logits: Array) -> Array:
        """Return `weight` times the distance, for every real target token."""
        return self.weight * model.prompt.distance() * jnp.sum(batch["decoder_targets"] != 0)

    def finished(self) -> MethodSettings:
        """Return the settings of the plain rows."""
        return Prompt(length=self.length, place=self.place, init=Uniform())


class WaywardPrompt(SoftPrompt):
    """P trainable rows and the frozen words [P, D] that they are held near."""

    def __init__(
        self, rows: Float[Array, "P D"], words: Float[Array, "P D"], scale: float, place: str, layout: PromptLayout
    ):
        super().__init__(rows, scale, place, layout)
        self.words = nnx.Param(jnp.asarray(words, jnp.float32), axes=("prompt", "embed"))

    def distance(self) -> Float[Array, ""]:
        """Return the mean squared difference of rows and words over the mean square of the words."""
        words = jax.lax.stop_gradient(self.words[...])
        return jnp.mean(jnp.square(self.rows[...] - words)) / jnp.mean(jnp.square(words))
