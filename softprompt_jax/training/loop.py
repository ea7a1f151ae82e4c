"""The training loop: one step for all methods, evaluation, checkpoints that resume to the bit."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Float

import softprompt_jax
from softprompt_jax.assembly import assemble, check_devices
from softprompt_jax.checkpoints.backbone import Backbone
from softprompt_jax.checkpoints.training_state import Checkpoints
from softprompt_jax.config import Diverged, parse, settings_hash
from softprompt_jax.data.batches import BatchCounts, count_slots
from softprompt_jax.distributed import mesh as sharding
from softprompt_jax.distributed.cloud_files import RunFolder
from softprompt_jax.distributed.folder_lock import lock_folder
from softprompt_jax.distributed.multihost import (
    PreemptedDuringEval,
    Preemption,
    assert_same_everywhere,
    is_first,
    run_on_process_0,
)
from softprompt_jax.methods import leaves, split
from softprompt_jax.optim.gradient_free import Search
from softprompt_jax.optim.optimizers import describe_rates
from softprompt_jax.progress import Reporter, duration, in_notebook
from softprompt_jax.run import UNHASHED_SETTINGS, Run, load_run
from softprompt_jax.training import run_folder
from softprompt_jax.training.callbacks import Callback, Callbacks, WandB
from softprompt_jax.training.distill import attach_context
from softprompt_jax.training.given import Metric, named_in
from softprompt_jax.training.meter import Meter, Speed
from softprompt_jax.training.run_data import ILLEGAL_HINT, PretrainingRunData, RunData, mostly_illegal
from softprompt_jax.training.step import build_optimizer, first_state, make_step
from softprompt_jax.training.trained_run import TrainedRun

SAVE_EVERY_S = 180  # wall time after which a checkpoint is written, whatever `checkpoint_every` says
_SAVING_SHARE = 0.05  # of the wall time at most goes into checkpoints that only time asks for


def train(
    run: Run | str | Path,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
    wait: bool = False,
    *,
    backbone: Backbone | None = None,
    callbacks: Sequence[Callback] = (),
    metrics: Sequence[Metric] = (),
    init: Float[np.ndarray | jax.Array, "P D"] | None = None,
) -> TrainedRun:
    """Train a run, or the config in a file, in the folder `out`, or go on where it stopped.

    What is returned has `scores`, `prompt` and `generate`. As a mapping it is the result: `validation` and `test`
    metrics of the best checkpoint (by `best_by`, or the mean of the task's metrics), `baselines` on the same split
    (majority class, the prompt before training), `steps`, `best_step`, `trainable_parameters` and `seconds`. Without a
    test split `test` is None. Without `out` the folder is a temporary one, which is not removed. A folder whose run had
    fewer `steps` is made longer. Where another command trains in the folder, this one is refused, or with `wait` waits
    for its end. In a notebook the progress is shown; elsewhere it needs a `reporter`.

    `backbone`: a loaded model, which stays as it is and is not copied; its name, dtype and quantisation become the
    run's. `callbacks`: functions of a step and a dictionary of numbers, called where the run is logged, validated,
    saved and at its end; one that returns True stops the training (training/callbacks.py). `metrics`: functions of
    predictions and targets, lists of texts, that return `{name: number}`, more is better; they are scored beside the
    task's metrics. `init`: rows [P, D] that the first method's prompt starts from. Functions and arrays, as rows in
    memory, are named in the folder's `config.yaml` only: to go on with the run, pass them again.

    Several processes (see `multihost.connect`) call this alike and share the folder, which may be on gs://.
    Errors: UserError for bad input. Raises Preempted after SIGTERM and Ctrl-C, with everything saved.
    """
    named = named_in(run if isinstance(run, Run) else load_run(run), backbone, metrics, init).expanded()
    home = RunFolder(out if out is not None else run_folder.temporary_folder(named))
    reporter = (reporter or Reporter(quiet=not in_notebook())) if is_first() else Reporter(quiet=True)
    assert_same_everywhere("versions", f"softprompt_jax {softprompt_jax.__version__}, jax {jax.__version__}")
    assert_same_everywhere("settings", settings_hash(named, without=UNHASHED_SETTINGS))
    assert_same_everywhere("mesh", str(named.mesh))
    mesh = named.mesh.build()
    with home.opened(), contextlib.ExitStack() as opened:

        def enter() -> dict[str, Any] | None:
            run_folder.create_folder(home.path)
            others = functools.partial(run_folder.check_folder, named, home.path)
            wait_s = math.inf if wait else None
            home.check = opened.enter_context(lock_folder(home.place, wait_s, reporter.line, others))
            home.fetch()
            return run_folder.check_folder(named, home.path, home.checkpoints)

        if (result := run_on_process_0(enter)) is not None:
            reporter.line(f"{home.place}: finished already; delete the folder to run it again")
            return TrainedRun(home.place, named, result, backbone)
        settings = run_on_process_0(lambda: run_folder.at_read_revisions(named, home.path).model_dump(mode="json"))
        opened.enter_context(jax.set_mesh(mesh))
        heard = opened.enter_context(Callbacks([*callbacks, *([WandB(named.wandb)] if named.wandb else [])]))
        pinned = parse(Run, settings, str(home.place))
        result = _OneRun(pinned, home, reporter, opened, backbone, heard, metrics).fit()
    return TrainedRun(home.place, pinned, result, backbone)


class Training(Protocol):
    """What `fit` trains, one run or N in one program: subclasses have these attributes and methods.

    `batches` yields batches and their counts; the training ends early where they end. `take_step` changes the state and
    returns the loss, [] or [N]. `evaluate` scores the state after a step, `save` starts to write it (the score is None
    where it was not evaluated) and what the next line says of the steps so far, `write_line` adds to the log and
    returns what the progress says. `ends` tells whether the step that is behind is the last, though more were planned.
    `finish` leaves the files for others and returns the result.
    """

    run: Run  # of N runs the first, for what all have in common
    place: str | Path
    title: str
    first: int  # step that is behind the state at the start
    last: int  # step that is behind the state now
    validated: bool  # whether the state at the start was
    pending: Any  # what was saved with that state
    state: Any
    begun: Callable[[], Any]  # called after the first step of this process
    checkpoints: Checkpoints
    preemption: Preemption
    reporter: Reporter

    def batches(self) -> Iterator[tuple[Any, BatchCounts]]: ...
    def take_step(self, batch: Any) -> Any: ...
    def evaluate(self, step: int) -> Any: ...
    def save(self, step: int, score: Any, pending: Any = None) -> None: ...
    def ends(self) -> bool: ...
    def write_line(self, step: int, speed: Speed) -> str: ...
    def finish(self) -> Any: ...

    def fit(self) -> Any:
        """Take the steps after `first` and finish. Raises Preempted, with the state saved, when it is time to go."""
        run, first, reporter = self.run, self.first, self.reporter
        if first == 0 or not self.validated:  # at 0 it shows at once whether evaluation works
            self._score(first)
        reporter.start(self.title, first, run.steps)
        meter, timer, shapes = Meter(self.pending), SaveTimer(first), set()
        self.last = first
        planned = () if self.ends() else range(first + 1, run.steps + 1)  # it may have ended before it was interrupted
        for number, (batch, counts) in zip(planned, self.batches(), strict=False):
            # ---- one step; that of a new shape compiles, and is waited for
            shape, compiling_s = tuple(rows.shape for rows in batch.values()), None
            if shape not in shapes:
                jax.block_until_ready(self.state)
                start = time.monotonic()
            loss, self.last = self.take_step(batch), number
            if shape not in shapes:
                jax.block_until_ready(loss)
                compiling_s = time.monotonic() - start
                reporter.skip(compiling_s)
                shapes.add(shape)
            meter.add(loss, counts, compiling_s)
            if number == first + 1:
                self.begun()
            # ---- what is due after it
            evaluated = run.evaluates(number)
            leaving = self.preemption.reached(loss) and number < run.steps
            planned = evaluated or number % run.checkpoint_every == 0
            saved = planned or leaving or timer.due(number)
            if planned or number % run.log_every == 0:  # at the same steps whenever the run is stopped
                reporter.update(number, run.steps, self.write_line(number, meter.read()))
                meter.restart()
            if saved:
                start = time.monotonic()
                score = self._score(number) if evaluated else None
                scored = time.monotonic()
                self.save(number, score, meter.pending())
                timer.saved(number, time.monotonic() - scored)
                meter.skip(time.monotonic() - start)
            if self.ends() and number < run.steps:
                if not evaluated:  # the state that is left needs a score
                    score = self._score(number)
                    self.checkpoints.score(number, *score) if saved else self.save(number, score, meter.pending())
                reporter.line(f"{self.place}: stopped at step {number} of {run.steps}")
                break
            if leaving:
                raise self.preemption.stopped(f"{self.place}: told to stop, saved at step {number}")
        reporter.stop()
        self.checkpoints.wait()
        with self._unless_preempted("the result was measured"):
            return self.finish()

    def _score(self, number: int) -> Any:
        with self._unless_preempted(f"step {number} was validated"):
            try:
                return self.evaluate(number)
            except PreemptedDuringEval:
                if number > self.first:
                    self.save(number, None)
                raise

    @contextlib.contextmanager
    def _unless_preempted(self, what: str) -> Iterator[None]:
        try:
            yield
        except PreemptedDuringEval:
            raise self.preemption.stopped(f"{self.place}: told to stop while {what}") from None

    def write_scores(self, log: run_folder.Log, step: int, scores: dict[str, float], name: str = "") -> None:
        """Write what a validation has found, of the run of this name if there are several."""
        log.write({"step": step, "validation": scores})
        self.reporter.line(f"{name}step {step}: validation " + "  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        if step > 0 and mostly_illegal(scores):
            self.reporter.once(ILLEGAL_HINT)


class _OneRun(Training):
    """The training of a run whose folder is checked and locked; `opened` ends what must be ended, also on errors."""

    title = "train"

    def __init__(
        self,
        run: Run,
        home: RunFolder,
        reporter: Reporter,
        opened: contextlib.ExitStack,
        backbone: Backbone | None,
        callbacks: Callbacks,
        metrics: Sequence[Metric],
    ):
        self.run, self.home, self.place, self.reporter = run, home, home.place, reporter
        self.callbacks = callbacks

        # ---- model, data, step
        self.assembly = assemble(run, backbone)
        check_devices(run, self.assembly)
        attach_context(run, self.assembly)
        model = sharding.shard_model(self.assembly.model)
        self.parts = parts = split(model)
        about = leaves(model)
        given = run, self.assembly, parts
        self.data = PretrainingRunData(*given) if run.pretraining else RunData(*given, metrics=metrics)
        self.optimizer = build_optimizer(run, about, self.assembly.identity)
        begin = functools.partial(first_state, self.optimizer)
        layout = sharding.state_sharding(jax.eval_shape(begin, parts.trainable), parts.trainable)
        self.state = jax.jit(begin, out_shardings=layout)(parts.trainable)
        self.step_function = make_step(run, parts, self.optimizer, layout)
        self.key = jax.random.fold_in(jax.random.key(run.seed), 2)
        self.trained = sum(leaf.size for leaf in jax.tree.leaves(parts.trainable))
        reporter.line(
            f"backbone {self.assembly.identity}: {model.settings.parameters():,} parameters, {self.trained:,} train; "
            f"{sharding.describe()}, {run.dtype}"
        )
        if isinstance(self.optimizer, Search):
            reporter.line(f"no gradients: {run.optimizer.kind}, {self.optimizer.population} candidates a step")
        else:
            reporter.line(describe_rates(run.method_names, run.optimizers, about))
        reporter.line(self.data.describe())

        # ---- resume. The order is important:
        # 1. The settings are written, now that everything could be built; an error before the first step takes them
        #    back.
        # 2. The state of the newest good checkpoint, if there is one, and what the next line says of steps before it.
        # 3. The scores of the validations up to it decide which checkpoint is the best; some were made after a
        #    checkpoint.
        # 4. The lines of metrics.jsonl behind it are dropped: their steps are taken again.
        # 5. Data and random keys follow from the step.
        self.preemption = opened.enter_context(Preemption())  # left last: it may end the process
        self.begun = lambda: None
        if is_first():
            self.begun = opened.enter_context(run_folder.begin_folder(run, home.path, home.send, home.check))
        checkpoints = Checkpoints(home.checkpoints, report=reporter.line)
        self.checkpoints = opened.enter_context(contextlib.closing(checkpoints))
        self.first, self.pending, lines = 0, None, None
        if (newest := self.checkpoints.restore_newest(self.state)) is not None:
            self.state, self.first = newest
            self.pending, lines = self.checkpoints.pending(self.first), self.checkpoints.lines(self.first)
            reporter.line(f"resumed at step {self.first}")
        scored = run_on_process_0(lambda: list(run_folder.scores_in(home.path, run).items()))
        scored = {step: score for step, score in scored if step <= self.first}
        for step, score in scored.items():
            self.checkpoints.score(step, *score)
        self.scored = {step: score for step, (score, _) in scored.items() if step > 0}  # the start is no candidate
        self.validated = self.first in scored or not run.evaluates(self.first)
        # A run that began before there were validation losses ends as it would have: the earliest of equal scores.
        self.losses_count = all(loss is not None for _, loss in scored.values())
        seconds = self.pending["seconds"] if self.pending else 0.0
        log = run_folder.Log(home.path, self.first, True, seconds, home.check, lines)
        self.log = opened.enter_context(contextlib.closing(log))
        if self.first == 0:
            self.log.write({"step": 0, "data": self.data.measures()})
        callbacks.begin(run, home.path)

    def ends(self) -> bool:
        """Tell whether a callback or `patience` stops the run: so many validations did not raise its score."""
        if self.run.patience is None or not self.scored:
            return self.callbacks.stop
        best = max(self.scored, key=lambda step: (self.scored[step], -step))
        waited = sum(step > best for step in self.scored)
        return waited >= self.run.patience or self.callbacks.stop

    def batches(self) -> Iterator[tuple[Any, BatchCounts]]:
        settings, (_, shares) = self.assembly.model.settings, sharding.process_share()
        for batch in self.data.batches(self.first):
            counts = count_slots(batch, settings.vocabulary_rows, settings.padding)
            yield batch, BatchCounts(*(shares * count for count in counts))

    def take_step(self, batch: Any) -> Any:
        rows = sharding.shard_local_batch(batch)
        self.state, measured = self.step_function(self.state, self.parts.frozen, rows, self.key)
        return measured["loss"]

    def evaluate(self, step: int) -> tuple[float, float | None]:
        scores, score = self.data.validate(self.state["trainable"], self.parts.frozen)
        self.write_scores(self.log, step, scores)
        if step > 0:
            self.scored[step] = score
        self.callbacks(step, {"validation": scores})
        loss = scores.get("loss") if self.losses_count else None
        if step == self.first > 0:  # its validation was cut short
            self.checkpoints.score(step, score, loss)
        return score, loss

    def save(self, step: int, score: tuple[float, float | None] | None, pending: Any = None) -> None:
        if pending is not None:
            self._check_finite(step, pending["loss"])
        self.home.check()
        self.checkpoints.save(step, self.state, *(score or (None, None)), pending, self.log.checksum())
        if is_first():
            self.home.send()
        self.callbacks(step, {"checkpoint": step})

    def write_line(self, step: int, speed: Speed) -> str:
        loss = float(speed.loss)
        self._check_finite(step, loss)
        line = speed.line(step, self.run.learning_rate(step - 1), self.log.seconds())
        self.log.write(line)
        self.callbacks(step, line)
        return f"loss {loss:.4f}  {float(speed.tokens_per_s):,.0f} tokens/s"

    def _check_finite(self, step: int, loss: float) -> None:
        if not np.isfinite(loss):
            raise Diverged(
                f"step {step}: the loss is {loss}; expected a finite number; lower the learning rate, "
                "clip the gradient or use float32",
                step,
            )

    def finish(self) -> dict[str, Any]:
        run, parts, optimizer = self.run, self.parts, self.optimizer
        best = self.checkpoints.best() if self.data.select_best else None
        best = self.last if best is None else best
        chosen = (self.state if best == self.last else self.checkpoints.restore(best, self.state))["trainable"]
        result = self.data.result(chosen, parts) | {
            "steps": self.last,
            "best_step": best,
            "trainable_parameters": self.trained,
            "seconds": round(self.log.seconds(), 1),
        }
        if isinstance(optimizer, Search):
            model = parts.merge(chosen, parts.frozen)
            result |= optimizer.report(model, self.last, self.assembly.tokenizer.decode)
        self.home.check()
        identity, lines, mistakes = self.assembly.identity, self.log.checksum(), self.data.mistakes
        run_folder.leave_files(run, self.home.path, identity, parts, chosen, result, lines, mistakes)
        if is_first():
            self.home.send()
        self.callbacks(self.last, result)
        self.reporter.line(f"{self.place}: done in {duration(result['seconds'])}")
        return result


class SaveTimer:
    """Says after SAVE_EVERY_S that it is time for a checkpoint, at the same step in every process: process 0's clock.

    Several processes agree at a few steps only, since they wait for each other there.
    """

    def __init__(self, step: int):
        self.saved(step, 0.0)

    def saved(self, step: int, seconds: float) -> None:
        """Begin to wait after a checkpoint at `step`, whose writing has held up the loop for so many seconds."""
        self._step, self._look, self._start = step, step + 1, time.monotonic()
        self._interval = max(SAVE_EVERY_S, seconds / _SAVING_SHARE)

    def due(self, step: int) -> bool:
        """Is it time to save after `step`?"""
        if step < self._look:
            return False
        waited = run_on_process_0(lambda: (time.monotonic() - self._start) / self._interval)
        if jax.process_count() > 1:  # look again at half the way to the step at which the time will be over
            self._look = step + max(1, int((1 - waited) / max(waited, 1e-6) * (step - self._step) / 2))
        return waited >= 1
