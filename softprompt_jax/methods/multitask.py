"""Multitask prompt tuning (Wang et al., 2023): one prompt that tasks share, changed for each by a low-rank matrix.

Two stages. First many tasks in a mixture, each with the shared prompt times its own matrix, taught by prompts that were
trained apart (`teachers`); then a new task that starts from them (`source`). Also the other ways of sharing that the
code of Lester et al. (2021) has: add, concatenate, project.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field, model_validator

from softprompt_jax.config import UserError
from softprompt_jax.data import prompt_layout
from softprompt_jax.methods import peft_names
from softprompt_jax.methods.base import AdapterConfig, Context, MethodSettings, Tensors
from softprompt_jax.methods.prompt import (
    T5_EMBEDDING_RMS,
    File,
    PromptMethod,
    PromptTable,
    SoftPrompt,
    Uniform,
    embedding_scale,
)
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.settings import ModelSettings

PARTS = {  # by `combine`, what trains
    "product": ("shared", "columns", "rows"),
    "add": ("shared", "own"),
    "concatenate": ("shared", "own"),
    "project": ("shared", "own", "projection"),
}
PEFT_NAMES = {"prompt_embeddings": "shared", "prefix_task_cols": "columns", "prefix_task_rows": "rows"}


class Multitask(PromptMethod):
    """A prompt for each task of a mixture (`prompts: own`), made of what tasks share and what each has of its own.

    `combine`: "product" (shared rows times a matrix of rank `rank` for each task), "add", "concatenate" (the last half
    of the rows is the task's own), or "project" (shared and own rows beside each other, times one matrix). Each task
    starts with the shared rows. `teachers`: for each task a prompt trained on it alone, whose answers and hidden states
    count `distillation` times as much as the targets. `source`: the run of a first stage to start from, and
    `source_task`: its tasks' mean (as in the paper), the number of one, or only what they share.
    """

    paper: ClassVar[str] = "Wang et al., 2023"
    peft_type: ClassVar[str | None] = "MULTITASK_PROMPT_TUNING"
    kind: Literal["multitask"] = "multitask"
    combine: Literal["product", "add", "concatenate", "project"] = "product"  # way in which shared and own parts make a
    # prompt
    rank: int = Field(default=1, ge=1)  # rank of a task's matrix, for combine: product
    tasks: int | None = Field(default=None, ge=1)  # number of tasks; null: as many as the mixture has, or one
    teachers: list[str] | None = None  # runs or prompt files, one a task, in the order of the mixture's tasks
    distillation: float = Field(default=0.9, ge=0)  # weight of the teachers' answers and hidden states beside the
    # targets
    source: str | None = None  # run of a first stage to start from
    source_task: int | Literal["mean", "shared"] = "mean"  # task of the first stage to start from: the tasks' mean, a
    # number, or only the shared part

    @model_validator(mode="after")
    def _stages(self) -> Multitask:
        if self.combine == "concatenate" and self.length < 2:
            raise ValueError("concatenate needs a length of 2 or more: a row that is shared and a task's own")
        if self.source is not None and self.init is not None:
            raise ValueError("init and source both say where the prompt starts; expected one of them")
        return self

    def prompt(self, model: LanguageModel, key: jax.Array, context: Context) -> PromptTable:
        """Return a prompt for each task."""
        total, width = self.row_count, model.settings.d_model
        most = min(total, width)
        if self.combine == "product" and self.rank > most:
            raise UserError(
                f"methods: multitask rank {self.rank}; expected at most {most}, the lesser of the prompt's length and "
                "its width; lower the rank"
            )
        count, scale, keys = self._count(context), embedding_scale(model), jax.random.split(key, 3)
        alone = dataclasses.replace(context, words_by_task=())
        if self.source is None:
            shared = self.first_rows(model, keys[0], alone)
            own = max(1, self.length // 2) if self.combine == "concatenate" else 0
            parts = _started(self.combine, shared, own, count, self.rank, scale, keys[1])
        else:
            parts = self._continued(context, count, (total, width))
        teachers = None
        if self.teachers is not None:
            teachers = jnp.stack([File(path=path).rows(total, model, key, context) for path in self.teachers])
        return SharedPrompt(self.combine, parts, scale, teachers)

    def _count(self, context: Context) -> int:
        if context.words_by_task and self.tasks not in (None, len(context.words_by_task)):
            raise UserError(
                f"methods: tasks is {self.tasks}, and the mixture has {len(context.words_by_task)}; expected the same; "
                "leave it out"
            )
        count = len(context.words_by_task) or self.tasks or 1
        if self.teachers is not None and len(self.teachers) != count:
            raise UserError(
                f"methods: found {len(self.teachers)} teachers for {count} task(s); "
                "expected one for each, in their order"
            )
        return count

    def _continued(self, context: Context, count: int, shape: tuple[int, int]) -> dict[str, Array]:
        """Start every task from those of a first stage."""
        assert context.load_trained is not None
        assert self.source is not None
        stored = jax.tree.map(np.asarray, context.load_trained(self.source).get("prompt", {}))
        if set(stored) != set(PARTS[self.combine]) or stored["shared"].shape[-1] != shape[1]:
            raise UserError(
                f"{self.source}: found {', '.join(sorted(stored)) or 'no prompt'}; expected "
                f"{', '.join(PARTS[self.combine])} of a multitask run with combine {self.combine} and width {shape[1]}"
            )
        parts: dict[str, Array] = {}
        for name, tasks in stored.items():
            if name in ("shared", "projection"):
                parts[name] = jnp.asarray(tasks)
                continue
            if isinstance(self.source_task, int) and not 0 <= self.source_task < len(tasks):
                raise UserError(f"methods: source_task is {self.source_task}; expected under {len(tasks)}, its tasks")
            if self.source_task == "shared":
                chosen = _neutral(name, tasks[0])
            else:
                chosen = tasks.mean(0) if self.source_task == "mean" else tasks[self.source_task]
            parts[name] = jnp.stack([chosen] * count)
        rows = parts["shared"].shape[0] + (parts["own"].shape[1] if self.combine == "concatenate" else 0)
        if rows != shape[0]:
            raise UserError(f"{self.source}: its prompt has {rows} rows; expected {shape[0]}; set length to it")
        return parts

    def penalty(self, model: LanguageModel, batch: dict[str, Array], hidden: Array, logits: Array) -> Array | float:
        """Return `distillation` times KL(teacher || student) and the squared distance of the decoder's last states.

        Summed over real target tokens; the distance is a mean over the width. Source: Wang et al., 2023.
        """
        if self.teachers is None:
            return 0.0
        student, model.prompt = model.prompt, SoftPrompt(model.prompt.teachers[...])
        wanted = jax.lax.stop_gradient(model.hidden(batch))
        model.prompt = student
        teacher, answer = jax.nn.log_softmax(model.project(wanted)), jax.nn.log_softmax(logits)
        divergence = jnp.sum(jnp.exp(teacher) * (teacher - answer), -1)
        distance = jnp.mean(jnp.square((hidden - wanted).astype(jnp.float32)), -1)
        return self.distillation * jnp.sum(jnp.where(model.is_real(batch["decoder_targets"]), divergence + distance, 0))

    def finished(self) -> MethodSettings:
        """Return the settings of the same parts without teachers and source."""
        return self.model_copy(update={"teachers": None, "source": None, "init": Uniform()})

    def without_sources(self) -> MethodSettings:
        return self.finished()

    def to_peft(self, model: LanguageModel) -> tuple[AdapterConfig, Tensors]:
        """Return the shared rows and all tasks' matrices."""
        if self.combine != "product" or self.place not in ("before", "both"):
            raise UserError(
                f"methods: combine {self.combine} with place {self.place!r}; expected product, before or both, since "
                "PEFT knows no other; keep the run folder"
            )
        prompt = model.prompt
        config = peft_names.prompt_config(model.settings, self.length, prompt_layout.rows(self.place, 1)) | {
            "num_tasks": prompt.columns.shape[0],
            "num_ranks": prompt.columns.shape[2],
            "prompt_tuning_init": "RANDOM",
        }
        return config, {theirs: np.asarray(getattr(prompt, ours)[...]) for theirs, ours in PEFT_NAMES.items()}

    @classmethod
    def from_peft(
        cls, config: AdapterConfig, tensors: Tensors, settings: ModelSettings
    ) -> tuple[MethodSettings, Tensors]:
        """Take PEFT's parts; with two submodules, its default, half of the rows stand before the decoder's input."""
        length, columns = config["num_virtual_tokens"], tensors["prefix_task_cols"]
        both = len(tensors["prompt_embeddings"]) == 2 * length
        tasks, _, rank = columns.shape
        method = cls(length=length, place="both" if both else "before", rank=rank, tasks=tasks, init=Uniform())
        return method, {f"prompt.{ours}": tensors[theirs] for theirs, ours in PEFT_NAMES.items()}


def _started(
    combine: str, shared: Array, own: int, count: int, rank: int, scale: float, key: jax.Array
) -> dict[str, Array]:
    """Return parts with which every task starts with the shared rows."""
    length, width = shared.shape
    if combine == "product":
        # The first column times the first row is 1 everywhere; the others are products with 0 whose gradient is not 0.
        columns = (0.02 * jax.random.normal(key, (count, length, rank))).at[..., 0].set(1.0)
        rows = jnp.zeros((count, rank, width)).at[:, 0].set(1.0)
        return {"shared": shared, "columns": columns, "rows": rows}
    if combine == "add":
        return {"shared": shared, "own": jnp.zeros((count, length, width))}
    if combine == "concatenate":
        return {"shared": shared[:-own], "own": jnp.tile(shared[-own:], (count, 1, 1))}
    drawn = scale * jax.random.uniform(key, (count, length, width), minval=-0.5, maxval=0.5)
    projection = jnp.concatenate([jnp.eye(width), jnp.zeros((width, width))])
    return {"shared": shared, "own": drawn, "projection": projection}


def _neutral(name: str, like: np.ndarray) -> np.ndarray:
    """Return a task's part that leaves the shared rows as they are."""
    neutral = np.zeros_like(like)
    if name == "columns":
        neutral[:, 0] = 1
    elif name == "rows":
        neutral[0] = 1
    return neutral


class SharedPrompt(PromptTable):
    """N prompts of P rows: the ids V + n P to V + n P + P - 1 are those of task n."""

    def __init__(
        self, combine: str, parts: dict[str, Array], scale: float, teachers: Float[Array, "N P D"] | None = None
    ):
        self.combine = combine

        def weight(name: str, axes: tuple[str, str], scale: float) -> Any:
            if name not in parts:
                return nnx.data(None)
            return Trainable(jnp.asarray(parts[name], jnp.float32), axes=axes, learning_rate_scale=scale)

        self.shared = weight("shared", ("prompt", "embed"), scale)
        self.own = weight("own", ("prompt", "embed"), scale)
        like_words = 1 / T5_EMBEDDING_RMS  # factors around 1 change in proportion as words change
        self.columns = weight("columns", ("prompt", "rank"), like_words)
        self.rows = weight("rows", ("prompt", "embed"), like_words)  # `prompt` in the axes: whole on every device
        self.projection = weight("projection", ("prompt", "embed"), like_words)
        self.teachers: Any = nnx.data(None) if teachers is None else nnx.Param(teachers, axes=("prompt", "embed"))

    def table(self) -> Float[Array, "NP D"]:
        shared = self.shared[...]
        if self.combine == "product":
            rows = shared * (self.columns[...] @ self.rows[...])
        elif self.combine == "add":
            rows = shared + self.own[...]
        else:
            own = self.own[...]
            same = jnp.broadcast_to(shared, (len(own), *shared.shape))
            if self.combine == "concatenate":
                rows = jnp.concatenate([same, own], 1)
            else:
                rows = jnp.concatenate([same, own], -1) @ self.projection[...]
        return rows.reshape(-1, rows.shape[-1])

    def finished(self) -> PromptTable:
        """Return the same parts, from which another task may start, without the teachers."""
        parts = {name: getattr(self, name)[...] for name in PARTS[self.combine]}
        return SharedPrompt(self.combine, parts, 1.0).at(self.place, self.layout)
