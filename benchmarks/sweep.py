"""Train N prompts in one program and one after another: CPU seconds of a step, of the start, and memory.

    python benchmarks/sweep.py [--prompts 8] [--cases fixed:1,fixed:8,real:8]

A case is a way of lengths (fixed: 32 words in every text; real: log-normal, median 20, at most 60, in four shapes) and
a batch size. Each side is a process of its own that trains on the backbone that ships here, so that its memory is its
own. Alone, one run is measured, and N of them count N times. Results are appended to `results/sweep.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

RESULTS = Path(__file__).resolve().parent / "results" / "sweep.jsonl"
TEXT = "the film is a warm slow bright story of two friends who never say what they want and it is all too long"
LOG_EVERY, STEPS, LENGTH = 5, 25, 20


def write_task(folder: Path, lengths: str) -> dict[str, Any]:
    """Write 512 texts for training and 16 for each other split, and return the task's settings."""
    draw = random.Random(0)

    def row(number: int) -> str:
        count = 32 if lengths == "fixed" else round(min(60, max(4, draw.lognormvariate(3.0, 0.7))))
        text = " ".join(draw.choices(TEXT.split(), k=count))
        return json.dumps({"text": text, "label": ("yes", "no")[number % 2]})

    source = {"kind": "files"}
    for split, count in (("train", 512), ("validation", 16), ("test", 16)):
        path = folder / f"{split}.jsonl"
        path.write_text("\n".join(row(number) for number in range(count)) + "\n")
        source[split] = str(path)
    return {"name": "texts", "source": source, "label_words": ["yes", "no"]}


def child(folder: Path, side: str, prompts: int) -> None:
    """Train one run, or all together, and print what it took."""
    from softprompt_jax import load_run, sweep, train
    from softprompt_jax.cli.allocator import keep_freed_memory
    from softprompt_jax.progress import Reporter

    keep_freed_memory()
    marks: list[tuple[int, float, float]] = []

    class Clock(Reporter):
        def update(self, step: int, steps: int, note: str) -> None:
            marks.append((step, machine.cpu_seconds(), time.perf_counter()))

    config = folder / "config.yaml"
    if side == "alone":
        train(load_run(config), folder / "alone", Clock(quiet=True))
        lines = [folder / "alone" / "metrics.jsonl"]
    else:
        sweep(config, [f"seed=0..{prompts - 1}"], folder / "together", together=prompts, reporter=Clock(quiet=True))
        lines = sorted((folder / "together").glob("*/metrics.jsonl"))
    (first, cpu, wall), (last, cpu_end, wall_end) = marks[0], marks[-1]
    padding = [line["padding"] for path in lines for line in map(json.loads, path.open()) if "loss" in line]
    print(
        json.dumps(
            {
                "cpu_s_per_step": (cpu_end - cpu) / (last - first),
                "wall_s_per_step": (wall_end - wall) / (last - first),
                "start_cpu_s": cpu - (cpu_end - cpu) / (last - first) * first,
                "peak_gib": machine.peak_memory_gib(),
                "padding": sum(padding) / len(padding),
            }
        )
    )


def measure(lengths: str, batch_size: int, prompts: int) -> dict[str, Any]:
    """Run both sides of a case and compare them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {
            "task": write_task(folder, lengths),
            "methods": [{"kind": "prompt", "length": LENGTH}],
            "batch_size": batch_size,
            "steps": STEPS,
            "shapes": 1 if lengths == "fixed" else 4,
            "max_input_tokens": 128,
            "log_every": LOG_EVERY,
            "evaluate_every": STEPS,
            "checkpoint_every": STEPS,
        }
        (folder / "config.yaml").write_text(json.dumps(settings))
        sides = {}
        for side in ("alone", "together"):
            command = [sys.executable, __file__, "--child", side, str(folder), "--prompts", str(prompts)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{side}: the process ended with {done.returncode}\n{done.stderr[-2000:]}")
            sides[side] = json.loads(done.stdout.splitlines()[-1])
    alone, together = sides["alone"], sides["together"]
    return {
        "lengths": lengths,
        "batch_size": batch_size,
        "prompts": prompts,
        "steps": STEPS,
        "prompt_length": LENGTH,
        **sides,
        "times_throughput": prompts * alone["cpu_s_per_step"] / together["cpu_s_per_step"],
        "times_start": prompts * alone["start_cpu_s"] / together["start_cpu_s"],
        "times_memory_of_one": together["peak_gib"] / alone["peak_gib"],
    }


def rounded(value: Any) -> Any:
    """Round all numbers to four places."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    """Measure the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--cases", default="fixed:1,fixed:8,real:8")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[1]), arguments.child[0], arguments.prompts)
        return
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    about = machine.describe()
    titles = f"{'alone x N':>12}{'together':>10}{'faster':>8}{'start':>7}{'memory':>8}{'padding':>16}"
    print(f"{'lengths':8}{'batch':>6}{titles}")
    for case in arguments.cases.split(","):
        lengths, size = case.split(":")
        busy, own, clock = machine.busy_seconds(), machine.child_cpu_seconds(), time.perf_counter()
        found = measure(lengths, int(size), arguments.prompts)
        used = machine.busy_seconds() - busy - (machine.child_cpu_seconds() - own)
        found["others"] = max(0.0, used) / ((time.perf_counter() - clock) * about["machine"]["cores"])
        with arguments.results.open("a") as file:
            file.write(json.dumps(about | rounded(found)) + "\n")
        alone, together = found["alone"], found["together"]
        print(
            f"{lengths:8}{size:>6}{arguments.prompts * alone['cpu_s_per_step']:12.3f}{together['cpu_s_per_step']:10.3f}"
            f"{found['times_throughput']:7.2f}x{found['times_start']:6.1f}x{found['times_memory_of_one']:7.2f}x"
            f"{alone['padding']:8.0%}{together['padding']:8.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
