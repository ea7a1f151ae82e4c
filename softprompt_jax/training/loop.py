"""The training loop: one step for all methods, evaluation, checkpoints that resume to the bit."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import softprompt_jax
from softprompt_jax.assembly import assemble, check_devices
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
from softprompt_jax.progress import Reporter, duration
from softprompt_jax.run import UNHASHED_SETTINGS, Run
from softprompt_jax.training.run_data import ILLEGAL_HINT, PretrainingRunData, RunData, mostly_illegal
from softprompt_jax.training.run_folder import (
    Log,
    at_read_revisions,
    begin_folder,
    check_folder,
    create_folder,
    default_folder,
    leave_files,
    scores_in,
)
from softprompt_jax.training.step import State, build_optimizer, first_state, make_step

SAVE_EVERY_S = 180  # wall time after which a checkpoint is written, whatever `checkpoint_every` says
_SAVING_SHARE = 0.05  # of the wall time at most goes into checkpoints that only time asks for


def train(run: Run, out: str | Path | None = None, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train a run in the folder `out`, or go on where it stopped, and return its result.

    The result: `validation` and `test` metrics of the best checkpoint (by the mean of the task's
    metrics), `baselines` on the same split (majority class, the prompt before training), `steps`,
    `best_step`, `trainable_parameters` and `seconds`. Without a test split `test` is None. Default folder: `runs/HASH`.
    A folder whose run had fewer `steps` is made longer.

    Several processes (see `multihost.connect`) call this alike and share the folder, which may be on gs://.
    Raises Preempted after SIGTERM and Ctrl-C, with everything saved.
    """
    run = run.expanded()
    home = RunFolder(out if out is not None else default_folder(run))
    reporter = reporter if reporter is not None and is_first() else Reporter(quiet=True)
    assert_same_everywhere("versions", f"softprompt_jax {softprompt_jax.__version__}, jax {jax.__version__}")
    assert_same_everywhere("settings", settings_hash(run, without=UNHASHED_SETTINGS))
    assert_same_everywhere("mesh", str(run.mesh))
    mesh = run.mesh.build()
    with home.opened(), contextlib.ExitStack() as opened:

        def enter() -> dict[str, Any] | None:
            create_folder(home.path)
            home.check = opened.enter_context(lock_folder(home.place, report=reporter.line))
            home.fetch()
            return check_folder(run, home.path, home.checkpoints)

        if (result := run_on_process_0(enter)) is not None:
            reporter.line(f"{home.place}: finished already; delete the folder to run it again")
            return result
        settings = run_on_process_0(lambda: at_read_revisions(run, home.path).model_dump(mode="json"))
        opened.enter_context(jax.set_mesh(mesh))
        return _train(parse(Run, settings, str(home.place)), home, reporter, opened)


def _train(run: Run, home: RunFolder, reporter: Reporter, opened: contextlib.ExitStack) -> dict[str, Any]:
    """Train a run whose folder is checked and locked; `opened` ends what must be ended, also after an error."""
    folder = home.path

    # ---- model, data, step
    assembly = assemble(run)
    check_devices(run, assembly)
    model = sharding.shard_model(assembly.model)
    parts = split(model)
    about = leaves(model)
    data = PretrainingRunData(run, assembly, parts) if run.pretraining else RunData(run, assembly, parts)
    optimizer = build_optimizer(run, about, assembly.identity)

    begin = functools.partial(first_state, optimizer)
    layout = sharding.state_sharding(jax.eval_shape(begin, parts.trainable), parts.trainable)
    state = jax.jit(begin, out_shardings=layout)(parts.trainable)
    step_function = make_step(run, parts, optimizer, layout)
    _, shares = sharding.process_share()
    trained = sum(leaf.size for leaf in jax.tree.leaves(parts.trainable))
    reporter.line(
        f"backbone {assembly.identity}: {assembly.model.settings.parameters():,} parameters, {trained:,} train; "
        f"{sharding.describe()}, {run.dtype}"
    )
    if isinstance(optimizer, Search):
        reporter.line(f"no gradients: {run.optimizer.kind}, {optimizer.population} candidates a step")
    else:
        reporter.line(describe_rates(run.method_names, run.optimizers, about))
    reporter.line(data.describe())

    # ---- resume. The order is important:
    # 1. The settings are written, now that everything could be built; an error before the first step takes them back.
    # 2. The state of the latest complete checkpoint, if there is one.
    # 3. The scores of the validations up to it decide which checkpoint is the best; some were made after a checkpoint.
    # 4. The lines of metrics.jsonl behind it are dropped: their steps are taken again.
    # 5. Data and random keys follow from the step.
    preemption = opened.enter_context(Preemption())  # left last: it may end the process
    begun = opened.enter_context(begin_folder(run, folder, home.send)) if is_first() else lambda: None
    checkpoints = opened.enter_context(contextlib.closing(Checkpoints(home.checkpoints)))
    first = 0
    if (latest := checkpoints.latest()) is not None:
        state, first = checkpoints.restore(latest, state), latest
        reporter.line(f"resumed at step {first}")
    scored = run_on_process_0(lambda: [(step, *score) for step, score in scores_in(folder, run).items()])
    scored = {step: score for step, *score in scored if step <= first}
    for step, score in scored.items():
        checkpoints.score(step, *score)
    # A run that began before there were validation losses ends as it would have: the earliest of equal scores.
    losses_count = all(loss is not None for _, loss in scored.values())
    log = opened.enter_context(contextlib.closing(Log(folder, first)))
    if first == 0:
        log.write({"step": 0, "data": data.measures()})
    key = jax.random.fold_in(jax.random.key(run.seed), 2)
    vocabulary_rows = assembly.model.settings.vocabulary_rows

    def batches() -> Iterator[tuple[Any, BatchCounts]]:
        for batch in data.batches(first):
            yield batch, BatchCounts(*(shares * count for count in count_slots(batch, vocabulary_rows)))

    def take_step(state: State, batch: Any) -> tuple[State, Any]:
        state, measured = step_function(state, parts.frozen, sharding.shard_local_batch(batch), key)
        return state, measured["loss"]

    def evaluate(step: int, state: State) -> tuple[float, float | None]:
        scores, score = data.validate(state["trainable"], parts.frozen)
        log.write({"step": step, "validation": scores})
        reporter.line(f"step {step}: validation " + "  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        if step > 0 and mostly_illegal(scores):
            reporter.once(ILLEGAL_HINT)
        loss = scores.get("loss") if losses_count else None
        if step == first > 0:  # its validation was cut short
            checkpoints.score(step, score, loss)
        return score, loss

    def save(step: int, state: State, score: tuple[float, float | None] | None) -> None:
        checkpoints.save(step, state, *(score or ()))
        if is_first():
            home.send()

    def write_line(step: int, speed: Speed) -> str:
        loss = float(speed.loss)
        if not np.isfinite(loss):
            raise Diverged(
                f"step {step}: the loss is {loss}; expected a finite number; lower the learning rate, "
                "clip the gradient or use float32",
                step,
            )
        log.write(speed.line(step, run.learning_rate(step - 1), log.seconds()))
        return f"loss {loss:.4f}  {float(speed.tokens_per_s):,.0f} tokens/s"

    state = fit(
        run,
        home.place,
        first,
        state,
        take_step,
        batches(),
        evaluate,
        save,
        write_line,
        begun,
        preemption,
        reporter,
        validated=first in scored or not run.evaluates(first),
    )

    # ---- the best checkpoint's results, files for others
    checkpoints.wait()
    best = checkpoints.best() if data.select_best else None
    best = run.steps if best is None else best
    chosen = state if best == run.steps else checkpoints.restore(best, state)
    try:
        measured = data.result(chosen["trainable"], parts)
    except PreemptedDuringEval:
        raise preemption.stopped(f"{home.place}: told to stop while its result was measured") from None
    result = measured | {
        "steps": run.steps,
        "best_step": best,
        "trainable_parameters": trained,
        "seconds": round(log.seconds(), 1),
    }
    if isinstance(optimizer, Search):
        result |= optimizer.report(parts.merge(chosen["trainable"], parts.frozen), run.steps, assembly.tokenizer.decode)
    leave_files(run, folder, assembly.identity, parts, chosen["trainable"], result)
    if is_first():
        home.send()
    reporter.line(f"{home.place}: done in {duration(result['seconds'])}")
    return result


def fit(
    run: Run,
    place: str | Path,
    first: int,
    state: Any,
    step: Callable[[Any, Any], tuple[Any, Any]],
    batches: Iterable[tuple[Any, BatchCounts]],
    evaluate: Callable[[int, Any], Any],
    save: Callable[[int, Any, Any], None],
    log: Callable[[int, Speed], str],
    begun: Callable[[], Any],
    preemption: Preemption,
    reporter: Reporter,
    validated: bool = True,
    title: str = "train",
) -> Any:
    """Take the steps of `run` after `first` and return the last state: of one run, or of N in one program.

    `step(state, batch)` returns the new state and the loss, [] or [N]. `batches` yields batches and their counts; the
    training ends early where they end. `evaluate(number, state)` scores a state, `save(number, state, score)` starts
    to write it (`score` is None where it was not evaluated), `log(number, speed)` writes a line and returns what the
    progress says. `begun` is called after the first step of this process. Unless `first` is `validated`, it is now.
    Raises Preempted, with the state saved, when it is time to go.
    """

    def scored(number: int) -> Any:
        try:
            return evaluate(number, state)
        except PreemptedDuringEval:
            if number > first:
                save(number, state, None)
            raise preemption.stopped(f"{place}: told to stop while step {number} was validated") from None

    if first == 0 or not validated:  # at 0 it shows at once whether evaluation works
        scored(first)
    reporter.start(title, first, run.steps)
    meter, timer, shapes = Meter(), SaveTimer(first), set()
    for number, (batch, counts) in zip(range(first + 1, run.steps + 1), batches, strict=False):
        # ---- one step; that of a new shape compiles, and is waited for
        shape, compiling_s = tuple(rows.shape for rows in batch.values()), None
        if shape not in shapes:
            jax.block_until_ready(state)
            start = time.monotonic()
        state, loss = step(state, batch)
        if shape not in shapes:
            jax.block_until_ready(loss)
            compiling_s = time.monotonic() - start
            reporter.skip(compiling_s)
            shapes.add(shape)
        meter.add(loss, counts, compiling_s)
        if number == first + 1:
            begun()
        # ---- what is due after it
        evaluated = run.evaluates(number)
        leaving = preemption.reached(loss) and number < run.steps
        saved = evaluated or leaving or number % run.checkpoint_every == 0 or timer.due(number)
        if saved or number % run.log_every == 0:  # so that no mean reaches back past a checkpoint
            reporter.update(number, run.steps, log(number, meter.read()))
            meter.restart()
        if saved:
            score = scored(number) if evaluated else None
            start = time.monotonic()
            save(number, state, score)
            timer.saved(number, time.monotonic() - start)
            meter.restart()
        if leaving:
            raise preemption.stopped(f"{place}: told to stop, saved at step {number}")
    reporter.stop()
    return state


class Speed(NamedTuple):
    """The mean loss of some steps and how fast they were; numbers, or [N] for N runs."""

    loss: Any
    examples_per_s: Any
    tokens_per_s: Any
    padding: Any

    def line(self, step: int, learning_rate: Any, seconds: float) -> dict[str, Any]:
        """Return the line of metrics.jsonl: `tokens_per_s` counts text, `padding` is that of BatchCounts."""
        return {
            "step": step,
            "loss": float(self.loss),
            "learning_rate": learning_rate,
            "examples_per_s": round(float(self.examples_per_s), 2),
            "tokens_per_s": round(float(self.tokens_per_s), 1),
            "padding": round(float(self.padding), 4),
            "seconds": round(seconds, 2),
        }


class Meter:
    """Losses and counts of the steps since the last line; steps that compiled are left out of the speed."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new line."""
        self._steps: list[tuple[Any, BatchCounts, float | None]] = []
        self._start = time.monotonic()

    def add(self, loss: Any, counts: BatchCounts, compiling_s: float | None) -> None:
        """Add a step, and how long it took if it compiled."""
        self._steps.append((loss, counts, compiling_s))

    def read(self) -> Speed:
        """Wait for the steps and return their means."""
        losses, counts, compiled = zip(*self._steps, strict=True)
        loss = np.mean([np.asarray(loss, np.float64) for loss in losses], axis=0)
        seconds = time.monotonic() - self._start
        fast = [counts for _, counts, compiling_s in self._steps if compiling_s is None]
        if fast:
            seconds -= sum(filter(None, compiled))
        done = _total(fast or counts)
        return Speed(loss, done.examples / seconds, done.text / seconds, _total(counts).padding)


def _total(counts: Sequence[BatchCounts]) -> BatchCounts:
    return BatchCounts(*(np.sum(each, axis=0) for each in zip(*counts, strict=True)))


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
