"""What settings cannot hold, rows and arrays in memory: settings state a hash, by which a process finds them again."""

from __future__ import annotations

import weakref
from typing import Any


class Held:
    """A value that is found by its hash while something in this process refers to this object."""

    def __init__(self, value: Any):
        self.value = value


_HELD: weakref.WeakValueDictionary[str, Held] = weakref.WeakValueDictionary()


def hold(sha256: str, value: Any) -> Held:
    """Return what holds a value, which `find` finds as long as the caller keeps it."""
    return _HELD.setdefault(sha256, Held(value))


def find(sha256: str) -> Held | None:
    """Return what holds the value with this hash; None where it is not in this process."""
    return _HELD.get(sha256)
