"""One command at a time in a run folder: the file system's lock, or an object in the bucket that its owner renews."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from softprompt_jax.config import UserError
from softprompt_jax.distributed import cloud_files

RENEW_S = 15  # between two renewals of a lock in a bucket
WAIT_S = 60.0  # for another command to end; a lock in a bucket that nobody renews for so long is taken over


def _always_ours() -> None:
    """Check nothing: a local lock is held until it is given back."""


@contextlib.contextmanager
def lock_folder(
    place: str | Path, wait_s: float = WAIT_S, report: Callable[[str], None] = lambda line: None
) -> Iterator[Callable[[], None]]:
    """Keep other commands out of a folder, which exists or is on gs://, until this one leaves it or ends.

    A command that is there is waited for first, which `report` is told in a line. Raises UserError after the wait.
    Yielded: a function that raises UserError where the lock was lost, since this process slept for too long.
    """
    if cloud_files.is_remote(place):
        with _lock_object(str(place), wait_s, report) as check:
            yield check
        return
    lock, until, waits = os.open(place, os.O_RDONLY), time.monotonic() + wait_s, False
    try:
        with contextlib.suppress(OSError):  # such as a file system without locks
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise _taken(place) from None
                    if not waits:
                        report(f"{place}: another command trains in it; waiting up to {wait_s:g} s for its end")
                    waits = True
                    time.sleep(min(1, wait_s))
        yield _always_ours
    finally:
        os.close(lock)


def _taken(place: str | Path, by: str = "another process") -> UserError:
    return UserError(f"{place}: {by} trains in it; expected one at a time; wait for it to end, or use another --out")


@contextlib.contextmanager
def _lock_object(place: str, wait_s: float, report: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold the object `lock.json` of a folder in a bucket, which is created only if it is absent.

    Its owner renews it every RENEW_S. An object that stays the same for all of `wait_s` belongs to a command that was
    killed, whatever the clocks of the machines say, and is taken over.
    """
    path = f"{place.rstrip('/')}/{cloud_files.LOCK_FILE}"
    own = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
    first, until = cloud_files.read_object(path), time.monotonic() + wait_s
    if first is not None:
        report(f"{place}: another command trains in it, or was killed; waiting up to {wait_s:g} s for its end")
    while not cloud_files.create_object(path, json.dumps(own).encode()):
        found = cloud_files.read_object(path)
        first = first or found
        if found is not None and found == first and time.monotonic() > until:
            cloud_files.remove_object(path)  # nobody has renewed it
        elif found is not None and time.monotonic() > until:
            raise _taken(place, f"a command on {json.loads(found)['host']}")
        else:
            time.sleep(min(1, wait_s / 10))
    left, lost = threading.Event(), threading.Event()

    def renew() -> None:
        number = 0
        while not left.wait(RENEW_S):
            number += 1
            with contextlib.suppress(UserError):  # the bucket cannot be reached: the next renewal may succeed
                if _owner(cloud_files.read_object(path)) != own["id"]:
                    lost.set()
                    return
                cloud_files.write_object(path, json.dumps(own | {"renewed": number}).encode())

    def check() -> None:
        if lost.is_set():
            raise UserError(
                f"{place}: another command has taken the folder over, since this one did not renew its lock for "
                f"{wait_s:g} s; expected one at a time; let the other go on"
            )

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield check
    finally:
        left.set()
        thread.join()
        with contextlib.suppress(UserError):  # then the next command waits until it is stale
            if _owner(cloud_files.read_object(path)) == own["id"]:
                cloud_files.remove_object(path)


def _owner(content: bytes | None) -> str | None:
    return None if content is None else json.loads(content)["id"]
