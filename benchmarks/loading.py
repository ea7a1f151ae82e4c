"""Time loading a backbone from safetensors here and in transformers (torch), side by side on a CPU, with its memory.

    .venv-torch/bin/python benchmarks/loading.py [--size base] [--rounds 3]

Each load is a process of its own on one core, after the imports; sides take turns, and the file is in the page cache
from a load that does not count. Every number is read once at the end, so that nothing stays mapped and unread. Memory
is the growth of anonymous memory at its peak. A line per side is appended to results/loading.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import machine

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "loading.jsonl"
SIDES = {
    "ours float32": ("float32", None),
    "ours bfloat16": ("bfloat16", None),
    "ours int8": ("bfloat16", "int8"),
    "ours nf4": ("bfloat16", "nf4"),
    "transformers float32": ("float32", None),
    "transformers bfloat16": ("bfloat16", None),
}


def anonymous() -> int:
    """Return the bytes that are this process's own."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def load(side: str, folder: str) -> int:
    """Load, read every number, and return the bytes of the weights."""
    dtype, quantize = SIDES[side]
    if side.startswith("ours"):
        import jax
        import numpy as np
        from flax import nnx

        from softprompt_jax.checkpoints.backbone import load_backbone

        leaves = jax.tree.leaves(nnx.state(load_backbone(folder, dtype, quantize=quantize).model))
        for leaf in leaves:
            np.asarray(leaf).view(np.uint8).max()
        return sum(leaf.nbytes for leaf in leaves)
    import torch
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.data.view(torch.uint8).max()
    return sum(parameter.nbytes for parameter in model.parameters())


def without_checksums(file: Path) -> None:
    """Write a file of ours as those on the hub are: only ours have checksums, which take a second for a gigabyte."""
    from safetensors.numpy import load_file, save_file

    save_file(load_file(file), file, {"format": "pt"})


def child(side: str, folder: str) -> None:
    """Import, load once, and say what that took."""
    if side.startswith("ours"):
        import jax
        import jax.numpy as jnp

        import softprompt_jax.checkpoints.backbone  # noqa: F401
        from softprompt_jax.cli.allocator import keep_freed_memory

        keep_freed_memory()  # as the command line does
        jax.block_until_ready(jnp.zeros(1))
    else:
        import torch
        import transformers.models.t5.modeling_t5  # noqa: F401

        torch.set_num_threads(1)
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    cpu, wall = machine.cpu_seconds(), time.perf_counter()
    size = load(side, folder)
    answer = {"cpu_s": machine.cpu_seconds() - cpu, "wall_s": time.perf_counter() - wall, "bytes": size}
    done.set()
    watcher.join()
    print(json.dumps(answer | {"peak_bytes": peak - before}))


def main() -> None:
    """Let the sides take turns, and append what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", help="tiny (to try this file), small, base, large")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    about = machine.describe()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    core = str(min(os.sched_getaffinity(0)))
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(HERE / "make_backbone.py"), folder, arguments.size], check=True)
        without_checksums(Path(folder) / "model.safetensors")
        for number in range(arguments.rounds + 1):
            for side, found in rounds.items():
                command = ["taskset", "-c", core, sys.executable, __file__, "--child", side, folder]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                if number:
                    found.append(json.loads(done.stdout.splitlines()[-1]))
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a") as file:
        for side, found in rounds.items():
            middle = {what: statistics.median(one[what] for one in found) for what in found[0]}
            line = about | {
                "side": side, "size": arguments.size, "cpu_s": round(middle["cpu_s"], 3),
                "wall_s": round(middle["wall_s"], 3), "weights_mb": round(middle["bytes"] / 1e6, 1),
                "peak_mb": round(middle["peak_bytes"] / 1e6, 1),
                "peak_of_weights": round(middle["peak_bytes"] / middle["bytes"], 2),
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            print(f"{side:22} {line['cpu_s']} CPU s, peak {line['peak_mb']} MB of {line['weights_mb']} MB weights")


if __name__ == "__main__":
    main()
