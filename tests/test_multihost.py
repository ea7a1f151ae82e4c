"""Several processes train as one; when one dies the others end, and the same commands go on."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_lm
from jax.experimental import multihost_utils
from small_runs import write_config

from softprompt_jax.checkpoints.artifact import load_prompt
from softprompt_jax.checkpoints.training_state import Checkpoints
from softprompt_jax.cli.signals import INTERRUPTED, PREEMPTED
from softprompt_jax.config import UserError
from softprompt_jax.distributed import multihost
from softprompt_jax.training.run_data import RunData

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(config: Path, out: Path, count: int = 1, *overrides: str, caches=("cache",)) -> list[subprocess.Popen]:
    """Start `softprompt train` in so many processes, with the caches in turn."""
    port, started = free_port(), []
    for index in range(count):
        cache = out.parent / caches[index % len(caches)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SOFTPROMPT_CACHE": str(cache)}
        command = [sys.executable, "-m", "softprompt_jax", "train", str(config), *overrides, "--out", str(out)]
        if count > 1:
            command += ["--coordinator", f"localhost:{port}", "--processes", str(count), "--process", str(index)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    return started


def finish(started: list[subprocess.Popen], timeout_s: float = 300) -> list[tuple[int, str, str]]:
    until, ended = time.monotonic() + timeout_s, []
    try:
        for process in started:
            out, err = process.communicate(timeout=max(1, until - time.monotonic()))
            ended.append((process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return ended


def succeed(config: Path, out: Path, count: int = 1, *overrides: str) -> None:
    for code, _, err in finish(start(config, out, count, *overrides)):
        assert code == 0, err[-3000:]


def wait_for_step(out: Path, step: int) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if any(json.loads(line)["step"] >= step for line in lines[:-1]):
            return
        time.sleep(0.05)
    raise AssertionError("the run does not get there")


def rows(out: Path) -> np.ndarray:
    return load_prompt(out)


@pytest.fixture(scope="module")
def config(small, tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "run.yaml", small.short)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """Return a function that gives the folder of an uninterrupted run of so many processes."""

    @functools.cache
    def made(count: int) -> Path:
        succeed(config, out := tmp_path_factory.mktemp("whole") / "run", count)
        return out

    return made


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "mesh={data: 1, tensor: 2}"])
def test_two_processes_train_what_one_trains(config, whole, tmp_path, mesh):
    if mesh:
        succeed(config, tmp_path / "sharded", 2, mesh)
    folders = [whole(1), tmp_path / "sharded" if mesh else whole(2)]
    one, two = map(rows, folders)
    np.testing.assert_allclose(two, one, atol=1e-3 * np.abs(one).max())
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert results[0]["test"] == results[1]["test"]
    lines = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len({(line["step"], *line) for line in lines})  # one writer


@pytest.mark.slow
@pytest.mark.parametrize("caches", [("full", "empty"), ("empty", "full")])
def test_a_teachers_answers_that_only_one_process_has_are_asked_for_together(tmp_path, caches):
    words = " ".join(tiny_lm.TEXTS).split()
    (tmp_path / "context.txt").write_text("a warm film . good\n")
    rows = [json.dumps({"inputs": " ".join(words[n : n + 4])}) for n in range(20)]
    (tmp_path / "inputs.jsonl").write_text("\n".join(rows))
    task = {"kind": "distill", "context": str(tmp_path / "context.txt"), "inputs": str(tmp_path / "inputs.jsonl")}
    settings = {
        **{
            "task": task,
            "backbone": str(tiny_lm.folder(tmp_path / "lm")),
            "methods": [{"kind": "prompt", "length": 3}],
        },
        **{"steps": 2, "batch_size": 4, "max_input_tokens": 16, "max_target_tokens": 4, "evaluate_every": 2},
    }
    config = write_config(tmp_path / "config.yaml", settings)
    for code, _, err in finish(start(config, tmp_path / "alone", caches=("full",))):
        assert code == 0, err[-3000:]
    for code, _, err in finish(start(config, tmp_path / "both", 2, caches=caches)):
        assert code == 0, err[-3000:]
    both, alone = (load_prompt(tmp_path / name) for name in ("both", "alone"))
    np.testing.assert_allclose(both, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim"), [(2, 0), (4, 2)])
def test_when_a_process_is_killed_the_others_end_and_all_go_on_to_the_same_bits(config, whole, tmp_path, count, victim):
    started = start(config, tmp_path / "killed", count)
    wait_for_step(tmp_path / "killed", 8)
    started[victim].kill()
    killed = time.monotonic()
    ended = finish(started, 120)
    # JAX's own words: of its watch, or where a collective failed earlier, of the barrier at the end.
    named = (
        "the leader" if victim == 0 else rf"stopped sending heartbeats\):\n{victim}\n|Task {victim} heartbeat timeout"
    )
    for index, (code, _, err) in enumerate(ended):
        assert code != 0
        assert index == victim or re.search(named, err), err[-3000:]
    assert time.monotonic() - killed < 60
    succeed(config, tmp_path / "killed", count)
    for name in ("prompt.safetensors", "trained.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (whole(count) / name).read_bytes()
    one, several = rows(whole(1)), rows(whole(count))
    np.testing.assert_allclose(several, one, atol=1e-3 * np.abs(one).max())


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(config, whole, tmp_path):
    started = start(config, tmp_path / "moved")
    wait_for_step(tmp_path / "moved", 12)
    started[0].kill()
    finish(started)
    succeed(config, tmp_path / "moved", 2)
    expected = rows(whole(1))
    np.testing.assert_allclose(rows(tmp_path / "moved"), expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.slow
def test_a_tuned_model_that_is_cut_goes_on_cut_another_way(small, tmp_path, monkeypatch):
    changes = {"steps": 40, "evaluate_every": 20, "checkpoint_every": 4, "log_every": 1}
    config = write_config(tmp_path / "run.yaml", small.full | changes)
    succeed(config, tmp_path / "one")
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2")
    started = start(config, tmp_path / "cut", 1, "mesh={data: 1, fsdp: 2}")
    wait_for_step(tmp_path / "cut", 6)
    started[0].send_signal(signal.SIGTERM)
    ((code, _, err),) = finish(started)
    assert code == PREEMPTED, err
    ((code, _, err),) = finish(start(config, tmp_path / "cut", 1, "mesh={data: 1, tensor: 2}"))
    assert code == 0, err
    assert "resumed at step " in err
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "cut")]
    losses = [{line["step"]: line["loss"] for line in map(json.loads, each) if "loss" in line} for each in lines]
    assert losses[0].keys() == losses[1].keys()
    np.testing.assert_allclose(list(losses[1].values()), list(losses[0].values()), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_run_told_to_stop_saves_and_says_so_by_its_exit_code(config, whole, tmp_path, count, number):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell, and in what it starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
    started = start(config, tmp_path / "told", count, "steps=40")
    wait_for_step(tmp_path / "told", 4)
    started[0].send_signal(number)  # among several processes one is told, and all go
    codes = [INTERRUPTED if number == signal.SIGINT else PREEMPTED, PREEMPTED]
    for expected, (code, _, err) in zip(codes, finish(started), strict=False):
        assert code == expected, err[-2000:]
        assert "the same command goes on" in err
    succeed(config, tmp_path / "told", count)
    told, expected = (folder / "prompt.safetensors" for folder in (tmp_path / "told", whole(count)))
    assert told.read_bytes() == expected.read_bytes()


class Told:
    """Sends a signal to this process at the call of a function that is counted, from 0."""

    def __init__(self, owner: type, name: str, call: int, after_s: float = 0, number: int = signal.SIGTERM):
        self._function, self._left, self._after_s, self._number = getattr(owner, name), call, after_s, number
        setattr(owner, name, lambda *arguments: self(*arguments))

    def __call__(self, *arguments):
        if self._left == 0:
            os.kill(os.getpid(), self._number)
            time.sleep(self._after_s)  # until the others have been told, too
        self._left -= 1
        return self._function(*arguments)


def told_at(monkeypatch, owner: type, name: str, call: int, number: int = signal.SIGTERM) -> None:
    """Send a signal at a call, once."""
    monkeypatch.setattr(owner, name, getattr(owner, name))  # so that the old one comes back
    Told(owner, name, call, number=number)


def test_ctrl_c_saves_as_sigterm_does(small, prompt_run, softprompt, own_cache, tmp_path, monkeypatch):
    config, out = write_config(tmp_path / "run.yaml", small.short), tmp_path / "out"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        told_at(monkeypatch, Checkpoints, "save", 1, signal.SIGINT)  # at step 10
        code, _, err = softprompt("train", config, "--out", out)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, err.splitlines()[-1]) == (
        130,
        f"softprompt: {out}: told to stop, saved at step 11; the same command goes on",
    )
    code, _, err = softprompt("train", config, "--out", out)
    assert (code, "resumed at step 11" in err) == (0, True), err
    for file in ("prompt.safetensors", "trained.safetensors"):
        assert (out / file).read_bytes() == (prompt_run / file).read_bytes()


def lines_of(out: Path) -> list[tuple]:
    """What metrics.jsonl says, without what the clock says."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], *map(line.get, ("loss", "validation", "data"))) for line in lines]


@pytest.mark.parametrize(
    ("name", "call", "said"),
    [
        ("validate", 1, "while step 10 was validated"),  # the best, to be known as such to the end
        pytest.param("validate", 0, "while step 0 was validated", marks=pytest.mark.slow),
        pytest.param("validate", 4, "while step 40 was validated", marks=pytest.mark.slow),
        pytest.param("result", 0, "while the result was measured", marks=pytest.mark.slow),
    ],
)
def test_a_validation_is_cut_short_and_made_up_for(
    small, prompt_run, softprompt, own_cache, tmp_path, monkeypatch, name, call, said
):
    config, out = write_config(tmp_path / "run.yaml", small.short), tmp_path / "out"
    told_at(monkeypatch, RunData, name, call)
    code, _, err = softprompt("train", config, "--out", out)
    assert (code, err.count(said)) == (PREEMPTED, 1), err
    best = json.loads((prompt_run / "result.json").read_text())["best_step"]
    kept = {"validate 0": [], "validate 1": [10], "validate 4": [best, 40], "result 0": [best, 40]}[f"{name} {call}"]
    found = {int(path.name) for path in out.glob("checkpoints/*")}
    assert set(kept) <= found
    assert bool(kept) is bool(found)
    code, _, err = softprompt("train", config, "--out", out)
    assert code == 0, err
    for file in ("prompt.safetensors", "trained.safetensors"):
        assert (out / file).read_bytes() == (prompt_run / file).read_bytes()
    assert lines_of(out) == lines_of(prompt_run)
    results = [json.loads((folder / "result.json").read_text()) | {"seconds": 0} for folder in (out, prompt_run)]
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_validation_cut_short_twice_and_killed_once_is_made_up_for(
    small, prompt_run, softprompt, own_cache, tmp_path, monkeypatch
):
    config, out = write_config(tmp_path / "run.yaml", small.short), tmp_path / "out"
    for call in (1, 0):  # the second time in what makes up for the first
        told_at(monkeypatch, RunData, "validate", call)
        assert softprompt("train", config, "--out", out)[0] == PREEMPTED

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the line of the validation, before its checkpoint
        patch.setattr(Checkpoints, "save", killed)
        assert softprompt("train", config, "--out", out)[0] == 130
    assert [line[0] for line in lines_of(out) if line[2]] == [0, 10]
    assert softprompt("train", config, "--out", out)[0] == 0
    assert (out / "prompt.safetensors").read_bytes() == (prompt_run / "prompt.safetensors").read_bytes()
    assert lines_of(out) == lines_of(prompt_run)


@pytest.mark.slow
def test_a_sweeps_validation_is_cut_short_and_made_up_for(small, softprompt, own_cache, tmp_path, monkeypatch):
    config = write_config(tmp_path / "run.yaml", small.short)
    command = "sweep", config, "--over", "seed=0,1", "--out"
    assert softprompt(*command, tmp_path / "whole")[0] == 0
    for name, call in (("validate", 5), ("result", 1)):  # of the second prompt at step 20, of the second one's result
        told_at(monkeypatch, RunData, name, call)
        code, _, err = softprompt(*command, tmp_path / "told")
        assert (code, "the same command goes on" in err) == (PREEMPTED, True), err
    assert softprompt(*command, tmp_path / "told")[0] == 0
    for whole in tmp_path.glob("whole/*/prompt.safetensors"):
        told = tmp_path / "told" / whole.parent.name
        assert (told / whole.name).read_bytes() == whole.read_bytes()
        assert lines_of(told) == lines_of(whole.parent)
    assert len(list(tmp_path.glob("told/*/prompt.safetensors"))) == 2


@pytest.mark.slow
def test_two_processes_cut_a_validation_short_together(config, whole, tmp_path):
    out, port = tmp_path / "told", free_port()
    script = (
        "import sys, test_multihost; from softprompt_jax.cli.main import main\n"
        "from softprompt_jax.training.run_data import RunData\n"
        "if sys.argv.pop() == '0': test_multihost.Told(RunData, 'validate', 2, after_s=5)\n"
        "main()"
    )
    environment = os.environ | {"SOFTPROMPT_CACHE": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    command = [sys.executable, "-c", script, "train", str(config), "evaluation_batch_size=1", "--out", str(out)]
    command += ["--coordinator", f"localhost:{port}", "--processes", "2", "--process"]
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    started = [subprocess.Popen([*command, index, index], **pipes) for index in "01"]
    for code, _, err in finish(started):
        assert (code, "while step 20 was validated" in err) == (PREEMPTED, True), err[-2000:]
    succeed(config, out, 2, "evaluation_batch_size=1")
    np.testing.assert_array_equal(rows(out), rows(whole(2)))
    assert [line[0] for line in lines_of(out)] == [line[0] for line in lines_of(whole(2))]


def test_a_run_told_to_stop_while_it_loads_ends_at_once(config, tmp_path):
    script = (
        "import os, signal, time; from softprompt_jax.cli import main\n"
        "from softprompt_jax.distributed import multihost\n"
        "multihost.connect = lambda *_: [os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)]\n"
        "main.main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, "train", config, "--out", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.stderr == "softprompt: told to stop while nothing was unsaved; the same command goes on\n"
    assert ended.returncode == PREEMPTED


@pytest.mark.slow
def test_multihost_with_unlike_settings_are_told_apart(config, tmp_path):
    port = free_port()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SOFTPROMPT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "softprompt_jax", "train", str(config), "--out", str(tmp_path / "out")]
    command += ["--coordinator", f"localhost:{port}", "--processes", "2"]
    started = [
        subprocess.Popen(
            [*command, "--process", str(index), *([] if index else ["seed=3"])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    for code, _, err in finish(started):
        assert code == 2, err
        assert "settings: process 1 has" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1",), "expected all three"),
        (("localhost:1", 2), "expected all three"),
        (("localhost:1", 2, 2), "expected 0 to 1"),
        (("localhost", 2, 1), "expected HOST:PORT"),
    ],
)
def test_half_a_description_of_the_processes_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        multihost.connect(*arguments)


@pytest.mark.parametrize("slurm", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("index", [0, 1])
def test_others_that_do_not_come_are_waited_for_in_bounds(slurm, index):
    port = free_port()
    found = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    found |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(index), "SLURM_LOCALID": "0"}
    arguments = "" if slurm else f"'localhost:{port}', 2, {index}, "
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from softprompt_jax.distributed import multihost; multihost.connect({arguments}timeout_s=2)",
        ],
        env=os.environ | (found if slurm else {}) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    where = "process 0" if slurm else f"process 0 at localhost:{port}"
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "softprompt: processes: not all came together in 2 s; expected every process of the job to start and to reach "
        f"{where}; start the missing ones, or check the address\n"
    )


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_only_jobs_of_several_processes_are_joined(environment, several):
    assert multihost._in_a_job(environment) is several


def test_kubernetes_is_joined_with_its_package_and_refused_without(monkeypatch):
    environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="found a Kubernetes job but not the package `kubernetes`"):
        multihost._in_a_job(environment)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert multihost._in_a_job(environment)


@pytest.mark.parametrize(
    ("endpoints", "workers"), [("10.0.0.2", 1), ("10.0.0.2,10.0.0.3,10.0.0.4", 3), ("a:0:10.0.0.2,b:1:10.0.0.3", 2)]
)
def test_a_tpu_vm_learns_of_its_slice_from_the_metadata_server(monkeypatch, endpoints, workers):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path == "/computeMetadata/v1/instance/attributes/worker-network-endpoints"
            self.send_response(200 if known and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write(endpoints.encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
        assert multihost._tpu_workers() == 1  # no TPU here: nobody is asked
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
        assert multihost._tpu_workers() == workers
        server.shutdown()


def test_a_process_without_a_device_is_told_in_one_line(monkeypatch):
    def none_left():
        raise RuntimeError("Unable to initialize backend:\n no visible device")

    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(jax, "local_devices", none_left)
    with pytest.raises(UserError, match=r"process 0 has no device \(Unable .* no visible device\); expected one"):
        multihost.connect("localhost:1", 8, 0)


@pytest.mark.parametrize("other", ["jax 0.10.2", "jax 0.9.0"])
def test_multihost_of_unlike_versions_are_told_apart(monkeypatch, other):
    def gather(own):
        return np.stack([own, np.frombuffer(other.encode().ljust(256), np.uint8)])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    if other == "jax 0.10.2":
        multihost.assert_same_everywhere("versions", "jax 0.10.2")
    else:
        with pytest.raises(UserError, match=r"process 1 has jax 0\.9\.0, process 0 has jax 0\.10\.2; expected"):
            multihost.assert_same_everywhere("versions", "jax 0.10.2")
