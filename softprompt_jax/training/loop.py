"""The training loop: one step for all methods, evaluation, checkpoints that resume to the bit."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import softprompt_jax
from softprompt_jax.assembly import assemble, check_mesh
from softprompt_jax.config import Diverged, Preempted, settings_hash
from softprompt_jax.data.batches import examples_in
from softprompt_jax.distributed import mesh as sharding
from softprompt_jax.distributed.cloud_files import RunFolder
from softprompt_jax.distributed.multihost import CutShort, Preemption, agreed, alone_in, is_first, on_first
from softprompt_jax.methods import leaves, split
from softprompt_jax.optim.gradient_free import Search
from softprompt_jax.optim.optimizers import describe_rates
from softprompt_jax.progress import Reporter, duration
from softprompt_jax.run import MACHINE, Run
from softprompt_jax.training.checkpoints import Checkpoints
from softprompt_jax.training.run_data import PretrainingRun, TaskRun
from softprompt_jax.training.run_folder import (
    Log,
    at_saved_revisions,
    default_folder,
    leave_files,
    prepare_folder,
    scores_in,
)
from softprompt_jax.training.step import State, build_optimizer, first_state, make_step


def train(run: Run, out: str | Path | None = None, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train a run in the folder `out`, or go on where it stopped, and return its result.

    The result: `validation` and `test` metrics of the best checkpoint (by the mean of the task's
    metrics), `baselines` on the same split (majority class, the prompt before training), `steps`,
    `best_step`, `trainable_parameters` and `seconds`. Without a test split `test` is None. Default folder: `runs/HASH`.

    Several processes (see `processes.connect`) call this alike and share the folder, which may be on gs://.
    Raises Preempted after SIGTERM, with everything saved.
    """
    run = run.expanded()
    home = RunFolder(out if out is not None else default_folder(run))
    reporter = reporter if reporter is not None and is_first() else Reporter(quiet=True)
    agreed("versions", f"softprompt_jax {softprompt_jax.__version__}, jax {jax.__version__}")
    agreed("settings", settings_hash(run, without=MACHINE))
    agreed("mesh", str(run.mesh))
    mesh = run.mesh.build()

    def prepare() -> None:
        home.fetch()
        prepare_folder(run, home.path)
        home.send()

    with home.opened(), contextlib.ExitStack() as opened:
        on_first(prepare, home.place)
        if is_first():
            opened.enter_context(alone_in(home.path))
        else:
            home.fetch()
        if (finished := home.path / "result.json").exists():
            reporter.line(f"{home.place}: finished already; delete the folder to run it again")
            return json.loads(finished.read_text())
        opened.enter_context(jax.set_mesh(mesh))
        return _train(at_saved_revisions(run, home.path), home, reporter, opened)


def _train(run: Run, home: RunFolder, reporter: Reporter, opened: contextlib.ExitStack) -> dict[str, Any]:
    """Train a run whose folder is prepared; `opened` ends what must be ended, also after an error."""
    folder = home.path
    # ---- model, data, step
    assembly = assemble(run)
    check_mesh(run, assembly)
    model = sharding.shard_model(assembly.model)
    parts = split(model)
    about = leaves(model)
    data = PretrainingRun(run, assembly, parts) if run.pretraining else TaskRun(run, assembly, parts)
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

    # ---- resume: state, then everything that is derived from it
    preemption = opened.enter_context(Preemption())  # left last: it may end the process
    checkpoints = opened.enter_context(contextlib.closing(Checkpoints(home.checkpoints)))
    first = 0
    if (latest := checkpoints.latest()) is not None:
        state, first = checkpoints.restore(latest, state), latest
        reporter.line(f"resumed at step {first}")
    scored = {step: score for step, score in scores_in(folder, run).items() if step <= first}
    for step, score in scored.items():
        checkpoints.score(step, score)
    log = opened.enter_context(contextlib.closing(Log(folder, first)))
    key = jax.random.fold_in(jax.random.key(run.seed), 2)

    def evaluate(step: int, state: State) -> float:
        try:
            scores, score = data.validate(state["trainable"], parts.frozen)
        except CutShort:
            if step > first:
                checkpoints.save(step, state)
                checkpoints.wait()
            if is_first():
                home.send()
            told = f"told to stop while step {step} was validated; the same command goes on"
            raise Preempted(f"{home.place}: {told}") from None
        log.write({"step": step, "validation": scores})
        reporter.line(f"step {step}: validation " + "  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        return score

    # ---- the loop
    reporter.start("train", first, run.steps)
    if first == 0:
        log.write({"step": 0, "data": data.measures()})
        evaluate(0, state)  # the start; also shows at once whether evaluation works
    elif run.evaluates(first) and first not in scored:  # its validation was cut short
        checkpoints.score(first, evaluate(first, state))
        if is_first():
            home.send()
    batches = data.batches(first)
    recent: list[tuple[Any, int, int, int]] = []
    clock = time.monotonic()
    for step in range(first + 1, run.steps + 1):
        batch = next(batches)
        tokens = [batch[name] for name in ("encoder_tokens", "decoder_targets")]
        real, padded = sum(int(np.count_nonzero(side)) for side in tokens), sum(side.size for side in tokens)
        state, measured = step_function(state, parts.frozen, sharding.shard_local_batch(batch), key)
        recent.append((measured, shares * real, shares * examples_in(batch), shares * padded))
        evaluated = run.evaluates(step)
        leaving = preemption.reached(measured) and step < run.steps
        saved = evaluated or leaving or step % run.checkpoint_every == 0
        if step % run.log_every == 0 or saved:  # so that no mean reaches back past a checkpoint
            loss = float(np.mean([float(measured["loss"]) for measured, *_ in recent]))
            now = time.monotonic()
            per_second = [sum(entry[i] for entry in recent) / (now - clock) for i in (1, 2)]
            line = {
                "step": step,
                "loss": loss,
                "learning_rate": run.learning_rate(step - 1),
                "examples_per_s": round(per_second[1], 2),
                "tokens_per_s": round(per_second[0], 1),
                "padding": round(1 - sum(entry[1] for entry in recent) / sum(entry[3] for entry in recent), 4),
                "seconds": round(log.seconds(), 2),
            }
            if not np.isfinite(loss):
                raise Diverged(
                    f"step {step}: the loss is {loss}; expected a finite number; lower the learning rate, "
                    "clip the gradient or use float32",
                    step,
                )
            log.write(line)
            reporter.update(step, run.steps, f"loss {loss:.4f}  {per_second[0]:,.0f} tokens/s")
            recent, clock = [], now
        if saved:
            paused = time.monotonic()
            checkpoints.save(step, state, evaluate(step, state) if evaluated else None)
            if is_first():
                home.send()
            clock += time.monotonic() - paused
        if leaving:
            checkpoints.wait()
            raise Preempted(f"{home.place}: told to stop, saved at step {step}; the same command goes on")
    reporter.stop()

    # ---- the best checkpoint's results, files for others
    checkpoints.wait()
    best = checkpoints.best() if data.select_best else run.steps
    assert best is not None
    chosen = state if best == run.steps else checkpoints.restore(best, state)
    try:
        measured = data.result(chosen["trainable"], parts)
    except CutShort:
        raise Preempted(f"{home.place}: told to stop while its result was measured; the same command goes on") from None
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
