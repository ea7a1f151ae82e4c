"""A backbone of a few thousand weights, its tokenizer, and a task that it can learn: whole runs in seconds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import jax
import sentencepiece
import yaml

from softprompt_jax.checkpoints.backbone import save_backbone
from softprompt_jax.models.t5 import T5, T5Settings

GOOD = ("bright", "warm", "quick", "kind", "neat")
BAD = ("dull", "cold", "slow", "rude", "messy")
THINGS = ("tea room", "old mill", "night train", "corner shop", "garden", "small café")
_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# The runs that ship: what states no task and no base is a paper's experiment or a list of sizes.
_RUN = re.compile(r"^(task|base):", re.M)
CONFIGS = sorted(path for path in _CONFIGS.rglob("*.yaml") if _RUN.search(path.read_text(encoding="utf-8")))
ROWS = 160  # V: more than the tokenizer has ids
ENDS = ("today", "as ever", "and far away", "on market days")


def rows() -> list[dict[str, str]]:
    """Return 96 different rows, the labels in turns: 64 for training, 16 and 16 for validation and test."""
    draw = random.Random(0)
    sides = []
    for label, words in (("yes", GOOD), ("no", BAD)):
        texts = [f"the {thing} is {word} {end}" for thing, word, end in itertools.product(THINGS, words, ENDS)]
        sides.append([{"text": text, "label": label} for text in draw.sample(texts, 48)])
    return [row for pair in zip(*sides, strict=True) for row in pair]


def write_rows(path: Path, values: list[Any]) -> Path:
    """Write a jsonl file."""
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


def write_task(folder: Path) -> dict[str, Any]:
    """Write the data and return the task's settings."""
    made = rows()
    parts = {"train": made[:64], "validation": made[64:80], "test": made[80:]}
    source = {split: str(write_rows(folder / f"{split}.jsonl", part)) for split, part in parts.items()}
    return {"name": "moods", "source": {"kind": "files", **source}, "label_words": ["yes", "no"]}


def write_tokenizer(folder: Path) -> Path:
    """Write a `spiece.model` whose pieces are the words of our rows; 100 sentinels follow them."""
    folder.mkdir(parents=True, exist_ok=True)
    sentences = [row["text"] for row in rows()] + ["yes no"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "spiece"),
        model_type="word",
        vocab_size=100,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    return folder


def write_backbone(folder: Path, width: int = 16, seed: int = 0) -> Path:
    """Write a T5 with random weights and its tokenizer in Hugging Face layout."""
    write_tokenizer(folder)
    settings = T5Settings(
        vocabulary_rows=ROWS, d_model=width, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1
    )
    save_backbone(T5(settings, jax.random.key(seed)), folder, "float32")
    return folder


def short_run(task: dict[str, Any] | str, backbone: Path | str) -> dict[str, Any]:
    """Return the settings of a prompt run of a second."""
    return {
        "task": task,
        "backbone": str(backbone),
        "methods": [{"kind": "prompt", "length": 3}],
        "steps": 40,
        "batch_size": 8,
        "max_input_tokens": 12,
        "max_target_tokens": 4,
        "shapes": 1,
        "log_every": 4,
        "evaluate_every": 10,
        "checkpoint_every": 5,
    }


def full_run(task: dict[str, Any] | str, backbone: Path | str) -> dict[str, Any]:
    """Return the settings of a run that learns the task."""
    return short_run(task, backbone) | {
        "methods": [{"kind": "full"}],
        "optimizer": {"kind": "adamw", "learning_rate": 0.01},
        "dropout": 0,
        "steps": 60,
        "evaluate_every": 20,
        "checkpoint_every": 20,
        "log_every": 10,
    }


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    """Write settings as YAML."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


@dataclasses.dataclass(frozen=True)
class Files:
    """A folder with a backbone and a task."""

    folder: Path
    backbone: Path
    task: dict[str, Any]

    @property
    def short(self) -> dict[str, Any]:
        """The settings of a prompt run of a second."""
        return short_run(self.task, self.backbone)

    @property
    def full(self) -> dict[str, Any]:
        """The settings of a run that learns the task."""
        return full_run(self.task, self.backbone)


def write_files(folder: Path) -> Files:
    """Write a backbone and a task."""
    return Files(folder, write_backbone(folder / "backbone"), write_task(folder))


def train_in(folder: str, config: str, point: str = "", count: int = 0) -> None:
    """Train a config; die by SIGKILL when `point` is reached for the `count`th time.

    Points: "save", a checkpoint is being written; "validate", before a validation; "replace", before a file gets its
    name; "replaced", after it.
    """
    import os
    import signal

    from softprompt_jax import load_run, train
    from softprompt_jax.checkpoints.training_state import Checkpoints
    from softprompt_jax.training.loop import RunData

    left = count

    def reached() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(function: Any, first: bool) -> Any:
        def call(*args: Any) -> Any:
            if first:
                reached()
            result = function(*args)
            if not first:
                reached()
            return result

        return call

    owner, name, first = {
        "": (None, "", False),
        "save": (Checkpoints, "save", False),  # it returns while the files are being written
        "validate": (RunData, "validate", True),
        "replace": (Path, "replace", True),
        "replaced": (Path, "replace", False),
    }[point]
    if owner is not None:
        setattr(owner, name, dying(getattr(owner, name), first))
    train(load_run(config), folder)
