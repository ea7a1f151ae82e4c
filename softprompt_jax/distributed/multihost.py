"""Several processes as one program: JAX's own runtime, told where the others are, and what is done by one of them."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import importlib.util
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from softprompt_jax.config import UserError

HEARTBEAT_S = 20  # a process that has been silent for so long is taken for dead, and all others end
_SILENT_S = 15  # of waiting for the others, before a line says so
T = TypeVar("T")


def connect(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, timeout_s: int = 600
) -> None:
    """Join the other processes of this job, before anything touches a device.

    Without arguments: those of a TPU pod, a Slurm or a Kubernetes job are found through the environment that these
    set, and everything else is one process. `coordinator` (HOST:PORT of process 0), `count` and `index` go together.
    """
    given = [value is not None for value in (coordinator, count, index)]
    if any(given):
        if not all(given):
            raise UserError(
                "processes: found some of coordinator, count and index; expected all three; "
                "add --coordinator HOST:PORT --processes N --process I"
            )
        assert coordinator is not None
        assert count is not None
        assert index is not None
        if not 0 <= index < count:
            raise UserError(f"processes: found index {index} of {count}; expected 0 to {count - 1}")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"processes: found coordinator {coordinator!r}; expected HOST:PORT")
    elif not (_in_a_job(os.environ) or _tpu_workers() > 1):
        return
    came = threading.Event()
    threading.Thread(target=_watch, args=(came, timeout_s, coordinator), daemon=True).start()
    try:
        jax.distributed.initialize(
            coordinator, count, index, initialization_timeout=timeout_s + 60, heartbeat_timeout_seconds=HEARTBEAT_S
        )
    except RuntimeError as error:
        raise UserError(
            f"processes: not all came together in {timeout_s} s ({' '.join(str(error).split())[:200]}); "
            "expected every process of the job to start; look at the others, and at the coordinator's port"
        ) from None
    finally:
        came.set()
    try:
        jax.local_devices()
    except RuntimeError as error:
        which = "this one" if index is None else f"process {index}"
        raise UserError(
            f"processes: {which} has no device ({' '.join(str(error).split())[:200]}); "
            "expected one at least for each; start no more processes on a machine than it has devices"
        ) from None


def is_first() -> bool:
    """Is this the process that writes what is written once?"""
    return jax.process_index() == 0


def run_on_process_0(action: Callable[[], T], name: str) -> T | None:
    """Let the first process act while the others wait; only it gets the value. A UserError ends all of them."""
    if jax.process_count() == 1:
        return action()
    from jax.experimental import multihost_utils

    value, error = None, None
    if is_first():
        try:
            value = action()
        except UserError as caught:
            error = caught
    failed = multihost_utils.broadcast_one_to_all(error is not None)
    if error is not None:
        raise error
    if failed:
        raise UserError(f"{name}: process 0 refused; expected it to go on; see its message")
    return value


@contextlib.contextmanager
def lock_folder(folder: Path, wait_s: float = 60) -> Iterator[None]:
    """Keep other processes out of a folder until this one leaves it or ends; wait so long for one that is there.

    Holds among the processes that the file system lets see each other's locks. Raises UserError after the wait.
    """
    lock, until = os.open(folder, os.O_RDONLY), time.monotonic() + wait_s
    try:
        with contextlib.suppress(OSError):  # such as a file system without locks
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise UserError(
                            f"{folder}: another process trains in it; expected one at a time; "
                            "wait for it, or use another --out"
                        ) from None
                    time.sleep(min(1, wait_s))
        yield
    finally:
        os.close(lock)


def assert_same_everywhere(name: str, value: str) -> None:
    """Fail unless every process has the same value, such as versions or settings."""
    if jax.process_count() == 1:
        return
    import numpy as np
    from jax.experimental import multihost_utils

    digest = np.frombuffer(value.encode().ljust(256)[:256], np.uint8)
    every = multihost_utils.process_allgather(digest)
    odd = [i for i, row in enumerate(every) if not np.array_equal(row, every[0])]
    if odd:
        first, other = (bytes(every[i]).decode(errors="replace").strip() for i in (0, odd[0]))
        raise UserError(f"{name}: process {odd[0]} has {other}, process 0 has {first}; expected the same everywhere")


class Preemption:
    """Notices that the machine wants to be left: SIGTERM in one process, JAX's sync point among several.

    A notice that comes after a run's last look, while it ends, goes to whoever had SIGTERM before the run.
    """

    _current: Preemption | None = None
    _AHEAD = 2  # steps; JAX would queue up to 32, which may take longer than the grace after a notice

    def __init__(self) -> None:
        self._told = False
        self._queued: collections.deque[Any] = collections.deque()
        self._asked = 0
        self._before: Any = None

    def __enter__(self) -> Preemption:
        Preemption._current = self
        if jax.process_count() == 1:
            try:
                self._before = signal.signal(signal.SIGTERM, self._note)
            except ValueError:  # not the main thread: whoever owns it decides
                self._before = None
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        Preemption._current = None
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            if self._told and error is None:
                signal.raise_signal(signal.SIGTERM)

    def _note(self, *_: object) -> None:
        self._told = True

    def reached(self, measured: Any) -> bool:
        """Is it time to save and go? All processes ask equally often and get the same answers.

        `measured`: what the step just begun returns, or None between steps; the one two before it is waited for.
        """
        self._asked += 1
        self._queued.append(measured)
        if len(self._queued) > self._AHEAD:
            jax.block_until_ready(self._queued.popleft())
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            self._told |= multihost_utils.reached_preemption_sync_point(self._asked)
        return self._told


class PreemptedDuringEval(Exception):
    """A validation ends because it is time to go; the training loop saves and raises Preempted."""


def raise_if_preempted() -> None:
    """Raise PreemptedDuringEval if it is time to save and go: asked between the batches of a validation, in a run."""
    if Preemption._current is not None and Preemption._current.reached(None):
        raise PreemptedDuringEval


def _in_a_job(environment: Any) -> bool:
    """Does the environment speak of several processes? JAX then finds the rest out by itself."""
    slurm = int(environment.get("SLURM_NTASKS", "1") or 1) > 1 and "SLURM_PROCID" in environment
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    alone = environment.get("TPU_WORKER_HOSTNAMES") and not pod  # GKE names a slice's only host too
    kubernetes = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment and not alone
    if kubernetes and not (slurm or pod) and importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "processes: found a Kubernetes job but not the package `kubernetes`, which finds the others; expected it, "
            "or --coordinator HOST:PORT --processes N --process I (see tpu/gpu/kubernetes.sh)"
        )
    return slurm or pod or kubernetes


def _tpu_workers() -> int:
    """Count the workers of the TPU slice that this machine is one of, as a TPU VM's metadata server tells."""
    if "TPU_SKIP_MDS_QUERY" in os.environ:  # set by JAX where there is no TPU
        return 1
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    address = f"http://{host}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, headers={"Metadata-Flavor": "Google"}), timeout=10
        ) as answer:
            return answer.read().count(b",") + 1
    except OSError:  # a TPU outside Compute Engine, such as in GKE: the environment tells
        return 1


def _watch(came: threading.Event, timeout_s: int, coordinator: str | None) -> None:
    """Say what is waited for, and at the limit end this process in one line: JAX's own wait ends in an abort."""
    where = f"process 0 at {coordinator}" if coordinator else "process 0"
    silent_s = min(_SILENT_S, timeout_s)
    if not came.wait(silent_s) and timeout_s > silent_s:
        print(f"waiting up to {timeout_s} s for the other processes and {where}", file=sys.stderr, flush=True)
    if not came.wait(timeout_s - silent_s):
        print(
            f"softprompt: processes: not all came together in {timeout_s} s; expected every process of the job to "
            f"start and to reach {where}; start the missing ones, or check the address",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)
