"""Damaged files: named in one line, or without any effect, or recovered from with a word; never other numbers."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from faults.child import Child, Ended, call
from faults.place import QUESTIONS, TEXTS, Place, contents, different, lines

ASKED = lines([{"inputs": text, "text": text} for text in TEXTS])
UNCHECKED = "unchecked"  # the title's end where the format has no checksum and other numbers are not seen
TRAINED = ("prompt.safetensors", "trained.safetensors", "result.json", "metrics.jsonl")


class Kind(NamedTuple):
    """A good file or folder, its copy's name, what reads it, and what its damaged files can be exchanged with."""

    good: str
    copy: str
    arguments: Sequence[object] | None  # None: an adapter, which the library attaches
    stdin: bytes = b""
    donor: str = ""
    trains: bool = False
    unchecked: str = ""  # files without checksums: changed numbers are not seen, nor that a whole file is another's


KINDS = {
    "finished run, trained again": Kind(
        "run", "run", ["train", "../../a.yaml", "--out", "run"], b"", "other", True, "result.json"
    ),
    "finished run, predict": Kind(
        "run", "run", ["predict", "run"], ASKED, "other", False, "prompt.safetensors trained.safetensors"
    ),
    "unfinished run": Kind("part", "run", ["train", "../../a.yaml", "--out", "run"], b"", "other", True),
    "checkpoint": Kind("part/checkpoints", "run/checkpoints", ["train", "../../a.yaml", "--out", "run"], trains=True),
    "backbone": Kind(
        "backbone", "b", ["predict", "../../good/prompt.safetensors", "--backbone", "b"], ASKED, "backbone2"
    ),
    "prompt": Kind(
        "prompt.safetensors",
        "p.safetensors",
        ["predict", "p.safetensors"],
        ASKED,
        "backbone/model.safetensors",
    ),
    "bank": Kind("bank", "bank", ["predict", "bank"], lines(QUESTIONS), "backbone2"),
    "adapter": Kind("adapter", "adapter", None, b"", "backbone"),
    "GGUF": Kind("model.gguf", "m.gguf", ["import", "m.gguf", "--to", "out"], b"", "prompt.npy", unchecked="m.gguf"),
    ".bin": Kind(
        "torch",
        "b",
        ["predict", "../../good/prompt.safetensors", "--backbone", "b", "--any-backbone"],
        ASKED,
        "backbone2",
        unchecked="config.json spiece.model",
    ),
    ".npy": Kind(
        "prompt.npy",
        "p.npy",
        ["predict", "p.npy", "--backbone", "../../small/backbone"],
        ASKED,
        "prompt.safetensors",
        unchecked="p.npy",
    ),
}


def _flip(content: bytes, draw: random.Random) -> bytes:
    first = draw.choice([0, max(0, len(content) - 64)])  # half of them in what is surely numbers, not a header
    place = draw.randrange(first, len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def _exchange_parts(content: bytes, draw: random.Random) -> bytes:
    size = max(1, min(64, len(content) // 3))
    first, second = sorted(draw.sample(range(0, len(content) - size + 1), 2))
    if second < first + size:
        return content[::-1]
    one, other = content[first : first + size], content[second : second + size]
    return content[:first] + other + content[first + size : second] + one + content[second + size :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit flipped": _flip,
    "cut": lambda content, draw: content[: draw.randrange(1, len(content))],
    "emptied": lambda content, draw: b"",
    "other JSON": lambda content, draw: draw.choice([b"{}", b"[]", b"null", b'{"step": 1e999}', b"[" * 100_000]),
    "parts exchanged": _exchange_parts,
    "binary": lambda content, draw: draw.randbytes(len(content)),
}
EXCHANGED, REMOVED = "exchanged for another", "removed"
WAYS = [*DAMAGES, EXCHANGED, REMOVED, "a bit flipped"]


def prepare(place: Place) -> dict[str, Any]:
    """Return what the commands say of what is good."""
    found = {}
    for name, kind in KINDS.items():
        folder = place.fresh(f"good {name}")
        _copy(place, kind, folder)
        ended = _run(kind, folder)
        assert not ended.problem(0), (name, ended)
        found[name] = _said(kind, ended, folder)
    return found


def run(number: int, seed: int, place: Place, expected: dict[str, Any]) -> tuple[str, str]:
    """Damage one file, run what reads it, judge; return the case's title and its problem."""
    draw = random.Random(f"damage:{number}:{seed}")
    name = [*KINDS][number % len(KINDS)]
    kind, folder = KINDS[name], place.fresh(f"damage:{number}")
    copy = _copy(place, kind, folder)
    victim, way = _damage(kind, copy, place, draw)
    title = f"{name}, {victim.relative_to(folder)} {way}"
    after = contents_raw(folder)
    ended = _run(kind, folder)
    if problem := ended.problem(None, only_line=not kind.trains):
        return title, problem
    if ended.code == 2:
        return _refused(kind, name, ended, victim, folder, after, expected[name], title)
    found = _said(kind, ended, folder)
    if (victim.suffix in (".json", ".jsonl", ".yaml") or kind.trains) and victim.name in ended.error:
        title += ": recovered"
    problem = different(found, expected[name])
    if kind.good == "run" and contents_raw(folder) == after:  # what is not read stays as it is
        title, problem = (
            f"{title}: not read",
            different({"output": found["output"]}, {"output": expected[name]["output"]}),
        )
    prompts = victim.suffix == ".safetensors"  # with checksums; that one is another run's, no checksum can tell
    unseen = (EXCHANGED,) if prompts else ("a bit flipped", "parts exchanged", EXCHANGED)
    if problem and victim.name in kind.unchecked.split() and way in unseen:
        return f"{title}: {UNCHECKED}", ""
    return title, problem


def _refused(
    kind: Kind, name: str, ended: Ended, victim: Path, folder: Path, after: dict[str, bytes], expected: Any, title: str
) -> tuple[str, str]:
    """Judge a refusal: it names the file, nothing else is lost, and what it says to delete is all in the way."""
    told, parts = ended.last, victim.relative_to(folder).parts
    step = parts[2] if parts[:2] == ("run", "checkpoints") and len(parts) > 2 else ""
    by_name = victim.name in told or bool(step and re.search(rf"/{step}\b", told))
    by_name |= name == "bank" and f"prompt '{victim.stem}'" in told
    by_folder = re.search(rf"\b{parts[0]}\b", told) is not None  # such as: was made with other settings
    without_settings = victim.name == "config.yaml" and 'expected {"inputs"' in told  # as a folder of prompts
    if not (by_name or by_folder or without_settings):
        return title, f"does not name {'/'.join(parts)}: {told[:300]}"
    left = contents_raw(folder)
    lost = [path for path, content in after.items() if left.get(path) != content]
    lost = [path for path in lost if "tensorboard" not in path and ".orbax-checkpoint-tmp" not in path]
    if any(path.replace(f"/{step}/", f"/{step}.damaged/") not in left for path in lost if step) or (lost and not step):
        return title, f"changed or removed {lost[:3]}"
    if kind.trains and by_name and "delete" in told:
        named = victim if victim.name in told else folder.joinpath(*parts[:3])
        shutil.rmtree(named) if named.is_dir() else named.unlink(missing_ok=True)
        again = _run(kind, folder)
        if problem := again.problem(0, only_line=False):
            return title, f"deleted as told, and then: {problem}"
        title += ": refused until it was deleted"
        gone = {"metrics.jsonl"} if victim.name == "metrics.jsonl" else set()
        found = _said(kind, again, folder)
        return title, different(_without(found, *gone), _without(expected, *gone))
    return f"{title}: {'refused' if by_name else 'refused by its folder'}", ""


def _copy(place: Place, kind: Kind, folder: Path) -> Path:
    """Copy what is good; of a checkpoint the run around it too."""
    source, target = place.good / kind.good, folder / kind.copy
    if source.parent != place.good:
        shutil.copytree(source.parent, target.parent)
    elif source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    return target


def _damage(kind: Kind, copy: Path, place: Place, draw: random.Random) -> tuple[Path, str]:
    files = [copy] if copy.is_file() else [path for path in sorted(copy.rglob("*")) if path.is_file()]
    files = [path for path in files if "tensorboard" not in path.parts and path.stat().st_size]
    files = [path for path in files if ".orbax-checkpoint-tmp" not in str(path)]  # of the kill
    if kind.good in ("run", "part"):  # checkpoints are a kind of their own
        files = [path for path in files if "checkpoints" not in path.parts]
    while True:
        victim, way = draw.choice(files), draw.choice(WAYS)
        content = victim.read_bytes()
        if way == REMOVED:
            if copy.is_file() or victim.name in ("checksums.json", "metrics.jsonl", "result.json"):
                continue  # of which it is known that it is missing, or that may be missing
            victim.unlink()
            return victim, way
        changed = _other(kind, copy, victim, place, draw) if way == EXCHANGED else DAMAGES[way](content, draw)
        if changed not in (None, content):
            victim.write_bytes(changed)
            return victim, way


def _other(kind: Kind, copy: Path, victim: Path, place: Place, draw: random.Random) -> bytes | None:
    """Return the same file of another folder of the kind, or another file."""
    if "checkpoints" in victim.parts:
        steps = sorted(path.name for path in copy.iterdir())
        mine = victim.relative_to(copy).parts
        other = copy.joinpath(steps[steps[0] == mine[0]], *mine[1:])
        return other.read_bytes() if other.is_file() else None
    donor = place.good / kind.donor
    if donor.is_dir():
        same = donor / victim.name
        donor = same if same.is_file() else donor / "model.safetensors"
    return donor.read_bytes() if donor.is_file() else None


def _run(kind: Kind, folder: Path) -> Ended:
    if kind.arguments is None:
        return Child(lambda: attach(folder / kind.copy), folder).end()
    return call(kind.arguments, folder, kind.stdin, exact=True)


def attach(folder: Path) -> None:
    """Print what an adapter adds to the backbone, as a program of the user would do."""
    import sys

    from softprompt_jax import UserError, load_backbone

    try:
        backbone = load_backbone(str(folder.parents[2] / "good" / "backbone"), adapter=str(folder))
    except UserError as error:
        print(f"softprompt: {error}", file=sys.stderr)
        sys.exit(2)
    print(backbone.model.prompt.table().tolist())


def _said(kind: Kind, ended: Ended, folder: Path) -> dict[str, Any]:
    """Return what tells of other numbers: the output, and what was written."""
    if kind.trains:
        found = contents(folder / "run", "checkpoints", "tensorboard")
        return {file: found.get(file) for file in ("config.yaml", *TRAINED)} | {"output": _result(ended)}
    return {"output": ended.out} | (contents(folder / "out") if (folder / "out").is_dir() else {})


def _result(ended: Ended) -> str:
    return re.sub(r'"seconds": [0-9.]+', "", ended.out)


def _without(found: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: content for name, content in found.items() if name not in names}


def contents_raw(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
