"""The command line's allocator: freed memory is kept, until the process holds too much of it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Blocks of more than 2 GiB: the largest limit that glibc takes as a number, which a step of SmolLM2 is beyond.
SCRIPT = """
import resource, sys, threading, time
from softprompt_jax.cli import allocator

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def take(mib):
    before = faults()
    b'x' * (mib << 20)
    return faults() - before

room = [1 << 40]
allocator._available_bytes = lambda: room[0]
assert allocator.keep_freed_memory()
assert allocator.keep_freed_memory()
assert sum(thread.name == "allocator" for thread in threading.enumerate()) == 1
kept = [take(2200) for _ in range(3)]
held = allocator._resident_bytes()
room[0] = 1 << 20
deadline = time.monotonic() + 20
while allocator._resident_bytes() > held - (2000 << 20) and time.monotonic() < deadline:
    time.sleep(0.05)
print(*kept, held, allocator._resident_bytes(), take(2200))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_freed_memory_is_kept_until_the_process_holds_too_much():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, third, held, after, anew = map(int, done.stdout.split())
    assert first > 10_000
    assert second < 1_000
    assert third < 1_000
    assert held - after > 2000 << 20  # what nobody used went back to the machine
    assert anew > 10_000
