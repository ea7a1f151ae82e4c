"""Several runs of one shape as one: their prompts are a table [N, P, D] over one frozen backbone.

Step, optimizer, clipping and schedule of one run are mapped over N; each run has its own batches, learning rate and
dropout keys, so that it ends where it would have ended alone, up to float noise. With dropout that holds for runs of
one seed: a mask of attention depends on the length that a batch is padded to, which prompts of unlike seeds share.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from softprompt_jax.assembly import Assembly, assemble, check_mesh
from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.backbone import Backbone
from softprompt_jax.config import Preempted, UserError
from softprompt_jax.data.batches import Batch, TrainBatches, examples_in
from softprompt_jax.data.buckets import Shape, choose_shapes, fitting_shape
from softprompt_jax.data.streaming import StreamBatches
from softprompt_jax.distributed import mesh
from softprompt_jax.distributed.multihost import CutShort, Preemption
from softprompt_jax.inference.evaluate import Decoder
from softprompt_jax.methods import Split, leaves, split
from softprompt_jax.progress import Reporter, duration
from softprompt_jax.run import Run
from softprompt_jax.training import remat
from softprompt_jax.training.checkpoints import Checkpoints
from softprompt_jax.training.run_data import TaskData, TaskRun
from softprompt_jax.training.run_folder import Log, leave_files
from softprompt_jax.training.step import build_optimizer, first_state, plain_step

FAILED_FILE = "failed.json"  # what a run leaves whose loss is no number
_PLANNED_STEPS = 1000  # whose shapes are looked at when common ones are chosen


def shape_of(run: Run) -> dict[str, Any]:
    """Return what runs must have in common to train together: all but seed, task, learning rate and initialisation."""
    settings = run.model_dump(mode="json", exclude={"seed", "task"})
    settings["optimizer"].pop("learning_rate")
    for method in settings["methods"]:
        method.pop("init", None)
    return settings | {"tasks": len(run.tasks), "own_prompts": run.own_prompts}


class Together:
    """What runs of one shape share: the backbone, data that are the same, and programs, each compiled once."""

    def __init__(self, run: Run, backbone: Backbone):
        self.run, self.backbone = run, backbone
        self.assembly, self._parts = self._assemble(run)
        self._about = leaves(self.assembly.model)
        self._decoder = Decoder(self._parts, self.assembly.tokenizer, run.decoding)
        self._tasks: dict[str, list[TaskData]] = {}
        self._step = jax.jit(self._mapped_step, donate_argnums=0)
        self._begin = jax.jit(jax.vmap(functools.partial(first_state, build_optimizer(run, self._about))))

    def _assemble(self, run: Run) -> tuple[Assembly, Split]:
        assembly = assemble(run, self.backbone)
        check_mesh(run, assembly)
        return assembly, split(mesh.shard_model(assembly.model))

    @property
    def possible(self) -> bool:
        """Whether nothing but the prompt trains, and all else is the same for every run."""
        alone = getattr(self.run.optimizer, "restore", False)  # whose slots are a checkpoint's
        return self._parts.trains_prompt_only and "prompt" not in self._parts.frozen and not alone

    def _optimizer(self, learning_rate: Any) -> Any:
        optimizer = self.run.optimizer.model_copy(update={"learning_rate": learning_rate})
        return build_optimizer(self.run.model_copy(update={"optimizer": optimizer}), self._about)

    def _mapped_step(self, states: Any, running: Any, rates: Any, frozen: Any, batches: Any, keys: Any) -> Any:
        """Take a step of each run that is still running."""

        memory, held = remat.memory(), mesh.local_bytes(self._parts.frozen)  # beside which prompts are nothing
        room = None if memory is None else remat.room(held, memory) // len(running)

        def one(state: Any, running: Any, rate: Any, batch: Any, key: Any) -> Any:
            new, measured = plain_step(self.run, self._parts, self._optimizer(rate), room)(state, frozen, batch, key)
            return jax.tree.map(lambda after, before: jnp.where(running, after, before), new, state), measured["loss"]

        states, losses = jax.vmap(one)(states, running, rates, batches, keys)
        return jax.tree.map(lambda leaf: mesh.constrain(leaf, *[None] * leaf.ndim), states), losses

    def _data(self, run: Run, assembly: Assembly, parts: Split) -> TaskRun:
        data = TaskRun(run, assembly, parts, self._tasks.get(_task_of(run)), self._decoder)
        self._tasks[_task_of(run)] = data.tasks
        if isinstance(data.train_batches, StreamBatches):
            raise UserError(f"task {run.task_name}: its train split never ends; expected a finite one; train it alone")
        return data

    def train(
        self,
        runs: Sequence[tuple[Run, Path]],
        folder: Path,
        reporter: Reporter,
        stop_after: int | None = None,
    ) -> None:
        """Train runs in their prepared folders, or go on where they stopped; their common state lies in `folder`.

        `stop_after`: a run stops after so many evaluations without a better score. One whose loss is no number stops,
        too, and leaves `failed.json` instead of a result. Raises Preempted after SIGTERM, with everything saved.
        """
        with contextlib.ExitStack() as opened:
            _Training(self, runs, folder, reporter, stop_after, opened).finish()


class _Training:
    """The training of these runs."""

    def __init__(
        self,
        shared: Together,
        runs: Sequence[tuple[Run, Path]],
        folder: Path,
        reporter: Reporter,
        stop_after: int | None,
        opened: contextlib.ExitStack,
    ):
        self.shared, self.reporter, self.stop_after = shared, reporter, stop_after
        self.runs, self.folders = [run for run, _ in runs], [path for _, path in runs]
        self.run = self.runs[0]  # for what all have in common
        self.parts: list[Split] = []
        known: dict[tuple[str, int], TaskRun] = {}
        self.data: list[TaskRun] = []
        for run in self.runs:
            assembly, parts = shared._assemble(run)
            self.parts.append(parts)
            same = _task_of(run), run.seed
            self.data.append(known.get(same) or known.setdefault(same, shared._data(run, assembly, parts)))
        self.frozen = self.parts[0].frozen
        # ---- the state before the first step, or where it stopped
        stacked = jax.tree.map(lambda *each: jnp.stack(each), *(parts.trainable for parts in self.parts))
        count = len(self.runs)
        self.state = shared._begin(stacked)
        self.best = stacked
        self.marks = {
            "best_score": np.full(count, -np.inf, np.float32),
            "best_step": np.zeros(count, np.int32),
            "stopped_at": np.zeros(count, np.int32),  # 0: it runs
            "failed_at": np.zeros(count, np.int32),  # 0: it has not
            "validated": np.zeros((), np.int32),  # the last step that was
        }
        self.preemption = opened.enter_context(Preemption())  # left last: it may end the process
        self.checkpoints = opened.enter_context(contextlib.closing(Checkpoints(folder / "checkpoints")))
        self.first = 0
        if (latest := self.checkpoints.latest()) is not None:
            self.state, self.best, marks = self.checkpoints.restore(latest, [self.state, self.best, self.marks])
            self.marks = {name: np.array(value) for name, value in marks.items()}
            self.first = latest
            reporter.line(f"resumed at step {latest}")
        self.validated = int(self.marks["validated"]) == self.first or not self.run.evaluates(self.first)
        logs = [Log(path, self.first, self.validated) for path in self.folders]
        self.logs = [opened.enter_context(contextlib.closing(log)) for log in logs]

    @property
    def running(self) -> Bool[np.ndarray, " N"]:
        """Which runs have neither stopped nor failed."""
        return (self.marks["stopped_at"] == 0) & (self.marks["failed_at"] == 0)

    def one(self, stacked: Any, index: int) -> Any:
        """Return what belongs to one run."""
        return jax.tree.map(lambda leaf: leaf[index], stacked)

    def finish(self) -> None:
        """Train all to their end and leave their files."""
        run, count = self.run, len(self.runs)
        rates = jnp.asarray([each.optimizer.learning_rate for each in self.runs], jnp.float32)
        keys = jnp.stack([jax.random.fold_in(jax.random.key(each.seed), 2) for each in self.runs])
        unlike = list({id(data): data for data in self.data}.values())
        source = [unlike.index(data) for data in self.data]
        batches = [each for data in unlike if isinstance(each := data.train_batches, TrainBatches)]
        shapes = common_shapes(batches, run.max_compiled_shapes, run.steps)
        self.reporter.line(
            f"{count} prompts in one program; {mesh.describe()}, {run.dtype}; shapes "
            + ", ".join(f"{t}/{u}" for t, u in shapes)
        )
        self.reporter.start(f"train {count} prompts", self.first, run.steps)
        if self.first == 0:
            for log, data in zip(self.logs, self.data, strict=True):
                log.write({"step": 0, "data": data.measures()})
            self.evaluate(0)
        elif not self.validated:  # it was cut short
            self.evaluate(self.first)
        batches = [data.batches(self.first) for data in unlike]
        recent: list[tuple[Any, Any, Any, int]] = []
        clock = time.monotonic()
        for step in range(self.first + 1, run.steps + 1):
            if not self.running.any():
                break
            own = [next(each) for each in batches]
            joined = stack_batches(own, shapes)
            spread = mesh.shard_stacked_batch({name: rows[source] for name, rows in joined.items()})
            running = self.running
            self.state, losses = self.shared._step(self.state, running, rates, self.frozen, spread, keys)
            real, examples = np.array([_real(batch) for batch in own]), np.array([examples_in(batch) for batch in own])
            recent.append((losses, real[source], examples[source], _size(joined)))
            evaluated = run.evaluates(step)
            leaving = self.preemption.reached(losses) and step < run.steps
            saved = evaluated or leaving or step % run.checkpoint_every == 0
            if step % run.log_every == 0 or saved:
                found = np.stack([np.asarray(each) for each, *_ in recent]).mean(0)
                now = time.monotonic()
                self.log(step, found, recent, now - clock)
                note = f"loss {np.nanmean(found[running]) if np.isfinite(found[running]).any() else np.nan:.4f}"
                self.reporter.update(step, run.steps, f"{note}  {self.running.sum()} of {count} running")
                recent, clock = [], now
            if saved:
                paused = time.monotonic()
                if evaluated:
                    self.evaluate(step)
                self.checkpoints.save(step, [self.state, self.best, self.marks])
                clock += time.monotonic() - paused
            if leaving:
                self.checkpoints.wait()
                raise Preempted(f"told to stop, saved at step {step}; the same command goes on")
        self.reporter.stop()
        self.checkpoints.wait()
        try:
            for index in range(count):
                self.leave(index)
        except CutShort:
            raise Preempted("told to stop while results were measured; the same command goes on") from None

    def log(self, step: int, losses: Float[np.ndarray, " N"], recent: list, seconds: float) -> None:
        """Write a line for each running run; one whose loss is no number has failed."""
        real, examples = (np.sum([entry[i] for entry in recent], axis=0) for i in (1, 2))
        padded = sum(entry[3] for entry in recent)
        for index in np.flatnonzero(self.running).tolist():
            if not np.isfinite(losses[index]):
                self.marks["failed_at"][index] = step
                self.reporter.line(f"{self.folders[index].name}: step {step}: the loss is {losses[index]}; stopped")
                continue
            self.logs[index].write(
                {
                    "step": step,
                    "loss": float(losses[index]),
                    "learning_rate": self.runs[index].learning_rate(step - 1),
                    "examples_per_s": round(float(examples[index]) / seconds, 2),
                    "tokens_per_s": round(float(real[index]) / seconds, 1),
                    "padding": round(1 - float(real[index]) / padded, 4),
                    "seconds": round(self.logs[index].seconds(), 2),
                }
            )

    def evaluate(self, step: int) -> None:
        """Score each running run on its validation split, keep the best, and stop those that no longer improve."""
        improved = np.zeros(len(self.runs), bool)
        running = np.flatnonzero(self.running).tolist()
        try:
            found = [self.data[i].validate(self.one(self.state["trainable"], i), self.frozen) for i in running]
        except CutShort:
            if step > self.first:
                self.checkpoints.save(step, [self.state, self.best, self.marks])
                self.checkpoints.wait()
            raise Preempted(f"told to stop while step {step} was validated; the same command goes on") from None
        self.marks["validated"][...] = step
        for index, (scores, score) in zip(running, found, strict=True):
            self.logs[index].write({"step": step, "validation": scores})
            told = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            self.reporter.line(f"{self.folders[index].name}: step {step}: validation {told}")
            if step == 0:  # the start is no candidate, as in a run of its own
                continue
            improved[index] = np.float32(score) > self.marks["best_score"][index]
            if improved[index]:
                self.marks["best_score"][index], self.marks["best_step"][index] = score, step
            elif self.stop_after and step - self.marks["best_step"][index] >= self.stop_after * self.run.evaluate_every:
                self.marks["stopped_at"][index] = step
                self.reporter.line(f"{self.folders[index].name}: stopped at step {step}")
        if improved.any():
            self.best = _chosen(jnp.asarray(improved), self.state["trainable"], self.best)

    def leave(self, index: int) -> None:
        """Write what a finished run leaves, as `train` does, if that has not been done."""
        folder, failed = self.folders[index], int(self.marks["failed_at"][index])
        if failed:
            artifact.dump({"step": failed, "reason": "the loss is no finite number"}, folder / FAILED_FILE)
        elif not (folder / "result.json").exists():
            best, parts = self.one(self.best, index), self.parts[index]
            result = self.data[index].result(best, parts) | {
                "steps": int(self.marks["stopped_at"][index]) or self.run.steps,
                "best_step": int(self.marks["best_step"][index]),
                "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(best)),
                "seconds": round(self.logs[index].seconds(), 1),  # of all that trained together
                "together": len(self.runs),
            }
            leave_files(self.runs[index], folder, self.shared.assembly.identity, parts, best, result)
            self.reporter.line(f"{folder}: done in {duration(result['seconds'])}")


@jax.jit
def _chosen(which: jax.Array, new: Any, old: Any) -> Any:
    """Take those of `new` that are chosen, the others of `old`."""
    return jax.tree.map(lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _task_of(run: Run) -> str:
    return str(run.model_dump(mode="json", include={"task"}))


def _real(batch: Batch) -> int:
    return sum(int(np.count_nonzero(batch[name])) for name in ("encoder_tokens", "decoder_targets"))


def _size(joined: dict[str, np.ndarray]) -> int:
    """Return the tokens of one run's rows, padding included."""
    return sum(joined[name][0].size for name in ("encoder_tokens", "decoder_targets"))


def common_shapes(sources: Sequence[TrainBatches], most: int, steps: int) -> list[Shape]:
    """Choose at most `most` shapes that hold the batches of all sources at a step, and pad them least."""
    planned = min(steps, _PLANNED_STEPS, max(source.batches_per_epoch for source in sources))
    needed = np.array([[source.shape(step) for source in sources] for step in range(planned)]).max(1)
    largest = np.array([shape for source in sources for shape in source.shapes]).max(0)
    each = {(int(t), int(u)) for t, u in [*needed, largest]}
    if len(each) <= most:
        return sorted(each, key=lambda shape: (sum(shape), shape))
    return choose_shapes(needed, (int(largest[0]), int(largest[1])), most, multiple=1)


def stack_batches(batches: Sequence[Batch], shapes: list[Shape]) -> dict[str, Int[np.ndarray, "N B _"]]:
    """Stack batches, padded to the first shape that holds all; a missing row is the first again, without targets."""
    rows = max(len(batch["encoder_tokens"]) for batch in batches)
    needed = np.array([[batch["encoder_tokens"].shape[1], batch["decoder_targets"].shape[1]] for batch in batches])
    shape = fitting_shape(shapes, needed.max(0))
    stacked = {}
    for name in batches[0]:
        width = shape[0] if name.startswith("encoder") else shape[1]
        stacked[name] = np.zeros((len(batches), rows, width), np.int32)
        for index, batch in enumerate(batches):
            values = batch[name]
            stacked[name][index, : len(values), : values.shape[1]] = values
            if name != "decoder_targets":
                stacked[name][index, len(values) :, : values.shape[1]] = values[:1]
    return stacked
