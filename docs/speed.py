"""The speed beside PEFT, as the committed lines of benchmarks/results/ have it: rows, a table, a picture."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from plot import COLOURS, DASHES, LEFT, RIGHT, TOP, WIDTH, frame

QUIET = 0.1  # the share of the machine that others may use before seconds are inflated
TICKS = (0.5, 1, 2, 5, 10, 20)
ROW, NAMES = 26, 310  # the height of a bar, the width of what stands before it


class Speed(NamedTuple):
    """What was timed, in CPU seconds, of us and of PEFT's best."""

    what: str
    ours: float
    peft: float
    rounds: int
    quiet: bool | None  # None: not recorded


def speeds(results: Path) -> list[Speed]:
    """Return the latest comparison of each kind that was made on a quiet machine, or else the latest."""
    return [*_training(_lines(results / "training_step.jsonl")), *_decoding(results), *_mixed(results)]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _training(lines: list[dict[str, Any]]) -> list[Speed]:
    runs: dict[tuple[str, str, bool], dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        if line["size"] != "tiny":
            kind = line["size"], line["dtype"], line["case"] == "fixed"
            runs.setdefault(kind, {}).setdefault(line["date"], []).append(line)
    found = []
    for (size, dtype, fixed), by_date in sorted(runs.items(), key=lambda item: (item[0][0] != "small", item[0][1])):
        quiet = [date for date, lines in by_date.items() if max(line["others"] for line in lines) < QUIET]
        chosen = by_date[max(quiet or by_date)]
        ours, peft = (
            min((line for line in chosen if line["side"] == side), key=lambda line: line["cpu_s_per_step"])
            for side in ("ours", "peft")
        )
        parts = {"halves": ", in 2 parts", "quarters": ", in 4 parts"}.get(ours["variant"], "")
        what = f"a step, {size}, {dtype}, {'fixed' if fixed else 'real'} lengths{parts}"
        rounds = min(len(line["cpu_s_rounds"]) for line in (ours, peft))
        found.append(Speed(what, ours["cpu_s_per_step"], peft["cpu_s_per_step"], rounds, bool(quiet)))
    return sorted(found, key=lambda speed: "float32" not in speed.what)


def _decoding(results: Path) -> list[Speed]:
    latest = {(line["size"], line["side"]): line for line in _lines(results / "decoding.jsonl")}
    return [
        Speed(
            f"decoding 8 x {line['tokens']} tokens, {size}, texts of {line['input_tokens']}",
            line["cpu_s_per_batch"],
            latest[size, "peft"]["cpu_s_per_batch"],
            len(line["rounds"]),
            None if "others" not in line else line["others"] < QUIET,
        )
        for (size, side), line in latest.items()
        if side == "ours"
    ]


def _mixed(results: Path) -> list[Speed]:
    latest = {line["settings"]["backbone"]: line for line in _lines(results / "mixed_prompts.jsonl")}
    return [
        Speed(
            f"32 texts under {prompts}, {backbone.removeprefix('t5-v1_1-')}",
            line["cpu_seconds_a_batch"]["bank, a prompt each" if several else "bank, one prompt"],
            line["cpu_seconds_a_batch"]["peft, a prompt each" if several else "peft, one prompt"],
            line["settings"]["rounds"],
            line["others_used_cores"] / line["machine"]["cores"] < QUIET,
        )
        for several, prompts in ((True, "32 prompts"), (False, "one prompt"))
        for backbone, line in latest.items()
    ]


def table(found: list[Speed]) -> str:
    """Return the comparisons as a Markdown table."""
    lines = ["| CPU seconds | here | PEFT's best | times | rounds | machine |", "|---" * 6 + "|"]
    said = {True: "quiet", False: "shared", None: "not recorded"}
    for what, ours, peft, rounds, quiet in found:
        lines.append(f"| {what} | {ours:.3g} | {peft:.3g} | **{peft / ours:.2f}** | {rounds} | {said[quiet]} |")
    return "\n".join(lines)


def picture(title: str, found: list[Speed]) -> str:
    """Return an SVG: how many times as fast as PEFT's best, on a scale of ratios."""
    left, right = LEFT + NAMES, WIDTH - RIGHT - 40
    low, high = math.log(TICKS[0]), math.log(max(TICKS[-1], *(speed.peft / speed.ours for speed in found)) * 1.1)
    foot = TOP + ROW * len(found)

    def at(times: float) -> float:
        return left + (right - left) * (math.log(times) - low) / (high - low)

    parts = frame(title, foot + 40)
    for tick in TICKS:
        parts.append(f'<path d="M{at(tick):.1f} {TOP}V{foot}" stroke="#d0d7de"/>')
        parts.append(f'<text class="mid" x="{at(tick):.1f}" y="{foot + 18}">{tick:g}</text>')
    for number, speed in enumerate(found):
        times, y = speed.peft / speed.ours, TOP + ROW * number
        begin, end = sorted((at(1), at(times)))
        colour = COLOURS[0] if times >= 1 else COLOURS[1]
        parts.append(f'<text class="end" x="{left - 8}" y="{y + 17}">{escape(speed.what)}</text>')
        parts.append(
            f'<rect x="{begin:.1f}" y="{y + 4}" width="{max(end - begin, 1):.1f}" height="{ROW - 8}" fill="{colour}"/>'
            f'<text x="{end + 6:.1f}" y="{y + 17}">{times:.2f}</text>'
        )
    parts.append(f'<path d="M{at(1):.1f} {TOP}V{foot}" {DASHES}/>')
    return "\n".join([*parts, "</svg>"]) + "\n"
