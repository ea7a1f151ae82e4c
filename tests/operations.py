"""Count what a program multiplies, and how little of it a gradient can do with."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from softprompt_jax.analysis.plan import product_flops


def flops(function, *arguments) -> float:
    """Count the operations of all matrix products of a function."""
    return product_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def gradient_flops(function, trainable: Any, *arguments) -> float:
    """Return what the value and gradient with respect to the first argument need at least.

    A product is computed once, and once more in the backward pass for each of its two factors that depends on what
    trains: a frozen weight is none, so its gradient does not count.
    """
    jaxpr = jax.make_jaxpr(function)(trainable, *arguments).jaxpr
    count = len(jax.tree.leaves(trainable))
    active = [True] * count + [False] * (len(jaxpr.invars) - count)
    return _needed(jaxpr, active)[0]


def _needed(jaxpr: Jaxpr, active: list[bool]) -> tuple[float, list[bool]]:
    """Return the operations, and which outputs depend on the active inputs."""
    known = {variable for variable, on in zip(jaxpr.invars, active, strict=True) if on}

    def on(variable: Any) -> bool:
        return not isinstance(variable, Literal) and variable in known

    total = 0.0
    for equation in jaxpr.eqns:
        inputs = [on(variable) for variable in equation.invars]
        inner = _inner(equation)
        if equation.primitive.name == "dot_general":
            total += _product(equation) * (1 + sum(inputs))
        if equation.primitive.name == "scan":
            first, carried = _carried(equation, inner[0])
            while True:  # what a step makes active is active in the next one
                needed, outputs = _needed(inner[0], inputs)
                again = [*inputs]
                for index in range(carried):
                    again[first + index] |= outputs[index]
                if again == inputs:
                    break
                inputs = again
            total += equation.params["length"] * needed
        elif len(inner) == 1 and len(inner[0].invars) == len(inputs):
            needed, outputs = _needed(inner[0], inputs)
            total += needed
        else:
            assert not any(product_flops(part) for part in inner), f"{equation.primitive.name} with products inside"
            outputs = [any(inputs) and equation.primitive.name != "stop_gradient"] * len(equation.outvars)
        known |= {variable for variable, on in zip(equation.outvars, outputs, strict=True) if on}
    return total, [on(variable) for variable in jaxpr.outvars]


def _carried(scan: Any, step: Jaxpr) -> tuple[int, int]:
    """Return where the carried inputs of a scan's step begin, and how many there are; others have an axis of steps."""

    def unstacked(outside: list[Any], inside: list[Any]) -> int:
        return sum(o.aval.ndim == i.aval.ndim for o, i in zip(outside, inside, strict=True))

    carried = unstacked(scan.outvars, step.outvars)
    return unstacked(scan.invars, step.invars) - carried, carried


def _product(equation: Any) -> float:
    if equation.primitive.name != "dot_general":
        return 0.0
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _inner(equation: Any) -> list[Jaxpr]:
    """Return the programs inside an equation."""
    values = [value if isinstance(value, tuple | list) else [value] for value in equation.params.values()]
    return [getattr(v, "jaxpr", v) for value in values for v in value if isinstance(v, ClosedJaxpr | Jaxpr)]
