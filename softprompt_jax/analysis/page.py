"""One HTML page that needs nothing else: text, tables, and plots inside it (and beside it as PNG)."""

from __future__ import annotations

import base64
import html
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from softprompt_jax.config import UserError

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; max-width: 1000px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.15em; margin: 2em 0 .4em }
div { overflow-x: auto; margin-bottom: 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 15px }
th, td { padding: .25em .8em; text-align: left; border-bottom: 1px solid #dde3ea; vertical-align: top }
th { border-bottom: 2px solid #9aa8b7 } td.number { text-align: right; white-space: nowrap }
tr.chosen td { background: #eef5ee } img { width: 100% } pre { background: #f2f4f7; padding: 1em; overflow-x: auto }
"""
COLOURS = ("#1f5fa8", "#d0632b", "#2f8f5b", "#8a4fa3", "#b3961a", "#3aa0b5", "#b5385f", "#6b7785")
GREY = "#9aa8b7"


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
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_be_written(error) from None

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

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[Any]], chosen: Sequence[int] = ()) -> None:
        """Add a table. Numbers stand to the right; texts wrap; rows with the numbers in `chosen` stand out."""
        head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
        body = []
        for number, row in enumerate(rows):
            cells = "".join(_cell(value) for value in row)
            body.append(f'<tr class="chosen">{cells}</tr>' if number in chosen else f"<tr>{cells}</tr>")
        self._parts.append(f"<div><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>")

    def figure(self, name: str, described: str, height: float = 3.6) -> Any:
        """Return the axes of a new plot, which `write` saves as `name.png`; `described` is read where none is seen."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.0, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        self._parts.append((name, described, figure))
        return axes

    def legend(self, axes: Any) -> None:
        """Add the legend of a plot, below it."""
        axes.figure.legend(loc="outside lower left", fontsize=8, ncols=2, frameon=False)

    def write(self) -> list[Path]:
        """Write the page and its plots, and return the files."""
        written, parts = [self._folder / "index.html"], []
        try:
            for part in self._parts:
                if not isinstance(part, str):
                    name, described, figure = part
                    written.append(self._folder / f"{name}.png")
                    figure.savefig(written[-1], dpi=160)
                    data = base64.b64encode(written[-1].read_bytes()).decode()
                    part = f'<img alt="{html.escape(described)}" src="data:image/png;base64,{data}">'
                parts.append(part)
            written[0].write_text(
                '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
                '<meta name="viewport" content="width=device-width, initial-scale=1">'
                f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style></head>"
                f"<body>\n{chr(10).join(parts)}\n</body></html>\n",
                encoding="utf-8",
            )
        except OSError as error:
            raise self._cannot_be_written(error) from None
        return written

    def _cannot_be_written(self, error: OSError) -> UserError:
        return UserError(f"{self._folder}: cannot be written ({error.strerror}); expected a folder")


def plot_text(text: str) -> str:
    """Return a text for a plot, whose font has few scripts and reads $ as mathematics, in lines of 60 letters."""
    text = "".join(c if c.isascii() else "?" for c in text).replace("$", r"\$")
    return textwrap.fill(text, 60)


def _cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (
            f'<td class="number">{value:.4g}</td>' if isinstance(value, float) else f'<td class="number">{value}</td>'
        )
    return f"<td>{html.escape('–' if value is None else str(value))}</td>"
