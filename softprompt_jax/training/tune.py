"""A race for settings: successive halving (Jamieson and Talwalkar, 2016), whose winner then trains to the end.

In each round every candidate trains from the beginning, with its schedule as long as the round, and the third with the
lowest validation loss goes on. All rounds have the same share of the budget, so that fewer candidates train longer.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from softprompt_jax import config
from softprompt_jax.checkpoints import artifact
from softprompt_jax.config import UserError
from softprompt_jax.distributed import mesh
from softprompt_jax.distributed.cloud_files import is_remote
from softprompt_jax.distributed.folder_lock import lock_folder
from softprompt_jax.files import read_object
from softprompt_jax.inference.evaluate import score_factor, score_text
from softprompt_jax.progress import Reporter, duration
from softprompt_jax.run import Run
from softprompt_jax.training.loop import train
from softprompt_jax.training.run_folder import create_folder, read_metrics, read_result, scores_in
from softprompt_jax.training.sweep import SHORT, Member, members, train_members
from softprompt_jax.training.vmapped import FAILED_FILE

KEPT = 3  # of so many candidates one goes on
BUDGET = 8  # times the steps of the config, where no budget is stated
EXAMPLES = 256  # of the validation split, by which candidates are judged
TUNE_FILE, WINNER, ROUNDS = "tune.json", "winner", "rounds"
_RATES = (0.1, 1 / 3, 1.0, 3.0, 10.0)  # times the learning rate of the config
_PROBE = 8  # steps by which a step's time is known before the first round
_TOGETHER = 8
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Budget(NamedTuple):
    """What all candidates may take together: steps, or seconds."""

    amount: float
    is_time: bool


def tune(
    run: Run | str | Path,
    out: str | Path,
    over: Sequence[str] = (),
    overrides: Sequence[str] = (),
    budget: str | int | None = None,
    together: int | None = None,
    reporter: Reporter | None = None,
    wait: bool = False,
) -> dict[str, Any]:
    """Find settings for a run (or the config in a file) by a race, train the winner in `out`/winner, return what
    `tune.json` holds.

    `over`: settings and their values as in `sweep`; by default five learning rates around the run's, and for prompts
    starts and lengths. `budget`: steps of all candidates together (4000), or time ("20m"); by default 8 times the run's
    steps. The winner's own training comes on top. `together`: prompts of one shape that train in one program; by
    default 8 on an accelerator or where batches have one shape, else 1, which is faster there (benchmarks/README.md).
    `wait`: for the end of another command in the folder. The same call goes on where a killed one stopped. Source of
    the method: Jamieson and Talwalkar, 2016.

    Returned: `rounds`, each with its `steps`, `seconds` and `candidates` from the best (name, settings, loss, score, or
    why one failed); `winner`, its `settings`, and the `result` of its run. Errors: UserError for settings that differ
    from those of a race in the folder, and for a budget too small for one step of each candidate.
    """
    reporter, folder = reporter or Reporter(quiet=True), Path(out)
    if is_remote(out):
        raise UserError(f"{out}: is not on this machine; expected a local folder; copy the winner's run afterwards")
    if jax.process_count() > 1:
        raise UserError(f"tune: {jax.process_count()} processes; expected one")
    if together is not None and together < 1:
        raise UserError(f"tune: found together {together}; expected 1 or more")
    where = "run" if isinstance(run, Run) else str(run)
    base = config.parse(Run, config.read(run, overrides), where)
    limit = read_budget(str(BUDGET * base.steps if budget is None else budget))
    asked = {"over": [*over] or default_space(base), "budget": [*limit]}
    create_folder(folder)
    with lock_folder(folder, math.inf if wait else None, reporter.line):
        state = _begun(folder, base, asked)
        base = config.parse(Run, state["run"], str(folder / TUNE_FILE))  # at the revisions of hub data read at first
        found = members(base, asked["over"])
        if len(found) < 2:
            raise UserError(f"tune: {len(found)} candidate; expected two or more; give more values, or use train")
        race = _Race(folder, state, limit, together or _fastest(base), reporter)
        winner = race.run(found)
        reporter.line(f"winner: {winner.name}, now {winner.run.steps} steps in {folder / WINNER}")
        result = train(winner.run, folder / WINNER, reporter).result
        shutil.rmtree(folder / ROUNDS, ignore_errors=True)  # what a kill left of rounds that are over
        state |= {"winner": winner.name, "settings": winner.varied, "result": result}
        artifact.dump(state, folder / TUNE_FILE)
    return state


def read_budget(text: str) -> Budget:
    """Read `4000` as steps, `90s`, `20m` and `2h` as time."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([smh]?)", text.strip())
    if found is None or float(found[1]) == 0 or ("." in found[1] and not found[2]):
        raise UserError(
            f"--budget {text[:40]}: expected steps of all candidates together (4000), or time (90s, 20m, 2h)"
        )
    return Budget(float(found[1]) * _UNITS.get(found[2], 1.0), bool(found[2]))


def default_space(run: Run) -> list[str]:
    """Return the settings that are tried for a run where none are stated, as `--over` takes them."""
    rate, first = getattr(run.optimizer, "learning_rate", None), run.methods[0]
    found = [] if not rate else [f"learning_rate={','.join(f'{rate * factor:.2g}' for factor in _RATES)}"]
    for name, values in first.space(any(task.words for task in run.tasks)).items():
        found.append(f"{'' if name in SHORT else 'methods.0.'}{name}={','.join(map(str, values))}")
    if not found:
        raise UserError(f"tune: {first.kind} has no learning rate to try; expected settings and values; add --over")
    return found


def _fastest(run: Run) -> int:
    """Return how many prompts to train in one program: on a CPU several only where none pads the others' batches."""
    with jax.set_mesh(run.mesh.build()):
        accelerator = mesh.platform() != "cpu"
    return _TOGETHER if accelerator or run.packing is not None or run.max_compiled_shapes == 1 else 1


def _begun(folder: Path, base: Run, asked: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of the race in a folder, or begin one.

    Errors: UserError for a race with other settings of which a candidate has trained.
    """
    path, expected = folder / TUNE_FILE, "a race; use another --out, or delete the folder to begin again"
    if not path.exists():
        if others := sorted(one.name for one in folder.iterdir()):
            raise UserError(f"{folder}: holds {', '.join(others[:3])}, no {TUNE_FILE}; expected nothing, or {expected}")
        return asked | {"run": base.pinned().model_dump(mode="json"), "rounds": []}
    state = read_object(path, expected)
    if not {"over", "budget", "run", "rounds"} <= set(state):
        raise UserError(f"{path}: lacks settings or rounds; expected {expected}")
    base = base.at_revisions_of(config.parse(Run, state["run"], str(path)))
    new = asked | {"run": base.model_dump(mode="json")}
    if changed := config.differences({key: state[key] for key in new}, new):
        if any("kept" in one for one in state["rounds"]) or any((folder / ROUNDS).glob("*/*/config.yaml")):
            raise UserError(f"{folder}: was begun with other settings ({'; '.join(changed[:6])}); expected {expected}")
        shutil.rmtree(folder / ROUNDS, ignore_errors=True)
        return new | {"rounds": []}
    return state


class _Race:
    """The rounds of a race, of which `state` says what is known."""

    def __init__(self, folder: Path, state: dict[str, Any], budget: Budget, together: int, reporter: Reporter):
        self.folder, self.state, self.budget, self.together, self.reporter = folder, state, budget, together, reporter

    def run(self, found: Sequence[Member]) -> Member:
        """Run the rounds that are left, and return the winner."""
        left = {member.name: member for member in found}
        if self.budget.is_time and "probe" not in self.state:
            self._probe(found)
        for number in range(1, _rounds(len(found)) + 1):
            over = number <= len(self.state["rounds"]) and "kept" in self.state["rounds"][number - 1]
            if not over and not self._round(number, [*left.values()], _rounds(len(found)) - number + 1):
                break
            try:
                left = {name: left[name] for name in self.state["rounds"][number - 1]["kept"]}
            except KeyError as name:
                raise UserError(
                    f"{self.folder / TUNE_FILE}: no candidate {name}; expected the file of this race"
                ) from None
        return next(iter(left.values()))

    def _probe(self, found: Sequence[Member]) -> None:
        """Note the time of a step: of the last candidate, which has the largest values, or of one that it can train."""
        artifact.dump(self.state, self.folder / TUNE_FILE)  # so that the folder is a race's, if it ends here
        for one in reversed(found):
            self._train("probe", [one], min(_PROBE, one.run.steps), "a first look at the time of a step")
            cost = self._cost("probe", [one])
            if cost["step_s"] > 0:  # it did not diverge
                self.state["probe"] = cost
                self._write("probe")
                return
        raise UserError(
            f"tune: all {len(found)} candidates diverged in their first steps; expected one whose loss is finite; "
            "try lower rates: --over learning_rate=..."
        )

    def _round(self, number: int, left: list[Member], remaining: int) -> bool:
        """Train a round and note who goes on; return False if there is nothing left to train."""
        rounds, most = self.state["rounds"], left[0].run.steps
        if number > len(rounds):
            steps = min(self._affordable(len(left), remaining), *(member.run.steps for member in left))
            before = rounds[-1]["steps"] if rounds else 0
            if steps <= before:  # the budget is used up, or they have trained to the end
                return False
            rounds.append({"steps": steps})
            artifact.dump(self.state, self.folder / TUNE_FILE)
        steps, name = rounds[-1]["steps"], str(number)
        title = f"round {number}: {len(left)} candidates, {steps} of {most} steps"
        self.reporter.line(title)
        self._train(name, left, steps, f"round {number}")
        judged = sorted((self._judge(name, member) for member in left), key=_place)
        if "failed" in judged[0]:
            raise UserError(
                f"tune: all {len(left)} candidates diverged in round {number}; expected one whose loss is finite; "
                "try lower rates: --over learning_rate=..."
            )
        count = -(-len(left) // KEPT)
        kept = [one["name"] for one in judged[:count] if "failed" not in one]
        rounds[-1] |= self._cost(name, left) | {"candidates": judged, "kept": kept}
        self._write(name)
        self.reporter.line(f"round {number}: {len(kept)} go on; best {kept[0]}, loss {judged[0]['loss']:.4g}")
        return True

    def _affordable(self, candidates: int, remaining: int) -> int:
        """Return how many steps each candidate may take, if the rounds that remain share what is left evenly."""
        rounds, total = self.state["rounds"], self.budget.amount
        known = [self.state["probe"], *rounds] if self.budget.is_time else rounds
        used = sum(one["seconds"] if self.budget.is_time else one["steps"] * len(one["candidates"]) for one in known)
        share = (total - used) / remaining / candidates
        start_s, step_s = (known[-1]["start_s"], known[-1]["step_s"]) if self.budget.is_time else (0.0, 1.0)
        steps = int((share - start_s) / step_s)
        if steps < 1 and not rounds:
            enough = math.ceil((start_s + step_s) * candidates * remaining + used)
            needed = f"{enough}s" if self.budget.is_time else f"{enough} steps"
            raise UserError(
                f"tune: the budget is too small for one step of each of {candidates} candidates in the first of "
                f"{remaining} rounds; expected at least {needed}; give more, or fewer values to try (--over)"
            )
        return steps

    def _train(self, name: str, left: Sequence[Member], steps: int, title: str) -> None:
        short = [dataclasses.replace(member, run=_shortened(member.run, steps)) for member in left]

        def before(group: Sequence[Member]) -> None:
            self.reporter.line(f"{title}: {'; '.join(member.name for member in group)}")

        train_members(short, self._home(name), self.together, Reporter(quiet=True), before_group=before)

    def _judge(self, name: str, member: Member) -> dict[str, Any]:
        """Return a candidate's line: its loss and score on the validation split, or at which step it failed."""
        folder, line = self._home(name) / member.name, {"name": member.name, "settings": member.varied}
        if (folder / FAILED_FILE).exists():
            return line | {"failed": read_object(folder / FAILED_FILE, "a step and a reason").get("step")}
        step, (score, loss) = max(scores_in(folder, member.run.model_copy(update={"best_by": None})).items())
        if loss is None or not math.isfinite(loss):
            return line | {"failed": step}
        return line | {"loss": loss, "score": score}

    def _cost(self, name: str, left: Sequence[Member]) -> dict[str, float]:
        """Return the seconds of a round, of a step of one candidate, and of what each takes besides its steps."""
        seconds, steps_s, steps = 0.0, [], 0
        for member in left:
            folder = self._home(name) / member.name
            result, lines = read_result(folder), read_metrics(folder / "metrics.jsonl")
            if result is not None and (
                speeds := [line["examples_per_s"] for line in lines if "examples_per_s" in line]
            ):
                shared = result.get("together", 1)
                seconds, steps = seconds + result["seconds"] / shared, result["steps"]
                steps_s.append(member.run.batch_size / max(speeds[-1], 1e-9) / shared)
        step_s = float(np.mean(steps_s)) if steps_s else 0.0
        start_s = max(0.0, seconds / max(1, len(steps_s)) - steps * step_s)
        return {"seconds": round(seconds, 1), "step_s": step_s, "start_s": start_s}

    def _home(self, name: str) -> Path:
        return self.folder / ROUNDS / name

    def _write(self, name: str) -> None:
        """Write what is known, and delete the runs that it is known from."""
        artifact.dump(self.state, self.folder / TUNE_FILE)
        shutil.rmtree(self._home(name))


def _shortened(run: Run, steps: int) -> Run:
    """Return a candidate's run of a round: its schedule is as long as the round, and little is evaluated."""
    warmup = run.schedule.warmup_steps * steps // run.steps
    changes = {
        "steps": steps,
        "schedule": run.schedule.model_dump() | {"warmup_steps": warmup},
        **dict.fromkeys(("evaluate_every", "checkpoint_every"), steps),
        "log_every": min(run.log_every, steps),
        "evaluation_examples": min(run.evaluation_examples or EXAMPLES, EXAMPLES),
        "result_examples": run.evaluation_batch_size,  # of a result that nobody reads
        **dict.fromkeys(("patience", "best_by", "wandb")),  # the winner's own run is watched
    }
    return config.parse(Run, run.model_dump(mode="json") | changes, "tune")


def _rounds(candidates: int) -> int:
    """Return how many rounds it takes until one candidate is left."""
    return 0 if candidates <= 1 else 1 + _rounds(-(-candidates // KEPT))


def _place(judged: dict[str, Any]) -> tuple[bool, float]:
    """Order candidates: by loss, those that diverged last."""
    return "failed" in judged, judged.get("loss", 0.0)


def describe(state: dict[str, Any]) -> Iterator[str]:
    """Yield a race's table as lines: each candidate with the last round that it was in, and why it fell."""
    factor = score_factor(config.parse(Run, state["run"], TUNE_FILE))
    width = max(len(one["name"]) for one in state["rounds"][0]["candidates"])
    yield f"{'candidate':{width}}  {'steps':>6}  {'loss':>8}  {'validation':>10}  fell"
    rounds = list(enumerate(state["rounds"], start=1))
    for number, one in reversed(rounds):
        kept = one["kept"] if number < len(rounds) else [state["winner"]]
        for place, judged in enumerate(one["candidates"], start=1):
            if judged["name"] in kept and number < len(rounds):
                continue  # it stands in a later round
            loss, score = f"{'-':>8}", f"{'-':>10}"
            if "failed" in judged:
                why = f"in round {number}: the loss was no number at step {judged['failed']}"
            else:
                loss, score = f"{judged['loss']:8.4g}", f"{score_text(judged['score'], factor):>10}"
                went = f"{len(kept)} of {len(one['candidates'])} went on"
                why = "winner" if judged["name"] in kept else f"after round {number}: place {place}, {went}"
            yield f"{judged['name']:{width}}  {one['steps']:6}  {loss}  {score}  {why}"
    steps = sum(one["steps"] * len(one["candidates"]) for _, one in rounds)
    seconds = sum(one["seconds"] for _, one in rounds) + state.get("probe", {}).get("seconds", 0.0)
    result = state["result"]
    yield f"{len(rounds)} rounds, {steps:,} steps, {duration(seconds)}; the winner: {result['steps']:,} steps more"
