"""What a checkpoint costs: how long the loop waits for it, how long the writing takes, its bytes on disk.

    .venv/bin/python benchmarks/checkpoint.py [--rounds 5]

The state of a prompt run is the prompt, its optimizer and the step, whatever the backbone weighs; that of model
tuning is a whole model. Lines are appended to results/checkpoint.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import numpy as np

from softprompt_jax import load_run
from softprompt_jax.analysis.plan import abstract_step
from softprompt_jax.checkpoints.training_state import Checkpoints

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "checkpoint.jsonl"
QUICKSTART = HERE.parent / "configs" / "quickstart.yaml"
CASES = {
    "prompt of 20 rows, embedded": (QUICKSTART, []),
    "prompt of 100 rows, T5 1.1 base": (QUICKSTART, ["backbone=google/t5-v1_1-base", "methods.0.length=100"]),
    "prompt of 100 rows, T5 1.1 XXL": (QUICKSTART, ["backbone=google/t5-v1_1-xxl", "methods.0.length=100"]),
    "model tuning, embedded": (QUICKSTART.with_name("model_tuning.yaml"), []),
}


def main() -> None:
    """Save the state of each case a few times, and append what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    about = machine.describe()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)  # equal numbers would be compressed away
    for name, (config, changes) in CASES.items():
        _, (described, *_), _ = abstract_step(load_run(config, changes))
        state = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 50, leaf.shape), leaf.dtype), described)
        waited, written, cpu = [], [], []
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(Path(folder) / "checkpoints")
            for step in range(1, arguments.rounds + 2):
                began, cpu_began = time.perf_counter(), machine.cpu_seconds()
                checkpoints.save(step, state, 0.5)
                waited.append(time.perf_counter() - began)
                checkpoints.wait()
                written.append(time.perf_counter() - began)
                cpu.append(machine.cpu_seconds() - cpu_began)
            checkpoints.close()
            files = [path for path in (Path(folder) / "checkpoints" / str(step)).rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files)
        # The first makes the writers; it is left out.
        line = about | {
            "case": name,
            "numbers": sum(leaf.size for leaf in jax.tree.leaves(state)),
            "bytes": size,
            "loop_waits_s": round(statistics.median(waited[1:]), 4),
            "written_s": round(statistics.median(written[1:]), 4),
            "cpu_s": round(statistics.median(cpu[1:]), 4),
        }
        print(f"{name}: {size:,} bytes, loop waits {line['loop_waits_s']} s, CPU {line['cpu_s']} s", flush=True)
        with arguments.results.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
