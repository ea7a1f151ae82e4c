"""Bad inputs of the command line: those of bad_inputs.py, which says how each must end."""

from __future__ import annotations

import sys

import bad_inputs

from faults.child import do
from faults.place import Place


def prepare(place: Place) -> list[bad_inputs.Case]:
    (place.root / "bad").mkdir()
    do(lambda: bad_inputs.prepare(place.root / "bad"), place.root)
    return bad_inputs.sample(300)


def run(number: int, seed: int, place: Place, chosen: list[bad_inputs.Case]) -> tuple[str, str]:
    """Run a case of the table; return its name and its problem."""
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - a pool's worker has none
    outcome = bad_inputs.run(chosen[number % len(chosen)], place.root / "bad")
    return outcome.case.name, outcome.problem
