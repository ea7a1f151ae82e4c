"""One side in a process of its own: obeys JSON lines on stdin, answers with JSON lines on its first stdout.

    {"prepare": case, "count": n}            -> {"padding": share of an epoch, "warm_up_s": wall seconds}
    {"time": case, "first": i, "count": n}   -> {"cpu_s": ..., "wall_s": ..., "losses": [...], "peak_gib": ...}

`prepare` makes the batches and takes a step on every shape that has to be compiled; it is not counted.
Every step is timed to its end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import machine


def serve(of_folder: Callable[[str, str, str, int], Any]) -> None:
    """Build the side from the arguments (backbone folder, dtype, variant, threads) and obey until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    folder, dtype, variant, threads = sys.argv[1:]
    side = of_folder(folder, dtype, variant, int(threads))
    batches: dict[str, list] = {}
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        started, cpu = time.perf_counter(), machine.cpu_seconds()
        if "prepare" in command:
            case = command["prepare"]
            batches[case], answer["padding"] = side.batches(case, command["count"])
            if case != "check":  # which takes one step, and times nothing
                side.warm_up(batches[case])
            answer["warm_up_s"] = time.perf_counter() - started
        else:
            first = command["first"]
            chosen = batches[command["time"]][first : first + command["count"]]
            answer["losses"] = [side.step(batch) for batch in chosen]
            answer["cpu_s"] = machine.cpu_seconds() - cpu
            answer["wall_s"] = time.perf_counter() - started
            answer["peak_gib"] = machine.peak_memory_gib()
        answers.write(json.dumps(answer) + "\n")
