"""Time from the start of a process to its first training step, with an empty and a filled compilation cache.

    .venv/bin/python benchmarks/startup.py [--config configs/quickstart.yaml] [--rounds 3]

JAX keeps compiled programs where JAX_COMPILATION_CACHE_DIR says: "cold" finds it empty, "warm" what the cold start
left. The scoring before the first step is cut to 64 examples. A line per start is appended to results/startup.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "startup.jsonl"


def child(config: str, folder: str) -> None:
    """Train one step; say when the data were ready and when the step was done, in CPU seconds of the process."""
    from softprompt_jax.progress import Reporter

    marks: dict[str, float] = {}

    class Watch(Reporter):
        def start(self, *_: object) -> None:
            marks["ready_cpu_s"] = machine.cpu_seconds()

        def update(self, *_: object) -> None:
            marks.setdefault("first_step_cpu_s", machine.cpu_seconds())
            marks.setdefault("at", time.time())

    from softprompt_jax import load_run, train

    changes = ["steps=1", "log_every=1", "evaluate_every=1", "evaluation_examples=64"]
    train(load_run(config, changes), folder, Watch(quiet=True))
    print(json.dumps(marks))


def main() -> None:
    """Start processes in pairs, cold and then warm, and append what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(HERE.parent / "configs" / "quickstart.yaml"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.config, arguments.child)
        return
    about, found = machine.describe(), {"cold": [], "warm": []}
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            }
            for state in found:
                command = [sys.executable, __file__, "--config", arguments.config, "--child", f"{folder}/{state}"]
                began = time.time()
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                marks = json.loads(done.stdout.splitlines()[-1])
                marks["first_step_wall_s"] = marks.pop("at") - began
                found[state].append({name: round(value, 2) for name, value in marks.items()})
                print(f"round {number + 1}, {state}: {found[state][-1]}", flush=True)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a") as file:
        for state, rounds in found.items():
            medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
            name = Path(arguments.config).name
            file.write(json.dumps(about | {"state": state, "config": name, **medians, "rounds": rounds}) + "\n")


if __name__ == "__main__":
    main()
