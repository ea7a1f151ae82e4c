"""What has been found of runs, so that nothing is computed twice and an experiment's JSON goes on without its runs.

A run that is finished leaves `result.json`. What else is measured of it, or of several, lies in `measured/`, named by
their results. The JSON of an experiment holds both, so that the folders of runs may be deleted.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from softprompt_jax import config
from softprompt_jax.checkpoints import artifact
from softprompt_jax.config import UserError, settings_hash, values_hash
from softprompt_jax.distributed.cloud_files import CHECKPOINTS
from softprompt_jax.files import read_object
from softprompt_jax.run import UNHASHED_SETTINGS, Run
from softprompt_jax.training.sweep import Member

MEASURED = "measured"


class WeightsGone(Exception):
    """What is to be measured needs weights of finished runs that have been deleted."""

    def __init__(self, folders: Sequence[Path]):
        super().__init__(", ".join(map(str, folders)))
        self.folders = folders


def kept(runs: Path, what: str, group: Sequence[Member], measure: Callable[[], Any]) -> Any:
    """Return what `measure` finds of a group of finished runs; it is called once for their results.

    Raises WeightsGone where it is not known yet and a run has no weights any more.
    """
    file = _place(runs, what, group)
    if not file.exists():
        if gone := [runs / m.name for m in group if not (runs / m.name / artifact.TRAINED_FILE).exists()]:
            raise WeightsGone(gone)
        file.parent.mkdir(exist_ok=True)
        artifact.dump({"of": [member.name for member in group], "found": measure()}, file)
    return json.loads(file.read_text(encoding="utf-8"))["found"]


def _place(runs: Path, what: str, group: Sequence[Member]) -> Path:
    texts = [(runs / member.name / "result.json").read_text(encoding="utf-8") for member in group]
    results = {member.name: json.loads(text) for member, text in zip(group, texts, strict=True)}
    return runs / MEASURED / f"{what.replace(' ', '-')}-{values_hash(results)}.json"


def of(members: Sequence[Member], labels: Sequence[str], runs: Path) -> dict[str, Any]:
    """Return what an experiment's JSON keeps: settings and result of each run, null while it is to do, and measures."""
    results: dict[str, Any] = {}
    for member, label in zip(members, labels, strict=True):
        path = runs / member.name / "result.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        held = {"runs": [], "config": config.to_yaml(member.run), "result": result}
        results.setdefault(member.name, held)["runs"].append(label)
    measured = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in (runs / MEASURED).glob("*.json")}
    own = {name: held for name, held in sorted(measured.items()) if set(held["of"]) <= set(results)}
    return {"runs": results, MEASURED: own}


def restore(folder: Path, members: Sequence[Member], runs: Path) -> None:
    """Write the results that the JSON files in `folder` hold and `runs` lacks, so that their runs count as finished.

    A run is known by its settings, which other versions of the library may name by another hash.
    """
    wanted = {member.name for member in members}
    for file in sorted(folder.glob("*.json")):
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            found = {name: run for name, run in held["runs"].items() if not (runs / name).exists() and run["result"]}
            configs = {name: config.read_text(run["config"], str(file)) for name, run in found.items()}
            measured = dict(held[MEASURED])
        except (ValueError, KeyError, TypeError, UserError):  # a result of another kind
            continue
        for name, values in configs.items():
            if not re.fullmatch("[0-9a-f]{12}", name) or _hash(values, file) not in wanted:
                continue
            (runs / name).mkdir(parents=True)
            (runs / name / "config.yaml").write_text(found[name]["config"], encoding="utf-8")
            artifact.dump(found[name]["result"], runs / name / "result.json")
        for name, value in measured.items():
            if Path(name).name == name and not (runs / MEASURED / name).exists():
                (runs / MEASURED).mkdir(parents=True, exist_ok=True)
                artifact.dump(value, runs / MEASURED / name)


def _hash(values: Any, file: Path) -> str | None:
    try:
        return settings_hash(config.parse(Run, values, str(file)), without=UNHASHED_SETTINGS)
    except UserError:  # settings that this version refuses
        return None


def check_place(to: Path, settings: Sequence[str]) -> None:
    """Refuse to replace results of other settings. Errors: UserError naming both."""
    if to.exists() and (held := read_object(to, "a result of `softprompt paper`").get("settings", [])) != list(
        settings
    ):
        raise UserError(
            f"{to}: holds results with {' '.join(held) or 'no other settings'}; expected "
            f"{' '.join(settings) or 'no other settings'}; give another --to"
        )


def forget(folders: Sequence[Path]) -> None:
    """Delete finished runs without weights, so that they are trained again."""
    for folder in folders:
        shutil.rmtree(folder)


def drop_checkpoints(members: Sequence[Member], runs: Path) -> None:
    """Delete the checkpoints of finished runs, of which model tuning leaves gigabytes; what they trained stays."""
    for member in members:
        if (runs / member.name / "result.json").exists():
            shutil.rmtree(runs / member.name / CHECKPOINTS, ignore_errors=True)
