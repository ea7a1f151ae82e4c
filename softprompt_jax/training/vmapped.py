"""Several runs of one shape as one: their prompts are a table [N, P, D] over one frozen backbone.

Step, optimizer, clipping and schedule of one run are mapped over N; each run has its own batches, learning rate and
dropout keys, so that it ends where it would have ended alone, up to float noise. With dropout that holds for runs of
one seed: a mask of attention depends on the length that a batch is padded to, which prompts of unlike seeds share.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from softprompt_jax.assembly import Assembly, assemble, check_devices
from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.backbone import Backbone
from softprompt_jax.checkpoints.training_state import MEMBERS, Checkpoints
from softprompt_jax.config import UserError
from softprompt_jax.data.batches import Batch, BatchCounts, TrainBatches, count_slots
from softprompt_jax.data.buckets import Shape, choose_shapes, fitting_shape
from softprompt_jax.data.streaming import StreamBatches
from softprompt_jax.data.task import Distill
from softprompt_jax.distributed import mesh
from softprompt_jax.distributed.cloud_files import CHECKPOINTS
from softprompt_jax.distributed.folder_lock import lock_folder
from softprompt_jax.distributed.multihost import Preemption
from softprompt_jax.files import writable
from softprompt_jax.inference.evaluate import Decoder
from softprompt_jax.methods import Split, leaves, split
from softprompt_jax.progress import Reporter, duration
from softprompt_jax.run import Run
from softprompt_jax.training import remat
from softprompt_jax.training.distill import attach_context
from softprompt_jax.training.loop import Training
from softprompt_jax.training.meter import Speed
from softprompt_jax.training.run_data import RunData, TaskSplits
from softprompt_jax.training.run_folder import Log, begin_folder, create_folder, leave_files, scores_in, until_begun
from softprompt_jax.training.step import build_optimizer, first_state, plain_step

FAILED_FILE = "failed.json"  # what a run leaves whose loss is no number
_PLANNED_STEPS = 1000  # whose shapes are looked at when common ones are chosen


def shape_of(run: Run) -> dict[str, Any]:
    """Return what runs must have in common to train together: all but seed, task, learning rate and initialisation."""
    settings = run.model_dump(mode="json", exclude={"seed", "task"})
    settings["optimizer"].pop("learning_rate")
    for method in settings["methods"]:
        method.pop("init", None)
    teacher = getattr(run.task, "context", None)  # what it has read is frozen, and shared
    return settings | {"tasks": len(run.tasks), "own_prompts": run.own_prompts, "context": teacher}


class VmappedSweep:
    """What runs of one shape share: the backbone, data that are the same, and programs, each compiled once."""

    def __init__(self, run: Run, backbone: Backbone):
        self.run, self.backbone = run, backbone
        self.assembly, self._parts = self._assemble(run)
        self._about = leaves(self.assembly.model)
        self._decoder = Decoder(self._parts, self.assembly.tokenizer, run.decoding)
        self._tasks: dict[str, list[TaskSplits]] = {}
        self._step = jax.jit(self._mapped_step, donate_argnums=0)
        self._begin = jax.jit(jax.vmap(functools.partial(first_state, build_optimizer(run, self._about))))

    def _assemble(self, run: Run) -> tuple[Assembly, Split]:
        assembly = assemble(run, self.backbone)
        check_devices(run, assembly)
        attach_context(run, assembly)
        return assembly, split(mesh.shard_model(assembly.model))

    @property
    def possible(self) -> bool:
        """Whether nothing but the prompt trains, and all else is the same for every run."""
        alone = getattr(self.run.optimizer, "restore", False)  # whose slots are a checkpoint's
        return self._parts.trains_prompt_only and "prompt" not in self._parts.frozen and not alone

    def _mapped_step(self, states: Any, running: Any, rates: Any, frozen: Any, batches: Any, keys: Any) -> Any:
        memory, held = remat.memory(), mesh.local_bytes(self._parts.frozen)  # beside which prompts are nothing
        room = None if memory is None else remat.room(held, memory) // len(running)

        def one(state: Any, running: Any, rate: Any, batch: Any, key: Any) -> Any:
            own = self.run.optimizer.model_copy(update={"learning_rate": rate})
            optimizer = build_optimizer(self.run.model_copy(update={"optimizer": own}), self._about)
            new, measured = plain_step(self.run, self._parts, optimizer, room)(state, frozen, batch, key)
            return jax.tree.map(lambda after, before: jnp.where(running, after, before), new, state), measured["loss"]

        states, losses = jax.vmap(one)(states, running, rates, batches, keys)
        return jax.tree.map(lambda leaf: mesh.constrain(leaf, *[None] * leaf.ndim), states), losses

    def _data(self, run: Run, assembly: Assembly, parts: Split) -> RunData:
        data = RunData(run, assembly, parts, self._tasks.get(_task_of(run)), self._decoder)
        self._tasks[_task_of(run)] = data.tasks
        if isinstance(data.train_batches, StreamBatches):
            raise UserError(f"task {run.task_name}: its train split never ends; expected a finite one; train it alone")
        return data


class VmappedGroup(Training):
    """The training of N runs at once, in their checked folders; their common state lies in `folder`.

    `stop_after`: a run stops after so many evaluations without a better score. One whose loss is no number stops, too,
    and leaves `failed.json` instead of a result. `opened` ends what must be ended, also on errors.
    """

    def __init__(
        self,
        shared: VmappedSweep,
        runs: Sequence[tuple[Run, Path]],
        folder: Path,
        reporter: Reporter,
        stop_after: int | None,
        opened: contextlib.ExitStack,
    ):
        self.shared, self.place, self.reporter = shared, folder.parents[1], reporter
        self.stop_after = stop_after or runs[0][0].patience
        self.runs, self.folders = [run for run, _ in runs], [path for _, path in runs]
        self.run, self.title = self.runs[0], f"train {len(runs)} prompts"
        for path in self.folders:
            create_folder(path)
        self.checks = [opened.enter_context(lock_folder(path, report=reporter.line)) for path in self.folders]

        # ---- data and the state before the first step
        self.parts: list[Split] = []
        self.data: list[RunData] = []
        unlike: dict[tuple[str, int], RunData] = {}
        for run in self.runs:
            assembly, parts = shared._assemble(run)
            self.parts.append(parts)
            if (same := (_task_of(run), run.seed)) not in unlike:
                unlike[same] = shared._data(run, assembly, parts)
            self.data.append(unlike[same])
        self.unlike = list(unlike.values())
        self.frozen = self.parts[0].frozen
        self.rates = jnp.asarray([each.optimizer.learning_rate for each in self.runs], jnp.float32)
        self.keys = jnp.stack([jax.random.fold_in(jax.random.key(each.seed), 2) for each in self.runs])
        batches = [each for data in self.unlike if isinstance(each := data.train_batches, TrainBatches)]
        self.shapes = common_shapes(batches, self.run.max_compiled_shapes, self.run.steps)
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

        # ---- resume, in the order of loop.py: settings, state, lines of metrics.jsonl, and then the scores in them
        self.preemption = opened.enter_context(Preemption())  # left last: it may end the process
        begun = [
            opened.enter_context(begin_folder(run, path, check=check))
            for (run, path), check in zip(runs, self.checks, strict=True)
        ]
        begun.append(opened.enter_context(_begin_group(folder, [path.name for path in self.folders])))
        self.begun = lambda: [begin() for begin in begun]
        checkpoints = Checkpoints(folder / CHECKPOINTS, report=reporter.line)
        self.checkpoints = opened.enter_context(contextlib.closing(checkpoints))
        self.first, self.pending, lines = 0, None, None
        if (newest := self.checkpoints.restore_newest([self.state, self.best, self.marks])) is not None:
            (self.state, self.best, marks), self.first = newest
            self.marks = {name: np.array(value) for name, value in marks.items()}
            self.pending, lines = self.checkpoints.pending(self.first), self.checkpoints.lines(self.first)
            reporter.line(f"resumed at step {self.first}")
        self.validated = int(self.marks["validated"]) == self.first or not self.run.evaluates(self.first)
        seconds = self.pending["seconds"] if self.pending else 0.0
        logs = [
            Log(path, self.first, self.validated, seconds, check, each)
            for path, check, each in zip(self.folders, self.checks, lines or [None] * count, strict=True)
        ]
        self.logs = [opened.enter_context(contextlib.closing(log)) for log in logs]
        self.best_loss = np.full(count, np.inf)
        self.losses_count = [True] * count  # False: it began before there were any, and keeps the first of equal scores
        self.better_at = self.marks["best_step"].copy()  # when the score rose last: a lower loss alone ends no waiting
        for index, (run, path) in enumerate(runs):
            scored = scores_in(path, run)
            self.losses_count[index] = all(loss is not None for _, loss in scored.values())
            scored.pop(0, None)  # the start is no candidate
            if (loss := scored.get(int(self.marks["best_step"][index]), (0, None))[1]) is not None:
                self.best_loss[index] = loss
            if scored:
                self.better_at[index] = max(scored, key=lambda step: (np.float32(scored[step][0]), -step))
        reporter.line(
            f"{count} prompts in one program; {mesh.describe()}, {self.run.dtype}; shapes "
            + ", ".join(f"{t}/{u}" for t, u in self.shapes)
        )
        if self.first == 0:
            for log, data in zip(self.logs, self.data, strict=True):
                log.write({"step": 0, "data": data.measures()})

    @property
    def running(self) -> Bool[np.ndarray, " N"]:
        """Which runs have neither stopped nor failed."""
        return (self.marks["stopped_at"] == 0) & (self.marks["failed_at"] == 0)

    def one(self, stacked: Any, index: int) -> Any:
        """Return what belongs to one run."""
        return jax.tree.map(lambda leaf: leaf[index], stacked)

    def batches(self) -> Iterator[tuple[Batch, BatchCounts]]:
        """Yield the batches of all runs, stacked, while any of them is running."""
        sources = [data.batches(self.first) for data in self.unlike]
        source = [self.unlike.index(data) for data in self.data]
        settings = self.shared.assembly.model.settings
        while self.running.any():
            own = [next(each) for each in sources]
            joined = stack_batches(own, self.shapes, settings.padding)
            slots = sum(joined[name][0].size for name in ("encoder_tokens", "decoder_targets"))  # of one run
            counted = [
                count_slots(batch, settings.vocabulary_rows, settings.padding)._replace(slots=slots) for batch in own
            ]
            counts = BatchCounts(*(np.array(each)[source] for each in zip(*counted, strict=True)))
            yield {name: rows[source] for name, rows in joined.items()}, counts

    def take_step(self, batch: Batch) -> Any:
        rows = mesh.shard_batch(batch, stacked=True)
        self.state, losses = self.shared._step(self.state, self.running, self.rates, self.frozen, rows, self.keys)
        return losses

    def write_line(self, step: int, speed: Speed) -> str:
        """Write a line for each running run; one whose loss is no number has failed."""
        running = np.flatnonzero(self.running).tolist()
        for index in running:
            own = Speed(*(each[index] for each in speed))
            if np.isfinite(own.loss):
                rate, seconds = self.runs[index].learning_rate(step - 1), self.logs[index].seconds()
                self.logs[index].write(own.line(step, rate, seconds))
            else:
                self.marks["failed_at"][index] = step
                self.reporter.line(f"{self.folders[index].name}: step {step}: the loss is {own.loss}; stopped")
        finite = [loss for loss in speed.loss[running] if np.isfinite(loss)]
        note = f"loss {np.mean(finite) if finite else np.nan:.4f}"
        return f"{note}  {self.running.sum()} of {len(self.runs)} running"

    def evaluate(self, step: int) -> None:
        """Score each running run on its validation split, keep the best, and stop those that no longer improve."""
        improved = np.zeros(len(self.runs), bool)
        running = np.flatnonzero(self.running).tolist()
        found = [self.data[i].validate(self.one(self.state["trainable"], i), self.frozen) for i in running]
        self.marks["validated"][...] = step
        for index, (scores, score) in zip(running, found, strict=True):
            self.write_scores(self.logs[index], step, scores, f"{self.folders[index].name}: ")
            if step == 0:  # the start is no candidate, as in a run of its own
                continue
            best, loss = self.marks["best_score"][index], scores.get("loss", np.inf)
            better = np.float32(score) > best
            lower = np.float32(score) == best and loss < self.best_loss[index] and self.losses_count[index]
            if better or lower:
                improved[index] = True
                self.marks["best_score"][index], self.marks["best_step"][index] = score, step
                self.best_loss[index] = loss
            if better:
                self.better_at[index] = step
            elif self.stop_after and step - self.better_at[index] >= self.stop_after * self.run.evaluate_every:
                self.marks["stopped_at"][index] = step
                self.reporter.line(f"{self.folders[index].name}: stopped at step {step}")
        if improved.any():
            self.best = _chosen(jnp.asarray(improved), self.state["trainable"], self.best)

    def save(self, step: int, score: None, pending: Any = None) -> None:
        self._check()
        lines = [log.checksum() for log in self.logs]
        self.checkpoints.save(step, [self.state, self.best, self.marks], pending=pending, lines=lines)

    def ends(self) -> bool:
        """Return False: each run stops by itself, and `batches` ends with the last."""
        return False

    def _check(self) -> None:
        for check in self.checks:
            check()

    def finish(self) -> None:
        """Write what each finished run leaves, as `train` does, if that has not been done."""
        self._check()
        for index, (run, folder, parts) in enumerate(zip(self.runs, self.folders, self.parts, strict=True)):
            if failed := int(self.marks["failed_at"][index]):
                artifact.dump({"step": failed, "reason": "the loss is no finite number"}, folder / FAILED_FILE)
            elif not (folder / "result.json").exists():
                best = self.one(self.best, index)
                result = self.data[index].result(best, parts) | {
                    "steps": int(self.marks["stopped_at"][index]) or run.steps,
                    "best_step": int(self.marks["best_step"][index]),
                    "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(best)),
                    "seconds": round(self.logs[index].seconds(), 1),  # of all that trained together
                    "together": len(self.runs),
                }
                identity, lines = self.shared.assembly.identity, self.logs[index].checksum()
                leave_files(run, folder, identity, parts, best, result, lines, self.data[index].mistakes)
                self.reporter.line(f"{folder}: done in {duration(result['seconds'])}")


@jax.jit
def _chosen(which: jax.Array, new: Any, old: Any) -> Any:
    """Take those of `new` that are chosen, the others of `old`."""
    return jax.tree.map(lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _task_of(run: Run) -> str:
    drawn = run.seed if isinstance(run.task, Distill) else None  # by it a teacher samples its answers
    return str((run.model_dump(mode="json", include={"task"}), drawn))


@contextlib.contextmanager
def _begin_group(folder: Path, names: list[str]) -> Iterator[Callable[[], None]]:
    """Note which runs share the state in `folder`; an error before the yielded function is called takes it back."""
    new = not (folder / MEMBERS).exists()
    if new:
        with writable(folder / MEMBERS) as path:
            artifact.dump(names, path)
    with until_begun(lambda: shutil.rmtree(folder) if new else None) as begin:
        yield begin


def common_shapes(sources: Sequence[TrainBatches], most: int, steps: int) -> list[Shape]:
    """Choose at most `most` shapes that hold the batches of all sources at a step, and pad them least."""
    planned = min(steps, _PLANNED_STEPS, max(source.batches_per_epoch for source in sources))
    needed = np.array([[source.shape(step) for source in sources] for step in range(planned)]).max(1)
    largest = np.array([shape for source in sources for shape in source.shapes]).max(0)
    each = {(int(t), int(u)) for t, u in [*needed, largest]}
    if len(each) <= most:
        return sorted(each, key=lambda shape: (sum(shape), shape))
    return choose_shapes(needed, (int(largest[0]), int(largest[1])), most, multiple=1)


def stack_batches(batches: Sequence[Batch], shapes: list[Shape], padding: int) -> dict[str, Int[np.ndarray, "N B _"]]:
    """Stack batches, padded to the first shape that holds all; a missing row is the first again, without targets."""
    rows = max(len(batch["encoder_tokens"]) for batch in batches)
    needed = np.array([[batch["encoder_tokens"].shape[1], batch["decoder_targets"].shape[1]] for batch in batches])
    shape = fitting_shape(shapes, needed.max(0))
    stacked = {}
    for name in batches[0]:
        width = shape[0] if name.startswith("encoder") else shape[1]
        empty = 0 if name.endswith("_segments") else padding
        stacked[name] = np.full((len(batches), rows, width), empty, np.int32)
        for index, batch in enumerate(batches):
            values = batch[name]
            stacked[name][index, : len(values), : values.shape[1]] = values
            if name != "decoder_targets":
                stacked[name][index, len(values) :, : values.shape[1]] = values[:1]
    return stacked
