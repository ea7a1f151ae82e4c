"""What every method says of itself. Only its own file and the union `Method` know a method by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from pydantic import Field, field_validator

from softprompt_jax.config import Settings, UserError
from softprompt_jax.models.t5 import T5, T5Settings
from softprompt_jax.optim.optimizers import OPTIMIZERS, Adafactor, Optimizer

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Context:
    """What initialisations may look at: the tokenizer, and the words that are the task's labels."""

    encode: Callable[[str], list[int]] = lambda text: [0] * len(text.split())  # default: enough to know shapes
    special_ids: frozenset[int] = frozenset()
    label_words: tuple[str, ...] = ()
    word_ids: Sequence[int] = ()  # of the pieces that are whole words, the most common first
    load_rows: Callable[[str], np.ndarray] | None = None
    words_by_task: tuple[
        tuple[str, ...], ...
    ] = ()  # the label words of each task, where each wants a prompt of its own
    load_trained: Callable[[str], dict[str, Any]] | None = None  # what a run has trained, nested


class MethodSettings(Settings):
    """A method is its settings: a `kind`, what `attach` needs, and the facts below, which the contract test checks."""

    paper: ClassVar[str]  # Author et al., year
    identity_at_start: ClassVar[bool] = False  # attaching it leaves every logit as it was
    refuses_packing: ClassVar[str | None] = None  # why several examples cannot share a row
    trains_backbone: ClassVar[bool] = False  # every weight, so that the run leaves a whole model
    draws_frozen: ClassVar[bool] = False  # what it freezes differs from seed to seed
    default_optimizer: ClassVar[Optimizer] = Adafactor()  # where neither the method nor the run states one
    peft_type: ClassVar[str | None] = None  # what PEFT calls it, if it has it
    optimizer: Optimizer | None = Field(default=None, exclude_if=lambda value: value is None)  # optimizer of this
    # method alone; null: the one that the run's `optimizer` says

    @field_validator("optimizer", mode="before")
    @classmethod
    def _whole_optimizer(cls, stated: Any) -> Any:
        return cls.complete_optimizer(stated) if isinstance(stated, dict) else stated

    @classmethod
    def complete_optimizer(cls, stated: dict[str, Any]) -> dict[str, Any]:
        """Return all settings of an optimizer; what is not stated is the method's default where the kind is equal."""
        default = cls.default_optimizer
        if (kind := stated.get("kind", default.kind)) != default.kind:
            return OPTIMIZERS[kind]().model_dump() | stated if str(kind) in OPTIMIZERS else stated
        return default.model_dump() | stated

    def attach(self, model: T5, key: jax.Array, context: Context) -> None:
        """Put `Trainable` parameters into the model, in place."""
        raise NotImplementedError

    def penalty(
        self, model: T5, batch: dict[str, jax.Array], hidden: jax.Array, logits: jax.Array
    ) -> jax.Array | float:
        """Return what is added to the loss of a batch, summed over its real target tokens; by default nothing.

        `hidden` [B, U, D] is the decoder's output, `logits` [B, U, V] are those of the targets' positions.
        """
        return 0.0

    def finished(self) -> MethodSettings:
        """Return the settings of what is left after training, without what only training needed."""
        return self

    def per_example_state(self, model: T5) -> Tensors:
        """Return what it has besides prompt rows that may differ from row to row of a batch (models/per_example.py).

        Errors: UserError where a model can have it for all rows only.
        """
        raise UserError(
            f"methods: {self.kind} changes the model for every text; "  # type: ignore[attr-defined]
            "expected a prompt, a prefix or ia3, of which each text of a batch can have its own; use the run by itself"
        )

    def to_peft(self, model: T5) -> tuple[dict[str, Any], Tensors]:
        """Return the adapter_config.json and the tensors with which PEFT computes the same.

        Errors: UserError where PEFT has no such method, or not with these settings.
        """
        raise UserError(
            f"methods: {self.kind} has no counterpart in PEFT; "  # type: ignore[attr-defined]
            "expected a method that PEFT knows; export it as hf or keep the run folder"
        )

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], tensors: Tensors, settings: T5Settings
    ) -> tuple[MethodSettings, Tensors]:
        """Return the settings that an adapter stands for, and its values by their paths in our model.

        Errors: UserError where the adapter asks for what this method cannot do.
        """
        raise NotImplementedError


class WeightMethod(MethodSettings):
    """What methods on the backbone's weights share."""

    learning_rate_scale: float = Field(default=1.0, gt=0)  # factor of the learning rate; with another than 1 the method
    # shares the run's optimizer. `optimizer` says it better
