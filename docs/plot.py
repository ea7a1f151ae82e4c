"""Plots of the experiments as SVG text: the same numbers give the same bytes, and no library is needed."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

from softprompt_jax.analysis.page import COLOURS

# Narrow, so that letters are 10 pixels high where the picture is as wide as a phone.
WIDTH, PLOT, LEFT, RIGHT, TOP = 520, 240, 44, 16, 58
LEGEND = 21  # the height of a row of the legend
LINE, LETTER = 16, 7.4  # the height of a line of text, the width of most letters
INK, GRID = "#1c2733", "#dde3ea"
DASHES = f'stroke="{INK}" stroke-width="1.5" stroke-dasharray="5 4"'
DODGE = 6  # between the points of neighbouring lines, so that equal ones are both seen
STYLE = (
    "text { font-family: system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; "
    f"font-size: 14px; fill: {INK} }} .head {{ font-size: 16px; font-weight: 600 }} .mid {{ text-anchor: middle }} "
    ".end { text-anchor: end } .on { fill: #fff; font-weight: 600 }"
)
# What a colour means in every picture. Names that begin so are variants: paler bars, dashed lines.
MEANINGS = {
    **{"prompt tuning": 0, "model tuning": 1, "prompt design": 2},
    **{"random uniform": 3, "sampled vocabulary": 4, "class labels": 5},
    **{"movie sentences": 7, "spam": 6},
    **{"span corruption": 3, "LM adaptation": 4, "mixture with instructions": 5},
}
TASKS = {"sentiment_movie": "movie sentences", "spam_sms": "spam"}  # as lines and columns call them
SIZES = ("#9dc3ea", "#5b96d6", COLOURS[0], "#0d3563")  # from the smallest to the largest
_UNITS = {"": 1.0, "%": 1.0, "k": 1e3, "m": 1e6}
Lines = dict[str, dict[str, dict[str, Any]]]  # line, column, {"mean": percent, "sd": percent or None}


def plot(title: str, lines: Lines, kind: str, y: str, majority: dict[str, float] | None = None, x: str = "") -> str:
    """Return an SVG of means with bars of one standard deviation: columns along x, a colour for each line.

    With one column the lines themselves stand along x, as bars. Bars begin at 0. Columns of lines that are numbers
    stand on a logarithmic scale. `majority` is drawn as dashed levels: under the column of that name, or across all.
    """
    fullest = sorted(lines.values(), key=len, reverse=True)  # has the columns in their order
    columns = list(dict.fromkeys(column for values in fullest for column in values))
    if len(columns) == 1:
        lines, columns = {columns[0]: {line: values[columns[0]] for line, values in lines.items()}}, list(lines)
        kind, x = "bars", ""
    found = [value for values in lines.values() for value in values.values()]
    ends = [value["mean"] + sign * (value["sd"] or 0) for value in found for sign in (-1, 1)]
    named = {name if name in columns else TASKS.get(name, name): level for name, level in (majority or {}).items()}
    levels = {name: level for name, level in named.items() if kind == "bars" or level > min(ends) - 30}
    low = 0 if kind == "bars" else max(0, 10 * ((min([*ends, *levels.values()]) - 3) // 10))
    high = min(100, 10 * ((max([*ends, *levels.values()]) + 3) // 10 + 1))
    middles, logarithmic = _middles(columns, kind == "lines")

    def at(value: float) -> float:
        return TOP + PLOT * (1 - (value - low) / (high - low))

    across = [name for name in levels if name not in columns]
    dashes = {name: _level(name, lines, number) for number, name in enumerate(across)}
    legend = [(name, _stroke(name, lines) if kind == "lines" else _fill(name, lines)) for name in lines]
    legend = legend if len(lines) > 1 else []
    legend += [(f"majority class {name} {levels[name]:.1f}", dashes[name]) for name in across]
    legend += [("majority class", DASHES)] if len(across) < len(levels) else []
    step = min((b - a for a, b in itertools.pairwise(middles)), default=WIDTH - LEFT - RIGHT)
    names = [_wrapped(column, step) for column in columns]
    foot = TOP + PLOT + 8 + LINE * max(map(len, names))
    rows = _legend(legend, foot + (LINE + 10 if x else 0) + 10)
    parts = frame(title, foot + (LINE + 10 if x else 0) + 14 + LEGEND * len(rows), y)
    for tick in range(int(low), int(high) + 1, 10):
        parts += _tick(at(tick), str(tick))
    for middle, name in zip(middles, names, strict=True):
        for row, text in enumerate(name):
            parts.append(f'<text class="mid" x="{middle:.1f}" y="{TOP + PLOT + 18 + LINE * row}">{escape(text)}</text>')
    if x:
        said = f"{x} (logarithmic scale)" if logarithmic else x
        parts.append(f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{foot + LINE + 4}">{escape(said)}</text>')
    drawn = _lines if kind == "lines" else _bars
    parts += drawn(lines, dict(zip(columns, middles, strict=True)), step, at)
    for name, level in levels.items():
        left, right = float(LEFT), float(WIDTH - RIGHT)
        if name in columns:
            middle = middles[columns.index(name)]
            left, right = middle - step / 2, middle + step / 2
        parts.append(f'<path d="M{left:.1f} {at(level):.1f}H{right:.1f}" {dashes.get(name, DASHES)}/>')
    return "\n".join([*parts, *itertools.chain(*rows), "</svg>"]) + "\n"


def curves(title: str, lines: dict[str, list[dict[str, float]]]) -> str:
    """Return an SVG of losses by step, a line for each list of {"step", "loss"}, of models from small to large.

    What was measured before the first step is left out. A name keeps its colour though other lines are empty.
    """
    lines = {name: [point for point in line if point["step"] > 0] for name, line in lines.items()}
    points = [point for line in lines.values() for point in line]
    last = max(point["step"] for point in points)
    losses = [point["loss"] for point in points]
    every = _round_step(max(losses) - min(losses))
    low, high = math.floor(min(losses) / every), math.ceil(max(losses) / every)
    wide = (WIDTH - LEFT - RIGHT - 24) / last

    def at(value: float) -> float:
        return TOP + PLOT * (1 - (value / every - low) / (high - low))

    colours = dict(zip(lines, SIZES, strict=False))
    legend = [(name, f'stroke="{colours[name]}" stroke-width="3"') for name, line in lines.items() if line]
    rows = _legend(legend, TOP + PLOT + 52)
    parts = frame(title, TOP + PLOT + 56 + LEGEND * len(rows), "loss, nats per target token")
    for tick in range(low, high + 1):
        parts += _tick(at(tick * every), f"{tick * every:g}")
    steps = _round_step(last)
    for number in range(int(last // steps) + 1):
        middle = LEFT + 8 + number * steps * wide
        parts.append(f'<text class="mid" x="{middle:.1f}" y="{TOP + PLOT + 18}">{number * steps:,.0f}</text>')
    parts.append(f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{TOP + PLOT + 38}">step</text>')
    for name, line in lines.items():
        if line:
            path = " ".join(f"{LEFT + 8 + point['step'] * wide:.1f},{at(point['loss']):.1f}" for point in line)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2.5"/>')
    return "\n".join([*parts, *itertools.chain(*rows), "</svg>"]) + "\n"


def frame(title: str, height: float, below: str = "") -> list[str]:
    """Begin a picture with its title, and below it what is measured."""
    size = f'width="{WIDTH}" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>',
        f'<text class="head" x="8" y="20">{escape(title)}</text>',
        f'<text x="8" y="41">{escape(below)}</text>',
    ]


def _round_step(span: float) -> float:
    """Return a round distance of which four to ten make a span."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return power * max(factor for factor in (1, 2, 2.5, 5) if factor * power <= span / 4)


def _middles(columns: Sequence[str], to_scale: bool) -> tuple[list[float], bool]:
    """Return where columns stand, and whether on a logarithmic scale: one of numbers, 0 as far left as it looks well.

    Other columns stand at equal distances.
    """
    parsed = [re.fullmatch(r"([\d.,]+)(%|k|m|)", column) for column in columns]
    wide = WIDTH - LEFT - RIGHT
    if not to_scale or not all(parsed) or len(columns) < 2:
        return [LEFT + wide * (number + 0.5) / len(columns) for number in range(len(columns))], False
    values = [float(match[1].replace(",", "")) * _UNITS[match[2]] for match in parsed if match]
    logs = [math.log(value) for value in values if value > 0]
    least = min(logs) - (max(logs) - min(logs)) / len(logs)
    places = [math.log(value) if value > 0 else least for value in values]
    first, last = min(places), max(places)
    return [LEFT + 30 + (wide - 60) * (place - first) / (last - first) for place in places], True


def _wrapped(text: str, wide: float) -> list[str]:
    """Return the lines of a column's name; one with underscores may break behind them."""
    letters = max(4, int(wide / LETTER))
    if max(map(len, text.split())) > letters:
        text = text.replace("_", "_ ")
    return textwrap.wrap(text, letters, break_long_words=False)[:4]


def _tick(y: float, text: str) -> list[str]:
    line = f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>'
    return [line, f'<text class="end" x="{LEFT - 7}" y="{y + 5:.1f}">{text}</text>']


def _colour(name: str, lines: Lines) -> tuple[str, bool]:
    """Return the colour of a name among those of a picture, and whether it is a variant of what the colour means."""
    if (meant := _meaning(name)) is not None:
        return COLOURS[MEANINGS[meant]], name != meant
    taken = {MEANINGS[meant] for each in lines if (meant := _meaning(each)) is not None}
    free = [colour for number, colour in enumerate(COLOURS) if number not in taken]
    without = [each for each in lines if _meaning(each) is None]
    return free[without.index(name) % len(free) if name in without else 0], False


def _meaning(name: str) -> str | None:
    return max((known for known in MEANINGS if name.startswith(known)), key=len, default=None)


def _fill(name: str, lines: Lines) -> str:
    colour, pale = _colour(name, lines)
    return f'fill="{colour}" fill-opacity="{0.4 if pale else 1}"'


def _stroke(name: str, lines: Lines) -> str:
    colour, dashed = _colour(name, lines)
    return f'stroke="{colour}" stroke-width="2.5"' + (' stroke-dasharray="7 3"' if dashed else "")


def _level(name: str, lines: Lines, number: int) -> str:
    """Return the style of the level of a task: the colour of its line where it has one."""
    colour = _colour(name, lines)[0] if len(lines) > 1 and name in lines else INK
    return f'stroke="{colour}" stroke-width="1.5" stroke-dasharray="{("5 4", "2 3", "9 3 2 3")[number % 3]}"'


def _legend(entries: Sequence[tuple[str, str]], top: float) -> list[list[str]]:
    """Return the legend's rows below `top`, as many as the names need; a style is that of an area or of a line."""
    rows: list[list[str]] = []
    left = WIDTH
    for name, style in entries:
        wide = 26 + LETTER * len(name) + 14
        if left + wide > WIDTH:
            rows.append([])
            left = 8
        y = top + LEGEND * (len(rows) - 1)
        area = f'<rect x="{left}" y="{y}" width="14" height="14" {style}/>'
        rows[-1].append(area if style.startswith("fill") else f'<path d="M{left - 2} {y + 7}h20" {style}/>')
        rows[-1].append(f'<text x="{left + 24}" y="{y + 12}">{escape(name)}</text>')
        left += math.ceil(wide)
    return rows


def _spread(x: float, value: dict[str, Any], at: Callable[[float], float]) -> str:
    ends = (at(value["mean"] + sign * (value["sd"] or 0)) for sign in (-1, 1))
    low, high = (min(max(end, TOP), TOP + PLOT) for end in ends)
    return f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{INK}" stroke-width="1.4"/>' if value["sd"] else ""


def _lines(lines: Lines, middles: dict[str, float], step: float, at: Callable[[float], float]) -> Iterator[str]:
    for number, (name, values) in enumerate(lines.items()):
        away = DODGE * (number - (len(lines) - 1) / 2)
        points = [(middles[column] + away, values[column]) for column in middles if column in values]
        path = " ".join(f"{x:.1f},{at(value['mean']):.1f}" for x, value in points)
        yield f'<polyline points="{path}" fill="none" {_stroke(name, lines)}/>'
        for x, value in points:
            y = f"{at(value['mean']):.1f}"
            colour = _colour(name, lines)[0]
            yield f'{_spread(x, value, at)}<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{colour}"/>'


def _bars(lines: Lines, middles: dict[str, float], step: float, at: Callable[[float], float]) -> Iterator[str]:
    """Yield bars with their numbers at the foot inside, where no deviation and no level crosses them."""
    width, foot = min(60, step * 0.86 / len(lines)), TOP + PLOT
    for number, (name, values) in enumerate(lines.items()):
        for column, middle in middles.items():
            if column not in values:
                continue
            x, value = middle + width * (number - (len(lines) - 1) / 2), values[column]
            top, named = at(value["mean"]), column if len(lines) == 1 else name  # one line: a colour for each column
            style = _fill(named if len(lines) > 1 or named in MEANINGS else name, lines)
            yield (
                f'<rect x="{x - width / 2 + 1:.1f}" y="{top:.1f}" width="{width - 2:.1f}" height="{foot - top:.1f}" '
                f"{style}/>{_spread(x, value, at)}"
            )
            turned, room = width < 36, foot - top
            inside = room > (44 if turned else 24)
            pale = inside and 'opacity="1"' in style
            y = foot - 8 if inside else at(value["mean"] + (value["sd"] or 0)) - 6
            kind = 'class="on' if pale else 'class="'
            where = f'transform="translate({x + 5:.1f} {y:.1f}) rotate(-90)"' if turned else f'x="{x:.1f}" y="{y:.1f}"'
            yield f'<text {kind}{"" if turned else " mid"}" {where}>{value["mean"]:.1f}</text>'
