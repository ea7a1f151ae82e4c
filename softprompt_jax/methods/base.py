"""What every method states about itself. The logic elsewhere knows methods by this only, none by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from pydantic import Field, field_validator

from softprompt_jax.config import Settings, UserError
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.settings import ModelSettings
from softprompt_jax.optim.optimizers import OPTIMIZERS, Adafactor, Optimizer

Tensors = dict[str, np.ndarray]
AdapterConfig = dict[str, Any]  # PEFT's adapter_config.json


@dataclasses.dataclass(frozen=True)
class Context:
    """What an initialisation may read: the tokenizer and the task's label words."""

    encode: Callable[[str], list[int]] = lambda text: [0] * len(text.split())  # default: enough to know shapes
    special_ids: frozenset[int] = frozenset()
    label_words: tuple[str, ...] = ()
    word_ids: Sequence[int] = ()  # of the pieces that are whole words, the most common first
    load_rows: Callable[[str], np.ndarray] | None = None
    words_by_task: tuple[tuple[str, ...], ...] = ()  # label words of each task, where each has a prompt of its own
    load_trained: Callable[[str], dict[str, Any]] | None = None  # what a run has trained, nested
    encode_label: Callable[[str], list[int]] | None = None  # ids of a label word as the model writes it; None: `encode`
    bos: tuple[int, ...] = ()  # ids with which the tokenizer begins a text of a decoder-only model


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

    def space(self, labelled: bool) -> dict[str, list[Any]]:
        """Return the settings that `softprompt tune` tries besides the learning rate, with their values.

        `labelled`: whether the task has label words.
        """
        return {}

    def attach(self, model: LanguageModel, key: jax.Array, context: Context) -> None:
        """Put `Trainable` parameters into the model, in place."""
        raise NotImplementedError

    def penalty(
        self, model: LanguageModel, batch: dict[str, jax.Array], hidden: jax.Array, logits: jax.Array
    ) -> jax.Array | float:
        """Return what is added to the loss of a batch, summed over its real target tokens; by default nothing.

        `hidden` [B, U, D] is the decoder's output, `logits` [B, U, V] are those of the targets' positions.
        """
        return 0.0

    def finished(self) -> MethodSettings:
        """Return the settings of the same model without what only training needs."""
        return self

    def without_sources(self) -> MethodSettings:
        """Return the settings of the same parameters without the files and runs that they start from.

        For parameters whose values are known. What starts at a file and is not trained stays as it is.
        """
        return self

    def per_example_state(self, model: LanguageModel) -> Tensors:
        """Return the arrays besides prompt rows that may differ between rows of a batch (models/per_example.py).

        Errors: UserError for a method that changes the model for all rows alike.
        """
        raise UserError(
            f"methods: {self.kind} changes the model for every text; "  # type: ignore[attr-defined]
            "expected a prompt, a prefix or ia3, of which each text of a batch can have its own; use the run by itself"
        )

    def to_peft(self, model: LanguageModel) -> tuple[AdapterConfig, Tensors]:
        """Return the adapter_config.json and the tensors with which PEFT computes the same.

        Errors: UserError if PEFT has no such method, or not with these settings.
        """
        raise UserError(
            f"methods: {self.kind} has no counterpart in PEFT; "  # type: ignore[attr-defined]
            "expected a method that PEFT knows; export it as hf or keep the run folder"
        )

    @classmethod
    def from_peft(
        cls, config: AdapterConfig, tensors: Tensors, settings: ModelSettings
    ) -> tuple[MethodSettings, Tensors]:
        """Return the settings of an adapter, and its values by their paths in our model.

        Errors: UserError if the adapter needs what this method cannot do.
        """
        raise NotImplementedError


def check_free(place: object, what: str) -> None:
    """Raise a UserError where another method has already taken a place of the model."""
    if place is not None:
        raise UserError(f"methods: two methods want {what}; expected one; remove the other")


class WeightMethod(MethodSettings):
    """What methods on the backbone's weights share."""

    learning_rate_scale: float = Field(default=1.0, gt=0)  # factor of the learning rate; with another than 1 the method
    # shares the run's optimizer. `optimizer` says it better
