"""A finished run as an object: its scores, its prompt, its answers."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from softprompt_jax.checkpoints.artifact import CONFIG_FILE, load_prompt
from softprompt_jax.checkpoints.backbone import Backbone
from softprompt_jax.config import UserError
from softprompt_jax.data.examples import input_text
from softprompt_jax.data.task import Task
from softprompt_jax.distributed import cloud_files
from softprompt_jax.inference.predictor import Predictor, load_predictor
from softprompt_jax.inference.texts import until
from softprompt_jax.models.decode import Decoding
from softprompt_jax.run import Run, load_run
from softprompt_jax.training.callbacks import numbers_of
from softprompt_jax.training.run_folder import read_metrics, read_result

_UNSCORED = ("count", "illegal", "loss")  # numbers that are no scores


class TrainedRun(Mapping[str, Any]):
    """A finished run. As a mapping it is its `result.json`: `run["baselines"]`, `run["best_step"]`.

    `folder` is where everything lies, `settings` the run's, `result` what `result.json` holds. A loaded backbone that
    was given to `train` or `open` answers without a second copy; otherwise one is loaded for the first answer.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Run,
        result: dict[str, Any],
        backbone: Backbone | None = None,
        trust: bool = True,
    ):
        self.folder, self.settings, self.result = str(folder), settings, result
        self._backbone, self._trust = backbone, trust
        self._predictors: dict[tuple[str | None, Any], Predictor] = {}

    @classmethod
    def open(cls, folder: str | Path, backbone: Backbone | None = None, trust: bool = False) -> TrainedRun:
        """Return the run that is finished in a folder, here or on gs://.

        `backbone`: the loaded model that answers. `trust`: do what its settings ask for, though they may name anything
        (trust.py). Errors: UserError for a folder without a finished run.
        """
        local = cloud_files.local(folder)
        settings = load_run(local / CONFIG_FILE)
        if (result := read_result(local, settings)) is None:
            raise UserError(
                f"{folder}: its run has not finished; expected a result; train it again in this folder, or "
                "load_predictor answers from its best checkpoint"
            )
        return cls(folder, settings, result, backbone, trust)

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """The scores of the best checkpoint, by split: `validation`, and `test` where the task has one."""
        return {split: self.result[split] for split in ("validation", "test") if self.result.get(split) is not None}

    @property
    def prompt(self) -> Float[np.ndarray, "P D"]:
        """The trained prompt. Errors: UserError where the run has trained none, or one for each task."""
        return load_prompt(self.folder)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`: losses, learning rates and speed, and each validation."""
        return read_metrics(cloud_files.local(self.folder) / "metrics.jsonl")

    def predictor(self, task: str | None = None, decoding: Decoding | None = None) -> Predictor:
        """Return what answers; `task` names one of a mixture's, `decoding` is the run's if not given."""
        if (task, decoding) not in self._predictors:
            found = load_predictor(self.folder, self._backbone, task, decoding, trust=self._trust)
            named = next((each for each in self.settings.tasks if each.name == task), None)
            # The run's own task, whose rows may be in memory.
            own = named or (self.settings.tasks[0] if len(self.settings.tasks) == 1 else None)
            self._predictors[task, decoding] = dataclasses.replace(found, task=own)
        return self._predictors[task, decoding]

    def generate(
        self,
        texts: Sequence[str | Mapping[str, Any]],
        task: str | None = None,
        decoding: Decoding | None = None,
        stop: str | Sequence[str] = (),
    ) -> list[str]:
        """Answer texts, or rows with the fields of the task's input; of samples or beams the first.

        A text is the one field that the input has, such as `{text}`, and is put into it. `stop`: texts at which an
        answer ends. Errors: UserError for one text instead of a list, and for texts where the input has several fields.
        """
        return [answers[0] for answers in self.answers(texts, task, decoding, stop)]

    def answers(
        self,
        texts: Sequence[str | Mapping[str, Any]],
        task: str | None = None,
        decoding: Decoding | None = None,
        stop: str | Sequence[str] = (),
    ) -> list[list[str]]:
        """Return all answers to each text: the samples, or the beams from the best; otherwise as `generate`."""
        predictor = self.predictor(task, decoding)
        found = predictor.answers(inputs(predictor.task, texts))
        return [[until(answer, stop) for answer in answers] for answers in found]

    def __getitem__(self, key: str) -> Any:
        return self.result[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.result)

    def __len__(self) -> int:
        return len(self.result)

    def __repr__(self) -> str:
        settings = self.settings
        return (
            f"TrainedRun({settings.task_name}, {'+'.join(settings.method_names)}, {self._summary()}, {self.folder!r})"
        )

    def _summary(self) -> str:
        first = {split: _first_score(scores) for split, scores in self.scores.items()}
        said = [f"{split} {name} {value:.4g}" for split, (name, value) in first.items()]
        return ", ".join([*said, f"{self.result['trainable_parameters']:,} trained"])

    def _repr_html_(self) -> str:
        """Return a table of scores and settings, for notebooks."""
        differ = ((name, value) for name, value in self.settings.__repr_args__() if name != "task")
        about = {"task": self.settings.task_name, **{str(name): value for name, value in differ}, "folder": self.folder}
        rows = [(name.replace("/", " "), f"{value:.4g}") for name, value in numbers_of(self.scores).items()]
        rows += [(name, value if isinstance(value, str) else repr(value)) for name, value in about.items()]
        cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
        return f"<table>{cells}</table>"


def inputs(task: Task | None, texts: Sequence[str | Mapping[str, Any]]) -> list[str]:
    """Return the inputs of texts or rows, as the task's template makes them; without a task texts are inputs."""
    if isinstance(texts, str | Mapping):
        raise UserError(f"generate: found one {type(texts).__name__}; expected a list of texts; put it in brackets")
    found = []
    for number, text in enumerate(texts, start=1):
        where = f"generate: text {number}"
        if isinstance(text, str) and task is not None:
            fields = list(dict.fromkeys(task.input_fields))
            if len(fields) > 1:
                raise UserError(
                    f"{where}: found a text, and the task's input has the fields {', '.join(fields)}; expected a "
                    "dictionary with these"
                )
            text = {fields[0]: text}
        if isinstance(text, Mapping) and task is not None:
            found.append(input_text(task, text, where))
        elif isinstance(text, str):
            found.append(text)
        else:
            raise UserError(f"{where}: found {type(text).__name__}; expected a text, or a dictionary of fields")
    return found


def _first_score(scores: Mapping[str, Any]) -> tuple[str, float]:
    found = numbers_of(scores)
    return next(((name, value) for name, value in found.items() if name not in _UNSCORED), next(iter(found.items())))
