"""One HTML page that needs nothing else: text, tables, and plots inside it (and beside it as PNG)."""

from __future__ import annotations

import base64
import html
import string
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt_jax.config import UserError
from softprompt_jax.files import writable

COLOURS = ("#1f5fa8", "#d0632b", "#2f8f5b", "#8a4fa3", "#b3961a", "#3aa0b5", "#b5385f", "#6b7785")
GREY = "#9aa8b7"
_LONG = 60  # letters of a cell that keeps a readable width where there is little room
# Of plots, in inches and points, so that a picture as wide as a phone can be read: its letters are then 9 pixels high.
_WIDTH, _LEFT, _RIGHT, _FOOT, _TOP, _LEGEND_ROW, _FONT, _DPI = 5.6, 0.75, 0.15, 0.55, 0.15, 0.24, 10.5, 200


class Page:
    """A page that is put together from above; `write` makes `index.html` and the plots in a folder."""

    def __init__(self, title: str, folder: Path):
        """Make the folder. Errors: UserError without matplotlib, or without a place to write."""
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            raise UserError(
                "--to: matplotlib is missing, which draws the plots; expected the extra report; "
                "pip install 'softprompt-jax[report]'"
            ) from None
        self._title, self._folder = title, folder
        self._parts: list[Any] = [f"<h1>{html.escape(title)}</h1>"]  # HTML, and plots until they are written
        with writable(folder, folder=True):  # before anything is drawn
            pass

    @property
    def plots(self) -> list[str]:
        """The names of the plots so far."""
        return [part[0] for part in self._parts if not isinstance(part, str)]

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def details(self, summary: str, text: str) -> None:
        """Add a text as it is that opens on demand."""
        self._parts.append(
            f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"
        )

    def table(self, columns: Mapping[str, Iterable[Any]], chosen: Sequence[int] = ()) -> None:
        """Add a table of columns by their titles.

        Numbers stand to the right; texts wrap; rows with the numbers in `chosen` stand out.
        """
        head = "".join(f"<th>{html.escape(title)}</th>" for title in columns)
        body = []
        for number, row in enumerate(zip(*columns.values(), strict=True)):
            cells = "".join(_cell(value) for value in row)
            body.append(f'<tr class="chosen">{cells}</tr>' if number in chosen else f"<tr>{cells}</tr>")
        self._parts.append(f"<div><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>")

    def figure(self, name: str, described: str, height: float = 3.0, left: float = _LEFT, foot: float = _FOOT) -> Any:
        """Return the axes of a new plot, which `write` saves as `name.png`; `described` is read where none is seen.

        `height`, in inches, is that of the axes; `left` and `foot` what stands before and below them. By default all
        plots have equal edges.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDTH, _TOP + height + foot))
        axes = figure.add_axes(_place(height, foot, left))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=_FONT, color=GREY)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.xaxis.label.set_fontsize(_FONT)
        axes.yaxis.label.set_fontsize(_FONT)
        axes.grid(axis="y", color="#dde3ea", linewidth=0.8)
        axes.set_axisbelow(True)
        self._parts.append((name, described, figure))
        return axes

    def legend(self, axes: Any) -> None:
        """Add the legend of a plot, below it, one name a row."""
        handles, labels = axes.get_legend_handles_labels()
        rows = sum(1 + label.count("\n") for label in labels)
        old, more = axes.figure.get_figheight(), _LEGEND_ROW * rows
        axes.figure.set_figheight(old + more)
        axes.set_position(_place(old - _TOP - _FOOT, _FOOT + more))
        axes.figure.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0.0, 0.0), fontsize=_FONT, frameon=False,
            borderaxespad=0.2, labelspacing=0.25,
        )  # fmt: skip

    def write(self) -> list[Path]:
        """Write the page and its plots, and return the files."""
        written, parts = [self._folder / "index.html"], []
        with writable(self._folder, folder=True):
            for part in self._parts:
                if not isinstance(part, str):
                    name, described, figure = part
                    written.append(self._folder / f"{name}.png")
                    figure.savefig(written[-1], dpi=_DPI)
                    data = base64.b64encode(written[-1].read_bytes()).decode()
                    part = f'<img alt="{html.escape(described)}" src="data:image/png;base64,{data}">'
                parts.append(part)
            template = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
            page = template.substitute(title=html.escape(self._title), body="\n".join(parts))
            written[0].write_text(page, encoding="utf-8")
        return written


def _place(height: float, foot: float, left: float = _LEFT) -> tuple[float, float, float, float]:
    """Return left, bottom, width and height of axes of a height and with a foot in inches, as shares of the figure."""
    whole = _TOP + height + foot
    return left / _WIDTH, foot / whole, 1 - (left + _RIGHT) / _WIDTH, height / whole


def plot_text(text: str) -> str:
    """Return a text for a plot, whose font has few scripts and reads $ as mathematics, in lines of 56 letters."""
    text = "".join(c if c.isascii() else "?" for c in text).replace("$", r"\$")
    return textwrap.fill(text, 56)


def gradient() -> Any:
    """Return the colours from white to the first of a plot."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shares", ["#ffffff", COLOURS[0]])


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f'<td class="number">{f"{value:.4g}" if isinstance(value, float) else value}</td>'
    text = "–" if value is None else str(value)
    kind = ' class="long"' if len(text) > _LONG else ""
    return f"<td{kind}>{html.escape(text)}</td>"
