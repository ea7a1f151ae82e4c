"""One command at a time in a run folder: the file system's lock, or an object in the bucket that its owner renews."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from softprompt_jax.config import UserError
from softprompt_jax.distributed import cloud_files

RENEW_S = 15  # between two renewals of a lock in a bucket
STALE_S = 60.0  # a lock in a bucket that nobody renews for so long is taken over


@contextlib.contextmanager
def lock_folder(
    place: str | Path,
    wait_s: float | None = None,
    report: Callable[[str], None] = lambda line: None,
    occupied: Callable[[], object] = lambda: None,
) -> Iterator[Callable[[], None]]:
    """Keep other commands out of a folder, which exists or is on gs://, until this one leaves it or ends.

    `wait_s`: how long to wait for a command that is there; by default not at all, on gs:// for STALE_S, since it may
    have been killed. A wait is reported in a line. `occupied` is called before it, and may refuse. Raises UserError
    after the wait.
    Yielded: a function that raises UserError where the folder is no longer this command's: it was deleted or moved, or
    another command has taken it over. An error inside the block that follows from this is told so, too.
    """
    lock = _lock_object if cloud_files.is_remote(place) else _lock_directory
    with lock(str(place), wait_s, report, occupied) as check:
        try:
            yield check
        except Exception:
            check()  # what follows from it may be any error, also of a library
            raise


@contextlib.contextmanager
def _lock_directory(
    place: str, wait_s: float | None, report: Callable[[str], None], occupied: Callable[[], object]
) -> Iterator[Callable[[], None]]:
    deleted = UserError(
        f"{place}: was deleted or moved while this command was in it; expected it to stay; start the command again"
    )

    def check() -> None:
        try:
            if os.path.samestat(os.stat(place), os.fstat(lock)):
                return
        except (FileNotFoundError, NotADirectoryError):
            pass
        raise deleted

    try:
        lock = os.open(place, os.O_RDONLY)
    except FileNotFoundError:
        raise deleted from None
    try:
        until, waits = time.monotonic() + (wait_s or 0), False
        while not _lock(lock):
            if not waits:
                occupied()
            if time.monotonic() >= until:
                raise _taken(place)
            if not waits:
                report(f"{place}: another command trains in it; waiting for its end")
            waits = True
            time.sleep(min(1.0, wait_s or 0))
        check()
        yield check
    finally:
        os.close(lock)


def _lock(folder: int) -> bool:
    """Lock an opened folder, and tell whether no other process has. A file system without locks has no others."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _taken(place: str, by: str = "another process") -> UserError:
    return UserError(
        f"{place}: {by} trains in it; expected one at a time; wait for its end with --wait, or use another --out"
    )


@contextlib.contextmanager
def _lock_object(
    place: str, wait_s: float | None, report: Callable[[str], None], occupied: Callable[[], object]
) -> Iterator[Callable[[], None]]:
    """Hold the object `lock.json` of a folder in a bucket, which is created only if it is absent.

    Its owner renews it every RENEW_S. An object that stays the same for STALE_S (or all of a shorter `wait_s`) belongs
    to a command that was killed, whatever the clocks of the machines say, and is taken over.
    """
    path = f"{place.rstrip('/')}/{cloud_files.LOCK_FILE}"
    own = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
    wait_s = STALE_S if wait_s is None else wait_s
    stale_s, until = min(wait_s, STALE_S), time.monotonic() + wait_s
    seen, since, waits = None, time.monotonic(), False
    while not cloud_files.create_object(path, json.dumps(own).encode()):
        found, now = cloud_files.read_object(path), time.monotonic()
        if found != seen:
            seen, since = found, now
        if found is None:
            continue
        if not waits:
            occupied()
            limit = "" if math.isinf(wait_s) else f" up to {wait_s:g} s"
            report(f"{place}: another command trains in it, or was killed; waiting{limit} for its end")
        waits = True
        if now - since >= stale_s:
            cloud_files.remove_object(path)  # nobody has renewed it
        elif now > until:
            raise _taken(place, f"a command on {_about(found).get('host', 'another machine')}")
        else:
            time.sleep(min(1, stale_s / 10))
    left, lost = threading.Event(), threading.Event()

    def renew() -> None:
        number = 0
        while not left.wait(RENEW_S):
            number += 1
            with contextlib.suppress(UserError):  # the bucket cannot be reached: the next renewal may succeed
                if _about(cloud_files.read_object(path)).get("id") != own["id"]:
                    lost.set()
                    return
                cloud_files.write_object(path, json.dumps(own | {"renewed": number}).encode())

    def check() -> None:
        if lost.is_set():
            raise UserError(
                f"{place}: another command has taken the folder over, since this one did not renew its lock for "
                f"{STALE_S:g} s; expected one at a time; let the other go on"
            )

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield check
    finally:
        left.set()
        thread.join()
        with contextlib.suppress(UserError):  # then the next command waits until it is stale
            if _about(cloud_files.read_object(path)).get("id") == own["id"]:
                cloud_files.remove_object(path)


def _about(content: bytes | None) -> dict[str, Any]:
    """Return what a lock says of its owner; nothing where it is gone, or none of ours."""
    with contextlib.suppress(ValueError):
        if isinstance(about := json.loads(content or b"{}"), dict):
            return about
    return {}
