"""Time a training step of prompt tuning here and in Hugging Face PEFT (torch), side by side on a CPU.

Each contestant runs in a process of its own, pinned to the same cores; they take turns, round by round,
never at once. Needs both libraries: `make benchmark` makes .venv-torch and runs this file in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from workload import BATCH_SIZE, PROMPT_LENGTH, Workload

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "training_step.jsonl"
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the losses of both sides, in nats


@dataclass
class Contestant:
    """One side, variant and way of batching, with what it measured."""

    side: str
    variant: str
    case: str
    process: Worker
    padding: float = 0.0
    warm_up_s: float = 0.0
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.side} {self.variant} {self.case}"

    def prepare(self, count: int) -> None:
        answer = self.process.ask(prepare=self.case, count=count)
        self.padding, self.warm_up_s = answer["padding"], answer["warm_up_s"]

    def per_step(self, what: str) -> list[float]:
        return [answer[what] / len(answer["losses"]) for answer in self.rounds]

    def losses(self) -> list[float]:
        return [loss for answer in self.rounds for loss in answer["losses"]]

    def cpu_s(self, whole_epoch: bool) -> float:
        """CPU seconds of a step: the median round, or for uneven batches the mean of all of them."""
        values = self.per_step("cpu_s")
        return statistics.fmean(values) if whole_epoch else statistics.median(values)

    def wall_s(self, whole_epoch: bool) -> float:
        values = self.per_step("wall_s")
        return statistics.fmean(values) if whole_epoch else statistics.median(values)


class Worker:
    """A process with one side and variant in it."""

    def __init__(self, python: str, side: str, variant: str, folder: str, dtype: str, cores: list[int], log):
        threads = str(len(cores))
        environment = os.environ | dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads
        )
        environment |= {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.name = f"{side} {variant}"
        self.process = subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, cores)), python, str(HERE / f"side_{side}.py"),
             folder, dtype, variant, threads],  # torch and XLA size their thread pools by the cores they may use
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        )  # fmt: skip

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise SystemExit(
                f"{self.name}: the process ended; its messages are in the .log beside the results"
            ) from None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def check_losses(contestants: list[Contestant], dtype: str) -> float:
    """Return the largest difference of losses between contestants that took the same steps."""
    trajectories = [contestant.losses() for contestant in contestants]
    worst = max(abs(a - b) for t in trajectories[1:] for a, b in zip(trajectories[0], t, strict=True))
    if worst > TOLERANCE[dtype]:
        found = "\n".join(f"  {c.name}: {[round(loss, 4) for loss in c.losses()]}" for c in contestants)
        raise SystemExit(f"losses: found differences up to {worst:.2g}; expected under {TOLERANCE[dtype]:g}\n{found}")
    return worst


def run_rounds(contestants: list[Contestant], rounds: int, steps: int) -> float:
    """Let the contestants take turns; return the share of the machine's CPU time that others used."""
    busy, own, clock = machine.busy_seconds(), 0.0, time.perf_counter()
    for number in range(rounds):
        turn = number % len(contestants)
        for contestant in contestants[turn:] + contestants[:turn]:
            answer = contestant.process.ask(time=contestant.case, first=number * steps, count=steps)
            contestant.rounds.append(answer)
            own += answer["cpu_s"]
        print(f"  round {number + 1}/{rounds}", end="\r", file=sys.stderr)
    available = (time.perf_counter() - clock) * (os.cpu_count() or 1)
    return max(0.0, machine.busy_seconds() - busy - own) / available


def report(title: str, contestants: list[Contestant], whole_epoch: bool, shared: dict[str, Any], file) -> None:
    """Print a table and append a JSON line for every contestant."""
    usual = [c for c in contestants if c.side == "peft" and not c.variant.endswith("-kept")]
    best = min(c.cpu_s(whole_epoch) for c in usual)
    print(f"\n{title}   (others used {shared['others']:.0%} of the machine)")
    print(
        f"{'':26}{'CPU s/step':>12}{'spread':>16}{'wall s/step':>13}{'ex./CPU s':>11}{'padding':>9}{'x best PEFT':>13}"
    )
    for contestant in contestants:
        cpu, wall = contestant.cpu_s(whole_epoch), contestant.wall_s(whole_epoch)
        values = contestant.per_step("cpu_s")
        print(
            f"{contestant.name:26}{cpu:12.3f}{min(values):9.3f}-{max(values):.3f}{wall:12.3f}{BATCH_SIZE / cpu:11.2f}"
            f"{contestant.padding:9.0%}{best / cpu:13.2f}"
        )
        line = shared | {
            "versions": shared["versions"][contestant.side],
            "side": contestant.side,
            "variant": contestant.variant,
            "case": contestant.case,
            "cpu_s_per_step": round(cpu, 4),
            "cpu_s_rounds": [round(value, 4) for value in values],
            "wall_s_per_step": round(wall, 4),
            "examples_per_cpu_s": round(BATCH_SIZE / cpu, 3),
            "padding": round(contestant.padding, 4),
            "warm_up_s": round(contestant.warm_up_s, 2),
            "peak_gib": round(max(answer["peak_gib"] for answer in contestant.rounds), 2),
            "times_best_peft": round(best / cpu, 3),
        }
        file.write(json.dumps(line) + "\n")
    file.flush()


def compete(workers: dict[tuple[str, str], Worker], names, rounds: int, steps: int) -> tuple[list[Contestant], float]:
    """Measure these (side, variant, case); also return what share of the machine others used meanwhile."""
    contestants = [Contestant(*name, workers[name[:2]]) for name in names]
    for contestant in contestants:
        contestant.prepare(rounds * steps)
    return contestants, run_rounds(contestants, rounds, steps)


def measure(
    arguments: argparse.Namespace, folder: str, dtype: str, cores: int, about: dict[str, Any], log, file
) -> None:
    """Run the fixed shape, and on one core real lengths with the faster variant of each side."""
    workload = Workload.read(folder)
    variants = [tuple(variant.split(":")) for variant in arguments.variants.split(",")]
    shared = about | {"size": arguments.size, "dtype": dtype, "cores": cores}
    setting = f"{arguments.size}, prompt {PROMPT_LENGTH}, batch {BATCH_SIZE}, {dtype}, {cores} core(s)"
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    with contextlib.ExitStack() as stack:
        pythons = {"ours": str(arguments.ours_python), "peft": sys.executable}
        workers = {v: stack.enter_context(Worker(pythons[v[0]], *v, folder, dtype, chosen, log)) for v in variants}
        check, _ = compete(workers, [(*v, "check") for v in variants], 1, 1)
        print(f"\nlosses before training: {check_losses(check, dtype):.1e} apart, {check[0].losses()[0]:.4f}")
        names = [(*v, "fixed") for v in variants]
        fixed, others = compete(workers, names, arguments.rounds, arguments.steps)
        shared |= {"losses_apart": check_losses(fixed, dtype), "others": round(others, 3)}
        shape = f"{workload.input_tokens}/{workload.target_tokens}"
        report(f"fixed lengths {shape}: {setting}", fixed, False, shared, file)
        if arguments.sample and cores == 1 and dtype in arguments.lengths_dtypes.split(","):
            best: dict[str, str] = {}
            for one in sorted(fixed, key=lambda one: one.cpu_s(False)):
                best.setdefault("kept" if one.variant.endswith("-kept") else one.side, one.variant)
            names = [("ours", best["ours"], case) for case in ("bucketed", "bucketed-4", "padded")]
            names += [("peft", best["peft"], "grouped"), ("peft", best["peft"], "dynamic")]
            names += [("peft", best["kept"], "grouped")] if "kept" in best else []
            rounds = min(8, arguments.sample)
            uneven, others = compete(workers, names, rounds, arguments.sample // rounds)
            shared |= {"losses_apart": None, "others": round(others, 3)}
            report(f"real lengths, median {workload.median:g}: {setting}", uneven, True, shared, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--size",
        default="small",
        help="small, base, ... of T5 1.1; llama, smollm2; tiny or tiny-llama, to try this file",
    )
    parser.add_argument(
        "--dtypes",
        default="float32",
        help="float32, bfloat16 or both; bfloat16 takes minutes a step in torch where the CPU has no units for it",
    )
    parser.add_argument("--cores", default="1,2", help="numbers of cores to run the fixed shape on")
    parser.add_argument("--rounds", type=int, default=7, help="of the fixed shape; medians are taken over them")
    parser.add_argument("--steps", type=int, default=2, help="per round and contestant")
    parser.add_argument("--sample", type=int, default=32, help="batches that stand for an epoch of real lengths, or 0")
    parser.add_argument("--lengths-dtypes", default="float32", help="dtypes to run real lengths in")
    parser.add_argument(
        "--variants",
        default="ours:scan,ours:unroll,peft:eager,peft:sdpa",
        help="who competes, at least one of each side; also peft:compile (a minute to compile), ours:halves, "
        "ours:quarters, peft:sdpa-kept (with our settings of the allocator)",
    )
    parser.add_argument(
        "--ours-python", default=sys.executable, help="interpreter of our side: .venv/bin/python with a newer jax"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if {name.partition(":")[0] for name in arguments.variants.split(",")} != {"ours", "peft"}:
        parser.error(f"--variants {arguments.variants}: expected at least one ours:... and one peft:...")
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    about = machine.describe()
    told = [arguments.ours_python, "-c", "import json, machine; print(json.dumps(machine.describe()['versions']))"]
    ours = json.loads(subprocess.run(told, cwd=HERE, check=True, capture_output=True, text=True).stdout)
    about["versions"] = {"ours": ours, "peft": about["versions"]}
    print(json.dumps(about))
    with (
        tempfile.TemporaryDirectory() as folder,
        open(arguments.results.with_suffix(".log"), "w") as log,
        open(arguments.results, "a") as file,
    ):
        subprocess.run([sys.executable, str(HERE / "make_backbone.py"), folder, arguments.size], check=True)
        for dtype in arguments.dtypes.split(","):
            for cores in map(int, arguments.cores.split(",")):
                measure(arguments, folder, dtype, cores, about, log, file)


if __name__ == "__main__":
    main()
