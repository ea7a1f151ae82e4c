"""Time greedy decoding under one prompt here and in Hugging Face PEFT (`generate`), side by side on a CPU.

    .venv-torch/bin/python benchmarks/decoding.py [--size small|smollm2] [--batch 8] [--rounds 5]

Each side is a process of its own on the same core; they take turns. Both load the same random weights and the same
prompt, decode exactly `--tokens` for each text and must give the same ones. A line per side is appended to
results/decoding.jsonl.
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
from typing import Any

import machine
import numpy as np
from workload import PROMPT_LENGTH, Workload

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "decoding.jsonl"


def texts(workload: Workload, batch: int, count: int) -> list[np.ndarray]:
    """Return batches [B, T] of one length, EOS included."""
    random = np.random.default_rng(4)
    made = random.integers(3, workload.vocabulary_rows, (count, batch, workload.input_tokens))
    made[..., -1] = 1
    return list(made.astype(np.int32))


class Ours:
    """softprompt_jax.generate."""

    def __init__(self, folder: str, tokens: int):
        import softprompt_jax
        from softprompt_jax.cli.allocator import keep_freed_memory

        keep_freed_memory()
        self.backbone = softprompt_jax.load_backbone(folder)
        self.prompt = Workload.read(folder).prompt(self.backbone.settings.d_model)
        self.tokens, self.generate = tokens, softprompt_jax.generate

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        found = self.generate(self.backbone, ids, self.prompt, max_tokens=self.tokens, stop=False)
        return np.asarray(found)


class Peft:
    """PEFT's generate around transformers' model."""

    def __init__(self, folder: str, tokens: int):
        import torch
        from peft import PromptTuningConfig, get_peft_model
        from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

        torch.set_num_threads(1)
        workload = Workload.read(folder)
        self.causal = workload.causal
        kind = AutoModelForCausalLM if self.causal else T5ForConditionalGeneration
        backbone = kind.from_pretrained(folder, dtype=torch.float32)
        backbone.generation_config.eos_token_id = None  # exactly so many tokens
        task = "CAUSAL_LM" if self.causal else "SEQ_2_SEQ_LM"
        config = PromptTuningConfig(task_type=task, num_virtual_tokens=PROMPT_LENGTH, num_transformer_submodules=1)
        self.model, self.torch, self.tokens = get_peft_model(backbone, config).eval(), torch, tokens
        embedding = self.model.prompt_encoder["default"].embedding.weight
        embedding.data.copy_(torch.from_numpy(workload.prompt(backbone.config.hidden_size)))

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            rows = self.torch.from_numpy(ids.astype(np.int64))
            found = self.model.generate(
                input_ids=rows, attention_mask=self.torch.ones_like(rows), max_new_tokens=self.tokens, do_sample=False
            )
        return found[:, ids.shape[1] if self.causal else 1 :].numpy()  # behind the text, or the decoder's start


def worker(side: str, folder: str, tokens: int) -> None:
    """Answer batches, given as numbers of lines on stdin, with their tokens and CPU seconds."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    made = {"ours": Ours, "peft": Peft}[side](folder, tokens)
    for line in sys.stdin:
        ids = np.asarray(json.loads(line), np.int32)
        cpu = machine.cpu_seconds()
        found = made(ids)
        answers.write(json.dumps({"cpu_s": machine.cpu_seconds() - cpu, "tokens": found.tolist()}) + "\n")


def same(one: list[list[int]], other: list[list[int]]) -> float:
    """Return the share of rows that agree."""
    return statistics.mean(float(a == b) for a, b in zip(one, other, strict=True))


def main() -> None:
    """Let both sides take turns, print and append what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", help="tiny (to try this file), small, base, ..., smollm2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="decoded for each text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker, arguments.tokens)
        return
    about = machine.describe()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    core = str(min(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(HERE / "make_backbone.py"), folder, arguments.size], check=True)
        batches = texts(Workload.read(folder), arguments.batch, arguments.rounds + 1)
        command = ["taskset", "-c", core, sys.executable, __file__, "--tokens", str(arguments.tokens), "--worker"]
        sides = {
            side: subprocess.Popen(
                [*command, side, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            for side in ("ours", "peft")
        }
        taken: dict[str, list[float]] = {side: [] for side in sides}
        agreed = []
        busy = clock = 0.0
        for number, ids in enumerate(batches):
            if number == 1:  # the first compiles, or fills caches
                busy, clock = machine.busy_seconds(), time.perf_counter()
            said: dict[str, Any] = {}
            for side, process in sides.items():
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(ids.tolist()) + "\n")
                process.stdin.flush()
                said[side] = json.loads(process.stdout.readline())
                if number:
                    taken[side].append(said[side]["cpu_s"])
            agreed.append(same(said["ours"]["tokens"], said["peft"]["tokens"]))
        used = machine.busy_seconds() - busy - sum(map(sum, taken.values()))
        others = max(0.0, used) / ((time.perf_counter() - clock) * about["machine"]["cores"])
        for process in sides.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    if statistics.mean(agreed) < 0.9:
        raise SystemExit(f"tokens: {statistics.mean(agreed):.0%} of the rows agree; expected at least 90%")
    peft = statistics.median(taken["peft"])
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a") as file:
        for side, seconds in taken.items():
            line = about | {
                "side": side, "size": arguments.size, "batch": arguments.batch, "prompt": PROMPT_LENGTH,
                "input_tokens": int(batches[0].shape[1]), "tokens": arguments.tokens, "dtype": "float32",
                "cpu_s_per_batch": round(statistics.median(seconds), 4), "rounds": [round(s, 4) for s in seconds],
                "rows_that_agree": round(statistics.mean(agreed), 3), "others": round(others, 3),
                "times_peft": round(peft / statistics.median(seconds), 2),
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            print(f"{side}: {line['cpu_s_per_batch']} CPU s a batch of {arguments.batch}, {line['times_peft']}x PEFT")


if __name__ == "__main__":
    main()
