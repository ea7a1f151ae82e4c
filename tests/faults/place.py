"""What the cases stand on: a small backbone and task, and one good file or folder of each kind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from faults.child import Child, Ended, call, do

TEXTS = [f"the {thing} is {word} {end}" for thing in ("garden", "old mill", "night train") for word in ("warm", "slow")
         for end in ("today", "as ever")]  # fmt: skip
PROMPTS = [f"p{number}" for number in range(4)]
QUESTIONS = [{"inputs": text, "prompt": name} for text in TEXTS for name in PROMPTS]
TIMINGS = {"seconds", "examples_per_s", "tokens_per_s"}


class Place(NamedTuple):
    """A folder with `small`, `good` (one of each kind), `reference` (ends of undisturbed commands) and `cases`."""

    root: Path

    @property
    def good(self) -> Path:
        return self.root / "good"

    def fresh(self, name: str) -> Path:
        """Return a new folder for a case."""
        folder = self.root / "cases" / name.replace(":", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def lines(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def prepare(root: Path) -> Place:
    """Make everything, in children."""
    place = Place(root)
    for name in ("small", "good", "reference", "cases", "bad", "state", "cache"):
        shutil.rmtree(root / name, ignore_errors=True)
    place.good.mkdir(parents=True)
    do(lambda: _files(place), root)
    for name, more in (("run", []), ("other", ["seed=1"])):
        _well(call(["train", root / "a.yaml", "--out", name, "--quiet", *more], place.good))
    import small_runs

    left = Child(lambda: small_runs.train_in("part", str(root / "a.yaml"), "save", 6), place.good).end()
    assert left.code == -signal.SIGKILL, left.error  # in step 30's: 25 is the newest, 20 the best
    _well(call(["export", "run", "--format", "peft", "--to", "adapter"], place.good))
    for name in ("backbone", "backbone2"):
        _well(call(["import", root / "small" / name, "--to", name], place.good))
    return place


def _well(ended: Ended) -> None:
    assert not ended.problem(0), ended.problem(0)


def _files(place: Place) -> None:
    import gguf_file
    import numpy as np
    import small_runs
    import test_torch_file
    from safetensors.numpy import load_file

    from softprompt_jax import load_backbone
    from softprompt_jax.checkpoints.artifact import save_prompt

    root, good = place.root, place.good
    files = small_runs.write_files(root / "small")
    small_runs.write_backbone(root / "small" / "backbone2", seed=1)
    small_runs.write_config(root / "a.yaml", files.short)
    (root / "questions.jsonl").write_bytes(lines(QUESTIONS))
    (root / "texts.jsonl").write_bytes(lines([{"inputs": text} for text in TEXTS] * 20))
    settings = {"settings": json.dumps(files.short), "backbone": str(files.backbone)}
    settings["fingerprint"] = load_backbone(str(files.backbone)).fingerprint()
    (good / "bank").mkdir()
    for number, name in enumerate(PROMPTS):
        rows = 3 * np.random.default_rng(number).normal(size=(1 + number % 3, 16)).astype(np.float32)
        save_prompt(rows, good / "bank" / f"{name}.safetensors", settings)
        if number == 2:
            save_prompt(rows, good / "prompt.safetensors", settings)
            np.save(good / "prompt.npy", rows)
    gguf_file.llama(good / "model.gguf")
    shutil.copytree(files.backbone, good / "torch")
    test_torch_file.save_tensors(good / "torch" / "pytorch_model.bin", load_file(good / "torch" / "model.safetensors"))
    os.remove(good / "torch" / "model.safetensors")


def contents(folder: Path, *without: str) -> dict[str, Any]:
    """Return what every file below a folder says, but for times: JSON as values, all else as bytes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        name = str(path.relative_to(folder))
        if not path.is_file() or any(part in Path(name).parts for part in without):
            continue
        found[name] = text = path.read_bytes()
        with contextlib.suppress(ValueError, RecursionError):  # damaged: its bytes
            if path.suffix == ".json":
                found[name] = _timeless(json.loads(text))
            elif path.suffix == ".jsonl":
                found[name] = [_timeless(json.loads(line)) for line in text.splitlines()]
            elif path.name == "trained.safetensors":
                found[name] = _without_checksum_of_lines(text)
    return found


def _without_checksum_of_lines(text: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and numbers of a safetensors file; a run that lost its metrics.jsonl has fewer lines to sum."""
    end = 8 + int.from_bytes(text[:8], "little")
    header = json.loads(text[8:end])
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise ValueError("no header of ours")
    header["__metadata__"].pop("metrics_crc32", None)
    return header, text[end:]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in TIMINGS}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def different(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Say which files differ."""
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return f"not as undisturbed: {', '.join(names[:5])}" if names else ""
