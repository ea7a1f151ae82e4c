"""What the command line tells glibc's allocator, so that a step on a CPU need not fetch its memory anew."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import threading
import time
from pathlib import Path

# From glibc's malloc.h, with its own defaults where there is one.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8
_MAPPINGS = 65536
_LARGEST = 2**31 - 1
_EVERY_S = 0.1


@functools.cache  # one thread watches, however often the command line is called in a process
def keep_freed_memory(share: float = 0.5) -> bool:
    """Tell glibc's allocator to keep buffers that were freed; say whether it could. Without glibc do nothing.

    On a CPU every step frees and takes the same buffers. Each time they would be fresh zeroed pages, which costs 20% to
    30% of a step's CPU time. Buffers of unlike sizes leave holes, though: once the process holds `share` of what it can
    have, free pages are given back, and from then on buffers of 2 GiB and more each time. Call this before JAX starts
    its threads.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    changes = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**28), (_ARENA_MAX, 1))  # -1: never trim
    accepted = [libc.mallopt(name, value) == 1 for name, value in changes]
    threading.Thread(target=_watch, args=(libc, share), name="allocator", daemon=True).start()
    return all(accepted)


def _watch(libc: ctypes.CDLL, share: float) -> None:
    """Wait until the process holds much memory; then give free pages back, and large buffers as they are freed."""
    while True:
        held = _resident_bytes()
        if held > share * (held + _available_bytes()):
            break
        time.sleep(_EVERY_S)
    for name, value in ((_MMAP_MAX, _MAPPINGS), (_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _LARGEST)):
        libc.mallopt(name, value)
    libc.malloc_trim(0)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _available_bytes() -> int:
    """Return what the machine, and the container if it is one, could still give."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = [int(lines["MemAvailable"].split()[0]) * 1024]
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        files = [Path("/sys/fs/cgroup", name) for name in (most, used)]
        if all(file.exists() for file in files) and (text := files[0].read_text().strip()).isdigit():
            available.append(int(text) - int(files[1].read_text()))
    return min(available)
