"""Where our training step spends its time: seconds by class of operation, and the ten longest.

    python benchmarks/profile_step.py [--variant unroll] [--dtype float32] [--size small] [--cores 1]

Reads JAX's own profile of one step (after a warm-up) and the compiled program's operations. Appends the classes to
`results/profile_step.jsonl`.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--size", default="small")
parser.add_argument("--dtype", default="float32")
parser.add_argument("--variant", default="unroll")
parser.add_argument("--cores", type=int, default=1)
parser.add_argument("--longest", type=int, default=10)
arguments = parser.parse_args()
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])  # before XLA makes its threads

import jax  # noqa: E402
import machine  # noqa: E402
from make_backbone import make  # noqa: E402
from side_ours import of_folder  # noqa: E402

from softprompt_jax.cli.allocator import keep_freed_memory  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "profile_step.jsonl"
CLASSES = [  # the first that an instruction's text matches names it
    ("matrix products", r"\bdot\(|dot_general|__onednn|custom-call.*matmul"),
    ("softmax, scores", r"reduce_max|reduce_sum|/exp|custom_jvp_call/div|attend"),
    ("gelu", r"tanh|gelu"),
    ("copies, transposes", r"\b(copy|transpose|bitcast|concatenate|dynamic-slice|dynamic-update-slice)\("),
]


def classify(instruction: str) -> str:
    return next((name for name, pattern in CLASSES if re.search(pattern, instruction)), "other")


def main() -> None:
    keep_freed_memory()  # as the command line does
    with tempfile.TemporaryDirectory() as folder:
        make(folder, arguments.size)
        side = of_folder(folder, arguments.dtype, arguments.variant, arguments.cores)
        (batch,), _ = side.batches("fixed", 1)
        program = side.function.lower(side.state, side.frozen, batch, side.key).compile()
        instructions = {}
        for line in program.as_text().splitlines():
            if found := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line):
                instructions[found[1]] = line.strip()
        for _ in range(2):
            side.step(batch)
        with jax.profiler.trace(folder):
            side.step(batch)
        path = max(Path(folder).rglob("*.xplane.pb"))
        seconds: collections.Counter[str] = collections.Counter()
        counts: collections.Counter[str] = collections.Counter()
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in instructions:
                        seconds[event.name] += event.duration_ns / 1e9
                        counts[event.name] += 1
    total = sum(seconds.values())
    by_class: collections.Counter[str] = collections.Counter()
    for name, value in seconds.items():
        by_class[classify(instructions[name])] += value
    print(
        f"{total:.3f} s in {sum(counts.values())} operations ({arguments.size}, {arguments.dtype}, {arguments.variant})"
    )
    for name, value in by_class.most_common():
        print(f"{value:9.3f} s {value / total:6.1%}  {name}")
    what = {key: getattr(arguments, key) for key in ("size", "dtype", "variant", "cores")}
    classes = {name: round(value, 3) for name, value in by_class.most_common()}
    with RESULTS.open("a") as results:
        results.write(json.dumps(machine.describe() | what | {"seconds": round(total, 3), "classes": classes}) + "\n")
    print()
    for name, value in seconds.most_common(arguments.longest):
        print(f"{value:9.3f} s {counts[name]:4d}x  {instructions[name][:200]}")


if __name__ == "__main__":
    main()
