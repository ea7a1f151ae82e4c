"""Predict what a run takes on other machines: its real step, or what answers, is compiled ahead of time for them.

The compilers are those of the machines (see machines.py): libtpu, whose memory figures and refusals are a TPU's, and
XLA for CUDA, whose program is a GPU's up to the choice of algorithms, which only a device can time. Where no compiler
for GPUs is installed, XLA's CPU compiler stands in: an estimate, and marked as one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from softprompt_jax.analysis.machines import GIB, LARGER_STACK, Topology, parse_topology
from softprompt_jax.analysis.plan_answers import Purpose, predicting, serving
from softprompt_jax.analysis.program import bytes_of_refusal, collective_bytes, library_kernels, product_flops
from softprompt_jax.assembly import Assembly, abstract_backbone_of, assemble, check_devices, check_memory
from softprompt_jax.checkpoints.backbone import EMBEDDED
from softprompt_jax.config import UserError
from softprompt_jax.data.tokenizer import T5_FORMAT, load_tokenizer
from softprompt_jax.distributed import mesh
from softprompt_jax.methods import leaves, split
from softprompt_jax.models.flash import model_refusal
from softprompt_jax.run import Run, load_run
from softprompt_jax.training.step import build_optimizer, first_state, make_step

_MOST_ROWS = 2**16  # a device, in the search for the largest batch
DOES_NOT_FIT = 3  # exit code


def plan(
    config: str,
    overrides: Sequence[str],
    topologies: Sequence[str],
    utilisation: float = 0.4,
    purpose: Purpose = "train",
) -> list[dict]:
    """Compile what a run does for each topology and return a dictionary for each.

    `purpose`: its training step, the decoding of one batch (predict), or the server's slots (serve).
    Keys: `purpose`, `topology`, `devices`, `fits`, `peak_bytes` (of a device; None if it does not fit and the compiler
    does not say), `limit_bytes`, `weights_bytes`, `state_bytes`, `cache_bytes` (of answers: keys and values; None in
    training), `temporary_bytes` (activations and copies), `rows_per_device`, `batch` (examples of a step, texts at
    once, or slots), `largest_batch` (the most that were found to fit; None if not even one a device does), `advice`,
    `quantized` (the frozen layers), `compiler`, `estimated` (it is not the machine's own), `kernels` (calls of NVIDIA's
    libraries in the last program, by kind), `compile_s`. Of training alone: `flops` (matrix products of a step on
    all devices), `collectives` (bytes that a device sends or receives in a step, by kind), `examples_per_s` (if the
    chips reach the share `utilisation` of their peak), `packed` (as if no two examples shared a row).
    """
    load_run(config, list(overrides))  # so that bad settings are found before anything is compiled
    parsed = [parse_topology(text) for text in topologies]
    return [_in_a_child(config, list(overrides), topology, utilisation, purpose) for topology in parsed]


def _in_a_child(
    config: str, overrides: list[str], topology: Topology, utilisation: float, purpose: Purpose
) -> dict[str, Any]:
    """Compile in a process of its own: libtpu reads its environment when JAX starts, and takes a lock."""
    environment = os.environ | topology.environment()
    request = json.dumps([config, overrides, topology.name, utilisation, purpose])
    command = [sys.executable, "-c", f"from {__name__} import _child; _child()"]
    done = subprocess.run(command, input=request, capture_output=True, text=True, env=environment)
    if "Unknown command line flag" in done.stderr and LARGER_STACK in environment.get("LIBTPU_INIT_ARGS", ""):
        environment["LIBTPU_INIT_ARGS"] = os.environ.get("LIBTPU_INIT_ARGS", "")  # another version of libtpu
        done = subprocess.run(command, input=request, capture_output=True, text=True, env=environment)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            answer = json.loads(line)
            if "error" in answer:
                raise UserError(answer["error"])
            return answer
    if done.returncode < 0 and topology.is_tpu:
        raise UserError(
            f"{topology.name}: libtpu crashed (signal {-done.returncode}) while it compiled the step; "
            "expected a program or a refusal; try another batch_size, remat or mesh"
        )
    raise RuntimeError(f"compiling for {topology.name} ended with code {done.returncode}:\n{done.stderr[-4000:]}")


def _child() -> None:
    """Answer the request on standard input with a line of JSON."""
    config, overrides, name, utilisation, purpose = json.loads(sys.stdin.read())
    topology = parse_topology(name)
    try:
        answer = measure(load_run(config, overrides), topology, utilisation, purpose)
    except UserError as error:
        answer = {"error": f"{name}: {error}"}
    except RuntimeError as error:
        if topology.is_tpu or "cuDNN" not in str(error):
            raise
        found = str(error).rstrip(".")
        answer = {"error": f"{name}: {found}; expected NVIDIA's libraries; install the extra cuda13 or cuda12 anew"}
    print(json.dumps(answer))


# ------------------------------------------------------------------------------------- in the child


@dataclasses.dataclass(frozen=True)
class Work:
    """What is compiled, and what of a device's memory it finds there."""

    traced: list[Any]  # programs, one of which runs at a time
    frozen: Any
    state_bytes: int  # of what changes, such as prompts and the optimizer's state
    rows: int  # that are computed at once, on all devices
    batch: int
    cache_bytes: int | None = None

    @property
    def fixed_bytes(self) -> int:
        """Bytes that a device holds, however few rows there are."""
        return mesh.local_bytes(self.frozen) + self.state_bytes


def measure(run: Run, topology: Topology, utilisation: float, purpose: Purpose = "train") -> dict[str, Any]:
    """Compile what a run does for a topology and describe what it takes."""
    devices = topology.devices()
    began, limit = time.monotonic(), topology.limit
    with mesh.entered(run.mesh.build(devices)):
        make = functools.partial(_work, run, purpose, limit, topology.platform)
        work, training = make(None), purpose == "train"
        compiled, peak, temporary = _compile(work, topology)
        fits = compiled is not None and peak is not None and peak <= limit
        text = "" if compiled is None else compiled.as_text()
        flops = product_flops(work.traced[0].jaxpr.jaxpr) if training else 0
        seconds = flops / (len(devices) * topology.chip.tflops * 1e12 * utilisation)
        answer = {
            "purpose": purpose,
            "topology": topology.name,
            "devices": len(devices),
            "fits": fits,
            "peak_bytes": peak,
            "limit_bytes": limit,
            "weights_bytes": mesh.local_bytes(work.frozen),
            "state_bytes": work.state_bytes,
            "cache_bytes": work.cache_bytes,
            "temporary_bytes": temporary,
            "flops": flops,
            "collectives": collective_bytes(text) if training else {},
            "kernels": library_kernels(text),
            "rows_per_device": work.rows // mesh.row_shards(),
            "batch": work.batch,
            "largest_batch": _largest(work, make, topology, limit, peak, fits),
            "quantized": any(leaf.dtype.kind in "iu" for leaf in jax.tree.leaves(work.frozen)),
            "packed": training and run.packing is not None,
            "estimated": topology.is_estimated,
            "compiler": topology.compiler,
            "plain_attention": not topology.is_tpu and _is_plain(run, text, topology),
            "utilisation": utilisation,
            "examples_per_s": round(run.batch_size / seconds, 2) if fits and training else None,
            "compile_s": round(time.monotonic() - began, 1),
        }
    return answer | {"advice": [] if fits else advice(run, answer, len(devices))}


def _is_plain(run: Run, program: str, topology: Topology) -> bool:
    """Whether no attention is the fused kernel's; where another compiler stands in, whether the model can have none."""
    if topology.is_estimated:
        settings = abstract_backbone_of(run).settings
        return bool(settings.always_plain or model_refusal("gpu", run.dtype, settings.d_kv) or run.packing)
    return "cuDNN attention" not in library_kernels(program)


def _compile(work: Work, topology: Topology) -> tuple[Any, int | None, int | None]:
    """Compile what works; return the last program (None: refused), and the peak and temporary bytes of a device."""
    compiled, peaks, temporary = None, [], []
    for traced in work.traced:
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None, bytes_of_refusal(str(error)), None
        memory = compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes  # XLA's CPU backend tells no peak
        peaks.append(held if topology.is_estimated else memory.peak_memory_in_bytes)
        temporary.append(max(0, peaks[-1] - memory.argument_size_in_bytes))
    return compiled, max(peaks), max(temporary)


def _largest(
    work: Work, make: Callable[[int], Work], topology: Topology, limit: int, peak: int | None, fits: bool
) -> int | None:
    """Return the largest batch that was found to fit; None: not even one row a device.

    The first guess takes memory for proportional to the rows; it is compiled too, and if it does not fit a smaller one.
    """
    shards, fixed = mesh.row_shards(), work.fixed_bytes
    rows, known = work.rows // shards, work.rows // shards if fits else 0
    if fixed < limit:
        guess = rows // 2 if peak is None or peak <= fixed else int(rows * (limit - fixed) / (peak - fixed))
        for _ in range(2 if fits else 4):
            guess = min(guess, _MOST_ROWS)
            if guess <= known:
                break
            compiled, peak, _ = _compile(make(guess * shards), topology)
            if compiled is not None and peak is not None and peak <= limit:
                known = guess
                break
            guess = known + (guess - known) // 2
    return known * shards * max(1, work.batch // work.rows) or None


def _assembled(run: Run, memory: int | None, platform: str | None) -> Assembly:
    """Return a run's abstract model; what training would refuse is refused."""
    backbone = abstract_backbone_of(run)
    if memory is not None:
        check_memory(run, backbone.model.settings, 0, memory * jax.sharding.get_mesh().size)
    # Where the tokenizer's files are not here another one will do: only numbers of ids are asked for.
    here = backbone.folder.is_dir()
    tokenizer = load_tokenizer(backbone.folder if here else EMBEDDED, backbone.text_format if here else T5_FORMAT)
    # XLA's CPU compiler, which may stand in for a GPU's, does not have its attention.
    stands_in = platform == "gpu" != mesh.platform()
    computed = run.model_copy(update={"attention": "plain"}) if stands_in else run
    return assemble(computed, backbone, platform, tokenizer)


def _work(run: Run, purpose: Purpose, memory: int, platform: str, rows: int | None) -> Work:
    """Trace what a run does with so many rows at once (default: as its settings say)."""
    if purpose == "train":
        run = run if rows is None else run.model_copy(update={"batch_size": rows * run.accumulate})
        step, arguments, parts = abstract_step(run, memory, platform)
        rows = len(arguments[2]["encoder_tokens"]) // run.accumulate
        return Work([step.trace(*arguments)], parts.frozen, mesh.local_bytes(arguments[0]), rows, run.batch_size)
    if run.pretraining is not None:
        raise UserError("plan: pre-training has nothing to predict or serve; expected a run on a task; leave --for out")
    run = run.finished()
    assembly = _assembled(run, None, platform)
    if purpose == "predict":
        found = predicting(run, assembly, rows)
    else:
        found = serving(run, assembly, rows, lambda arrays: memory - mesh.local_bytes(arrays))
    changing = mesh.local_bytes(found.model.changing)
    return Work(found.traced, found.model.frozen, changing, found.rows, found.rows, found.cache_bytes)


def abstract_step(run: Run, memory: int | None = None, platform: str | None = None) -> tuple[Callable, tuple, Any]:
    """Return the jitted step of a run, its abstract arguments laid out on the mesh, and the split model.

    What training would refuse is refused. `platform`: of the devices that the step is for (default: of the mesh).
    """
    assembly = _assembled(run, memory, platform)
    check_devices(run, assembly, platform)
    model = mesh.shard_model(assembly.model)
    parts = split(model)
    optimizer = build_optimizer(run, leaves(model))
    state = jax.eval_shape(functools.partial(first_state, optimizer), parts.trainable)
    layout = mesh.state_sharding(state, parts.trainable)
    around, before_decoder = assembly.layout.lengths
    limits = run.pretraining or run
    decoder = limits.max_target_tokens + before_decoder
    lengths = {
        "encoder_tokens": limits.max_input_tokens + around,
        "decoder_inputs": decoder,
        "decoder_targets": decoder,
    }
    rows = run.batch_size
    if run.packing is not None:
        wide, long = run.packing.length or lengths["encoder_tokens"], run.packing.target_length or decoder
        lengths = {"encoder_tokens": wide, "decoder_inputs": long, "decoder_targets": long}
        lengths |= {"encoder_segments": wide, "decoder_segments": long}
        multiple = run.accumulate * mesh.row_shards()
        rows = -(-rows // multiple) * multiple
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name, length in lengths.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (mesh.with_sharding(state, layout), parts.frozen, mesh.shard_batch(batch), key)
    return make_step(run, parts, optimizer, layout, memory), arguments, parts


def advice(run: Run, answer: dict[str, Any], devices: int) -> list[str]:
    """Say what to change so that the step fits, the cheapest change first."""
    said = []
    if run.dtype == "float32":
        said.append("dtype=bfloat16")
    if run.remat not in ("auto", "full"):
        said.append("remat=full")
    if answer["weights_bytes"] > answer["limit_bytes"] / 2:
        if not answer["quantized"]:
            said.append("quantize=int8")
        if devices > 1 and run.mesh.fsdp == 1:
            said.append("mesh={data: 1, fsdp: -1}")
        if devices == 1:
            said.append("more devices with mesh={data: 1, fsdp: -1}")
    if answer["rows_per_device"] > 1:
        said.append(f"accumulate={run.accumulate * 2}")
    return said or ["more devices, or a shorter max_input_tokens"]


def describe(answer: dict[str, Any]) -> str:
    """Write what was measured as a few lines."""

    def gib(size: int | None) -> str:
        if size is None:
            return "?"
        return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.3g} MiB"

    verdict, training = "fits" if answer["fits"] else "does not fit", answer["purpose"] == "train"
    how = (
        "estimated with XLA for CPUs and plain attention; the extra `cuda13` or `cuda12` compiles it"
        if answer["estimated"]
        else f"compiled by {answer['compiler']}"
    )
    lines = [
        f"{answer['topology']}: {verdict}; peak {gib(answer['peak_bytes'])} of {gib(answer['limit_bytes'])} "
        f"on each of {answer['devices']} device(s) ({how})",
        f"  weights {gib(answer['weights_bytes'])}, state {gib(answer['state_bytes'])}, "
        + ("" if training else f"caches {gib(answer['cache_bytes'])}, ")
        + f"activations and buffers {gib(answer['temporary_bytes'])}; "
        f"{answer['rows_per_device']} row(s) a device at a time"
        + (" at most, as if no two examples shared one" if answer["packed"] else ""),
    ]
    what = {"train": "batch_size", "predict": "texts at once", "serve": "slots"}[answer["purpose"]]
    most = "none fits" if answer["largest_batch"] is None else f"{answer['largest_batch']:,} fit"
    lines.append(f"  {what}: {answer['batch']:,}; {most}")
    if training:
        lines.append(
            f"  {answer['flops'] / 1e12:.3g} TFLOP a step; "
            + (", ".join(f"{kind} {gib(size)}" for kind, size in answer["collectives"].items()) or "no collectives")
        )
    if answer["kernels"]:
        lines.append("  libraries: " + ", ".join(f"{name} {count}" for name, count in answer["kernels"].items()))
    if answer["examples_per_s"] is not None:
        share = f"{answer['utilisation']:.0%} of its peak"
        lines.append(f"  {answer['examples_per_s']:,.5g} examples/s, if it reaches {share}")
    if answer["plain_attention"]:
        lines.append(
            "  attention is plain on the GPU: cuDNN's is for T5s, and decoder-only models without soft caps and unlike "
            "windows; in bfloat16, heads up to 128, rows not packed"
        )
    if answer["advice"]:
        lines.append(f"  try {', or '.join(answer['advice'])}")
    return "\n".join(lines)
