"""What a run takes elsewhere: counted by hand where a hand can, and by libtpu where the extra `tpu` is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import shutil
from pathlib import Path

import jax
import pytest
import tiny
import yaml

from softprompt_jax import load_run
from softprompt_jax.analysis import machines, plan
from softprompt_jax.analysis.program import bytes_of_refusal, library_kernels
from softprompt_jax.assembly import abstract_backbone_of, assemble, check_devices
from softprompt_jax.config import UserError
from softprompt_jax.distributed import mesh
from softprompt_jax.inference import memory, programs
from softprompt_jax.inference.programs import DeviceModel
from softprompt_jax.methods import Trainable, split
from softprompt_jax.models.presets import preset

ROOT = Path(__file__).resolve().parents[1]
TASK = {"name": "none", "source": {"kind": "files", "train": "none.jsonl"}}
XXL_WIDTH = {"vocabulary_rows": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64}


def write(path: Path, **changes) -> str:
    settings = {"task": TASK, "backbone": "google/t5-v1_1-small", "batch_size": 8, "max_input_tokens": 28, **changes}
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5:2x4", "unknown chip; expected one of v2, .*did you mean v5p or v5e"),
        ("v5e", "expected CHIP:SHAPE"),
        ("v5e:2x", "expected CHIP:SHAPE"),
        ("h100:0", "expected CHIP:SHAPE"),
    ],
)
def test_a_topology_that_is_none_is_told_in_one_line(text, message):
    with pytest.raises(UserError, match=message):
        plan.parse_topology(text)


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    program = """HloModule step
%body (x: f32[8]) -> f32[8] {
  %gather = bf16[16,4]{1,0} all-gather(%x), dimensions={0}
  ROOT %start = (f32[8]{0}, f32[8]{0}) all-reduce-start(%x), to_apply=%add
}
%cond (x: f32[8]) -> pred[] {
  ROOT %p = pred[] constant(true)
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = f32[2,8]{1,0} all-reduce(%w), to_apply=%add
}
"""
    assert plan.collective_bytes(program) == {"all-gather": 3 * 16 * 4 * 2, "all-reduce": 3 * 2 * 8 * 4 + 2 * 8 * 4}


def test_the_compilers_refusal_says_how_much_it_would_need():
    assert bytes_of_refusal("RESOURCE_EXHAUSTED: Used 23.50G of 15.75G hbm. Exceeded") == int(23.5 * plan.GIB)
    newer = "the total memory required for HLO temporaries (22.50G) exceeds available HBM (15.75G)."
    assert bytes_of_refusal(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {newer}") == int(22.5 * plan.GIB)
    assert bytes_of_refusal("RESOURCE_EXHAUSTED: something else") is None


def test_products_are_those_of_the_paper_model_counted_by_hand(tmp_path):
    """T5 1.1 small: 8 layers, D 512, inner 384, F 1024; encoder 128 with the prompt, decoder 64."""
    run = load_run(write(tmp_path / "run.yaml"))
    step, arguments, parts = plan.abstract_step(run)
    B, T, U, D, inner, F, V, P = 8, 128, 64, 512, 384, 1024, 32128, 100
    attention, feed = 2 * 4 * D * inner, 2 * 3 * D * F
    encoder = 8 * B * T * (attention + feed + 4 * T * inner)
    decoder = (
        8 * B * (U * (attention + 2 * 2 * D * inner + feed + 4 * U * inner + 4 * T * inner) + T * 2 * 2 * D * inner)
    )
    forward = encoder + decoder + 2 * B * U * D * V
    scores = 8 * B * (T * T + U * U + U * T) * 2 * 2 * inner  # attention products have two gradients each
    lookup = 2 * B * T * P * D
    # The first layer's gradient stops at the decoder's text and the prompt; nothing else is left out.
    expected = 2 * forward + scores + 2 * lookup
    counted = plan.product_flops(step.trace(*arguments).jaxpr.jaxpr)
    assert counted == pytest.approx(expected, rel=0.02)
    assert mesh.local_bytes(parts.frozen) == 4 * 76_961_152
    assert mesh.local_bytes(parts.trainable) == 4 * P * D


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("google-t5/t5-base", "t5-base"),
        ("google-t5/t5-3b", "t5-3b"),
        ("google/t5-base-lm-adapt", "t5-v1_1-base"),
        ("google/flan-t5-xl", "t5-v1_1-xl"),
        ("bigscience/T0_3B", "t5-v1_1-xl"),
        ("gs://t5-data/pretrained_models/t5x/t5_1_1_lm100k_xxl/checkpoint_1100000", "t5-v1_1-xxl"),
        ("runs/adapted/10000/t5-v1_1-large", "t5-v1_1-large"),
    ],
)
def test_a_published_backbone_is_planned_without_its_files(tmp_path, backbone, size):
    run = load_run(write(tmp_path / "run.yaml", backbone=backbone))
    assert abstract_backbone_of(run).settings == preset(size)


def test_a_folder_is_planned_as_what_it_holds(tmp_path, small):
    folder = shutil.copytree(small.backbone, tmp_path / "t5-v1_1-small")
    assert abstract_backbone_of(load_run(write(tmp_path / "run.yaml", backbone=str(folder)))).settings.d_model == 16


def test_pre_training_is_planned_with_its_own_lengths():
    run = load_run(ROOT / "configs" / "pretrain" / "embedded.yaml")
    _, (_, _, batch, _), _ = plan.abstract_step(run)
    shapes = {name: rows.shape[1] for name, rows in batch.items()}
    assert shapes == {"encoder_tokens": 96, "decoder_inputs": 48, "decoder_targets": 48}


GPU = plan.Topology("test:1", machines.Chip(memory_gib=1, tflops=1), (1,))


@pytest.mark.slow
@pytest.mark.parametrize("purpose", ["predict", "serve", "train"])
def test_the_largest_batch_fits_by_the_compilers_own_figures(small, tmp_path, purpose):
    run = load_run(write(tmp_path / "run.yaml", backbone=str(small.backbone), max_target_tokens=16))
    answer = plan.measure(run, GPU, 0.4, purpose)
    assert answer["fits"]
    assert answer["batch"] < answer["largest_batch"]
    work = plan._work(run, purpose, GPU.limit, "gpu", answer["largest_batch"])
    _, peak, _ = plan._compile(work, GPU)
    assert GPU.limit / 4 < peak <= GPU.limit or answer["largest_batch"] == plan._MOST_ROWS
    assert (answer["cache_bytes"] is None) is (purpose == "train")


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_told_with_one_that_does(small, tmp_path):
    run = load_run(write(tmp_path / "run.yaml", backbone=str(small.backbone), evaluation_batch_size=2**17))
    answer = plan.measure(run, GPU, 0.4, "predict")
    assert not answer["fits"]
    assert 0 < answer["largest_batch"] < 2**17
    again = run.model_copy(update={"evaluation_batch_size": answer["largest_batch"]})
    assert plan.measure(again, GPU, 0.4, "predict")["fits"]
    assert "texts at once: 131,072; " in plan.describe(answer)


@pytest.mark.parametrize("of", ["t5", "llama", "t5gemma"])
def test_caches_are_counted_as_the_server_allocates_them(of):
    model = tiny.model(of=of)
    batch = DeviceModel.of(model, Trainable)
    slots = jax.eval_shape(lambda: programs.empty_slots(batch, 6, 7, 11))
    allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in (*slots.caches, *slots.cross))
    assert memory.cache_bytes(model.settings, "float32", 6, 11, 7) == allocated
    one = memory.cache_bytes(model.settings, "float32", 1, 11, 7)
    for room, found in ((0.5, 1), (1, 1), (3, 2), (7.9, 4), (1000, 32)):
        assert memory.slots_that_fit(model.settings, "float32", 11, 7, int(2 * room * one), 32) == found


def test_pre_training_is_neither_predicted_with_nor_served():
    with pytest.raises(UserError, match="pre-training has nothing to predict or serve; expected a run on a task"):
        plan.measure(load_run(ROOT / "configs" / "pretrain" / "embedded.yaml"), GPU, 0.4, "serve")


def test_advice_starts_with_what_costs_least(tmp_path):
    answer = {"weights_bytes": 20 * plan.GIB, "limit_bytes": 16 * plan.GIB, "rows_per_device": 4, "quantized": False}
    run = load_run(write(tmp_path / "run.yaml", remat="none"))
    said = plan.advice(run, answer, 8)
    assert said == ["dtype=bfloat16", "remat=full", "quantize=int8", "mesh={data: 1, fsdp: -1}", "accumulate=2"]
    done = load_run(write(tmp_path / "done.yaml", dtype="bfloat16", remat="full", quantize="int8"))
    answer = {"weights_bytes": plan.GIB, "limit_bytes": 16 * plan.GIB, "rows_per_device": 1, "quantized": True}
    assert plan.advice(done, answer, 8) == ["more devices, or a shorter max_input_tokens"]


def refusal(prepare, *arguments) -> str | None:
    """Return why a run is refused, None if it is accepted."""
    try:
        prepare(*arguments)
    except UserError as error:
        return str(error)
    return None


def assembled(run) -> None:
    check_devices(run, assemble(run))


def is_run(path: Path) -> bool:
    return (
        path.parent.name in ("configs", "intents", "methods") or path == ROOT / "configs" / "pretrain" / "embedded.yaml"
    )


CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if is_run(path)]
TABLE = {"kind": "prompt", "length": 3}
REFUSED = {
    "two prompts": {"methods": [TABLE, TABLE]},
    "no label words": {"methods": [TABLE | {"init": "labels"}]},
    "no such file": {"methods": [TABLE | {"init": {"kind": "file", "path": "nowhere.npy"}}]},
    "flash on a CPU": {"attention": "flash", "dropout": 0, "dtype": "bfloat16"},
    "no such backbone": {"backbone": "./nowhere"},
    "no tokenizer": {"backbone": {"settings": tiny.settings().model_dump(), "tokenizer": "./nowhere"}},
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_plan_accepts_exactly_the_configs_that_training_accepts(path, small):
    run = load_run(path)
    if isinstance(run.backbone, str):
        run = run.model_copy(update={"backbone": str(small.backbone)})
    assert refusal(plan.abstract_step, run) == refusal(assembled, run)


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_plan_refuses_what_training_refuses_in_the_same_words(changes, small, tmp_path):
    run = load_run(write(tmp_path / "run.yaml", **{"backbone": str(small.backbone), **changes}))
    message = refusal(assembled, run)
    assert message is not None
    assert refusal(plan.abstract_step, run) == message


def test_plan_refuses_a_folder_that_lacks_a_weight(small, tmp_path):
    folder = shutil.copytree(small.backbone, tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text()) | {"num_layers": 9}
    (folder / "config.json").write_text(json.dumps(config))
    run = load_run(write(tmp_path / "run.yaml", backbone=str(folder)))
    assert "weights are missing" in refusal(plan.abstract_step, run)
    assert refusal(plan.abstract_step, run) == refusal(assembled, run)


@pytest.mark.parametrize(("dtype", "quantize"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")])
@pytest.mark.parametrize("scratch", [True, False])
def test_what_plan_counts_is_what_training_holds(small, tmp_path, dtype, quantize, scratch):
    backbone = {"settings": tiny.settings().model_dump()} if scratch else str(small.backbone)
    changes = {"methods": [TABLE | {"init": "vocabulary"}], "dtype": dtype, "quantize": quantize}
    run = load_run(write(tmp_path / "run.yaml", backbone=backbone, **changes))
    _, (state, frozen, _, _), _ = plan.abstract_step(run)
    held = split(assemble(run).model)
    for planned, real in ((frozen, held.frozen), (state["trainable"], held.trainable)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == jax.tree.map(lambda x: (x.shape, x.dtype), real)


def test_flash_is_judged_by_the_topologys_devices(small, tmp_path):
    run = load_run(write(tmp_path / "run.yaml", dtype="bfloat16", attention="flash", dropout=0))
    assert refusal(plan.abstract_step, run, None, "gpu") is None
    assert "found tpu devices; expected NVIDIA GPUs" in refusal(plan.abstract_step, run, None, "tpu")


def test_packed_rows_follow_the_mesh_and_the_parts(small, tmp_path):
    config = write(tmp_path / "run.yaml", backbone=str(small.backbone), batch_size=6, packing=True)
    _, (_, _, batch, _), _ = plan.abstract_step(load_run(config, ["accumulate=3"]))
    assert len(batch["encoder_tokens"]) == 6


@pytest.mark.slow
def test_a_packed_batch_that_the_devices_do_not_divide_is_planned(small, tmp_path):
    config = write(tmp_path / "run.yaml", backbone=str(small.backbone), batch_size=3, packing=True)
    (answer,) = plan.plan(config, [], ["l4:2"])
    assert answer["rows_per_device"] == 2
    with pytest.raises(UserError, match="data x fsdp is 2; expected a divisor of the 3 rows"):
        plan.plan(config, ["packing=null"], ["l4:2"])


def test_packed_rows_are_planned_with_their_segments(tmp_path):
    config = write(tmp_path / "run.yaml", batch_size=4)
    _, (_, _, batch, _), _ = plan.abstract_step(load_run(config, ["packing={length: 256, target_length: 32}"]))
    wide, long = dict.fromkeys(("encoder_tokens", "encoder_segments"), (4, 256)), (4, 32)
    assert {name: rows.shape for name, rows in batch.items()} == wide | dict.fromkeys(
        ("decoder_inputs", "decoder_targets", "decoder_segments"), long
    )


def test_a_gpu_has_as_much_memory_as_jax_takes_of_it(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    h100 = plan.parse_topology("h100:8")
    assert h100.limit == int(0.75 * 79.1 * plan.GIB)
    assert plan.parse_topology("v5e:1x1").limit == 16 * plan.GIB
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert h100.limit == int(0.9 * 79.1 * plan.GIB)
    for wrong in ("most", "0", "-1", "1.2", "nan"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(UserError, match=f"found {wrong}; expected a number over 0, 1 at"):
            _ = h100.limit


def test_the_calls_of_nvidias_libraries_are_counted_by_kind():
    calls = ("__cublas$lt$matmul", "__cublas$gemm", "__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaSoftmaxBackward", "x")
    program = "\n".join(f'%c = f32[2] custom-call(%a), custom_call_target="{call}"' for call in calls)
    expected = {"cuBLAS products": 2, "cuDNN attention": 1, "cuDNN attention backward": 1}
    assert library_kernels(program) == expected


@pytest.mark.slow
@pytest.mark.skipif(machines.cuda_compiler() is not None, reason="a compiler for GPUs is here; see test_cuda.py")
def test_a_gpu_is_estimated_and_says_so(tmp_path):
    lengths = {"batch_size": 4, "max_input_tokens": 12}
    config = write(tmp_path / "run.yaml", **lengths)
    alone, shared = plan.plan(config, ["dtype=bfloat16"], ["h200:1", "h100:2"])
    assert alone["fits"]
    assert alone["estimated"]
    assert alone["collectives"] == {}
    assert shared["collectives"]["all-reduce"] >= 4 * 100 * 512  # the prompt's gradient
    assert shared["flops"] == alone["flops"]
    assert "(estimated with XLA for CPUs and plain attention; the extra `cuda13`" in plan.describe(alone)
    assert alone["kernels"] == {}
    assert "attention is plain on the GPU" not in plan.describe(alone)
    other = write(tmp_path / "other.yaml", backbone="pythia-70m", **lengths)
    for dtype in ("bfloat16", "float32"):
        (answer,) = plan.plan(other, [f"dtype={dtype}"], ["h200:1"])
        assert ("attention is plain on the GPU" in plan.describe(answer)) == (dtype == "float32")


def test_a_missing_library_of_nvidias_is_told_in_one_line_and_other_errors_are_defects(tmp_path, monkeypatch, capsys):
    def measure(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(plan, "measure", measure)
    request = json.dumps([write(tmp_path / "run.yaml"), [], "h100:1", 0.4, "train"])
    for message, told in (("cuDNN not found.", True), ("something else", False)):
        monkeypatch.setattr("sys.stdin", io.StringIO(request))
        with contextlib.nullcontext() if told else pytest.raises(RuntimeError, match=message):
            plan._child()
    expected = "h100:1: cuDNN not found; expected NVIDIA's libraries; install the extra cuda13 or cuda12 anew"
    assert json.loads(capsys.readouterr().out) == {"error": expected}


def test_bad_settings_are_told_before_anything_is_compiled(tmp_path):
    with pytest.raises(UserError, match="batch_size"):
        plan.plan(write(tmp_path / "run.yaml"), ["batch_size=0"], ["v5e:1x1"])
    with pytest.raises(UserError, match="unknown chip"):
        plan.plan(write(tmp_path / "run.yaml"), [], ["tpu"])


# ------------------------------------------------------------------------------------------- libtpu


@pytest.fixture
def quick(monkeypatch):
    """Have libtpu try less hard: a fifth of the time, and a peak of memory that is one percent higher."""
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0")


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`")


@needs_libtpu
@pytest.mark.libtpu
def test_a_shallow_model_of_xxl_width_on_three_topologies(tmp_path, quick):
    settings = XXL_WIDTH | {"num_layers": 2, "num_decoder_layers": 2}
    config = write(
        tmp_path / "run.yaml", backbone={"settings": settings}, batch_size=8, max_input_tokens=412, max_target_tokens=32
    )
    changes = ["dtype=bfloat16", "remat=full", "dropout=0"]
    one, four = plan.plan(config, changes, ["v5e:1x1", "v5p:2x2x1"])
    (cut,) = plan.plan(config, [*changes, "mesh={data: 1, fsdp: -1}"], ["v5e:2x4"])
    assert one["fits"]
    assert one["weights_bytes"] < one["peak_bytes"] < one["limit_bytes"]
    assert one["flops"] == four["flops"] == cut["flops"]
    assert four["temporary_bytes"] < one["temporary_bytes"]
    # Replicated weights: only the prompt's gradient and scalars travel.
    assert set(four["collectives"]) == {"all-reduce"}
    assert 4 * 100 * 4096 <= four["collectives"]["all-reduce"] < 3 * 4 * 100 * 4096
    assert cut["weights_bytes"] < one["weights_bytes"] / 6
    assert "all-gather" in cut["collectives"]


@needs_libtpu
@pytest.mark.libtpu
def test_what_does_not_fit_is_said_with_advice_and_exit_code_3(tmp_path, quick, capsys):
    from softprompt_jax.cli.main import app

    settings = XXL_WIDTH | {"num_layers": 24, "num_decoder_layers": 24}
    config = write(tmp_path / "run.yaml", backbone={"settings": settings}, max_input_tokens=412, max_target_tokens=32)
    code = app(
        ["plan", config, "dtype=bfloat16", "remat=full", "--topology", "v5e:1x1", "--json"], prog_name="softprompt"
    )
    assert code == plan.DOES_NOT_FIT
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is False
    assert answer["weights_bytes"] < answer["peak_bytes"] < 1.3 * answer["weights_bytes"]
    assert "quantize=int8" in answer["advice"]
    assert answer["flops"] == pytest.approx(8 * 18.2e12, rel=0.1)  # of 18.2 TFLOP an example, see shared notes
    assert math.isclose(answer["weights_bytes"], 2 * 11_135_332_352, rel_tol=0.01)
