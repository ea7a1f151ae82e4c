"""The training loop: one step for all methods, evaluation, checkpoints that resume to the bit."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import softprompt_jax
from softprompt_jax import config
from softprompt_jax.assembly import assemble, check_mesh
from softprompt_jax.checkpoints import artifact
from softprompt_jax.config import Diverged, Preempted, UserError, differences, settings_hash, to_yaml
from softprompt_jax.data.batches import examples_in
from softprompt_jax.distributed import mesh as sharding
from softprompt_jax.distributed.cloud_files import RunFolder
from softprompt_jax.distributed.multihost import CutShort, Preemption, agreed, alone_in, is_first, on_first
from softprompt_jax.inference.evaluate import headline
from softprompt_jax.methods import Split, finish, leaves, split
from softprompt_jax.optim import optimizers
from softprompt_jax.optim.gradient_free import Search
from softprompt_jax.optim.losses import cross_entropy, finite_mean
from softprompt_jax.progress import Reporter, duration
from softprompt_jax.run import MACHINE, Run
from softprompt_jax.training import remat
from softprompt_jax.training.checkpoints import Checkpoints
from softprompt_jax.training.run_data import PretrainingRun, TaskRun

State = dict[str, Any]  # trainable, optimizer, step (which is also the data position)


def train(run: Run, out: str | Path | None = None, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train a run in the folder `out`, or go on where it stopped, and return its result.

    The result: `validation` and `test` metrics of the best checkpoint (by the mean of the task's
    metrics), `baselines` on the same split (majority class, the prompt before training), `steps`,
    `best_step`, `trainable_parameters` and `seconds`. Without a test split `test` is None. Default folder: `runs/HASH`.

    Several processes (see `processes.connect`) call this alike and share the folder, which may be on gs://.
    Raises Preempted after SIGTERM, with everything saved.
    """
    run = run.expanded()
    home = RunFolder(out if out is not None else Path("runs") / settings_hash(run, without=MACHINE))
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
        return _train(run, home, reporter, opened)


def _train(run: Run, home: RunFolder, reporter: Reporter, opened: contextlib.ExitStack) -> dict[str, Any]:
    """Train a run whose folder is prepared; `opened` ends what must be ended, also after an error."""
    folder = home.path
    # ---- model, data, step
    assembly = assemble(run)
    check_mesh(run, assembly)
    model = sharding.place(assembly.model)
    parts = split(model)
    about = leaves(model)
    data = PretrainingRun(run, assembly, parts) if run.pretraining else TaskRun(run, assembly, parts)
    schedule = run.schedule.build(run.optimizer.learning_rate, run.steps)
    settings, slots = optimizers.read_slots(run.optimizer, assembly.identity)
    optimizer = optimizers.build(settings, schedule, about, run.clip_norm)
    if slots:
        optimizer = optimizers.from_slots(optimizer, slots, assembly.identity)

    begin = functools.partial(first_state, optimizer)
    layout = sharding.layout(jax.eval_shape(begin, parts.trainable), parts.trainable)
    state = jax.jit(begin, out_shardings=layout)(parts.trainable)
    step_function = make_step(run, parts, optimizer, layout)
    _, shares = sharding.process_share()
    trained = sum(leaf.size for leaf in jax.tree.leaves(parts.trainable))
    scales = sorted({leaf.learning_rate_scale for leaf in about.values()})
    reporter.line(
        f"backbone {assembly.identity}: {assembly.model.settings.parameters():,} parameters, {trained:,} train; "
        f"{sharding.describe()}, {run.dtype}"
    )
    rate = run.optimizer.learning_rate
    if isinstance(optimizer, Search):
        reporter.line(f"no gradients: {run.optimizer.kind}, {optimizer.population} candidates a step")
    else:
        reporter.line(
            f"learning rate {' and '.join(f'{rate * scale:.4g}' for scale in scales)} "
            f"({rate:g} x scale {', '.join(f'{scale:.4g}' for scale in scales)} of the embedding)"
        )
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
        state, measured = step_function(state, parts.frozen, sharding.spread(batch), key)
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
                "learning_rate": float(np.asarray(schedule(step - 1))),
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


def leave_files(
    run: Run, folder: Path, identity: str, parts: Split, trainable: dict[str, Any], result: dict[str, Any]
) -> None:
    """Write what a finished run leaves for others: everything trained, prompts, and last `result.json`."""
    whole = jax.tree.map(lambda leaf: jnp.asarray(sharding.collect(leaf)), trainable)
    final = parts.merge(whole, parts.frozen)
    metadata = {
        "backbone": identity,
        "task": run.task_name,
        "settings_hash": settings_hash(run, without=MACHINE),
        "step": str(result["best_step"]),
        "settings": json.dumps(run.model_dump(mode="json")),
        "fingerprint": artifact.fingerprint(final),
    }

    def write() -> None:
        artifact.save_trained(finish(final), folder / artifact.TRAINED_FILE, metadata)
        if set(parts.trainable) == {"prompt"}:
            rows, placed = np.asarray(final.prompt.table()), metadata | {"place": final.prompt.place}
            if run.own_prompts:
                save_own_prompts(run, rows, folder, placed)
            else:
                artifact.save_prompt(rows, folder / artifact.PROMPT_FILE, placed)
        artifact.dump(result, folder / "result.json")

    on_first(write, str(folder))


def save_own_prompts(run: Run, rows: np.ndarray, folder: Path, metadata: dict[str, str]) -> None:
    """Write the prompt of each task of a mixture as if the task had had a run of its own."""
    for task, own in zip(run.tasks, np.split(rows, len(run.tasks)), strict=True):
        settings = run.model_copy(update={"task": task}).model_dump(mode="json")
        path = artifact.own_prompt_file(folder, task.name)
        path.parent.mkdir(exist_ok=True)
        artifact.save_prompt(own, path, metadata | {"task": task.name, "settings": json.dumps(settings)})


def first_state(optimizer: optax.GradientTransformation | Search, trainable: Any) -> State:
    """Return the state before the first step."""
    return {
        "trainable": jax.tree.map(jnp.copy, trainable),  # donated; the start is compared with later
        "optimizer": optimizer.init(trainable),
        "step": jnp.zeros((), jnp.int32),
    }


def make_step(
    run: Run,
    parts: Split,
    optimizer: optax.GradientTransformation | Search,
    state_shardings: Any = None,
    memory: int | None = None,
) -> Callable:
    """Return the jitted `step(state, frozen, batch, key) -> state, metrics`; `state` is donated.

    `state_shardings` keeps the state where it lies, which XLA would be free to change. `memory` are the bytes of a
    device, by default what it tells itself.
    """
    memory, room = memory or remat.memory(), None
    if run.remat == "auto" and memory is not None:
        state = jax.eval_shape(functools.partial(first_state, optimizer), parts.trainable)
        state = sharding.described(state, state_shardings)
        held = sharding.local_bytes(parts.frozen) + 2 * sharding.local_bytes(state)  # with gradient and updates
        room = remat.room(held, memory)
    step = plain_step(run, parts, optimizer, room)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def plain_step(
    run: Run, parts: Split, optimizer: optax.GradientTransformation | Search, room: int | None = None
) -> Callable:
    """Return `step(state, frozen, batch, key) -> state, metrics`.

    With `remat: auto` each shape of a batch keeps as many activations as fit into `room` bytes of a device.

    Only the trainable argument is differentiated, so that no weight gradient of the frozen backbone is
    ever computed. A search differentiates nothing: all its candidates are scored at once, without dropout. With
    accumulation losses and weights are summed over the parts and divided once.
    """

    def summed_loss(trainable: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array | None, policy=None):
        model = parts.merge(trainable, jax.lax.stop_gradient(frozen))
        if policy is not None:
            model.encoder.remat = model.decoder.remat = policy
        hidden = model.hidden(batch, key)
        logits = model.project(hidden)
        loss, weight = cross_entropy(logits, batch["decoder_targets"], run.z_loss, run.label_smoothing)
        return loss + sum(method.penalty(model, batch, hidden, logits) for method in run.methods), weight

    gradient = jax.value_and_grad(summed_loss, has_aux=True)

    def part_gradient(trainable: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array | None):
        def kept(policy: remat.Policy) -> int:
            return remat.kept_bytes(lambda own, some: summed_loss(own, frozen, some, key, policy)[0], trainable, batch)

        policy = remat.choose(kept, room) if run.remat == "auto" and room is not None else None
        (loss, weight), gradients = gradient(trainable, frozen, batch, key, policy)
        return loss, weight, gradients

    def divided(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return jax.tree.map(lambda x: x.reshape(run.accumulate, -1, *x.shape[1:]), batch)

    def search_step(state: State, frozen: Any, batch: dict[str, jax.Array], key: jax.Array):
        assert isinstance(optimizer, Search)
        key = jax.random.fold_in(key, state["step"])
        candidates, drawn = optimizer.propose(state["optimizer"], state["trainable"], frozen, key)
        score = jax.vmap(lambda one, part: summed_loss(one, frozen, part, None), (0, None))
        losses, weights = jax.tree.map(
            lambda x: x.sum(0), jax.lax.map(lambda part: score(candidates, part), divided(batch))
        )
        losses = losses / jnp.maximum(weights, 1)
        trainable, searched = optimizer.choose(state["optimizer"], state["trainable"], drawn, losses)
        state = {"trainable": trainable, "optimizer": searched, "step": state["step"] + 1}
        return state, {"loss": finite_mean(losses)}

    if isinstance(optimizer, Search):
        return search_step

    def step(state: State, frozen: Any, batch: dict[str, jax.Array], key: jax.Array):
        dropout_key = jax.random.fold_in(key, state["step"]) if run.draws_dropout else None
        trainable = state["trainable"]
        if run.accumulate == 1:
            loss, weight, gradients = part_gradient(trainable, frozen, batch, dropout_key)
        else:
            keys = None if dropout_key is None else jax.random.split(dropout_key, run.accumulate)

            def add(total, part):
                return jax.tree.map(jnp.add, total, part_gradient(trainable, frozen, *part)), None

            zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
            (loss, weight, gradients), _ = jax.lax.scan(add, zeros, (divided(batch), keys))
        weight = jnp.maximum(weight, 1)
        if run.loss == "mean":
            gradients = jax.tree.map(lambda g: g / weight, gradients)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], trainable)
        new = {
            "trainable": optax.apply_updates(trainable, updates),
            "optimizer": optimizer_state,
            "step": state["step"] + 1,
        }
        return new, {"loss": loss / weight}

    return step


def scores_in(folder: Path, run: Run) -> dict[int, float]:
    """Return the score of each validation in a run's `metrics.jsonl`, by step."""
    path, found = folder / "metrics.jsonl", {}
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # the last line of a killed run
            line = json.loads(text)
            if "validation" in line:
                found[line["step"]] = headline(run, line["validation"])
    return found


class Log:
    """`metrics.jsonl` and TensorBoard events; what a killed run wrote past its checkpoint is dropped.

    Only the first process writes.
    """

    def __init__(self, folder: Path, first: int, validated: bool = True):
        """Go on after step `first`; unless that is `validated`, its validation is written anew."""
        from tensorboardX import SummaryWriter

        self._path = folder / "metrics.jsonl"
        self._before, self._start = 0.0, time.monotonic()
        self._events: Any = None
        if not is_first():
            return
        if self._path.exists():
            kept = []
            for text in self._path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except ValueError:  # the last line of a killed run
                    continue
                if line["step"] <= first and first > 0 and (validated or line["step"] < first or "loss" in line):
                    kept.append(text)
                    self._before = line.get("seconds", self._before)
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(f"{text}\n" for text in kept))
            partial.replace(self._path)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first or None)

    def seconds(self) -> float:
        """Return the seconds of this run, those before a restart included."""
        return self._before + time.monotonic() - self._start

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, and its numbers as curves."""
        if self._events is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if isinstance(value, dict):
                for inner, number in value.items():
                    self._events.add_scalar(f"{name}/{inner}", number, line["step"])
            elif name != "step":
                self._events.add_scalar(name, value, line["step"])
        self._events.flush()  # what a kill loses of a curve would not be drawn again

    def close(self) -> None:
        """End the curves."""
        if self._events is not None:
            self._events.close()


def prepare_folder(run: Run, folder: Path) -> dict[str, Any] | None:
    """Create a run's folder; return the result if it is finished; refuse one with other settings."""
    settings, partial = folder / "config.yaml", folder / "config.partial"
    if settings.exists():
        saved = config.parse(Run, config.read(settings), str(settings))  # fills in settings that are newer than it
        old, new = (each.model_dump(mode="json", exclude=set(MACHINE)) for each in (saved, run))
        changed = differences(old, new)
        if changed:
            raise UserError(
                f"{folder}: was made with other settings ({'; '.join(changed[:6])}); "
                "expected the same; use another --out, or delete the folder"
            )
        finished = folder / "result.json"
        return json.loads(finished.read_text()) if finished.exists() else None
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected a folder for the run; use another --out")
    try:
        if folder.exists() and set(folder.iterdir()) - {partial}:
            raise UserError(f"{folder}: is not empty and no run; expected a new folder; use another --out")
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(to_yaml(run))
        partial.replace(settings)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); expected a writable folder") from None
    return None
