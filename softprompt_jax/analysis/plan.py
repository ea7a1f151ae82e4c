"""What a run would take on machines one does not own: its real step, compiled ahead of time for them.

TPU slices are compiled by libtpu itself (extra `tpu`), which needs no TPU: its memory figures and its refusals are
those of the machine. GPUs are compiled by XLA's CPU backend on as many simulated devices: an estimate, and marked so.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from softprompt_jax.config import UserError, nearest

GIB = 2**30
DOES_NOT_FIT = 3  # exit code
# Of the threads that compile: with their default of 64 KiB libtpu 0.0.42 overflows its stack on wide layers.
_LARGER_STACK = "--fibers_default_thread_stack_size=4194304"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it, from the vendors' data sheets."""

    memory_gib: int
    tflops: float | int  # bfloat16, dense
    accelerator_type: str | None = None  # what libtpu calls a slice; None: not a TPU


CHIPS = {
    "v2": Chip(8, 22.5, "v2-8"),  # two devices a chip, as v3 and tpu7x
    "v3": Chip(16, 61.5, "v3-8"),
    "v4": Chip(32, 275, "v4-8"),
    "v5e": Chip(16, 197, "v5litepod-4"),
    "v5p": Chip(95, 459, "v5p-8"),
    "v6e": Chip(32, 918, "v6e-4"),
    "tpu7x": Chip(96, 1153.5, "tpu7x-8"),
    "l4": Chip(24, 121),
    "a100-40": Chip(40, 312),
    "a100": Chip(80, 312),
    "h100": Chip(80, 989),
    "h200": Chip(141, 989),
    "b200": Chip(192, 2250),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A kind of chip and how many: `v5e:2x4`, `h200:8`."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def is_tpu(self) -> bool:
        """Is it compiled by libtpu?"""
        return self.chip.accelerator_type is not None


def parse_topology(text: str) -> Topology:
    """Read `CHIP:SHAPE`, e.g. `v5e:2x4`, `v5p:4x4x4` or `h100:8`."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"topology {text!r}: unknown chip; expected one of {', '.join(CHIPS)}{nearest(name, CHIPS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"topology {text!r}: expected CHIP:SHAPE, such as v5e:2x4, v5p:2x2x1 or h100:8")
    return Topology(text, CHIPS[name], tuple(int(size) for size in shape.split("x")))


def plan(config: str, overrides: Sequence[str], topologies: Sequence[str], utilisation: float = 0.4) -> list[dict]:
    """Compile a run's step for each topology and return a dictionary for each.

    Keys: `topology`, `fits`, `peak_bytes` (of a device; None if it does not fit and the compiler does not say),
    `limit_bytes`, `weights_bytes`, `state_bytes`, `temporary_bytes` (activations and what is moved), `flops` (of all
    devices in a step, products only), `collectives` (bytes a device sends or receives in a step, by kind),
    `examples_per_s` (at the `utilisation` of the chips' peak that is assumed), `advice`, `packed` (planned as if no two
    examples shared a row), `estimated`, `compile_s`.
    """
    from softprompt_jax.run import load_run

    load_run(config, list(overrides))  # bad settings are told before anything is compiled
    parsed = [parse_topology(text) for text in topologies]
    return [_in_a_child(config, list(overrides), topology, utilisation) for topology in parsed]


def _in_a_child(config: str, overrides: list[str], topology: Topology, utilisation: float) -> dict[str, Any]:
    """Compile in a process of its own: libtpu reads its environment when JAX starts, and takes a lock."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if topology.chip.accelerator_type is not None:
        environment |= {
            "LIBTPU_INIT_ARGS": f"{_LARGER_STACK} {flags}",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": topology.chip.accelerator_type,
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        }
    else:
        count = math.prod(topology.shape)
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    request = json.dumps([config, overrides, topology.name, utilisation])
    command = [sys.executable, "-c", "from softprompt_jax.plan import _child; _child()"]
    done = subprocess.run(command, input=request, capture_output=True, text=True, env=environment)
    if "Unknown command line flag" in done.stderr and flags != environment.get("LIBTPU_INIT_ARGS"):
        environment["LIBTPU_INIT_ARGS"] = flags  # another version of libtpu
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
    from softprompt_jax.run import load_run

    config, overrides, name, utilisation = json.loads(sys.stdin.read())
    topology = parse_topology(name)
    try:
        answer = measure(load_run(config, overrides), topology, utilisation)
    except UserError as error:
        answer = {"error": f"{name}: {error}"}
    print(json.dumps(answer))


# ------------------------------------------------------------------------------------- in the child


def devices_of(topology: Topology) -> Sequence[Any]:
    """Return descriptions of the devices, which cannot run anything."""
    import jax

    if not topology.is_tpu:
        return jax.devices()
    from jax.experimental import topologies

    single = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(topology.shape) == 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **single).devices
    except Exception as error:  # a missing libtpu and a wrong shape come as errors of many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"libtpu cannot describe it ({reason}); expected the extra `tpu` and a shape that exists"
        ) from None


def measure(run: Any, topology: Topology, utilisation: float) -> dict[str, Any]:
    """Compile the step of a run for a topology and describe what it takes."""
    import jax

    from softprompt_jax.distributed import mesh

    devices = devices_of(topology)
    began, limit = time.monotonic(), int(topology.chip.memory_gib * GIB)
    with jax.set_mesh(run.mesh.build(devices)):
        step, arguments, parts = abstract_step(run, limit)
        traced = step.trace(*arguments)
        answer: dict[str, Any] = {
            "topology": topology.name,
            "devices": len(devices),
            "fits": True,
            "peak_bytes": None,
            "limit_bytes": limit,
            "weights_bytes": mesh.local_bytes(parts.frozen),
            "state_bytes": mesh.local_bytes(arguments[0]),
            "temporary_bytes": None,
            "flops": product_flops(traced.jaxpr.jaxpr),
            "collectives": {},
            "rows_per_device": run.batch_size // run.accumulate // mesh.row_shards(),
            "packed": run.packing is not None,
            "estimated": not topology.is_tpu,
        }
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            answer |= {"fits": False, "peak_bytes": _used(str(error))}
        else:
            memory = compiled.memory_analysis()
            held = memory.argument_size_in_bytes + memory.temp_size_in_bytes  # XLA's CPU backend tells no peak
            answer["peak_bytes"] = peak = memory.peak_memory_in_bytes if topology.is_tpu else held
            answer["temporary_bytes"] = max(0, peak - memory.argument_size_in_bytes)
            answer["collectives"] = collective_bytes(compiled.as_text())
            answer["fits"] = peak <= answer["limit_bytes"]
    seconds = answer["flops"] / (len(devices) * topology.chip.tflops * 1e12 * utilisation)
    answer |= {
        "utilisation": utilisation,
        "examples_per_s": round(run.batch_size / seconds, 2) if answer["fits"] else None,
        "advice": [] if answer["fits"] else advice(run, answer, len(devices)),
        "compile_s": round(time.monotonic() - began, 1),
    }
    return answer


def abstract_step(run: Any, memory: int | None = None) -> tuple[Callable, tuple, Any]:
    """Return the jitted step of a run, its abstract arguments laid out on the mesh, and the split model."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from softprompt_jax import methods
    from softprompt_jax.checkpoints.artifact import load_prompt, read_trained
    from softprompt_jax.distributed import mesh
    from softprompt_jax.methods import Context, leaves, split
    from softprompt_jax.models.quantized import quantized
    from softprompt_jax.models.t5 import T5
    from softprompt_jax.training.step import build_optimizer, make_step

    settings = backbone_settings(run).model_copy(update=run.backbone_overrides)
    kind = kept_as(run)
    each = tuple(tuple(task.words or ()) for task in run.tasks)
    words = tuple(dict.fromkeys(itertools.chain.from_iterable(each)))
    tasks = each if run.own_prompts else ()

    def build() -> T5:
        model = T5(settings, jax.random.key(0), run.dtype)
        graphdef, state = nnx.split(model)
        model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(run.dtype), state))
        if kind is not None:
            quantized(model, kind)
        context = Context(
            lambda text: [0], frozenset(), words, (), load_prompt, tasks, lambda path: read_trained(path)[0]
        )
        methods.attach(run.methods, model, jax.random.key(0), context)
        return model

    mesh.check_divisible(run.batch_size // run.accumulate, settings.num_heads)
    model = mesh.shard_model(nnx.eval_shape(build))
    parts = split(model)
    optimizer = build_optimizer(run, leaves(model))

    def begin(trainable: Any) -> dict[str, Any]:
        return {"trainable": trainable, "optimizer": optimizer.init(trainable), "step": jnp.zeros((), jnp.int32)}

    state = jax.eval_shape(begin, parts.trainable)
    layout = mesh.state_sharding(state, parts.trainable)
    placement = None if model.prompt is None else model.prompt.placement
    around = 0 if placement is None else np.shape(placement.before)[-1] + np.shape(placement.after)[-1]
    limits = run.pretraining or run
    decoder = limits.max_target_tokens + (0 if placement is None else np.shape(placement.decoder)[-1])
    rows = {
        "encoder_tokens": limits.max_input_tokens + around,
        "decoder_inputs": decoder,
        "decoder_targets": decoder,
    }
    if run.packing is not None:
        wide, long = run.packing.length or rows["encoder_tokens"], run.packing.target_length or decoder
        rows = {"encoder_tokens": wide, "decoder_inputs": long, "decoder_targets": long}
        rows |= {"encoder_segments": wide, "decoder_segments": long}
    batch = {name: jax.ShapeDtypeStruct((run.batch_size, length), jnp.int32) for name, length in rows.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (mesh.with_sharding(state, layout), parts.frozen, mesh.shard_batch(batch), key)
    return make_step(run, parts, optimizer, layout, memory), arguments, parts


def kept_as(run: Any) -> Literal["int8", "nf4"] | None:
    """Return how a run's frozen layers are kept, int8 or nf4, by its settings or in the folder that it reads."""
    from softprompt_jax.checkpoints import quantized_folder

    if run.quantize is None and isinstance(run.backbone, str) and quantized_folder.is_quantized_folder(run.backbone):
        return quantized_folder.read_about(run.backbone).quantize
    return run.quantize


def backbone_settings(run: Any) -> Any:
    """Return the shapes of a run's backbone, without its weights where it is a published one."""
    from softprompt_jax.checkpoints.backbone import load_settings
    from softprompt_jax.models import presets
    from softprompt_jax.run import Scratch

    if isinstance(run.backbone, Scratch):
        return run.backbone.settings
    source = presets.hub_name(run.backbone) or run.backbone
    if source not in presets.SOURCES and Path(source).exists():
        return load_settings(source)
    name = re.sub(r"^flan-t5-(\w+)$|^t5-(\w+)-lm-adapt$", r"t5-v1_1-\1\2", source.rpartition("/")[2])
    known = presets.PRESETS.get(presets.SOURCES.get(source, (name,))[0])
    return load_settings(source) if known is None else known


def product_flops(jaxpr: Any) -> float:
    """Count the floating-point operations of all matrix products, those of a scan as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        assert equation.primitive.name != "while", "a loop of unknown length"
        if equation.primitive.name == "cond":  # one of them runs: that which counts most, the plain way
            total += max(product_flops(branch.jaxpr) for branch in equation.params["branches"])
            continue
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * product_flops(inner)
    return total


_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


def collective_bytes(program: str) -> dict[str, int]:
    """Sum the bytes of the results of a compiled program's collectives by kind, those in a loop as often as it runs."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = opened.group(2)
            computations[name] = []
            entry = name if opened.group(1) else entry
        elif name:
            computations[name].append(line)

    def walk(name: str, times: int) -> Iterator[tuple[str, int]]:
        for line in computations.get(name, ()):
            if found := _COLLECTIVE.search(line):
                yield found.group(2), times * _bytes(found.group(1))
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                yield from walk(called, times * (int(trips.group(1)) if trips else 1))

    total: dict[str, int] = {}
    for kind, size in walk(entry, 1):
        total[kind] = total.get(kind, 0) + size
    return total


def _bytes(shapes: str) -> int:
    return sum(
        _SIZES.get(dtype, 4) * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    )


def _used(message: str) -> int | None:
    """Read from the compiler's refusal how much it would have needed, the weights included."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", message)
    if found is None:
        return None
    number, unit = (part for part in found.groups() if part)
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


def advice(run: Any, answer: dict[str, Any], devices: int) -> list[str]:
    """Say what to change so that it fits, the cheapest first."""
    said = []
    if run.dtype == "float32":
        said.append("dtype=bfloat16")
    if run.remat not in ("auto", "full"):
        said.append("remat=full")
    if answer["weights_bytes"] > answer["limit_bytes"] / 2:
        if kept_as(run) is None:
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

    verdict = "fits" if answer["fits"] else "does not fit"
    estimate = " (estimated with XLA's CPU compiler and plain attention)" if answer["estimated"] else ""
    lines = [
        f"{answer['topology']}: {verdict}; peak {gib(answer['peak_bytes'])} of {gib(answer['limit_bytes'])} "
        f"on each of {answer['devices']} device(s){estimate}",
        f"  weights {gib(answer['weights_bytes'])}, state {gib(answer['state_bytes'])}, "
        f"activations and buffers {gib(answer['temporary_bytes'])}; "
        f"{answer['rows_per_device']} row(s) a device at a time"
        + (" at most, as if no two examples shared one" if answer["packed"] else ""),
        f"  {answer['flops'] / 1e12:.3g} TFLOP a step; "
        + (", ".join(f"{kind} {gib(size)}" for kind, size in answer["collectives"].items()) or "no collectives"),
    ]
    if answer["examples_per_s"] is not None:
        share = f"{answer['utilisation']:.0%} of its peak"
        lines.append(f"  {answer['examples_per_s']:,.5g} examples/s, if it reaches {share}")
    if answer["advice"]:
        lines.append(f"  try {', or '.join(answer['advice'])}")
    return "\n".join(lines)
