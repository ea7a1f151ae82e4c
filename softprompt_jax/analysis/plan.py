"""Predict what a run takes on other machines: its real step is compiled ahead of time for them.

TPU slices are compiled by libtpu (extra `tpu`), which needs no TPU; its memory figures and refusals are the machine's.
For GPUs XLA's CPU backend compiles for simulated devices: an estimate, and marked as one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from softprompt_jax.config import UserError, nearest

if TYPE_CHECKING:
    from softprompt_jax.run import Run

GIB = 2**30
DOES_NOT_FIT = 3  # exit code
# Stack of the threads that compile: with the default of 64 KiB libtpu 0.0.42 overflows it on wide layers.
_LARGER_STACK = "--fibers_default_thread_stack_size=4194304"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it, from the vendors' data sheets."""

    memory_gib: int
    tflops: float | int  # of dense products in bfloat16
    accelerator_type: str | None = None  # libtpu's name of a slice; None: not a TPU


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
        """Whether libtpu compiles for it."""
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
    `limit_bytes`, `weights_bytes`, `state_bytes`, `temporary_bytes` (activations and copies), `flops` (matrix products
    of a step on all devices), `collectives` (bytes that a device sends or receives in a step, by kind),
    `examples_per_s` (if the chips reach the share `utilisation` of their peak), `advice`, `packed` (as if no two
    examples shared a row), `quantized` (the frozen layers), `estimated`, `compile_s`.
    """
    from softprompt_jax.run import load_run

    load_run(config, list(overrides))  # so that bad settings are found before anything is compiled
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
    command = [sys.executable, "-c", f"from {__name__} import _child; _child()"]
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


def measure(run: Run, topology: Topology, utilisation: float) -> dict[str, Any]:
    """Compile the step of a run for a topology and describe what it takes."""
    import jax

    from softprompt_jax.distributed import mesh

    devices = devices_of(topology)
    began, limit = time.monotonic(), int(topology.chip.memory_gib * GIB)
    with jax.set_mesh(run.mesh.build(devices)):
        step, arguments, parts = abstract_step(run, limit, "tpu" if topology.is_tpu else "gpu")
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
            "rows_per_device": len(arguments[2]["encoder_tokens"]) // run.accumulate // mesh.row_shards(),
            "quantized": any(leaf.dtype.kind in "iu" for leaf in jax.tree.leaves(parts.frozen)),
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


def abstract_step(run: Run, memory: int | None = None, platform: str | None = None) -> tuple[Callable, tuple, Any]:
    """Return the jitted step of a run, its abstract arguments laid out on the mesh, and the split model.

    What training would refuse is refused. `platform`: of the devices that the step is for (default: of the mesh).
    """
    import jax
    import jax.numpy as jnp

    from softprompt_jax.assembly import abstract_backbone_of, assemble, check_devices
    from softprompt_jax.data.tokenizer import Tokenizer, load_tokenizer
    from softprompt_jax.distributed import mesh
    from softprompt_jax.methods import leaves, split
    from softprompt_jax.training.step import build_optimizer, first_state, make_step

    class WordCounter(Tokenizer):
        """A piece for each word, where the tokenizer's files are not here: only numbers of ids are asked for."""

        def __init__(self) -> None:
            super().__init__("words", [], 0, 1, 2, "")

        def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
            return [[2] * len(text.split()) for text in texts]

    backbone = abstract_backbone_of(run)
    tokenizer = load_tokenizer(backbone.folder) if backbone.folder.is_dir() else WordCounter()
    # XLA's CPU compiler, which stands in for a GPU's, does not have its attention.
    computed = run.model_copy(update={"attention": "plain"}) if platform == "gpu" else run
    assembly = assemble(computed, backbone, platform, tokenizer)
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


def product_flops(jaxpr: Any) -> float:
    """Count the floating-point operations of matrix products; those in a scan count as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        assert equation.primitive.name != "while", "a loop of unknown length"
        if equation.primitive.name == "cond":  # one branch runs: count the largest
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
    """Sum the bytes of a compiled program's collectives by kind; those in a loop count as often as it runs."""
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
    """Read from the compiler's refusal how many bytes it would have needed, weights included."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", message)
    if found is None:
        return None
    number, unit = (part for part in found.groups() if part)
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


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
