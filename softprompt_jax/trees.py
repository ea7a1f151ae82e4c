"""Nested dictionaries as flat ones whose keys are dotted paths, and back: flax's functions with types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import traverse_util


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"a.b.c": leaf} of a nested dictionary."""
    return traverse_util.flatten_dict(dict(tree), sep=".")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves), sep=".")
