"""What is measured of the fixtures, alike by make.py with the old code and by test_legacy.py with today's.

By public names only, but for the model of a predictor, which stands in `backbone_of`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from softprompt_jax import Backbone, UserError, load_predictor, load_run, logits

TEXTS = [
    "the garden is warm today",
    "the night train is slow and far away",
    "the corner shop is rude as ever",
    "the old mill is bright on market days",
]
EVERY = 4  # one logit of so many is kept


def tokens(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return encoder ids [2, 7] of unlike lengths, and decoder inputs [2, 3], in a vocabulary of so many rows."""
    encoder = np.random.default_rng(0).integers(3, min(rows, 40), (2, 7)).astype(np.int32)
    encoder[0, 6], encoder[1, 4], encoder[1, 5:] = 1, 1, 0
    return encoder, np.array([[0, 5, 9], [0, 7, 3]], np.int32)


def logits_of_backbone(backbone: Backbone) -> np.ndarray:
    found = np.asarray(logits(backbone, *tokens(backbone.settings.vocabulary_rows)), np.float32)
    return found[..., :: EVERY * max(1, found.shape[-1] // 160)]


def backbone_of(predictor: Any) -> Backbone:
    """Return the model of a run, with what it has trained, as a backbone."""
    return Backbone(predictor.model, Path(), "trained")


def prompts_of(name: str) -> Iterator[tuple[str, Any]]:
    """Yield what a run answers with: once, or once for each task that has a prompt of its own."""
    run = load_run(f"{name}/config.yaml")
    if not run.own_prompts:
        yield name, load_predictor(name)
        return
    for task in run.tasks:
        yield f"{name}/{task.name}", load_predictor(name, task=task.name)


def measured(predictor: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the logits and the answers' scores, and the answers and the metrics of the test split."""
    scored = predictor.scored(TEXTS)
    found = {"scores": np.asarray([answers[0].score for answers in scored], np.float32)}
    try:
        found["logits"] = logits_of_backbone(backbone_of(predictor))
    except UserError as error:  # a prompt that stands not only before the text has no plain logits
        if "the prompt stands not only before them" not in str(error):
            raise
    said = {"answers": predictor.texts(TEXTS), "test": predictor.evaluate(predictor.task, "test")}
    return found, said


def asked(names: list[str]) -> list[dict[str, str]]:
    """Return what a bank is asked: every text of every prompt."""
    return [{"inputs": text, "prompt": name} for text in TEXTS for name in names]


def without_plane(found: dict[str, Any]) -> dict[str, Any]:
    """Return what `inspect` says without the rows in the plane, whose signs are free."""
    return found | {"prompts": [{k: v for k, v in each.items() if k != "plane"} for each in found["prompts"]]}
