"""Several processes as one program: JAX's own runtime, told where the others are, and what is done by one of them."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from softprompt_jax.config import UserError

HEARTBEAT_S = 20  # a process that has been silent for so long is taken for dead, and all others end
PREEMPTED = 75  # exit code of a run that was told to go and has saved: start it again (EX_TEMPFAIL)
T = TypeVar("T")


def connect(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, timeout_s: int = 300
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
        if index > 0:
            _await_coordinator(host, int(port), timeout_s)
    elif not (_in_a_job(os.environ) or _tpu_workers() > 1):
        return
    jax.distributed.initialize(
        coordinator, count, index, initialization_timeout=timeout_s, heartbeat_timeout_seconds=HEARTBEAT_S
    )
    try:
        jax.local_devices()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"processes: process {jax.process_index() if count is None else index} has no device ({reason}); "
            "expected one at least for each; start no more processes on a machine than it has devices"
        ) from None


def is_first() -> bool:
    """Is this the process that writes what is written once?"""
    return jax.process_index() == 0


def on_first(action: Callable[[], T], name: str) -> T | None:
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


def agreed(name: str, value: str) -> None:
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
    """Notices that the machine wants to be left: SIGTERM in one process, JAX's sync point among several."""

    def __init__(self) -> None:
        self._told = False
        self._before: Any = None

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1:
            try:
                self._before = signal.signal(signal.SIGTERM, self._note)
            except ValueError:  # not the main thread: whoever owns it decides
                self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self._told = True

    def reached(self, step: int) -> bool:
        """Is it time to save and go? All processes agree on the step."""
        if jax.process_count() == 1:
            return self._told
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


class Preempted(Exception):
    """The run has saved its state and ended before its last step, because the machine is being taken away."""


def _in_a_job(environment: Any) -> bool:
    """Does the environment speak of several processes? JAX then finds the rest out by itself."""
    slurm = int(environment.get("SLURM_NTASKS", "1") or 1) > 1 and "SLURM_PROCID" in environment
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    kubernetes = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
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


def _await_coordinator(host: str, port: int, timeout_s: int) -> None:
    """Wait until process 0 listens; JAX's own wait ends in an abort with a trace."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"processes: coordinator {host}:{port} not reached in {timeout_s} s ({error.strerror or error}); "
                    "expected process 0 to listen there; start it first, or check the address"
                ) from None
            time.sleep(0.5)
