"""SIGKILL at a random moment: the same command again ends with the same bits as one that was not disturbed."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path

from faults.child import Child, call, command
from faults.place import Place, contents, different

COMMANDS = {
    "train": ["train", "../../a.yaml", "--out", "out", "--quiet"],
    "sweep": ["sweep", "../../a.yaml", "--over", "seed=0,1", "--out", "out", "--quiet"],
    "predict": ["predict", "../../good/run", "--input", "../../texts.jsonl", "--output", "out.jsonl"],
    "export peft": ["export", "../../good/run", "--format", "peft", "--to", "out"],
    "export stablehlo": ["export", "../../good/run", "--format", "stablehlo", "--to", "out"],
}
ORDER = ["train", "sweep", "predict", "export peft", "train", "export stablehlo"]
LEFT = ("tensorboard", "checkpoints")  # what may differ: a file for each start, steps by what was saved


def prepare(place: Place) -> dict[str, float]:
    """Run each command undisturbed; return its seconds, of a second run, which compiles nothing."""
    seconds = {}
    for name, arguments in COMMANDS.items():
        for _ in range(2):
            folder = place.fresh(f"undisturbed {name}")
            ended = call(arguments, folder, exact=True)
            assert not ended.problem(0), (name, ended)
        seconds[name] = ended.seconds
        shutil.copytree(folder, place.root / "reference" / name)
    return seconds


def run(number: int, seed: int, place: Place, seconds: dict[str, float]) -> tuple[str, str]:
    """Kill a command once, let it end; return the case's title and its problem."""
    draw = random.Random(f"kill:{number}:{seed}")
    name = ORDER[number % len(ORDER)]
    after, most = draw.uniform(0.01, seconds[name]), size(place.root / "reference" / name)
    written = int(most * draw.random() ** 2) if draw.random() < 0.5 else None  # by the clock, or by what is on disk
    folder = place.fresh(f"kill:{number}")
    while True:
        if written is None:
            ended = Child(command(COMMANDS[name], exact=True), folder).end(after)
        else:
            ended = Child(command(COMMANDS[name], exact=True), folder).end(
                killed=lambda written=written: size(folder) > written
            )
        if ended.code < 0:
            break
        if problem := ended.problem(0, only_line=False):
            return name, problem
        shutil.rmtree(folder)  # it was faster than the kill
        folder.mkdir()
        after, written = after * 0.7, written and written // 2
    title = f"{name}, killed after {ended.seconds:.2f} s of {seconds[name]:.2f}, {size(folder)} bytes of {most}"
    ended = call(COMMANDS[name], folder, exact=True)
    if problem := ended.problem(0, only_line=False):
        return title, problem
    left = [path.name for path in folder.rglob("*") if "partial" in path.name or "tmp" in path.name]
    if left:
        return title, f"leaves {left[:5]}"
    return title, different(contents(folder, *LEFT), contents(place.root / "reference" / name, *LEFT))


def size(folder: Path) -> int:
    """Return the bytes of all files; some may vanish meanwhile."""
    found = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            found += path.stat().st_size
    return found
