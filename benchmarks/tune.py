"""A race beside the default settings and the full grid: test scores and CPU seconds, on four tasks and on SmolLM2.

    python benchmarks/tune.py [--only movies spam intents sts smollm2] [--seeds 3] [--runs runs/tune]

Of each task: one run with default settings; all candidates of `softprompt tune`, each trained to the end (the grid, of
which the lowest validation loss counts, as in the race); the race. Then the settings of all three with more seeds. Each
side is a process of its own with an empty cache of compiled programs. What is done is kept, and a killed run goes on.
`results/tune.json` has a row for each task that is done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
import yaml

RESULTS = Path(__file__).resolve().parent / "results" / "tune.json"
SIDES = ("default", "grid", "tune", "seeds")
SMALL = {
    "methods": [{"kind": "prompt", "length": 20}],
    **{"steps": 300, "max_input_tokens": 64, "max_target_tokens": 8, "evaluate_every": 300, "checkpoint_every": 300},
    **{"log_every": 25, "evaluation_examples": 256, "result_examples": 500},
}


def task_of_intents() -> dict[str, Any]:
    """Return the task of configs/intents."""
    return yaml.safe_load((machine.ROOT / "configs" / "intents" / "run.yaml").read_text())["task"]


def cases() -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Return the settings of each case, and what is tried in it (nothing: the default)."""
    smollm2 = yaml.safe_load((machine.ROOT / "configs" / "intents" / "run.yaml").read_text())
    smollm2 |= {"steps": 75, "evaluate_every": 75, "checkpoint_every": 75}
    rates = "learning_rate=0.03,0.1,0.3,0.9,3"
    return {
        "movies": (SMALL | {"task": "sentiment_movie"}, []),
        "spam": (SMALL | {"task": "spam_sms"}, []),
        "intents": (SMALL | {"task": task_of_intents()}, []),
        "sts": (SMALL | {"task": "sts_similarity", "max_input_tokens": 96}, []),
        "smollm2": (smollm2, [rates, "init=labels,vocabulary"]),  # 20 rows: a grid of three hours
    }


def main() -> None:
    """Measure what is missing and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(cases()), default=list(cases()))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=machine.ROOT / "runs" / "tune")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side, case = arguments.child
        child(side, case, arguments.runs / case, arguments.seeds)
        return
    for case in arguments.only:
        folder = arguments.runs / case
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(cases()[case][0], sort_keys=False))
        for side in SIDES:
            if not (folder / f"{side}.json").exists():
                command = [sys.executable, __file__, "--child", side, case, "--seeds", str(arguments.seeds)]
                cache = {"JAX_COMPILATION_CACHE_DIR": str((folder / f"compiled-{side}").absolute())}
                done = subprocess.run(
                    [*command, "--runs", str(arguments.runs)], env=os.environ | cache, cwd=machine.ROOT
                )
                if done.returncode:
                    raise SystemExit(f"{case}: {side} ended with {done.returncode}; the same command goes on")
        write(arguments.results, case, row(case, folder))


def child(side: str, case: str, folder: Path, seeds: int) -> None:
    """Train one side of a case; CPU seconds are noted as it goes, those before a kill too."""
    from softprompt_jax import load_run, sweep, train, tune
    from softprompt_jax.cli.allocator import keep_freed_memory
    from softprompt_jax.progress import Reporter
    from softprompt_jax.training.tune import default_space

    spent = folder / "cpu" / f"{side}-{os.getpid()}-{time.time_ns()}.json"
    spent.parent.mkdir(exist_ok=True)

    class Clock(Reporter):
        """Writes the CPU seconds of this process at every line."""

        def line(self, text: str) -> None:
            super().line(text)
            spent.write_text(json.dumps(machine.cpu_seconds()))

    keep_freed_memory()
    config, over, clock = folder / "config.yaml", cases()[case][1], Clock()
    over = over or default_space(load_run(config))
    if side == "default":
        found: Any = train(load_run(config), folder / side, clock).result
    elif side == "grid":
        found = sweep(config, over, folder / side, together=1, reporter=clock)
        losses = {run["name"]: run["validation"]["loss"] for run in lossy(found, folder / side)}
        found = {"losses": losses, "best": min(losses, key=losses.__getitem__), "runs": found["runs"]}
    elif side == "tune":
        found = tune(config, folder / side, over, reporter=clock)
    else:
        found = {}
        for name, where in chosen(folder).items():
            found[name] = []
            for seed in range(seeds):
                result = train(load_run(where, [f"seed={seed}"]), folder / side / f"{name}-{seed}", clock)
                found[name].append(score(result, load_run(where)))
    clock.line(f"{case}: {side} is done")
    (folder / f"{side}.json").write_text(json.dumps(found))


def lossy(found: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return the finished runs of a sweep with the loss of their last validation."""
    runs = [run for run in found["runs"] if "failed" not in run]
    for run in runs:
        lines = map(json.loads, (folder / run["name"] / "metrics.jsonl").read_text().splitlines())
        run["validation"]["loss"] = [line["validation"]["loss"] for line in lines if "validation" in line][-1]
    return runs


def chosen(folder: Path) -> dict[str, Path]:
    """Return the configs of the three settings that are compared over seeds."""
    best = json.loads((folder / "grid.json").read_text())["best"]
    return {
        "default": folder / "default" / "config.yaml",
        "grid": folder / "grid" / best / "config.yaml",
        "tune": folder / "tune" / "winner" / "config.yaml",
    }


def score(result: Any, run: Any) -> float:
    """Return a run's test score, in percent."""
    from softprompt_jax.inference.evaluate import run_score

    return round(100 * run_score(run, result["test"]), 2)


def row(case: str, folder: Path) -> dict[str, Any]:
    """Return what was measured of a case."""
    grid, raced, seeds = (json.loads((folder / f"{side}.json").read_text()) for side in ("grid", "tune", "seeds"))
    cpu: dict[str, float] = {"default": 0.0, "grid": 0.0, "tune": 0.0}
    for path in (folder / "cpu").glob("*.json"):
        if (side := path.name.partition("-")[0]) in cpu:
            cpu[side] += json.loads(path.read_text())
    names: dict[str, str] = {"default": "", "grid": grid["best"], "tune": raced["winner"]}
    found = {"task": case, "steps": raced["run"]["steps"], "candidates": len(grid["runs"])}
    found["rounds"] = [[one["steps"], len(one["candidates"])] for one in raced["rounds"]]
    for side, name in names.items():
        values = seeds[side]
        found[side] = {
            "settings": name,
            "test": values,
            "mean": round(statistics.mean(values), 2),
            "sd": round(statistics.stdev(values), 2) if len(values) > 1 else None,
            "cpu_s": round(cpu[side]),
        }
    order = sorted(grid["losses"], key=grid["losses"].__getitem__)
    found["place_of_the_winner_in_the_grid"] = 1 + order.index(names["tune"])
    found["share_of_the_grids_cpu"] = round(cpu["tune"] / cpu["grid"], 3)
    return found


def write(path: Path, case: str, found: dict[str, Any]) -> None:
    """Put a row into the results, in the place of one of the same case, and print it."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [one for one in rows if one["task"] != case] + [found]
    path.write_text(json.dumps({"about": machine.describe(), "rows": rows}, indent=1) + "\n")
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
