"""What answers on a mesh: the answers of one device, and no device holds the whole of a weight that is cut."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_lm

import softprompt_jax
from softprompt_jax.checkpoints.artifact import read_tensors
from softprompt_jax.checkpoints.backbone import save_backbone
from softprompt_jax.config import parse
from softprompt_jax.run import Run
from softprompt_jax.trust import remember

HERE = Path(__file__).parent
CUT, LONG, ROWS = "{data: 2, fsdp: 2, tensor: 2}", "{data: 1, fsdp: 4, tensor: 2}", "{data: -1}"
EIGHT = "--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="module")
def folder(small, prompt_run, full_run, tmp_path_factory) -> Path:
    """Return a folder with a backbone, runs, a bank of prompts of all kinds, and models of other families."""
    made = tmp_path_factory.mktemp("mesh")
    for name, target in (("backbone", small.backbone), ("prompt", prompt_run), ("full", full_run)):
        (made / name).symlink_to(target)
    bank = made / "bank"
    bank.mkdir()
    (bank / "prompt").symlink_to(prompt_run)
    np.save(bank / "rows.npy", 3 * np.random.default_rng(5).normal(size=(2, 16)).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTPROMPT_CACHE", str(made / "cache"))
        for kind, settings in (("prefix", {"length": 3}), ("ia3", {})):
            run = parse(Run, small.short | {"methods": [{"kind": kind} | settings], "steps": 2}, "test")
            softprompt_jax.train(run, bank / kind)
            remember(run)
    tiny_lm.folder(made / "lm")
    (made / "lm_bank").mkdir()
    for length in (1, 2, 4):
        np.save(made / "lm_bank" / f"p{length}.npy", np.random.default_rng(length).normal(size=(length, 32)))
    for family in ("llama", "gemma2", "t5gemma"):
        save_backbone(tiny.model(of=family, d_ff=32), made / family, "float32")
    return made


def answered(folder: Path, what: str, mesh: str) -> tuple[Any, Any]:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, str(HERE / "answers_on_eight_devices.py"), str(folder), what, mesh]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return found["one"], found["mesh"]


def same(one: Any, other: Any) -> None:
    """Compare answers: texts and tokens are equal, numbers within 1e-5."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one.keys() - {"shares", "read", "table", "compiled", "caches"}:
            same(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            same(*pair)
    elif isinstance(one, float):
        assert math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-5)
    else:
        assert one == other


def cut(found: dict[str, Any], into: int) -> None:
    """Every matrix of the layers is divided by all of fsdp x tensor, and was never read as a whole."""
    assert found["read"] == 1 / into
    shares = found["shares"]
    kernels = {path: share for path, share in shares.items() if path.endswith("kernel") or path == "embedding"}
    assert len(kernels) > 5
    assert set(kernels.values()) == {1 / into}, kernels


@pytest.mark.parametrize(
    ("what", "mesh", "into"),
    [
        ("prompt", CUT, 4),
        *(pytest.param("full", mesh, into, marks=pytest.mark.slow) for mesh, into in ((LONG, 8), (ROWS, 1))),
    ],
)
def test_a_run_is_evaluated_and_predicts_on_a_mesh_as_on_one_device(folder, what, mesh, into):
    one, other = answered(folder, what, mesh)
    same(one, other)
    cut(other, into)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "mesh", "into"),
    [("backbone", CUT, 4), ("llama", CUT, 4), ("llama", LONG, 8), ("gemma2", CUT, 4), ("t5gemma", CUT, 4)],
)
def test_logits_and_every_way_of_decoding_on_a_mesh_are_those_of_one_device(folder, source, mesh, into):
    one, other = answered(folder, f"arrays {source}", mesh)
    same(one, other)
    cut(other, into)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "mesh"), [("bank", CUT), ("bank", LONG), ("bank lm", CUT)])
def test_a_bank_of_prompts_prefixes_and_factors_answers_on_a_mesh_as_on_one_device(folder, what, mesh):
    one, other = answered(folder, what, mesh)
    same(one, other)
    cut(other, 4 if mesh == CUT else 8)
    assert other["table"] == 1  # whole on each device


@pytest.mark.slow
@pytest.mark.parametrize(("what", "mesh"), [("server", CUT), ("server", LONG), ("server lm", CUT)])
def test_the_server_answers_on_a_mesh_as_on_one_device(folder, what, mesh):
    one, other = answered(folder, what, mesh)
    same(one, other)
    cut(other, 4 if mesh == CUT else 8)
    assert set(other["caches"]) == {1 / 8}  # by rows over data x fsdp, by heads over tensor
    before, after = other["compiled"]
    assert before == after  # all was compiled before the first request


@pytest.mark.parametrize(
    ("command", "mesh", "message"),
    [
        (["eval", "nowhere"], "{data: 1, fsdp: 3}", "mesh: found data 1 x fsdp 3 x tensor 1 for 1 device"),
        (["predict", "nowhere"], "{data: 2}", "mesh: found data 2 x fsdp 1 x tensor 1 for 1 device"),
        (["ensemble", "nowhere", "no"], "{data: 2}", "for 1 device(s); expected a product of 1"),
        (["inspect", "nowhere"], "{data: 2}", "for 1 device(s)"),
        (["export", "nowhere", "--to", "x.npy", "--format", "npy"], "{data: 2}", "for 1 device(s)"),
        (["submit", "nowhere", "--to", "x"], "{data: 2}", "for 1 device(s)"),
        (["serve", "nowhere"], "{data: 2}", "for 1 device(s)"),
        (["eval", "nowhere"], "{fsdp: 1, fdsp: 2}", "mesh: fdsp: unknown setting; expected one of data, fsdp, tensor"),
        (["eval", "nowhere"], "data: [", "mesh: not YAML for settings"),
        (["eval", "nowhere"], "3", "mesh: "),
    ],
)
def test_a_mesh_that_the_devices_do_not_make_is_refused_before_anything_is_read(refused, command, mesh, message):
    assert message in refused(*command, "--mesh", mesh)


def on_eight(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "TF_CPP_MIN_LOG_LEVEL": "2"}
    environment |= {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {EIGHT}", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "softprompt_jax", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_runs_own_mesh_is_made_and_one_that_eight_devices_do_not_make_is_refused(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for file in (folder / "prompt").iterdir():
        if file.name != "config.yaml":
            (run / file.name).symlink_to(file)
    settings = (folder / "prompt" / "config.yaml").read_text()
    own = "mesh:\n  data: -1\n  fsdp: 1\n  tensor: 1\n"
    assert own in settings
    (run / "config.yaml").write_text(settings.replace(own, "mesh:\n  data: 1\n  fsdp: 3\n  tensor: 1\n"))
    refusal = on_eight("eval", run, "--trust")
    assert refusal.returncode == 2
    assert refusal.stderr.count("\n") == 1
    assert (
        "mesh: found data 1 x fsdp 3 x tensor 1 for 8 device(s); expected a product of 8; say another" in refusal.stderr
    )
    (run / "config.yaml").write_text(settings.replace(own, "mesh:\n  data: 1\n  fsdp: -1\n  tensor: 2\n"))
    found = [on_eight("eval", run, "--trust", *mesh) for mesh in ([], ["--mesh", "{data: 8}"])]
    assert [done.returncode for done in found] == [0, 0], found[0].stderr
    assert found[0].stdout == found[1].stdout


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hf", "stablehlo", "peft"])
def test_what_is_exported_on_a_mesh_is_what_one_device_exports(folder, softprompt, tmp_path, format):
    source = folder / ("full" if format == "hf" else "prompt")
    one, eight = tmp_path / "one" / "exported", tmp_path / "eight" / "exported"  # the pages name the folder
    code, _, err = softprompt("export", source, "--to", one, "--format", format, "--trust")
    assert code == 0, err
    done = on_eight("export", source, "--to", eight, "--format", format, "--trust", "--mesh", CUT)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in eight.iterdir())
    for name in names:
        if name == "model.safetensors":  # safetensors writes its metadata in any order
            arrays, others = (read_tensors(each / name)[0] for each in (one, eight))
            assert arrays.keys() == others.keys()
            for tensor, values in arrays.items():
                np.testing.assert_array_equal(values, others[tensor])
        elif name != "program.stablehlo":  # XLA numbers what it serialises
            assert (one / name).read_bytes() == (eight / name).read_bytes(), name


@pytest.mark.slow
def test_an_ensemble_and_inspect_on_a_mesh_say_what_they_say_on_one_device(folder, softprompt):
    ensemble = ["ensemble", folder / "bank" / "prompt", folder / "bank" / "prefix", "--json", "--trust"]
    inspect = ["inspect", folder / "prompt", "--json", "--trust"]
    for command in (ensemble, inspect):
        code, one, err = softprompt(*command)
        assert code == 0, err
        done = on_eight(*command, "--mesh", LONG)
        assert done.returncode == 0, done.stderr
        same(json.loads(one), json.loads(done.stdout))
