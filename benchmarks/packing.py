"""Time training steps on real lengths: buckets of 4 and 12 shapes, packed rows, and everything padded; no torch.

All take turns in one process, a step each, so that whatever else the machine does slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import machine
from make_backbone import make
from side_ours import of_folder

from softprompt_jax.cli.allocator import keep_freed_memory
from softprompt_jax.data.batches import examples_in

RESULTS = Path(__file__).resolve().parent / "results" / "packing.jsonl"
CASES = ("bucketed-4", "bucketed-12", "packed", "packed-512", "padded")


def measure(size: str, steps: int) -> list[dict[str, float | str]]:
    """Return a line per way of batching: padding, examples and CPU seconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        make(folder, size)
        ours = of_folder(folder, "float32", "scan", 1)
        prepared = {case: ours.batches(case, steps) for case in CASES}
    seconds = dict.fromkeys(CASES, 0.0)
    for batches, _ in prepared.values():
        ours.warm_up(batches)
    for step in range(steps):
        for case in CASES[step % len(CASES) :] + CASES[: step % len(CASES)]:
            start = machine.cpu_seconds()
            ours.step(prepared[case][0][step])
            seconds[case] += machine.cpu_seconds() - start
    lines = []
    for case, (batches, padding) in prepared.items():
        examples = sum(map(examples_in, batches))
        lines.append(
            {
                "size": size,
                "case": case,
                "padding": round(padding, 3),
                "examples_per_step": round(examples / steps, 2),
                "cpu_s_per_step": round(seconds[case] / steps, 3),
                "examples_per_cpu_s": round(examples / seconds[case], 3),
            }
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="small", help="tiny, small, base, ...")
    parser.add_argument("--steps", type=int, default=8, help="of each way of batching, spread over an epoch")
    options = parser.parse_args()
    keep_freed_memory()
    about = machine.describe()
    for line in measure(options.size, options.steps):
        print("{case:12} padding {padding:6.1%}  {examples_per_step:5.2f} examples in {cpu_s_per_step:7.3f} CPU s: "
              "{examples_per_cpu_s:.2f} a second".format(**line))  # fmt: skip
        with RESULTS.open("a") as file:
            file.write(json.dumps(about | line) + "\n")
