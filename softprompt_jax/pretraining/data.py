"""The data of pre-training: a pure function of (settings, seed, batch number).

Resuming needs one integer, the number of the next batch. Examples are made a window of batches at a
time, sorted by length inside it so that little is padding, and the batches of the window are permuted.
"""

from __future__ import annotations

import threading
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import pydantic

from softprompt_jax.config import Settings, UserError, nearest
from softprompt_jax.pretraining.corpus import TextFile
from softprompt_jax.pretraining.instructions import TASKS, instructions
from softprompt_jax.pretraining.lexicon import Lexicon, fetch_lexicon
from softprompt_jax.pretraining.objectives import (
    Example,
    Library,
    Objective,
    copy,
    prefix_lm,
    short_spans,
    span_corruption,
    word_order,
)

EOS = 1
WINDOW = 32  # batches made together

_PLAIN = (span_corruption, short_spans, copy, word_order, prefix_lm, instructions)
OBJECTIVES: dict[str, Objective] = {function.__name__: function for function in _PLAIN}
OBJECTIVES |= {name: function for name, (function, _) in TASKS.items()}  # each by itself, too


class Stage(Settings):
    """A mixture of objectives, used until this share of the run."""

    until: float = pydantic.Field(gt=0, le=1)
    objectives: dict[str, float] = pydantic.Field(min_length=1)

    @pydantic.field_validator("objectives")
    @classmethod
    def _known(cls, objectives: dict[str, float]) -> dict[str, float]:
        for name, weight in objectives.items():
            if name not in OBJECTIVES:
                known = ", ".join(sorted(OBJECTIVES))
                raise ValueError(f"unknown objective {name!r}; expected one of {known}{nearest(name, OBJECTIVES)}")
            if weight <= 0:
                raise ValueError(f"weight {weight} of {name}; expected more than 0")
        return objectives


class Pretraining(Settings):
    """Settings of the pre-training data.

    `texts_folder` stands before relative paths of `texts`. A batch has the smallest of `shapes`
    (encoder length, decoder length) that holds it; (max_input_tokens, max_target_tokens) is always one.
    """

    kind: Literal["pretraining"] = "pretraining"
    texts_folder: str = ""
    texts: list[TextFile] = pydantic.Field(min_length=1)
    max_input_tokens: int = pydantic.Field(96, ge=16)
    max_target_tokens: int = pydantic.Field(48, ge=8)
    shapes: list[tuple[int, int]] = pydantic.Field(
        [(32, 4), (48, 4), (80, 4), (32, 16), (64, 16), (96, 24), (48, 48), (96, 48)]
    )
    final_sentinel: bool = True
    lexicon: bool = pydantic.Field(True, description="fetch word polarities; the sentiment tasks need them")
    stages: list[Stage] = pydantic.Field(min_length=1)

    @pydantic.field_validator("stages")
    @classmethod
    def _ascending(cls, stages: list[Stage]) -> list[Stage]:
        ends = [stage.until for stage in stages]
        if ends != sorted(set(ends)) or ends[-1] != 1.0:
            raise ValueError("expected ascending `until`, the last 1.0")
        return stages

    def located_texts(self) -> list[TextFile]:
        """Return the texts with the folder before their paths."""
        folder = Path(self.texts_folder)
        return [text.model_copy(update={"path": str(folder / text.path)}) for text in self.texts]


class PretrainingData:
    """Batches of pre-training; `batch(i)` depends on the arguments and on `i` alone.

    Made for sequential access: the last window is kept. Safe to use from several threads.
    `shapes` lists every (T, U) that can occur.
    """

    def __init__(
        self,
        settings: Pretraining,
        tokenizer_folder: str | Path,
        batch_size: int,
        seed: int,
        total_batches: int,
        lexicon: Lexicon | None = None,
    ):
        if not (Path(tokenizer_folder) / "spiece.model").is_file():
            raise UserError(f"{tokenizer_folder}: no spiece.model; expected a folder with a SentencePiece tokenizer")
        self.settings, self.batch_size, self.seed, self.total_batches = settings, batch_size, seed, total_batches
        limits = settings.max_input_tokens, settings.max_target_tokens
        fitting = {(t, u) for t, u in settings.shapes if t <= limits[0] and u <= limits[1]} | {limits}
        self.shapes = sorted(fitting, key=lambda shape: (shape[0] * shape[1], shape))
        if lexicon is None:
            lexicon = fetch_lexicon() if settings.lexicon else Lexicon({})
        self.library = Library(
            settings.located_texts(), tokenizer_folder, lexicon, *limits, final_sentinel=settings.final_sentinel
        )
        self._lock = threading.Lock()
        self._window: tuple[int, list[dict[str, np.ndarray]]] = (-1, [])

    def __len__(self) -> int:
        return self.total_batches

    def batch(self, i: int) -> dict[str, np.ndarray]:
        """Return batch `i`: int32 encoder_tokens [B, T], decoder_inputs [B, U], decoder_targets [B, U]; 0 pads."""
        if not 0 <= i < self.total_batches:
            raise IndexError(f"batch {i} of {self.total_batches}")
        window, place = divmod(i, WINDOW)
        with self._lock:
            if self._window[0] != window:
                self._window = window, self._make_window(window)
            return self._window[1][place]

    def examples(self, window: int) -> list[tuple[str, Example]]:
        """Return the window's (objective, (input ids, target ids)) in the order drawn, without EOS."""
        draw = Random(f"pretraining {self.seed} {window}")
        share = window * WINDOW / self.total_batches
        stage = next(stage for stage in self.settings.stages if share < stage.until)
        names, weights = list(stage.objectives), list(stage.objectives.values())
        made = []
        for name in draw.choices(names, weights, k=WINDOW * self.batch_size):
            made.append((name, self._make(draw, name)))
        return made

    def _make(self, draw: Random, name: str) -> Example:
        for _ in range(1000):
            example = OBJECTIVES[name](draw, self.library)
            if (
                example is not None
                and 0 < len(example[0]) < self.settings.max_input_tokens
                and 0 < len(example[1]) < self.settings.max_target_tokens
            ):
                return example
        raise UserError(f"{name}: no example in 1000 attempts; the texts do not suit this objective; leave it out")

    def _make_window(self, window: int) -> list[dict[str, np.ndarray]]:
        examples = [example for _, example in self.examples(window)]
        order = Random(f"order {self.seed} {window}")
        batches = []
        pending: list[Example] = []
        for shape in self.shapes:
            fitting = [e for e in examples if len(e[0]) < shape[0] and len(e[1]) < shape[1]]
            examples = [e for e in examples if not (len(e[0]) < shape[0] and len(e[1]) < shape[1])]
            pending += fitting
            order.shuffle(pending)
            full = len(pending) // self.batch_size * self.batch_size
            batches += [(pending[k : k + self.batch_size], shape) for k in range(0, full, self.batch_size)]
            # What does not fill a batch goes on to the next shape.
            examples += pending[full:]
            pending = []
        made = [_pad(batch, shape) for batch, shape in batches]
        order.shuffle(made)
        return made


def _pad(examples: list[Example], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    encoder = np.zeros((len(examples), shape[0]), np.int32)
    targets = np.zeros((len(examples), shape[1]), np.int32)
    for row, (input_ids, target_ids) in enumerate(examples):
        encoder[row, : len(input_ids) + 1] = [*input_ids, EOS]
        targets[row, : len(target_ids) + 1] = [*target_ids, EOS]
    inputs = np.zeros_like(targets)
    inputs[:, 1:] = targets[:, :-1]
    # Past a row's EOS the targets are 0; its input there is the EOS, which no loss sees.
    return {"encoder_tokens": encoder, "decoder_inputs": inputs, "decoder_targets": targets}
