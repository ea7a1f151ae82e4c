"""Several processes as one program: how they find each other, what one does for all, and how they stop together."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from softprompt_jax.config import Interrupted, Preempted, UserError

HEARTBEAT_S = 20  # silence after which a process counts as dead and all others end
_SILENT_S = 15  # wait for the others before a line says so
T = TypeVar("T")


def connect(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, timeout_s: int = 600
) -> None:
    """Connect the processes of this job. Call it before anything touches a device.

    Without arguments, the processes of a TPU pod, a Slurm job or a Kubernetes job are found through the environment.
    Anything else is one process. `coordinator` (HOST:PORT of process 0), `count` and `index` must be given together.
    Errors: UserError if the others do not connect within `timeout_s`, or if this process has no device.
    """
    if (coordinator, count, index) != (None, None, None):
        if coordinator is None or count is None or index is None:
            raise UserError(
                "processes: found some of coordinator, count and index; expected all three; "
                "add --coordinator HOST:PORT --processes N --process I"
            )
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
    """Is this process 0, which writes what is written once?"""
    return jax.process_index() == 0


def run_on_process_0(action: Callable[[], T]) -> T:
    """Run the action in process 0 while the others wait. Return its value, which must fit into JSON, in every process.

    A UserError of process 0 is raised in every process.
    """
    if jax.process_count() == 1:
        return action()
    answer: dict[str, Any] = {}
    if is_first():
        try:
            answer = {"value": action()}
        except UserError as error:
            answer = {"error": str(error)}
    answer = json.loads(_broadcast_text(json.dumps(answer)))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def raise_everywhere(error: str) -> None:
    """Raise a UserError in every process if one has found an error; all call this when their part is done.

    `error`: that of this process; empty: none. The line says which process has found it.
    """
    if jax.process_count() == 1:
        if error:
            raise UserError(error)
        return
    every = multihost_utils.process_allgather(np.frombuffer(error.encode().ljust(2048)[:2048], np.uint8))
    found = [bytes(row).decode(errors="replace").strip() for row in every]
    if any(found):
        index, first = next((index, text) for index, text in enumerate(found) if text)
        raise UserError(first if all(text == first for text in found) else f"process {index}: {first}")


def _broadcast_text(text: str) -> str:
    """Return the text of process 0 in every process."""
    content = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    return bytes(multihost_utils.broadcast_one_to_all(np.resize(content, length).astype(np.uint8))).decode()


def assert_same_everywhere(name: str, value: str) -> None:
    """Raise a UserError unless every process has the same value, such as versions or settings."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(value.encode().ljust(256)[:256], np.uint8)
    every = multihost_utils.process_allgather(digest)
    odd = [i for i, row in enumerate(every) if not np.array_equal(row, every[0])]
    if odd:
        first, other = (bytes(every[i]).decode(errors="replace").strip() for i in (0, odd[0]))
        raise UserError(f"{name}: process {odd[0]} has {other}, process 0 has {first}; expected the same everywhere")


class Preemption:
    """Notices SIGTERM and Ctrl-C during a run. With several processes, JAX's sync point tells all of a SIGTERM to one.

    The second Ctrl-C goes to the handler from before the run, with which Python raises KeyboardInterrupt. So does a
    signal that comes while a run ends, after it has last asked.
    """

    _current: Preemption | None = None
    _AHEAD = 2  # steps; JAX would queue up to 32, which may take longer than the grace after a notice

    def __init__(self) -> None:
        self._requested = self._interrupted = self._agreed = False
        self._queued: collections.deque[Any] = collections.deque()
        self._asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        Preemption._current = self
        own = signal.SIGTERM if jax.process_count() == 1 else None  # among several processes it is JAX's
        for number in (own, signal.SIGINT):
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                try:
                    self._before[number] = signal.signal(number, self._note)
                except ValueError:  # not the main thread: whoever owns it decides
                    break
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        Preemption._current = None
        for number, before in self._before.items():
            signal.signal(number, before)
        number = signal.SIGINT if self._interrupted else signal.SIGTERM
        if self._requested and error is None and number in self._before:
            signal.raise_signal(number)

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGTERM:
            self._requested = True
        elif not self._interrupted:
            self._requested = self._interrupted = True
            if jax.process_count() > 1:  # JAX tells the others, and all save at the same step
                signal.raise_signal(signal.SIGTERM)
        else:
            signal.signal(number, self._before.pop(number))
            signal.raise_signal(number)

    @staticmethod
    def watches() -> bool:
        """Is a run under way that will save before it ends?"""
        return Preemption._current is not None

    def reached(self, measured: Any) -> bool:
        """Is it time to save and stop? All processes must ask equally often; they get the same answers.

        `measured`: what the step just started returns, or None between steps. This waits for the step two before it.
        """
        self._asked += 1
        self._queued.append(measured)
        if len(self._queued) > self._AHEAD:
            jax.block_until_ready(self._queued.popleft())
        if jax.process_count() > 1:
            self._agreed |= multihost_utils.reached_preemption_sync_point(self._asked)
            return self._agreed
        return self._requested

    def stopped(self, message: str) -> Preempted:
        """Return the exception that ends a run: Interrupted after Ctrl-C, else Preempted."""
        return (Interrupted if self._interrupted else Preempted)(f"{message}; the same command goes on")


class PreemptedDuringEval(Exception):
    """Ends a validation because it is time to stop; the training loop then saves and raises Preempted."""


def raise_if_preempted() -> None:
    """Raise PreemptedDuringEval if it is time to save and stop; called between the batches of a validation."""
    if Preemption._current is not None and Preemption._current.reached(None):
        raise PreemptedDuringEval


def _in_a_job(environment: Any) -> bool:
    """Does the environment name several processes? JAX then finds them by itself."""
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
    """Count the workers of this machine's TPU slice, as the metadata server of a TPU VM lists them."""
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
    """Print that this process waits. At the limit end it with one line, since JAX's own wait ends in an abort."""
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
