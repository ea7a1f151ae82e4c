"""The speed beside PEFT, as the committed lines of benchmarks/results/ have it: rows, a table, a picture."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from plot import COLOURS, GRID, INK, TOP, WIDTH, frame

QUIET = 0.1  # the share of the machine that others may use at most
TICKS = (0.5, 1, 2, 5, 10, 20)
ROW = 44  # the height of a name and its bar
FIVE = {  # what a reader cares about, and how the names of its comparisons begin; the first of them counts
    "a step of T5 small": "a step, small, float32, fixed lengths",
    "a step of SmolLM2": "a step, smollm2, float32, fixed lengths",
    "a step of T5 small, texts of unlike lengths": "a step, small, float32, real lengths",
    "SmolLM2 answers 32 texts under 32 prompts": "32 texts under 32 prompts, smollm2",
    "SmolLM2 writes 8 x 32 tokens": "decoding 8 x 32 tokens, smollm2",
}
VARIANTS = {"scan": "", "unroll": ", unrolled", "halves": ", unrolled, 2 parts", "quarters": ", unrolled, 4 parts"}
CASES = {"fixed": "fixed lengths", "bucketed": "real lengths, 12 shapes", "bucketed-4": "real lengths, 4 shapes"}
NEWER = ", jax 0.12"
RENAMED = "2026-11-21T11:28"  # before, these two cases had other names
Line = dict[str, Any]


class Speed(NamedTuple):
    """What was timed, in CPU seconds (with two cores wall seconds), of us and of PEFT's best in the same run."""

    what: str
    ours: float
    peft: float
    best: str  # which of PEFT's variants that is
    kept: float | None  # the same of PEFT's best in a process whose allocator keeps freed memory, as ours does
    rounds: int
    quiet: bool
    cpu: str  # family/model


def speeds(results: Path) -> list[Speed]:
    """Return of each kind the latest comparison that was made on a quiet machine, or else the latest."""
    return [*_training(_lines(results / "training_step.jsonl")), *_decoding(results), *_mixed(results)]


def _lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _latest(lines: list[Line]) -> Line:
    """Return the last of the lines on a quiet machine, or of all."""
    return max([line for line in lines if _quiet(line)] or lines, key=lambda line: line["date"])


def _quiet(line: Line) -> bool:
    return line.get("others", 1.0) < QUIET


def _training(lines: list[Line]) -> list[Speed]:
    kinds: dict[tuple[str, str, str, str, int, bool], list[Line]] = {}
    for line in lines:
        named = line["case"] == "fixed" or (line["case"] in CASES and line["date"] > RENAMED)
        if named and line["size"] != "tiny" and line["side"] == "ours":
            kind = (*(line[key] for key in ("size", "dtype", "case", "variant", "cores")), _newer(line))
            kinds.setdefault(kind, []).append(line)
    found = []
    for (size, dtype, case, variant, cores, newer), of_kind in kinds.items():
        ours = _latest(of_kind)
        fixed = case == "fixed"
        same = ("date", "size", "dtype", "cores")
        beside = [
            line for line in lines
            if line["side"] == "peft" and (line["case"] == "fixed") == fixed and all(line[k] == ours[k] for k in same)
        ]  # fmt: skip
        measure = "cpu_s_per_step" if cores == 1 else "wall_s_per_step"
        kept = [line for line in beside if line["variant"].endswith("-kept")]
        peft = min((line for line in beside if line not in kept), key=lambda line: line[measure])
        rounds = min(len(line["cpu_s_rounds"]) for line in (ours, peft))
        what = f"a step, {size}, {dtype}, {CASES[case]}{VARIANTS[variant]}" + ("" if cores == 1 else f", {cores} cores")
        what += NEWER if newer else ""
        best = peft["variant"] if fixed else f"{peft['variant']}, {peft['case']}"
        lent = min((line[measure] for line in kept), default=None)
        found.append(Speed(what, ours[measure], peft[measure], best, lent, rounds, _quiet(ours), _cpu(ours)))
    return sorted(found, key=lambda speed: ("float32" not in speed.what, "small" not in speed.what, speed.what))


def _newer(line: Line) -> bool:
    """Say whether our side ran on the jax that Python 3.12 and later have."""
    return "0.12" in line.get("versions", {}).get("jax", "")


def _cpu(line: Line) -> str:
    return line["machine"]["family_model"]


def _decoding(results: Path) -> list[Speed]:
    lines = _lines(results / "decoding.jsonl")
    found = []
    for size in dict.fromkeys(line["size"] for line in lines):
        ours = _latest([line for line in lines if line["size"] == size and line["side"] == "ours"])
        (peft,) = (line for line in lines if line["date"] == ours["date"] and line["side"] == "peft")
        what = f"decoding 8 x {ours['tokens']} tokens, {size}, texts of {ours['input_tokens']}"
        seconds = ours["cpu_s_per_batch"], peft["cpu_s_per_batch"]
        found.append(Speed(what, *seconds, "", None, len(ours["rounds"]), _quiet(ours), _cpu(ours)))
    return found


def _mixed(results: Path) -> list[Speed]:
    lines = [
        line | {"others": line["others_used_cores"] / line["machine"]["cores"]}
        for line in _lines(results / "mixed_prompts.jsonl")
    ]
    found = []
    for title, prompts in (("a prompt each", "32 prompts"), ("one prompt", "one prompt")):
        for backbone in dict.fromkeys(line["settings"]["backbone"] for line in lines):
            line = _latest([line for line in lines if line["settings"]["backbone"] == backbone])
            ours, peft = (line["cpu_seconds_a_batch"][f"{side}, {title}"] for side in ("bank", "peft"))
            rounds = len(range(4, line["settings"]["rounds"] + 2, 4))  # PEFT is timed in every fourth, after two
            what = f"32 texts under {prompts}, {backbone.removeprefix('t5-v1_1-')}"
            found.append(Speed(what, ours, peft, "", None, rounds, _quiet(line), _cpu(line)))
    return found


def five(found: list[Speed]) -> list[Speed]:
    """Return the comparisons that a reader cares about, by names that can be read alone."""
    chosen = {title: next((one for one in found if one.what.startswith(begin)), None) for title, begin in FIVE.items()}
    return [one._replace(what=title) for title, one in chosen.items() if one is not None]


def table(found: list[Speed]) -> str:
    """Return the comparisons as a Markdown table."""
    lines = ["| CPU seconds (2 cores: wall) | here | PEFT's best | times | rounds | CPU |", "|---" * 6 + "|"]
    for what, ours, peft, best, kept, rounds, quiet, cpu in found:
        times = f"**{peft / ours:.2f}**"
        best = f"{peft:.3g} ({best})" if best else f"{peft:.3g}"
        best += "" if kept is None else f"; {kept:.3g} with our allocator"
        lines.append(f"| {what} | {ours:.3g} | {best} | {times} | {rounds} | {cpu}{'' if quiet else ', shared'} |")
    return "\n".join(lines)


def picture(title: str, found: list[Speed]) -> str:
    """Return an SVG: how many times as fast as PEFT's best, on a logarithmic scale; each name above its bar."""
    left, right = 12, WIDTH - 64
    low, high = math.log(TICKS[0]), math.log(max(TICKS[-1], *(speed.peft / speed.ours for speed in found)) * 1.1)
    foot = TOP + ROW * len(found)

    def at(times: float) -> float:
        return left + (right - left) * (math.log(times) - low) / (high - low)

    parts = frame(title, foot + 68, "time of PEFT's best / time here, logarithmic scale")
    for tick in TICKS:
        parts.append(f'<path d="M{at(tick):.1f} {TOP}V{foot}" stroke="{GRID}"/>')
        parts.append(f'<text class="mid" x="{at(tick):.1f}" y="{foot + 18}">{tick:g}</text>')
    for number, speed in enumerate(found):
        times, y = speed.peft / speed.ours, TOP + ROW * number
        said = speed.what if speed.quiet else f"{speed.what} *"
        begin, end = sorted((at(1), at(times)))
        colour = COLOURS[0] if times >= 1 else COLOURS[1]
        parts.append(f'<text x="{left}" y="{y + 16}">{escape(said)}</text>')
        parts.append(
            f'<rect x="{begin:.1f}" y="{y + 22}" width="{max(end - begin, 1):.1f}" height="14" fill="{colour}"/>'
            f'<text x="{end + 6:.1f}" y="{y + 34}">{times:.2f}</text>'
        )
        parts.append(f'<path d="M{at(1):.1f} {y + 20}V{y + 38}" stroke="{INK}" stroke-width="1.5"/>')
    for x, colour, text in ((left, COLOURS[0], "faster here"), (left + 130, COLOURS[1], "PEFT is faster")):
        parts.append(f'<rect x="{x}" y="{foot + 30}" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 22}" y="{foot + 42}">{text}</text>')
    if not all(one.quiet for one in found):
        parts.append(f'<text x="{left}" y="{foot + 62}">* on a machine that others used too</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
