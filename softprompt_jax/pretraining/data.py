"""The data of pre-training: what is in a batch depends only on the settings, the seed and the number of the batch.

So a run that resumes needs only the number of the next batch. The examples of a window of batches are made together and
put into batches by length, so that there is little padding. Then the batches of the window are shuffled.
"""

from __future__ import annotations

import functools
from pathlib import Path
from random import Random
from typing import Annotated, Literal

import numpy as np
import pydantic

from softprompt_jax.config import Settings, UserError
from softprompt_jax.data.registry import Registry
from softprompt_jax.pretraining.corpus import TextFile
from softprompt_jax.pretraining.instructions import TASKS, instructions
from softprompt_jax.pretraining.lexicon import Lexicon, fetch_lexicon
from softprompt_jax.pretraining.objectives import PLAIN, Example, Library, Objective

EOS = 1
WINDOW = 32  # batches made together

OBJECTIVES: Registry[Objective] = Registry({function.__name__: function for function in (*PLAIN, instructions)})
OBJECTIVES |= TASKS  # each by itself, too


class Stage(Settings):
    """A mixture of objectives, and the share of the run at which it ends."""

    until: float = pydantic.Field(gt=0, le=1)  # share of the run's steps at which the stage ends
    objectives: dict[str, Annotated[float, pydantic.Field(gt=0)]] = pydantic.Field(min_length=1)  # weight of each
    # objective

    @pydantic.field_validator("objectives")
    @classmethod
    def _known(cls, objectives: dict[str, float]) -> dict[str, float]:
        if unknown := [name for name in objectives if name not in OBJECTIVES]:
            raise ValueError(f"unknown objective {unknown[0]!r}; {OBJECTIVES.expected(unknown[0])}")
        return objectives


class Pretraining(Settings):
    """Settings of the pre-training data.

    Paths of `texts` are relative to `texts_folder`. A batch is padded to the smallest of `shapes`, pairs of encoder and
    decoder length, that holds it. The pair of max_input_tokens and max_target_tokens is always one of the shapes.
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
    lexicon: bool = True  # whether the polarities of words are fetched, which tasks of sentiment need
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
    """Batches of pre-training. `batch(i)` depends only on the arguments and on `i`.

    The batches of the last window are kept, so that batches are best read in order. Several threads may read them.
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
        self._window = functools.lru_cache(maxsize=1)(self._make_window)

    def __len__(self) -> int:
        return self.total_batches

    def batch(self, i: int) -> dict[str, np.ndarray]:
        """Return batch `i`, int32: encoder_tokens [B, T], decoder_inputs and decoder_targets [B, U]; 0 is padding."""
        if not 0 <= i < self.total_batches:
            raise IndexError(f"batch {i} of {self.total_batches}")
        window, place = divmod(i, WINDOW)
        return self._window(window)[place]

    def examples(self, window: int) -> list[tuple[str, Example]]:
        """Return the examples of a window as they were drawn: (objective, (input ids, target ids)), without EOS."""
        draw = Random(f"pretraining {self.seed} {window}")
        share = window * WINDOW / self.total_batches
        stage = next(stage for stage in self.settings.stages if share < stage.until)
        names, weights = list(stage.objectives), list(stage.objectives.values())
        drawn = draw.choices(names, weights, k=WINDOW * self.batch_size)
        return [(name, self._make(draw, name)) for name in drawn]

    def _make(self, draw: Random, name: str) -> Example:
        for _ in range(1000):
            example = OBJECTIVES[name](draw, self.library)
            limits = self.settings.max_input_tokens, self.settings.max_target_tokens
            if example is not None and all(0 < len(ids) < most for ids, most in zip(example, limits, strict=True)):
                return example
        raise UserError(f"{name}: no example in 1000 attempts; the texts do not suit this objective; leave it out")

    def _make_window(self, window: int) -> list[dict[str, np.ndarray]]:
        examples = [example for _, example in self.examples(window)]
        order = Random(f"order {self.seed} {window}")
        batches = []
        for shape in self.shapes:
            fitting = [e for e in examples if len(e[0]) < shape[0] and len(e[1]) < shape[1]]
            examples = [e for e in examples if len(e[0]) >= shape[0] or len(e[1]) >= shape[1]]
            order.shuffle(fitting)
            full = len(fitting) // self.batch_size * self.batch_size
            batches += [_pad(fitting[k : k + self.batch_size], shape) for k in range(0, full, self.batch_size)]
            examples += fitting[full:]  # what does not fill a batch goes on to the next shape
        order.shuffle(batches)
        return batches


def _pad(examples: list[Example], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    encoder = np.zeros((len(examples), shape[0]), np.int32)
    targets = np.zeros((len(examples), shape[1]), np.int32)
    for row, (input_ids, target_ids) in enumerate(examples):
        encoder[row, : len(input_ids) + 1] = [*input_ids, EOS]
        targets[row, : len(target_ids) + 1] = [*target_ids, EOS]
    inputs = np.zeros_like(targets)
    inputs[:, 1:] = targets[:, :-1]
    # Where the input is a row's EOS, the target is 0, which has no weight in the loss.
    return {"encoder_tokens": encoder, "decoder_inputs": inputs, "decoder_targets": targets}
