"""Plots of the experiments as SVG text: the same numbers give the same bytes, and no library is needed."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator
from html import escape
from typing import Any

COLOURS = ("#1d5fbf", "#c2410c", "#1a7f37", "#7c3aed", "#57606a", "#b4690e")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 384, 56, 20, 44, 88
LEGEND = 20  # the height of a row of the legend
LINE, LETTER = 15, 7  # the height of a line of text, the width of most letters
DASHES = 'stroke="#24292f" stroke-width="1.5" stroke-dasharray="5 4"'
PATTERNS = ("5 4", "2 3", "9 3 2 3")  # of several dashed levels
DODGE = 8  # between the points of neighbouring lines, so that equal ones are both seen
STYLE = (
    "text { font-family: system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; "
    "font-size: 13px; fill: #24292f } .head { font-size: 15px; font-weight: 600 } .mid { text-anchor: middle } "
    ".end { text-anchor: end }"
)
Lines = dict[str, dict[str, dict[str, Any]]]  # line, column, {"mean": percent, "sd": percent or None}


def plot(title: str, lines: Lines, kind: str, y: str, majority: dict[str, float] | None = None, x: str = "") -> str:
    """Return an SVG of means with bars of one standard deviation: columns along x, a colour for each line.

    With one column the lines themselves stand along x, as bars. Bars begin at 0. `majority` is drawn as dashed levels:
    under the column of that name, or across all of them.
    """
    fullest = sorted(lines.values(), key=len, reverse=True)  # has the columns in their order
    columns = list(dict.fromkeys(column for values in fullest for column in values))
    if len(columns) == 1:
        lines, columns = {columns[0]: {line: values[columns[0]] for line, values in lines.items()}}, list(lines)
        kind, x = "bars", ""
    found = [value for values in lines.values() for value in values.values()]
    ends = [value["mean"] + sign * (value["sd"] or 0) for value in found for sign in (-1, 1)]
    levels = {name: level for name, level in (majority or {}).items() if level > min(ends) - 30}
    low = 0 if kind == "bars" else max(0, 10 * ((min([*ends, *levels.values()]) - 3) // 10))
    high = min(100, 10 * ((max([*ends, *levels.values()]) + 3) // 10 + 1))
    step = (WIDTH - LEFT - RIGHT) / len(columns)

    def at(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    across = [name for name in levels if name not in columns]
    dashes = {name: DASHES.replace(PATTERNS[0], PATTERNS[i % len(PATTERNS)]) for i, name in enumerate(across)}
    dashed = {f"majority class {name} {levels[name]:.1f}": dashes[name] for name in across}
    dashed |= {"majority class": DASHES} if len(across) < len(levels) else {}
    legend = _legend(list(lines) if len(lines) > 1 else [], dashed=dashed)
    parts = frame(title, HEIGHT + LEGEND * max(0, len(legend) - 1))
    for tick in range(int(low), int(high) + 1, 10):
        parts.append(f'<path d="M{LEFT} {at(tick):.1f}H{WIDTH - RIGHT}" stroke="#d0d7de"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{at(tick) + 4:.1f}">{tick}</text>')
    parts.append(_beside_y(y))
    for number, column in enumerate(columns):
        for row, text in enumerate(textwrap.wrap(column, int(step / LETTER), max_lines=3)):
            y_text = HEIGHT - BOTTOM + 18 + LINE * row
            parts.append(f'<text class="mid" x="{LEFT + step * (number + 0.5):.1f}" y="{y_text}">{escape(text)}</text>')
    if x:
        parts.append(
            f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - BOTTOM + 44}">{escape(x)}</text>'
        )
    parts += _lines(lines, columns, step, at) if kind == "lines" else _bars(lines, columns, step, at)
    for name, level in levels.items():
        left, right = LEFT, WIDTH - RIGHT
        if name in columns:
            left = LEFT + step * columns.index(name)
            right = left + step
        parts.append(f'<path d="M{left:.1f} {at(level):.1f}H{right:.1f}" {dashes.get(name, DASHES)}/>')
    return "\n".join([*parts, *itertools.chain(*legend), "</svg>"]) + "\n"


def curves(title: str, lines: dict[str, list[dict[str, float]]]) -> str:
    """Return an SVG of losses by step, a line for each list of {"step", "loss"}.

    What was measured before the first step is left out. A name keeps its colour though other lines are empty.
    """
    lines = {name: [point for point in line if point["step"] > 0] for name, line in lines.items()}
    points = [point for line in lines.values() for point in line]
    last = max(point["step"] for point in points)
    wide = (WIDTH - LEFT - RIGHT - 40) / last
    low, high = int(min(point["loss"] for point in points)), int(max(point["loss"] for point in points)) + 1

    def at(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    legend = _legend(list(lines), [name for name, line in lines.items() if line])
    parts = frame(title, HEIGHT + LEGEND * max(0, len(legend) - 1))
    for tick in range(low, high + 1):
        parts.append(f'<path d="M{LEFT} {at(tick):.1f}H{WIDTH - RIGHT}" stroke="#d0d7de"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{at(tick) + 4:.1f}">{tick}</text>')
    parts.append(_beside_y("loss, nats per target token"))
    for step in (0, last / 4, last / 2, 3 * last / 4, last):
        x, y = LEFT + 8 + step * wide, HEIGHT - BOTTOM + 18
        parts.append(f'<text class="mid" x="{x:.1f}" y="{y}">{step:,.0f}</text>')
    parts.append(f'<text class="end" x="{WIDTH - RIGHT}" y="{HEIGHT - BOTTOM + 40}">step</text>')
    for number, line in enumerate(lines.values()):
        if not line:
            continue
        path = " ".join(f"{LEFT + 8 + point['step'] * wide:.1f},{at(point['loss']):.1f}" for point in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[number]}" stroke-width="2"/>')
    return "\n".join([*parts, *itertools.chain(*legend), "</svg>"]) + "\n"


def _beside_y(text: str) -> str:
    return f'<text transform="rotate(-90 14 {HEIGHT / 2})" class="mid" x="14" y="{HEIGHT / 2}">{escape(text)}</text>'


def frame(title: str, height: int, left: int = LEFT) -> list[str]:
    """Begin a picture with its title, which starts at `left`."""
    size = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text class="head" x="{left}" y="20">{escape(title)}</text>',
    ]


def _legend(names: list[str], shown: list[str] | None = None, dashed: dict[str, str] | None = None) -> list[list[str]]:
    """Return the legend's rows, as many as the names need, with the colour of each name and the style of each level."""
    rows: list[list[str]] = [[]]
    left = LEFT
    entries = [(name, f'fill="{COLOURS[i]}"') for i, name in enumerate(names) if shown is None or name in shown]
    for name, style in [*entries, *(dashed or {}).items()]:
        wide = 18 + LETTER * len(name) + 24
        if rows[-1] and left + wide > WIDTH:
            rows.append([])
            left = LEFT
        y = HEIGHT - 24 + LEGEND * (len(rows) - 1)
        square = f'<rect x="{left}" y="{y}" width="12" height="12" {style}/>'
        rows[-1].append(square if style.startswith("fill") else f'<path d="M{left - 2} {y + 6}h16" {style}/>')
        rows[-1].append(f'<text x="{left + 18}" y="{y + 11}">{escape(name)}</text>')
        left += wide
    return rows


def _spread(x: float, value: dict[str, Any], at: Any) -> str:
    ends = (at(value["mean"] + sign * (value["sd"] or 0)) for sign in (-1, 1))
    low, high = (min(max(end, TOP), HEIGHT - BOTTOM) for end in ends)
    return f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="#24292f" stroke-width="1.4"/>' if value["sd"] else ""


def _lines(lines: Lines, columns: list[str], step: float, at: Any) -> Iterator[str]:
    for number, values in enumerate(lines.values()):
        middle = LEFT + DODGE * (number - (len(lines) - 1) / 2) + step / 2
        points = [(middle + step * i, values[column]) for i, column in enumerate(columns) if column in values]
        path = " ".join(f"{x:.1f},{at(value['mean']):.1f}" for x, value in points)
        yield f'<polyline points="{path}" fill="none" stroke="{COLOURS[number]}" stroke-width="2"/>'
        for x, value in points:
            y = f"{at(value['mean']):.1f}"
            yield f'{_spread(x, value, at)}<circle cx="{x:.1f}" cy="{y}" r="4" fill="{COLOURS[number]}"/>'


def _bars(lines: Lines, columns: list[str], step: float, at: Any) -> Iterator[str]:
    width = min(60, step * 0.8 / len(lines))
    for number, values in enumerate(lines.values()):
        for i, column in enumerate(columns):
            if column not in values:
                continue
            middle = LEFT + step * (i + 0.5) + width * (number - (len(lines) - 1) / 2)
            top, foot = at(values[column]["mean"]), HEIGHT - BOTTOM
            above = at(values[column]["mean"] + (values[column]["sd"] or 0)) - 5
            mean = f"{values[column]['mean']:.1f}"
            yield (
                f'<rect x="{middle - width / 2:.1f}" y="{top:.1f}" width="{width - 3:.1f}" height="{foot - top:.1f}" '
                f'fill="{COLOURS[number]}" fill-opacity="0.85"/>{_spread(middle - 1.5, values[column], at)}'
                f'<text class="mid" x="{middle - 1.5:.1f}" y="{above:.1f}">{mean}</text>'
            )
