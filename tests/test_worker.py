"""The loop that runs on every machine (tpu/worker.sh): runs go on after preemption and outlive a lost connection."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """tpu/worker.sh at work in a folder, on commands that end as they are told."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        self.notice("")

    def notice(self, text: str) -> None:
        """Let the metadata server say this of preemption and maintenance."""
        (self.folder / "bin" / "curl.new").write_text(f"#!/bin/sh\necho {text}\n")
        (self.folder / "bin" / "curl.new").chmod(0o755)
        (self.folder / "bin" / "curl.new").replace(self.folder / "bin" / "curl")

    def process(self, *arguments: str, **told: str) -> subprocess.CompletedProcess:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "SOFTPROMPT_WORKER": str(self.folder), "WAIT_S": "0.1"} | told
        command = ["bash", str(ROOT / "tpu" / "worker.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    def call(self, *arguments: str) -> str:
        done = self.process(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start(self, script: str) -> None:
        """Start a run that is this shell script; `$n` counts how often it was started."""
        counter = self.folder / "counter"
        counter.write_text("0")
        count = f"n=$(($(cat {counter}) + 1)); echo $n >{counter}.new; mv {counter}.new {counter}"
        self.call("start", "bash", "-c", f"{count}; {script}")

    def starts(self) -> int:
        return int((self.folder / "counter").read_text())

    def until(self, true) -> None:
        limit = time.monotonic() + 60
        while not true():
            assert time.monotonic() < limit, (self.folder / "log").read_text()
            time.sleep(0.02)

    def outcome(self) -> str:
        self.until(lambda: self.call("outcome") != "running")
        return self.call("outcome")


@pytest.fixture
def worker(tmp_path):
    made = Worker(tmp_path)
    yield made
    pid = tmp_path / "pid"
    if pid.exists() and made.call("outcome") == "running":
        os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("script", "code", "starts"),
    [
        ("exit 0", "0", 1),
        ("[ $n -ge 4 ] || exit 75", "0", 4),  # told to go and saved: for ever
        ("exit 2", "2", 1),  # bad input: never again
        ("exit 134", "134", 6),  # whatever else: five times
    ],
)
def test_a_run_is_started_again_until_it_is_done_or_hopeless(worker, script, code, starts):
    assert worker.call("outcome") == "absent"
    worker.start(script)
    assert worker.outcome() == code
    assert worker.starts() == starts


def test_a_run_outlives_the_connection_and_is_not_started_twice(worker):
    worker.start(f"until [ -f {worker.folder}/go ]; do sleep 0.05; done; echo finished")
    assert worker.call("outcome") == "running"
    assert "running already" in worker.call("start", "bash", "-c", "exit 3")
    (worker.folder / "go").touch()
    assert worker.outcome() == "0"
    assert "finished" in worker.call("tail")
    assert worker.starts() == 1


def test_a_start_that_comes_to_nothing_is_told_in_one_line(worker):
    (worker.folder / "bin" / "setsid").write_text("#!/bin/sh\nexit 1\n")
    (worker.folder / "bin" / "setsid").chmod(0o755)
    done = worker.process("start", "true", START_S="1")
    assert done.returncode == 1
    assert done.stderr.startswith("worker.sh: nothing runs after 1 s; expected a run that holds")
    assert done.stderr.count("\n") == 1
    assert worker.call("outcome") == "absent"


def test_stop_lets_the_run_save_and_starts_it_no_more(worker):
    worker.start(f"trap 'exit 75' TERM; touch {worker.folder}/up; while :; do sleep 0.05; done")
    worker.until((worker.folder / "up").exists)
    worker.call("stop")
    assert worker.outcome() == "75"
    assert worker.starts() == 1


@pytest.mark.parametrize("told", ["TRUE", "TERMINATE_ON_HOST_MAINTENANCE"])
def test_a_maintenance_notice_lets_the_run_save_and_go_on_afterwards(worker, told):
    worker.start(f"[ $n = 1 ] || exit 0; trap 'exit 75' TERM; touch {worker.folder}/up; while :; do sleep 0.05; done")
    worker.until((worker.folder / "up").exists)
    worker.notice(told)
    worker.until(lambda: "exit code 75" in (worker.folder / "log").read_text())
    assert worker.starts() == 1  # not while the notice stands
    worker.notice("NONE")
    assert worker.outcome() == "0"
    assert worker.starts() == 2
