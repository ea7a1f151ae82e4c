"""Mean, standard deviation and confidence of the scores of several runs: one definition for every table and page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SCORE = "The score of a run is the mean of its task's metrics, in percent (of a seqio Task: in its own unit)."
CELL = "mean ± sd over runs that differ in their seed (sd: sample standard deviation), in brackets the best run"


def score_statistics(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None of one value), half a 95% confidence interval of the mean, and best.

    The interval is Student's, which few seeds need.
    """
    from scipy.stats import t

    count = len(values)
    sd = statistics.stdev(values) if count > 1 else None
    interval = None if sd is None else float(t.ppf(0.975, count - 1)) * sd / count**0.5
    return {"mean": statistics.fmean(values), "sd": sd, "interval": interval, "best": max(values)}


def mean_sd_text(found: Mapping[str, Any], number: Callable[[float], str] = "{:.1f}".format, best: bool = False) -> str:
    """Write mean ± sd (and the best in brackets), the mean alone where there is one run.

    `number` writes a single value.
    """
    if found["sd"] is None:
        return number(found["mean"])
    return f"{number(found['mean'])} ± {number(found['sd'])}" + (f" ({number(found['best'])})" if best else "")
