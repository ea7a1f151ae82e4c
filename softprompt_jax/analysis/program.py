"""What a program tells of itself: its products before it is compiled; its collectives and kernels afterwards."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import Any


def product_flops(jaxpr: Any) -> float:
    """Count the floating-point operations of matrix products; those in a scan count as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        assert equation.primitive.name != "while", "a loop of unknown length"
        if equation.primitive.name == "cond":  # one branch runs: count the largest
            total += max(product_flops(branch.jaxpr) for branch in equation.params["branches"])
            continue
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * product_flops(inner)
    return total


_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


def collective_bytes(program: str) -> dict[str, int]:
    """Sum the bytes of a compiled program's collectives by kind; those in a loop count as often as it runs."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = opened.group(2)
            computations[name] = []
            entry = name if opened.group(1) else entry
        elif name:
            computations[name].append(line)

    def walk(name: str, times: int) -> Iterator[tuple[str, int]]:
        for line in computations.get(name, ()):
            if found := _COLLECTIVE.search(line):
                yield found.group(2), times * _bytes(found.group(1))
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                yield from walk(called, times * (int(trips.group(1)) if trips else 1))

    total: dict[str, int] = {}
    for kind, size in walk(entry, 1):
        total[kind] = total.get(kind, 0) + size
    return total


def _bytes(shapes: str) -> int:
    return sum(
        _SIZES.get(dtype, 4) * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    )


def bytes_of_refusal(message: str) -> int | None:
    """Read from the compiler's refusal how many bytes it would have needed, weights included."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", message)
    if found is None:
        return None
    number, unit = (part for part in found.groups() if part)
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


# Kernels of vendors' libraries by the name of the call in a compiled program; others are XLA's own.
_LIBRARIES = (("__cudnn$fmha", "cuDNN attention"), ("__cublas", "cuBLAS products"), ("__cudnn", "cuDNN others"))


def library_kernels(program: str) -> dict[str, int]:
    """Count the calls of NVIDIA's libraries in a compiled program, attention's gradient apart; one in a loop is one."""
    found: collections.Counter[str] = collections.Counter()
    for target in re.findall(r'custom_call_target="([^"]+)"', program):
        kind = next((name for prefix, name in _LIBRARIES if target.startswith(prefix)), None)
        if kind is not None:
            found[kind + " backward" * target.endswith("Backward")] += 1
    return dict(sorted(found.items()))
