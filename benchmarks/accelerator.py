"""Time training steps of T5s with random weights on an accelerator, ours beside PEFT's, each in a process of its own.

    python benchmarks/accelerator.py [--sizes xl,xxl] [--variants ours:flash,peft:sdpa,...] [--batch 16] [--rounds 10]

Weights are drawn on the device, nothing is read or written. A variant of ours is ours:ATTENTION[:REMAT[:QUANTIZE]], one
of PEFT's peft:eager, sdpa or compile. A variant that does not fit into memory is told and left out. Seconds are of the
wall clock, after what is compiled first. "share" is of the rate at which the device multiplies bfloat16 matrices, found
in the same run, and counts what a step needs: forward, and backward to the activations; not what is computed again.
Without an accelerator it runs on the CPU, which is good for trying it (`--sizes tiny --batch 2 --rounds 1`).
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
from workload import PROMPT_LENGTH, Workload

RESULTS = Path(__file__).resolve().parent / "results" / "accelerator.jsonl"
VARIANTS = (
    "ours:flash,ours:plain,ours:flash:dots,ours:flash:full,ours:flash:none:int8,peft:eager,peft:sdpa,peft:compile"
)


def step_flop(settings: dict[str, Any], batch: int, text: int, target: int) -> float:
    """Count what a step of prompt tuning needs: products with frozen weights twice, of attention's own three times."""
    s, inner = argparse.Namespace(**settings), settings["num_heads"] * settings["d_kv"]
    width, source = s.d_model, text + PROMPT_LENGTH
    sublayers = 4 * width * inner + (3 if s.gated else 2) * width * s.d_ff
    weights = source * s.num_layers * sublayers
    weights += target * (s.num_decoder_layers * (sublayers + 2 * width * inner) + width * s.vocabulary_rows)
    weights += source * s.num_decoder_layers * 2 * width * inner  # the keys and values of what the encoder says
    pairs = s.num_layers * source * source + s.num_decoder_layers * target * (target + source)
    return batch * (2 * 2 * weights + 3 * 4 * inner * pairs)


def ceiling(size: int) -> dict[str, Any]:
    """Return how many FLOP a second a product of two square bfloat16 matrices reaches."""
    import jax
    import jax.numpy as jnp

    one, other = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in range(2))
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(10):
        begun = time.perf_counter()
        jax.block_until_ready(product(one, other))
        seconds.append(time.perf_counter() - begun)
    device = jax.local_devices()[0]
    return {
        "flop_s": 2 * size**3 / statistics.median(seconds[2:]),
        "device": device.device_kind,
        "backend": device.platform,
    }


def ours(case: dict[str, Any], workload: Workload) -> Any:
    """Return our side, and what tells its peak of memory."""
    import jax
    from flax import nnx
    from side_ours import Ours

    from softprompt_jax.models.quantized import quantized
    from softprompt_jax.models.t5 import T5, T5Settings

    attention, remat, quantize = (*case["variant"].split(":"), "none", "none")[:3]
    changes = {"attention": attention, "platform": jax.devices()[0].platform, "remat": remat}
    settings = T5Settings.model_validate(case["settings"] | changes)

    @jax.jit
    def drawn() -> Any:
        state = nnx.state(T5(settings, jax.random.key(0)))
        return jax.tree.map(lambda leaf: leaf.astype(case["dtype"]), state)

    model = nnx.eval_shape(lambda: T5(settings, jax.random.key(0)))
    nnx.update(model, drawn())
    model.dtype = case["dtype"]
    if quantize != "none":
        quantized(model, quantize)
    side = Ours(model, workload, dtype=case["dtype"], remat=remat)
    return side, lambda: (side.device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def peft(case: dict[str, Any], workload: Workload) -> Any:
    """Return PEFT's side, and what tells its peak of memory."""
    import torch
    from side_peft import Peft
    from transformers import AutoModelForSeq2SeqLM, T5Config

    s = argparse.Namespace(**case["settings"])
    config = T5Config(
        vocab_size=s.vocabulary_rows, d_model=s.d_model, d_kv=s.d_kv, d_ff=s.d_ff, num_heads=s.num_heads,
        num_layers=s.num_layers, num_decoder_layers=s.num_decoder_layers, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = "eager" if case["variant"] == "eager" else "sdpa"
    with torch.device(device):
        backbone = AutoModelForSeq2SeqLM.from_config(
            config, dtype=getattr(torch, case["dtype"]), attn_implementation=attention
        )
    side = Peft(backbone, workload, compiled=case["variant"] == "compile")
    return side, torch.cuda.max_memory_allocated if device == "cuda" else lambda: 0


def child(case: dict[str, Any]) -> dict[str, Any]:
    """Measure one variant of one size: fixed lengths, then a sample of an epoch of real ones."""
    if case["side"] == "ceiling":
        return ceiling(case["size"])
    workload = Workload(**case["workload"])
    side, peak = {"ours": ours, "peft": peft}[case["side"]](case, workload)
    found: dict[str, Any] = {}
    for name, kind, count in (
        ("fixed", "fixed", case["rounds"]),
        ("real", {"ours": "bucketed", "peft": "grouped"}[case["side"]], case["sample"]),
    ):
        if not count:
            continue
        batches, padding = side.batches(kind, count)
        for batch in batches:  # what a shape compiles or tunes is not counted, of either side
            side.step(batch)
        seconds = []
        for batch in batches:
            begun = time.perf_counter()
            side.step(batch)
            seconds.append(time.perf_counter() - begun)
        found[name] = {"seconds": seconds, "padding": padding, "peak_gib": peak() / 2**30}
    return found


def measure(case: dict[str, Any]) -> dict[str, Any] | str:
    """Run a case in a process of its own; return what it found, or why it ended."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--child", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    told = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"ended with {done.returncode}"]
    last = max((number for number, line in enumerate(told) if "Error" in line), default=len(told) - 1)
    return " ".join(told[last:])[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="xl,xxl", help="of T5 1.1; tiny, to try this file")
    parser.add_argument("--variants", default=VARIANTS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lengths", default="512,16", help="tokens of text and target; the prompt comes on top")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=10, help="steps of the fixed lengths; medians are taken")
    parser.add_argument("--sample", type=int, default=24, help="batches that stand for an epoch of real lengths, or 0")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    from softprompt_jax.models.presets import preset  # starts no device

    tiny = {"num_layers": 2, "num_decoder_layers": 2, "vocabulary_rows": 512, "d_model": 64, "d_ff": 128}
    text, target = map(int, arguments.lengths.split(","))
    most = measure({"side": "ceiling", "size": 512 if arguments.sizes == "tiny" else 8192})
    if isinstance(most, str):
        raise SystemExit(f"no product of matrices: {most}")
    about = machine.describe() | {"device": most["device"], "backend": most["backend"]}
    print(f"{most['device']}: {most['flop_s'] / 1e12:.3g} TFLOP/s in bfloat16")
    print(f"{'':34}{'s a step':>10}{'TFLOP/s':>9}{'share':>8}{'GiB':>8}{'real: ex./s':>13}{'padding':>9}")
    with arguments.results.open("a") as file:
        for size in arguments.sizes.split(","):
            settings = preset("t5-v1_1-small" if size == "tiny" else f"t5-v1_1-{size}")
            settings = settings.model_copy(update=tiny if size == "tiny" else {}).model_dump(mode="json")
            workload = {"vocabulary_rows": settings["vocabulary_rows"], "input_tokens": text, "target_tokens": target}
            workload |= {"median": text / 4, "batch_size": arguments.batch, "examples": 64 if size == "tiny" else 2048}
            needed = step_flop(settings, arguments.batch, text, target)
            for variant in arguments.variants.split(","):
                side, _, kind = variant.partition(":")
                case = {"side": side, "variant": kind, "settings": settings, "workload": workload}
                case |= {"dtype": arguments.dtype, "rounds": arguments.rounds, "sample": arguments.sample}
                found = measure(case)
                line = {"size": size, "side": side, "variant": kind, "dtype": arguments.dtype, "batch": arguments.batch}
                line |= {"text": text, "target": target, "ceiling_flop_s": most["flop_s"], "step_flop": needed}
                if isinstance(found, str):
                    print(f"{size + ' ' + variant:34}  {found[:80]}")
                    line["failed"] = found
                else:
                    seconds = statistics.median(found["fixed"]["seconds"])
                    line |= {"s_per_step": seconds, "share": needed / seconds / most["flop_s"], **found}
                    real = found.get("real")
                    rate = (
                        "" if real is None else f"{arguments.batch * len(real['seconds']) / sum(real['seconds']):.1f}"
                    )
                    padding = "" if real is None else f"{real['padding']:.0%}"
                    print(
                        f"{size + ' ' + variant:34}{seconds:10.3f}{needed / seconds / 1e12:9.3g}{line['share']:8.1%}"
                        f"{found['fixed']['peak_gib']:8.1f}{rate:>13}{padding:>9}"
                    )
                file.write(json.dumps(about | line) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
