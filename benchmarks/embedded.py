"""Prompt tuning against model tuning on the backbone that ships here: lengths, tasks, three seeds.

    python benchmarks/embedded.py [--seeds 3] [--runs runs/embedded]

Runs what is missing (a killed one goes on), then writes `benchmarks/results/embedded.json` and prints
the table. Two to three minutes a run of 500 steps on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import machine

from softprompt_jax import load_run, train
from softprompt_jax.cli.allocator import keep_freed_memory
from softprompt_jax.progress import Reporter

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (1, 5, 20, 100)
TASKS = ("sentiment_movie", "spam_sms")
RESULTS = ROOT / "benchmarks" / "results" / "embedded.json"


def main() -> None:
    """Run the grid and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "embedded")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    arguments = parser.parse_args()
    keep_freed_memory()
    methods = {f"prompt, length {n}": ("quickstart.yaml", [f"methods.0.length={n}"]) for n in LENGTHS}
    # One message in ten is spam: at 500 steps prompts have hardly left the majority class.
    methods["prompt, length 20, 3000 steps"] = (
        "quickstart.yaml",
        ["methods.0.length=20", "steps=3000", "schedule.decay=linear", "unroll=true"],
    )
    methods["model tuning"] = ("model_tuning.yaml", [])
    rows = []
    # All of one seed before the next, so that an interrupted grid still compares like with like.
    measured: dict[tuple[str, str], list[dict]] = {}
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            for name, (config, changes) in methods.items():
                run = load_run(ROOT / "configs" / config, [f"task={task}", f"seed={seed}", *changes])
                folder = arguments.runs / task / name.replace(", ", "-").replace(" ", "-") / str(seed)
                result = train(run, folder, Reporter(quiet=True))
                measured.setdefault((task, name), []).append(result)
                print(f"{task}  {name}  seed {seed}: {result['test']['accuracy']:.3f}", flush=True)
    for (task, name), results in measured.items():
        scores = [100 * result["test"]["accuracy"] for result in results]
        second = next(key for key in results[0]["test"] if key.startswith("f1"))
        f1 = [100 * result["test"][second] for result in results]
        baselines = results[0]["baselines"]
        rows.append(
            {
                "task": task,
                "method": name,
                "seeds": len(scores),
                "accuracy_mean": round(statistics.mean(scores), 1),
                "accuracy_sd": round(statistics.stdev(scores), 1) if len(scores) > 1 else None,
                f"{second}_mean": round(statistics.mean(f1), 1),
                "majority": round(100 * baselines["majority"], 1),
                "untrained": round(statistics.mean(100 * r["baselines"]["untrained"]["accuracy"] for r in results), 1),
                "steps": results[0]["steps"],
                "seconds_mean": round(statistics.mean(result["seconds"] for result in results)),
            }
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"about": machine.describe(), "rows": rows}, indent=1) + "\n")
    print("| task | method | test accuracy | F1 | majority | untrained | seconds |\n|---|---|---|---|---|---|---|")
    for row in rows:
        sd = "" if row["accuracy_sd"] is None else f" ± {row['accuracy_sd']}"
        print(
            f"| {row['task']} | {row['method']} | {row['accuracy_mean']}{sd} "
            f"| {row.get('f1_macro_mean', row.get('f1_mean'))} "
            f"| {row['majority']} | {row['untrained']} | {row['seconds_mean']} |"
        )


if __name__ == "__main__":
    main()
