"""What a run leaves in its folder: settings, `metrics.jsonl`, curves, everything trained, prompts, `result.json`."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.training_state import Checkpoints
from softprompt_jax.config import UserError, differences, settings_hash, to_yaml
from softprompt_jax.distributed import mesh as sharding
from softprompt_jax.distributed.multihost import is_first, run_on_process_0
from softprompt_jax.files import parse_json, read_object, refusals, writable, written_whole
from softprompt_jax.inference.evaluate import checkpoint_score, run_score
from softprompt_jax.inference.mistakes import MISTAKES_FILE
from softprompt_jax.methods import Split, finish
from softprompt_jax.run import T5_DROPOUT, UNHASHED_SETTINGS, Run, load_run
from softprompt_jax.training.callbacks import TensorBoard, numbers_of
from softprompt_jax.trees import flatten
from softprompt_jax.trust import remember

_RESULT, _LINES = "result_crc32", "metrics_crc32"  # in the metadata of trained.safetensors
_CLOCK = frozenset({"seconds", "examples_per_s", "tokens_per_s"})  # which two equal runs have not in common


def _checksum(result: dict[str, Any]) -> str:
    """Return the CRC-32 of what a result says, but for the time that it took."""
    return str(_checksum_of(json.loads(json.dumps(result))))


def _checksum_of(said: dict[str, Any], before: int = 0) -> int:
    """Return the CRC-32 of an object, but for what the clock says, behind others whose CRC-32 is `before`."""
    said = {key: value for key, value in said.items() if key not in _CLOCK}
    return zlib.crc32(json.dumps(said, sort_keys=True).encode(), before)


def leave_files(
    run: Run,
    folder: Path,
    identity: str,
    parts: Split,
    trainable: dict[str, Any],
    result: dict[str, Any],
    lines: Sequence[int],
    mistakes: dict[str, Any],
) -> None:
    """Write what a finished run leaves for others: everything trained, prompts, mistakes, and last `result.json`.

    `lines`: the checksum of its `metrics.jsonl`, from `Log.checksum`; `mistakes`: by task (`inference/mistakes.py`).
    """
    whole = jax.tree.map(lambda leaf: jnp.asarray(sharding.gather(leaf)), trainable)
    final = parts.merge(whole, parts.frozen)
    metadata = {
        "backbone": identity,
        "task": run.task_name,
        "settings_hash": settings_hash(run, without=UNHASHED_SETTINGS),
        "step": str(result["best_step"]),
        "settings": json.dumps(run.model_dump(mode="json")),
        "fingerprint": artifact.fingerprint(final),
    }

    def write() -> None:
        about = metadata | {_RESULT: _checksum(result), _LINES: json.dumps(lines)}
        artifact.save_trained(finish(final), folder / artifact.TRAINED_FILE, about)
        if parts.trains_prompt_only:
            rows, placed = np.asarray(final.prompt.table()), metadata | {"place": final.prompt.place}
            if run.own_prompts:
                save_own_prompts(run, rows, folder, placed)
            else:
                artifact.save_prompt(rows, folder / artifact.PROMPT_FILE, placed)
                if (compact := final.prompt.compact()) is not None:
                    artifact.write_tensors(compact[0], folder / artifact.COMPACT_FILE, placed | compact[1])
        if mistakes:
            artifact.dump(mistakes, folder / MISTAKES_FILE)
        artifact.dump(result, folder / "result.json")

    run_on_process_0(write)


def save_own_prompts(run: Run, rows: np.ndarray, folder: Path, metadata: dict[str, str]) -> None:
    """Write the prompt of each task of a mixture as if the task had had a run of its own."""
    for task, own in zip(run.tasks, np.split(rows, len(run.tasks)), strict=True):
        settings = run.model_copy(update={"task": task}).model_dump(mode="json")
        path = artifact.own_prompt_file(folder, task.name)
        path.parent.mkdir(exist_ok=True)
        artifact.save_prompt(own, path, metadata | {"task": task.name, "settings": json.dumps(settings)})


def read_metrics(path: Path, run: Run | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl` as dictionaries with a `step`; none where there is no file.

    The end is left out if its line is not complete: a run was killed, or is writing it. Errors: UserError for any other
    line that no run writes; `run`: one with these settings; and for lines that a finished run has not written.
    """
    try:
        if not path.exists():
            return []
        written = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected a file with a line per logged step; delete it, and "
            "the same command goes on without them"
        ) from None
    *lines, last = written.split(b"\n")
    found = [_read_line(f"{path}: line {number}", line, run) for number, line in enumerate(lines, start=1)]
    trained = path.with_name(artifact.TRAINED_FILE)
    if path.with_name("result.json").exists() and trained.exists():
        try:
            known = parse_json(artifact.read_metadata(trained).get(_LINES, "null"))
        except ValueError:
            known = []  # which no lines have
        _check_lines(path, found, known)
    with contextlib.suppress(UserError):
        found.append(_read_line("", last, run))
    return found


def _check_lines(path: Path, lines: Sequence[dict[str, Any]], expected: Any) -> None:
    """Refuse a file that does not begin as its run wrote it; `expected`: from `Log.checksum`, if that was kept."""
    if expected is None:
        return
    count = expected[0] if isinstance(expected, list) and expected and type(expected[0]) is int else 0
    begun = lines[: max(count, 0)]
    if [len(begun), functools.reduce(lambda before, line: _checksum_of(line, before), begun, 0)] != expected:
        raise UserError(
            f"{path}: is not what the run has written (its checksum differs); expected the lines of the run unchanged; "
            "delete it, and the same command goes on without them"
        )


def _read_line(where: str, line: bytes, run: Run | None) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if type(found["step"]) is not int:
            raise TypeError
        if not all(type(each) in (int, float) for each in flatten(found).values()):  # some are by task or by method
            raise TypeError
        if run is not None and "validation" in found:
            checkpoint_score(run, found["validation"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(
            f"{where}: found {line[:40].decode(errors='replace')!r}; expected an object with a step and numbers, as "
            "the run has written it; delete the file, and the same command goes on without it"
        ) from None
    return found


def read_result(folder: Path, run: Run | None = None) -> dict[str, Any] | None:
    """Return a run's `result.json`, or None while it is not finished.

    Errors: UserError for a file that is no result; `run`: not that of a run with these settings.
    """
    path, expected = folder / "result.json", "a run's result; delete it, and the same command evaluates again"
    if not path.exists():
        return None
    result = read_object(path, expected)
    try:
        found = [result["validation"], *([] if result["test"] is None else [result["test"]])]
        if not all(isinstance(scores, dict) for scores in found) or not isinstance(result["best_step"], int):
            raise TypeError
        if run is not None:
            for scores in found:
                run_score(run, scores)
    except (KeyError, TypeError):
        raise UserError(f"{path}: lacks scores or steps; expected {expected}") from None
    trained = folder / artifact.TRAINED_FILE
    known = artifact.read_metadata(trained).get(_RESULT) if trained.exists() else None
    if known is not None and known != _checksum(result):
        raise UserError(f"{path}: is not what the run has written (its checksum differs); expected {expected}")
    return result


def scores_in(folder: Path, run: Run) -> dict[int, tuple[float, float | None]]:
    """Return the score and the loss of each validation in a run's `metrics.jsonl`, by step. Older runs have no loss."""
    lines = (line for line in read_metrics(folder / "metrics.jsonl", run) if "validation" in line)
    return {line["step"]: (checkpoint_score(run, line["validation"]), line["validation"].get("loss")) for line in lines}


class Log:
    """`metrics.jsonl` and TensorBoard events; what a killed run wrote past its checkpoint is dropped.

    Only the first process writes.
    """

    def __init__(
        self,
        folder: Path,
        first: int,
        validated: bool = True,
        seconds: float = 0.0,
        check: Callable[[], None] = lambda: None,
        checksum: Sequence[int] | None = None,
    ):
        """Go on after step `first`; unless that is `validated`, its validation is written anew.

        `seconds`: how long the run was at work since its last line. `check` is called before each line. Errors:
        UserError for lines that are not those of the `checksum` that was taken at step `first`.
        """
        self._path, self._check = folder / "metrics.jsonl", check
        self._before, self._start = 0.0, time.monotonic()
        self._events: TensorBoard | None = None
        self._lines, self._sum = 0, 0
        if not is_first():
            return
        if self._path.exists():
            kept = []
            for line in (lines := read_metrics(self._path)):
                if line["step"] <= first and first > 0 and (validated or line["step"] < first or "loss" in line):
                    kept.append(line)
                    self._before = line.get("seconds", self._before)
            if kept or not lines:  # else it was deleted, and begun anew behind the checkpoint
                _check_lines(self._path, kept, checksum)
            with written_whole(self._path) as partial:
                partial.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
            for line in kept:
                self._count(line)
        self._before += seconds
        self._events = TensorBoard(folder / "tensorboard", first)

    def seconds(self) -> float:
        """Return the seconds of this run, those before a restart included."""
        return self._before + time.monotonic() - self._start

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, and its numbers as curves."""
        if self._events is None:
            return
        self._check()
        with refusals(self._path), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._count(line)
        self._events(line["step"], numbers_of(line))

    def checksum(self) -> list[int]:
        """Return how many lines there are so far, and the CRC-32 of what they say, but for the time."""
        return [self._lines, self._sum]

    def _count(self, line: dict[str, Any]) -> None:
        self._lines, self._sum = self._lines + 1, _checksum_of(line, self._sum)

    def close(self) -> None:
        """End the curves."""
        if self._events is not None:
            self._events.close()


def temporary_folder(run: Run) -> Path:
    """Return a new folder for a run that states none in Python. Errors: UserError for several processes."""
    if jax.process_count() > 1:
        raise UserError(
            f"out: not stated, and {jax.process_count()} processes; expected a folder that all can write to"
        )
    return Path(tempfile.mkdtemp(prefix=f"softprompt-{re.sub('[^A-Za-z0-9]+', '-', run.task_name)[:40]}-"))


def default_folder(run: Run) -> Path:
    """Return the folder of a run that states none on the command line.

    It is `runs/HASH`, or what an older version called the same settings.
    """
    name, runs = settings_hash(run, without=UNHASHED_SETTINGS), Path("runs")
    return runs / (name if (runs / name).exists() else folders_by_hash(runs).get(name, name))


def folders_by_hash(runs: Path) -> dict[str, str]:
    """Return the folders in `runs` that are named by a hash, by the hash that their settings have in this version."""
    found = {}
    for path in sorted(runs.glob("*/config.yaml")):
        if re.fullmatch("[0-9a-f]{12}", path.parent.name):
            with contextlib.suppress(UserError):  # settings that this version refuses
                run = load_run(path)
                for each in (_with_dropout_left_out(run), run):
                    found[settings_hash(each, without=UNHASHED_SETTINGS)] = path.parent.name
    return found


def _with_dropout_left_out(saved: Run) -> Run:
    """Return a run as if its config left the dropout out, which was saved as 0.1 until null stood for it."""
    return saved.model_copy(update={"dropout": None}) if saved.dropout == T5_DROPOUT else saved


def at_read_revisions(run: Run, folder: Path) -> Run:
    """Return a run at the revisions of hub data that its folder's `config.yaml` states, of a new one those of now."""
    path = folder / "config.yaml"
    return run.at_revisions_of(load_run(path)) if path.exists() else run.pinned()


def create_folder(folder: Path) -> None:
    """Create a run's folder, empty, so that it can be locked."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected a folder for the run; use another --out")
    with writable(folder, folder=True):
        pass


def check_folder(run: Run, folder: Path, checkpoints: str | Path | None = None) -> dict[str, Any] | None:
    """Refuse a folder that is not this run's, and return the result if the run is finished; nothing is written.

    A folder of the same settings with fewer `steps` goes on from its last checkpoint in `checkpoints`, where the
    learning rates up to there are those of a run of so many steps. (With dropout it is not to the bit the longer run:
    the number of compiled shapes, on which masks depend, is chosen by `steps`, too.) Without `checkpoints`, as in a
    sweep, other `steps` are refused like any other setting.
    """
    settings = folder / "config.yaml"
    if not settings.exists():
        if folder.exists() and {path.name for path in folder.iterdir()} - {"config.partial"}:
            raise UserError(f"{folder}: is not empty and no run; expected a new folder; use another --out")
        return None
    saved = load_run(settings)
    run = run.at_revisions_of(saved)
    if run.dropout is None:
        saved = _with_dropout_left_out(saved)
    old, new = (each.model_dump(mode="json", exclude=set(UNHASHED_SETTINGS)) for each in (saved, run))
    changed = differences(old, new)
    if not changed:
        remember(run)
        if (result := read_result(folder, saved)) is None:
            read_metrics(folder / "metrics.jsonl", saved)  # which is read again when a model has been loaded
        return result
    if checkpoints is None or run.steps < saved.steps or old | {"steps": run.steps} != new:
        raise UserError(
            f"{folder}: was made with other settings ({'; '.join(changed[:6])}); "
            "expected the same; use another --out, or delete the folder"
        )
    with contextlib.closing(Checkpoints(checkpoints, read_only=True)) as opened:
        _check_longer(saved, run, folder, opened.latest(), (folder / "result.json").exists())
    return None


def _check_longer(saved: Run, run: Run, folder: Path, latest: int | None, finished: bool) -> None:
    """Refuse to make a run longer whose steps so far would have been others."""
    before = jnp.arange(latest or 0)
    old, new = (np.asarray(each.schedule.build(1.0, each.steps)(before)) for each in (saved, run))
    reason = None
    if finished and latest is None:
        reason = "its checkpoints are gone, or belong to a sweep's group"
    elif run.pretraining is not None:
        reason = "the stages of pre-training are shares of all steps"
    elif not np.array_equal(old, new):
        reason = f"its {run.schedule.decay} decay was that of {saved.steps} steps; only other schedules go on"
    if reason is not None:
        raise UserError(
            f"{folder}: cannot go on from {saved.steps} to {run.steps} steps ({reason}); "
            "expected the same steps; use another --out"
        )


@contextlib.contextmanager
def until_begun(take_back: Callable[[], None]) -> Iterator[Callable[[], Any]]:
    """Call `take_back` on an error before the yielded function is called."""
    with contextlib.ExitStack() as stack:
        stack.push(lambda error, *_: take_back() if error else None)
        yield stack.pop_all


@contextlib.contextmanager
def begin_folder(
    run: Run, folder: Path, send: Callable[[], None] = lambda: None, check: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], Any]]:
    """Write `config.yaml` into a checked folder; an error before the yielded function is called takes it back.

    So a command that fails before its first step leaves no settings behind that the corrected one would not fit. The
    result of a run that is made longer is removed first: a kill in between leaves an unfinished run of fewer steps.
    `send` is called after each change, `check` before one is taken back.
    """
    settings, result, partial = (folder / name for name in ("config.yaml", "result.json", "config.partial"))
    before = {path: path.read_bytes() for path in (settings, result) if path.exists()}

    def take_back() -> None:
        check()
        if settings not in before:  # the folder was empty
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path, old in before.items():
            path.write_bytes(old)
        send()

    with until_begun(take_back) as begin:
        if settings not in before or load_run(settings).steps != run.steps:
            with writable(folder, folder=True):
                result.unlink(missing_ok=True)
                partial.write_text(to_yaml(run))
                partial.replace(settings)
            remember(run)
            send()
        yield begin
