"""The default prompt beside no training, on every task whose data come as Python packages and can be trained on.

    python benchmarks/defaults.py [--backbone embedded|smollm2] [--runs runs/defaults]

A run states its task and `methods: [prompt]`, and how long it is: 300 steps of 32 examples on the embedded T5, 75 of 8
on SmolLM2. The untrained model is the same run with LoRA before its first step, which changes nothing. What has been
measured already is not run again; a killed run goes on. Writes `benchmarks/results/defaults/BACKBONE/TASK.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import machine

from softprompt_jax import Run, tasks, train
from softprompt_jax.cli.allocator import keep_freed_memory
from softprompt_jax.inference.evaluate import run_score
from softprompt_jax.progress import Reporter
from softprompt_jax.training.run_folder import read_metrics

RESULTS = machine.ROOT / "benchmarks" / "results" / "defaults"
LENGTHS: dict[str, dict[str, Any]] = {
    "embedded": {"steps": 300, "evaluate_every": 300, "evaluation_examples": 400},
    "smollm2": {"steps": 75, "batch_size": 8, "evaluate_every": 75, "evaluation_examples": 100, "shapes": 6},
}
LIMITS = {"max_input_tokens": 128, "max_target_tokens": 64, "truncate_targets": True, "result_examples": 1}


def main() -> None:
    """Run what is missing, and print a line for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=LENGTHS, default="embedded")
    parser.add_argument("--runs", type=Path, default=machine.ROOT / "runs" / "defaults")
    parser.add_argument("--tasks", nargs="+", help="default: all whose data come as packages, with a train split")
    chosen = parser.parse_args()
    keep_freed_memory()
    for name in chosen.tasks or [name for name in tasks.names() if _is_packaged(name)]:
        file = RESULTS / chosen.backbone / f"{name}.json"
        if not file.exists():
            answer = machine.describe() | measure(name, chosen.backbone, chosen.runs / chosen.backbone / name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(answer, indent=1) + "\n")
        answer = json.loads(file.read_text())
        print(f"{chosen.backbone} {name}: {answer['untrained']:.3f} -> {answer['trained']:.3f}", flush=True)


def measure(task: str, backbone: str, folder: Path) -> dict[str, Any]:
    """Return the validation score of a task without training, and that at the end with the default prompt."""
    settings = {"task": task, "backbone": backbone} | LENGTHS[backbone] | LIMITS
    before = Run(**settings | {"methods": ["lora"], "steps": 1})
    train(before, folder / "untrained", Reporter(quiet=True))
    run = Run(**settings | {"methods": ["prompt"]})
    result = train(run, folder / "prompt", Reporter(quiet=True))
    first, *_ = _scores(before, folder / "untrained")
    start, trained = _scores(run, folder / "prompt")
    return {
        "task": task,
        "backbone": backbone,
        "steps": run.steps,
        "metrics": list(run.tasks[0].metrics),  # the scores below are their mean
        "untrained": first,
        "prompt before training": start,
        "trained": trained,
        "seconds": result["seconds"],
    }


def _scores(run: Run, folder: Path) -> list[float]:
    lines = read_metrics(folder / "metrics.jsonl", run)
    return [run_score(run, line["validation"]) for line in lines if "validation" in line]


def _is_packaged(name: str) -> bool:
    source = tasks.get(name).source
    return source.kind == "package" and "train" in source.splits


if __name__ == "__main__":
    main()
