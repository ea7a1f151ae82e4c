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
from softprompt_jax.distributed import mesh
from softprompt_jax.distributed.cloud_files import CHECKPOINTS
from softprompt_jax.distributed.folder_lock import lock_folder
from softprompt_jax.distributed.multihost import PreemptedDuringEval, Preemption
from softprompt_jax.inference.evaluate import Decoder
from softprompt_jax.methods import Split, leaves, split
from softprompt_jax.progress import Reporter, duration
from softprompt_jax.run import Run
from softprompt_jax.training import remat
from softprompt_jax.training.loop import Speed, fit
from softprompt_jax.training.run_data import ILLEGAL_HINT, RunData, TaskSplits, mostly_illegal
from softprompt_jax.training.run_folder import Log, begin_folder, create_folder, leave_files, scores_in
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

    def _data(self, run: Run, assembly: Assembly, parts: Split) -> RunData:
        data = RunData(run, assembly, parts, self._tasks.get(_task_of(run)), self._decoder)
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
        """Train runs in their checked folders, or go on where they stopped; their common state lies in `folder`.

        `stop_after`: a run stops after so many evaluations without a better score. One whose loss is no number stops,
        too, and leaves `failed.json` instead of a result. Raises Preempted after SIGTERM and Ctrl-C, with everything
        saved.
        """
        with contextlib.ExitStack() as opened:
            _VmappedGroup(self, runs, folder, reporter, stop_after, opened).train()


class _VmappedGroup:
    """The training of these runs: what `fit` asks for, for N runs at once."""

    def __init__(
        self,
        shared: VmappedSweep,
        runs: Sequence[tuple[Run, Path]],
        folder: Path,
        reporter: Reporter,
        stop_after: int | None,
        opened: contextlib.ExitStack,
    ):
        self.shared, self.folder, self.reporter, self.stop_after = shared, folder, reporter, stop_after
        self.runs, self.folders = [run for run, _ in runs], [path for _, path in runs]
        self.run = self.runs[0]  # for what all have in common
        for path in self.folders:
            create_folder(path)
            opened.enter_context(lock_folder(path, report=reporter.line))

        # ---- data and the state before the first step
        self.parts: list[Split] = []
        known: dict[tuple[str, int], RunData] = {}
        self.data: list[RunData] = []
        for run in self.runs:
            assembly, parts = shared._assemble(run)
            self.parts.append(parts)
            same = _task_of(run), run.seed
            self.data.append(known.get(same) or known.setdefault(same, shared._data(run, assembly, parts)))
        self.frozen = self.parts[0].frozen
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
        begun = [opened.enter_context(begin_folder(run, path)) for run, path in runs]
        begun.append(opened.enter_context(_begin_group(folder, [path.name for path in self.folders])))
        self.begun = lambda: [begin() for begin in begun]
        self.checkpoints = opened.enter_context(contextlib.closing(Checkpoints(folder / CHECKPOINTS)))
        self.first = 0
        if (latest := self.checkpoints.latest()) is not None:
            self.state, self.best, marks = self.checkpoints.restore(latest, [self.state, self.best, self.marks])
            self.marks = {name: np.array(value) for name, value in marks.items()}
            self.first = latest
            reporter.line(f"resumed at step {latest}")
        self.validated = int(self.marks["validated"]) == self.first or not self.run.evaluates(self.first)
        logs = [Log(path, self.first, self.validated) for path in self.folders]
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

    @property
    def running(self) -> Bool[np.ndarray, " N"]:
        """Which runs have neither stopped nor failed."""
        return (self.marks["stopped_at"] == 0) & (self.marks["failed_at"] == 0)

    def one(self, stacked: Any, index: int) -> Any:
        """Return what belongs to one run."""
        return jax.tree.map(lambda leaf: leaf[index], stacked)

    def train(self) -> None:
        """Train all to their end and leave their files."""
        run, count = self.run, len(self.runs)
        self.rates = jnp.asarray([each.optimizer.learning_rate for each in self.runs], jnp.float32)
        self.keys = jnp.stack([jax.random.fold_in(jax.random.key(each.seed), 2) for each in self.runs])
        unlike = list({id(data): data for data in self.data}.values())
        batches = [each for data in unlike if isinstance(each := data.train_batches, TrainBatches)]
        shapes = common_shapes(batches, run.max_compiled_shapes, run.steps)
        self.reporter.line(
            f"{count} prompts in one program; {mesh.describe()}, {run.dtype}; shapes "
            + ", ".join(f"{t}/{u}" for t, u in shapes)
        )
        if self.first == 0:
            for log, data in zip(self.logs, self.data, strict=True):
                log.write({"step": 0, "data": data.measures()})
        place = self.folder.parents[1]
        fit(
            run,
            place,
            self.first,
            self.state,
            self.take_step,
            self.batches(unlike, shapes),
            self.evaluate,
            self.save,
            self.log,
            self.begun,
            self.preemption,
            self.reporter,
            validated=self.validated,
            title=f"train {count} prompts",
        )
        self.checkpoints.wait()
        try:
            for index in range(count):
                self.leave(index)
        except PreemptedDuringEval:
            raise self.preemption.stopped(f"{place}: told to stop while results were measured") from None

    def batches(self, unlike: Sequence[RunData], shapes: list[Shape]) -> Iterator[tuple[Batch, BatchCounts]]:
        """Yield the batches of all runs, stacked, while any of them is running."""
        sources = [data.batches(self.first) for data in unlike]
        source = [unlike.index(data) for data in self.data]
        vocabulary_rows = self.shared.assembly.model.settings.vocabulary_rows
        while self.running.any():
            own = [next(each) for each in sources]
            joined = stack_batches(own, shapes)
            slots = sum(joined[name][0].size for name in ("encoder_tokens", "decoder_targets"))  # of one run
            counted = [count_slots(batch, vocabulary_rows)._replace(slots=slots) for batch in own]
            counts = BatchCounts(*(np.array(each)[source] for each in zip(*counted, strict=True)))
            yield {name: rows[source] for name, rows in joined.items()}, counts

    def take_step(self, states: Any, batches: Batch) -> tuple[Any, Any]:
        """Take a step of each run that is still running."""
        rows = mesh.shard_stacked_batch(batches)
        return self.shared._step(states, self.running, self.rates, self.frozen, rows, self.keys)

    def log(self, step: int, speed: Speed) -> str:
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

    def evaluate(self, step: int, state: Any) -> None:
        """Score each running run on its validation split, keep the best, and stop those that no longer improve."""
        improved = np.zeros(len(self.runs), bool)
        running = np.flatnonzero(self.running).tolist()
        found = [self.data[i].validate(self.one(state["trainable"], i), self.frozen) for i in running]
        self.marks["validated"][...] = step
        for index, (scores, score) in zip(running, found, strict=True):
            self.logs[index].write({"step": step, "validation": scores})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            self.reporter.line(f"{self.folders[index].name}: step {step}: validation {shown}")
            if step == 0:  # the start is no candidate, as in a run of its own
                continue
            if mostly_illegal(scores):
                self.reporter.once(ILLEGAL_HINT)
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
            self.best = _chosen(jnp.asarray(improved), state["trainable"], self.best)

    def save(self, step: int, state: Any, _: None) -> None:
        """Start writing the state of all runs, and what each has found."""
        self.checkpoints.save(step, [state, self.best, self.marks])

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


@contextlib.contextmanager
def _begin_group(folder: Path, names: list[str]) -> Iterator[Callable[[], None]]:
    """Note which runs share the state in `folder`; an error before the yielded function is called takes it back."""
    new, begun = not (folder / MEMBERS).exists(), False

    def begin() -> None:
        nonlocal begun
        begun = True

    if new:
        folder.mkdir(parents=True, exist_ok=True)
        artifact.dump(names, folder / MEMBERS)
    try:
        yield begin
    except BaseException:
        if new and not begun:
            shutil.rmtree(folder)
        raise


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
