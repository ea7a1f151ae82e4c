"""Programs for NVIDIA GPUs, by XLA's own CUDA compiler, which needs no GPU: what is promised of them is in them.

`make test-cuda` runs these. What is compiled is what a GPU would run, up to the choice of algorithms.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from softprompt_jax.analysis import machines, plan
from softprompt_jax.analysis.program import collective_bytes, library_kernels
from softprompt_jax.config import UserError, parse
from softprompt_jax.distributed import mesh
from softprompt_jax.models import flash
from softprompt_jax.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu_programs

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(machines.cuda_compiler() is None, reason="needs the extra `cuda13`"),
]
T5_BASE = gpu_programs.T5_BASE
FUSED = {"cuDNN attention": 1, "cuDNN attention backward": 1}
B, H, T, L, D, F, P = 32, 12, 512, 12, 768, 2048, 100  # of T5 base with its prompt


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """Prepare this process, as `plan` does a child."""
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized(), "JAX has read its environment; expected these tests alone"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in machines.parse_topology("h100:1").environment().items():
            patch.setenv(name, value)
        jax.config.update("jax_enable_compilation_cache", False)  # read from the environment before
        yield


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The programs of a case, and what is known of them."""

    work: plan.Work
    programs: list[Any]
    limit: int  # bytes of a device
    rows: int  # of a device
    weights: int  # bytes of a device

    @property
    def text(self) -> str:
        """All programs, as XLA writes them."""
        return "\n".join(program.as_text() for program in self.programs)

    @property
    def peak(self) -> int:
        """Bytes that a device holds at most."""
        return max(program.memory_analysis().peak_memory_in_bytes for program in self.programs)

    def kernels(self) -> dict[str, int]:
        """Calls of NVIDIA's attention."""
        return {name: count for name, count in library_kernels(self.text).items() if "attention" in name}

    def arrays(self, least: int) -> set[tuple[str, tuple[int, ...]]]:
        """Return types and shapes of all arrays of at least so many numbers."""
        found = re.findall(r"\b([a-z]+\d*)\[([\d,]+)\]", self.text)
        shapes = {(dtype, tuple(map(int, sizes.split(",")))) for dtype, sizes in found}
        return {(dtype, shape) for dtype, shape in shapes if math.prod(shape) >= least}


def compiled(name: str, **others: Any) -> Compiled:
    """Compile a case of the benchmark, with other settings on top; each program once."""
    purpose, topology, changes = gpu_programs.CASES[name]
    return _compiled(purpose, topology, json.dumps(gpu_programs.SETTINGS | changes | others))


@functools.cache
def _compiled(purpose: plan.Purpose, topology: str, settings: str) -> Compiled:
    run, machine = parse(Run, json.loads(settings), "run"), machines.parse_topology(topology)
    with mesh.entered(run.mesh.build(machine.devices())):
        work = plan._work(run, purpose, machine.limit, machine.platform, None)
        programs = [traced.lower().compile() for traced in work.traced]
        rows, weights = work.rows // mesh.row_shards(), mesh.local_bytes(work.frozen)
        return Compiled(work, programs, machine.limit, rows, weights)


def scores(found: Compiled, heads: int, length: int) -> set[tuple[int, ...]]:
    """Return the shapes that can hold the scores [B, H, T, T] of a layer or more, whatever axes are joined."""
    least = found.rows * heads * length * length
    return {shape for _, shape in found.arrays(least) if len(shape) > 2 and shape[-1] == length == shape[-2]}


CASES = [name for name in gpu_programs.CASES if "plain" not in name]


@pytest.mark.parametrize("name", CASES)
def test_a_program_takes_the_memory_and_the_kernels_that_are_published(name):
    (row,) = (row for row in json.loads(gpu_programs.RESULT.read_text())["rows"] if row["name"] == name)
    found = compiled(name)
    assert found.weights + found.work.state_bytes < found.peak < found.limit
    assert found.peak == pytest.approx(row["peak_bytes"], rel=0.1)
    kernels = {kernel: count for kernel, count in row["kernels"].items() if "attention" in kernel}
    assert found.kernels() == kernels
    assert library_kernels(found.text)["cuBLAS products"] > 0


@pytest.mark.parametrize("name", [name for name in CASES if gpu_programs.CASES[name][2]["backbone"] == T5_BASE])
def test_auto_attention_of_a_t5_is_cudnns_and_no_scores_are_kept(name):
    found = compiled(name)
    assert found.kernels() == (FUSED if gpu_programs.CASES[name][0] == "train" else {"cuDNN attention": 1})
    assert not scores(found, H, T)


def test_plain_attention_keeps_scores_which_the_test_above_would_see():
    found = compiled("T5 1.1 base, a step without dropout, `attention: plain`")
    assert found.kernels() == {}
    assert any(shape[0] == L for shape in scores(found, H, T))  # those of all layers, for the gradient
    assert found.peak > 1.5 * compiled("T5 1.1 base, a step without dropout").peak


def test_dropout_of_a_t5_costs_masks_and_no_scores():
    assert compiled("T5 1.1 base, a step").peak < 1.2 * compiled("T5 1.1 base, a step without dropout").peak


def test_an_odd_prompt_length_gets_cudnns_attention_too():
    odd = {"backbone": "google/t5-v1_1-small", "methods": [{"kind": "prompt", "length": 99}]}
    assert compiled("T5 1.1 base, a step", **odd).kernels() == FUSED


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"dtype": "float32"}, "found float32; expected dtype bfloat16"),
        ({"packing": True}, "found packed rows, .*expected rows whose real keys all come first"),
        ({"backbone": "gemma-2-2b"}, "found a gemma2, whose scores have a soft cap; expected a model without"),
    ],
)
def test_what_the_kernel_cannot_compute_is_plain_by_auto_and_told_in_one_line_by_flash(changes, found):
    settings = gpu_programs.SETTINGS | {"backbone": "google/t5-v1_1-small"} | changes
    assert "dot_product_attention" not in traced(settings)
    with pytest.raises(UserError, match=f"^attention flash: {found}; use attention: auto, or plain$"):
        traced(settings | {"attention": "flash"})
    assert "dot_product_attention" in traced(settings | {"dtype": "bfloat16", "packing": None, "backbone": T5_BASE})


def traced(settings: dict[str, Any]) -> str:
    """Return the step of these settings for one GPU, as JAX writes it before it is compiled."""
    run, machine = parse(Run, settings, "run"), machines.parse_topology("h100:1")
    with mesh.entered(run.mesh.build(machine.devices())):
        (step,) = plan._work(run, "train", machine.limit, machine.platform, None).traced
        return str(step.jaxpr)


def test_replicated_weights_exchange_gradients_of_the_prompt_alone():
    found = collective_bytes(compiled("T5 1.1 base, a step on 8 GPUs").text)
    assert set(found) == {"all-reduce"}
    assert 4 * P * D <= found["all-reduce"] < 1.01 * 4 * P * D


def test_divided_weights_are_gathered_and_no_gradient_of_theirs_is_exchanged():
    whole, divided = (
        compiled("T5 1.1 base, a step on 8 GPUs"),
        compiled("T5 1.1 base, a step on 8 GPUs, `mesh: {data: 1, fsdp: 8}`"),
    )
    found = collective_bytes(divided.text)
    assert divided.weights < whole.weights / 6
    assert whole.weights < found["all-gather"] < 2.5 * whole.weights  # forward and backward
    assert found["all-reduce"] < 1.01 * 4 * P * D
    assert "reduce-scatter" not in found
    assert divided.peak < whole.peak


def test_int8_weights_stay_int8():
    found, half = (
        compiled("T5 1.1 base, a step without dropout, `quantize: int8`"),
        compiled("T5 1.1 base, a step without dropout"),
    )
    assert found.weights < 0.65 * half.weights  # the embeddings stay
    stacks = {dtype for dtype, shape in found.arrays(L * D * F) if shape in ((L, D, F), (L, F, D))}
    assert stacks == {"s8"}
    assert "bf16" in {dtype for dtype, shape in half.arrays(L * D * F) if shape in ((L, D, F), (L, F, D))}


def test_the_server_encodes_with_cudnns_attention_and_writes_its_caches_in_place():
    server = compiled("T5 1.1 base, the server")
    advance, join = (library_kernels(program.as_text()) for program in server.programs)
    assert "cuDNN attention" not in advance  # one query a row
    assert join["cuDNN attention"] == 1
    for program in server.programs:
        assert program.memory_analysis().alias_size_in_bytes >= server.work.cache_bytes


@pytest.mark.parametrize("backbone", ["smollm2-135m", "pythia-70m", "mistral-7b"])
def test_auto_attention_of_a_decoder_only_model_is_cudnns_and_no_scores_are_kept(backbone):
    """Keys that heads share, part of a head's width that turns, and a window."""
    found, length = compiled("SmolLM2 135M, a step", backbone=backbone), 412 + P + 32
    assert found.kernels().keys() == FUSED.keys()  # Mistral's forward pass twice: it is computed again for the gradient
    assert not scores(found, 8, length)


def test_plain_attention_of_a_decoder_only_model_keeps_scores_where_memory_allows_it():
    """`remat: auto` keeps everything that fits, of Gemma 3 too; `dots` computes scores again."""
    length = 412 + P + 32

    def layers(found: Compiled, heads: int) -> float:
        one = B * heads * length**2
        return max((math.prod(shape) / one for shape in scores(found, heads, length)), default=0)

    plain = {"attention": "plain"}
    assert layers(compiled("SmolLM2 135M, a step", **plain), 9) == 30
    assert layers(compiled("SmolLM2 135M, a step", remat="dots", **plain), 9) <= 1
    assert layers(compiled("Gemma 3 1B, a step"), 4) == 26
    assert layers(compiled("Gemma 3 1B, a step", remat="dots"), 4) <= 1


GPUS = [name for name, chip in machines.CHIPS.items() if chip.gpu is not None]


@pytest.mark.parametrize("topology", [*(f"{name}:1" for name in GPUS), "h100:2x8"])
def test_every_gpu_of_the_table_is_compiled_for(topology):
    machine = machines.parse_topology(topology)
    devices = machine.devices()
    assert (devices[0].platform, devices[0].device_kind) == ("gpu", machine.chip.gpu.name)
    assert len(devices) == math.prod(machine.shape)
    made = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    heads = jax.ShapeDtypeStruct((16, 2, 65, 64), "bfloat16", sharding=NamedSharding(made, PartitionSpec("data")))
    lengths = jax.ShapeDtypeStruct((16,), "int32", sharding=NamedSharding(made, PartitionSpec("data")))
    attend = jax.jit(lambda query, lengths: flash.cudnn(query, query, query, None, lengths))
    with jax.set_mesh(made):
        text = attend.trace(heads, lengths).lower().compile().as_text()
    assert library_kernels(text) == {"cuDNN attention": 1}


def test_a_plan_says_that_it_compiled_and_which_kernels_it_found(tmp_path):
    config, small = (
        tmp_path / "run.yaml",
        {"backbone": "google/t5-v1_1-small", "batch_size": 16, "max_input_tokens": 28},
    )
    config.write_text(json.dumps(gpu_programs.SETTINGS | small))
    (answer,) = plan.plan(str(config), [], ["a100:8"])
    assert not answer["estimated"]
    assert answer["compiler"] == f"XLA for CUDA {machines.cuda_compiler()}"
    assert answer["kernels"].items() >= FUSED.items()
    assert set(answer["collectives"]) == {"all-reduce"}
    assert answer["batch"] < answer["largest_batch"]
    told = plan.describe(answer)
    assert f"(compiled by {answer['compiler']})" in told
    assert "cuDNN attention 1, cuDNN attention backward 1" in told
