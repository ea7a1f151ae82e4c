"""Compile for NVIDIA GPUs, without one, what people run on them; write memory, kernels and collectives.

    .venv-cuda/bin/python benchmarks/gpu_programs.py     # make install VENV=.venv-cuda EXTRAS=dev,cuda13; ten minutes

`make test-cuda` compiles the same programs and compares; docs/build.py writes the table of tpu/README.md from it.
Nothing runs: what is measured is the program.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parent / "results" / "gpu_programs.json"
T5_BASE, TASK = "google/t5-v1_1-base", {"name": "none", "source": {"kind": "files", "train": "none.jsonl"}}
# 412 tokens of text behind 100 prompt rows, 32 of target, 32 rows in a batch.
SETTINGS = {"task": TASK, "batch_size": 32, "max_input_tokens": 412, "max_target_tokens": 32, "dtype": "bfloat16"}
# name: what is compiled, for which machine, and what differs from SETTINGS
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "T5 1.1 base, a step": ("train", "h100:1", {"backbone": T5_BASE}),
    "T5 1.1 base, a step without dropout": ("train", "h100:1", {"backbone": T5_BASE, "dropout": 0}),
    "T5 1.1 base, a step without dropout, `attention: plain`": (
        "train",
        "h100:1",
        {"backbone": T5_BASE, "dropout": 0, "attention": "plain"},
    ),
    "T5 1.1 base, a step without dropout, `quantize: int8`": (
        "train",
        "h100:1",
        {"backbone": T5_BASE, "dropout": 0, "quantize": "int8"},
    ),
    "T5 1.1 base, a step on 8 GPUs": ("train", "a100:8", {"backbone": T5_BASE}),
    "T5 1.1 base, a step on 8 GPUs, `mesh: {data: 1, fsdp: 8}`": (
        "train",
        "h100:8",
        {"backbone": T5_BASE, "mesh": {"data": 1, "fsdp": 8}},
    ),
    "T5 1.1 base, decoding of 64 texts": ("predict", "h200:1", {"backbone": T5_BASE}),
    "T5 1.1 base, the server": ("serve", "h100:1", {"backbone": T5_BASE}),
    "SmolLM2 135M, a step": ("train", "h100:1", {"backbone": "smollm2-135m"}),
    "Gemma 3 1B, a step": ("train", "h100:1", {"backbone": "gemma-3-1b"}),
}


def main() -> None:
    """Compile all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=RESULT, help="where the result goes")
    to = parser.parse_args().to

    from softprompt_jax.analysis import plan

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.yaml"
        for name, (purpose, topology, changes) in CASES.items():
            config.write_text(json.dumps(SETTINGS | changes))  # which is YAML, too
            (answer,) = plan.plan(str(config), [], [topology], purpose=purpose)
            assert not answer["estimated"], "no compiler for GPUs; expected the extra cuda13"
            print(name, plan.describe(answer), sep="\n", flush=True)
            kept = ("purpose", "topology", "compiler", "limit_bytes", "peak_bytes", "weights_bytes", "cache_bytes")
            kept += ("kernels", "collectives", "batch", "largest_batch")
            rows.append({"name": name} | {key: answer[key] for key in kept})
    packages = ("jax", "nvidia-cudnn-cu13", "nvidia-cublas")
    versions = {package: importlib.metadata.version(package) for package in packages}
    result = {"date": time.strftime("%Y-%m-%d"), "versions": versions, "settings": SETTINGS, "rows": rows}
    to.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
