"""A sweep: one config over lists of settings. Prompts of one shape train together, all else one after another."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import operator
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from softprompt_jax import config
from softprompt_jax.assembly import backbone_of
from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.training_state import GROUPS, MEMBERS, read_members
from softprompt_jax.config import Diverged, UserError
from softprompt_jax.distributed.cloud_files import CHECKPOINTS, is_remote
from softprompt_jax.distributed.folder_lock import lock_folder
from softprompt_jax.files import read_object
from softprompt_jax.inference.evaluate import run_score, score_factor, score_text
from softprompt_jax.optim.gradient_free import GradientFree
from softprompt_jax.progress import Reporter
from softprompt_jax.run import Run, Scratch, load_run
from softprompt_jax.statistics import CELL, SCORE, mean_sd_text, score_statistics
from softprompt_jax.training.loop import train
from softprompt_jax.training.run_folder import at_read_revisions, check_folder, create_folder, read_result
from softprompt_jax.training.vmapped import FAILED_FILE, VmappedGroup, VmappedSweep, shape_of

MOST_RUNS = 10_000
SHORT = {"learning_rate": "optimizer.learning_rate", "length": "methods.0.length", "init": "methods.0.init"}


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep: its name is that of its folder, `varied` are the settings that make it."""

    name: str
    varied: dict[str, Any]
    run: Run


def sweep(
    path: str | Path,
    over: Sequence[str],
    out: str | Path,
    overrides: Sequence[str] = (),
    together: int = 8,
    stop_after: int | None = None,
    reporter: Reporter | None = None,
    wait: bool = False,
) -> dict[str, Any]:
    """Train the config in `path` with every combination of the settings in `over`, and return what `sweep.json` holds.

    `over`: `seed=0..7`, `learning_rate=0.03,0.1,0.3`, any dotted setting with YAML values. Each run leaves the folder
    `out/NAME` that `train` would leave. Runs that train nothing but prompts and differ in seed, task, learning rate or
    initialisation only share one program, at most `together` at a time; all others train one after another.
    `stop_after`: a prompt stops after so many evaluations without a better validation score (of those that train
    together). `wait`: for the end of another command that trains in the folder. The same call goes on where a killed
    one stopped. Raises Preempted after SIGTERM and Ctrl-C.

    Returned: `runs` (name, settings, scores or why it failed), `table` (mean, sd and best over seeds of each setting)
    and `best`, the name of the run with the best validation score.
    """
    reporter, folder = reporter or Reporter(quiet=True), Path(out)
    if together < 1 or (stop_after is not None and stop_after < 1):
        raise UserError(f"sweep: found together {together}, stop_after {stop_after}; expected 1 or more")
    if is_remote(out):
        raise UserError(f"{out}: is not on this machine; expected a local folder for a sweep; copy its runs afterwards")
    if jax.process_count() > 1:
        raise UserError(f"sweep: {jax.process_count()} processes; expected one; use softprompt train for each run")
    found = members(path, over, overrides)
    if stop_after is not None and (alone := [member.name for member in found if _alone(member.run)]):
        raise UserError(f"sweep: {alone[0]} trains alone; expected prompts on one backbone; leave --stop-after out")
    train_members(found, folder, together, reporter, stop_after, wait=wait)
    result = summary(found, folder)
    artifact.dump(result, folder / "sweep.json")
    return result


def train_members(
    members: Sequence[Member],
    folder: Path,
    together: int,
    reporter: Reporter,
    stop_after: int | None = None,
    before_group: Callable[[Sequence[Member]], None] = lambda group: None,
    wait: bool = False,
) -> None:
    """Train the members that are not finished in `folder`/NAME; the same call goes on where a killed one stopped.

    `before_group` is called with the members that train next, in one program or one after another. A member that
    `train` has begun in its own folder goes on alone.
    """
    programs: dict[str, VmappedSweep] = {}
    create_folder(folder)
    with lock_folder(folder, math.inf if wait else None, reporter.line):
        for member in members:
            check_folder(member.run, folder / member.name)
        members = [dataclasses.replace(m, run=at_read_revisions(m.run, folder / m.name)) for m in members]
        reporter.line(f"{folder}: {len(members)} runs, {sum(_done(folder / m.name) for m in members)} of them finished")
        for group in _open_groups(members, folder, together):
            before_group(group)
            _train_group(group, folder, reporter, stop_after, programs)
    with contextlib.suppress(OSError):  # it is not there, or holds a group that was not asked for
        (folder / GROUPS).rmdir()


def members(path: str | Path | Run, over: Sequence[str], overrides: Sequence[str] = ()) -> list[Member]:
    """Return every run of a sweep, its settings checked."""
    source = "run" if isinstance(path, Run) else path
    axes = dict(read_axis(text) for text in over)
    if not axes or len(axes) < len(over):
        raise UserError(f"sweep: --over {' --over '.join(over)}; expected one or more settings, each once")
    if (count := math.prod(map(len, axes.values()))) > MOST_RUNS:
        raise UserError(f"sweep: {count:,} runs; expected {MOST_RUNS:,} or fewer; give fewer values")
    short, found = short_names(list(axes)), []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        changes = [*overrides, *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in chosen.items())]
        run = config.parse(Run, config.read(path, changes), f"{source} with {', '.join(changes)}").expanded()
        varied = {short[key]: value for key, value in chosen.items()}
        found.append(Member(",".join(f"{key}={_file_name(value)}" for key, value in varied.items()), varied, run))
    names = [member.name for member in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"sweep: two runs would be called {twice}; expected values that differ in letters or digits")
    return found


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Call each setting by the last part of its path, if no other ends so."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)}


def read_axis(text: str) -> tuple[str, list[Any]]:
    """Read `seed=0..7` or `task=boolq,cb` as a setting and its values; short names become dotted ones."""
    key, equals, values = text.partition("=")
    if not equals or not key or not values.strip():
        raise UserError(
            f"--over {text}: found no values; expected KEY=VALUES, such as seed=0..7 or learning_rate=0.1,0.3"
        )
    span = re.fullmatch(r"\s*(-?\d{1,18})\.\.(-?\d{1,18})\s*", values)
    if span:
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise UserError(f"--over {text}: {first} is past {last}; expected the smaller number first")
        if last - first >= MOST_RUNS:
            raise UserError(f"--over {text}: {last - first + 1:,} values; expected {MOST_RUNS:,} or fewer")
        found: list[Any] = list(range(first, last + 1))
    else:
        found = config.read_text(f"[{values}]", f"--over {text}")
    if len({json.dumps(int(v) if isinstance(v, float) and v.is_integer() else v) for v in found}) < len(found):
        raise UserError(f"--over {text}: a value stands twice; expected each once")
    return SHORT.get(key, key), found


def _file_name(value: Any) -> str:
    """Write a value as part of a folder's name; a long one is cut, and told apart by a hash."""
    text = value if isinstance(value, str) else json.dumps(value)
    name = re.sub(r"[^\w.+-]+", "-", text).strip("-.")
    return name if 0 < len(name) <= 40 else f"{name[:30]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _done(folder: Path) -> bool:
    return (folder / "result.json").exists() or (folder / FAILED_FILE).exists()


def _alone(run: Run, folder: Path | None = None) -> bool:
    """Whether a run has frozen weights of its own, no gradients to compute together, or begun alone in `folder`.

    Runs that are watched by others, or scored by functions, go through `train`, too.
    """
    own = isinstance(run.backbone, Scratch) or any(method.draws_frozen for method in run.methods)
    begun = folder is not None and (folder / CHECKPOINTS).exists()  # runs that train together keep theirs elsewhere
    own = own or run.wandb is not None or bool(run.metric_functions)
    return run.pretraining is not None or own or begun or isinstance(run.optimizer, GradientFree)


def _open_groups(found: Sequence[Member], folder: Path, together: int) -> Iterator[list[Member]]:
    """Yield what is left to do: groups that have begun as they were, then the other unfinished runs by their shape."""
    known, begun = {member.name: member for member in found}, set()
    for file in sorted((folder / GROUPS).glob(f"*/{MEMBERS}")):
        names = read_members(file)
        if any(name in known and not _done(folder / name) for name in names):
            begun |= set(names)  # some of which may not be asked for now
            yield [known.get(name) or Member(name, {}, load_run(folder / name / "config.yaml")) for name in names]
    groups: dict[str, list[Member]] = {}
    for member in found:
        if member.name not in begun and not _done(folder / member.name):
            alone = _alone(member.run, folder / member.name)
            key = member.name if alone else json.dumps(shape_of(member.run), sort_keys=True)
            groups.setdefault(key, []).append(member)
    for group in groups.values():
        for first in range(0, len(group), together):
            yield group[first : first + together]


def _train_group(
    group: Sequence[Member], folder: Path, reporter: Reporter, stop_after: int | None, programs: dict[str, VmappedSweep]
) -> None:
    """Train runs of one shape, together if that is possible."""
    run, runs = group[0].run, [(member.run, folder / member.name) for member in group]
    with jax.set_mesh(run.mesh.build()):
        program = None if _alone(*runs[0]) else _program(run, programs)
        if program is not None and program.possible:
            names = [member.name for member in group]
            own = folder / GROUPS / hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
            with contextlib.ExitStack() as opened:
                VmappedGroup(program, runs, own, reporter, stop_after, opened).fit()
            shutil.rmtree(own)  # what it held is now in the runs' folders
            return
    if stop_after is not None:
        raise UserError(
            f"sweep: --stop-after is for prompts that train together; found methods "
            f"{', '.join(method.kind for method in run.methods)}; leave --stop-after out"
        )
    programs.clear()  # with its copy of the backbone
    for one, path in runs:
        reporter.line(f"{path}:")
        try:
            train(one, path, reporter)
        except Diverged as error:
            reporter.line(f"{path}: {error}")
            artifact.dump({"step": error.step, "reason": "the loss is no finite number"}, path / FAILED_FILE)


def _program(run: Run, programs: dict[str, VmappedSweep]) -> VmappedSweep:
    """Return the program of runs of this shape; the last backbone is kept."""
    key = json.dumps(shape_of(run), sort_keys=True)
    weights = operator.attrgetter("backbone", "dtype", "quantize", "mesh")
    if key not in programs:
        kept = [other.backbone for other in programs.values() if weights(other.run) == weights(run)]
        programs.clear()
        programs[key] = VmappedSweep(run, kept[0] if kept else backbone_of(run))
    return programs[key]


def summary(found: Sequence[Member], folder: Path) -> dict[str, Any]:
    """Return the scores of each run, their table over seeds, and the best run of each task."""
    runs, table, best = [], {}, {}
    for member in found:
        line: dict[str, Any] = {"name": member.name, "settings": member.varied}
        runs.append(line)
        if (folder / member.name / FAILED_FILE).exists():
            line["failed"] = _read_failure(folder / member.name / FAILED_FILE)
            continue
        if (result := read_result(folder / member.name, member.run)) is None:
            raise UserError(f"{folder / member.name}: has no result; expected one; start the same sweep again")
        scores = {s: run_score(member.run, result[s]) for s in ("validation", "test") if result[s] is not None}
        line |= {"score": scores, **{name: result[name] for name in ("validation", "test", "best_step")}}
        settings = {name: value for name, value in member.varied.items() if name != "seed"}
        row = {"task": member.run.task_name, "settings": settings, "unit": score_factor(member.run)}
        table.setdefault(json.dumps(row), (row, []))[1].append(scores)
        if scores["validation"] > best.get(member.run.task_name, ("", -float("inf")))[1]:
            best[member.run.task_name] = member.name, scores["validation"]
    rows = []
    for row, each in table.values():
        measured = {split: score_statistics([scores[split] for scores in each]) for split in each[0]}
        rows.append(row | {"runs": len(each), **measured})
    return {"runs": runs, "table": rows, "best": {task: name for task, (name, _) in best.items()}}


def _read_failure(path: Path) -> dict[str, Any]:
    expected = "a step and a reason; delete it, and the same sweep trains this run again"
    found = read_object(path, expected)
    if not {"step", "reason"} <= set(found):
        raise UserError(f"{path}: found {', '.join(found) or 'nothing'}; expected {expected}")
    return found


def describe(result: dict[str, Any]) -> Iterator[str]:
    """Yield a sweep's table as lines: mean, sd and best of the scores of each setting."""
    titles = [", ".join(f"{key} {value}" for key, value in row["settings"].items()) for row in result["table"]]
    width = max([8, *map(len, titles)])
    yield f"{'setting':{width}}  {'task':20} runs  " + "  ".join(f"{s:>22}" for s in ("validation", "test"))
    for title, row in zip(titles, result["table"], strict=True):
        number = functools.partial(score_text, factor=row["unit"])
        cells = (mean_sd_text(row[s], number, best=True) if s in row else "" for s in ("validation", "test"))
        yield f"{title:{width}}  {row['task']:20} {row['runs']:4}  " + "  ".join(f"{cell:>22}" for cell in cells)
    yield f"{SCORE} A cell: {CELL}."
    for task, name in result["best"].items():
        yield f"best on {task}: {name}"
    for run in result["runs"]:
        if "failed" in run:
            yield f"{run['name']}: failed at step {run['failed']['step']}: {run['failed']['reason']}"
