"""Every setting of a run as Markdown, out of the classes that hold them: docstrings, fields and their comments."""

from __future__ import annotations

import inspect
import json
import types
import typing
from typing import Any

from pydantic.fields import FieldInfo

from softprompt_jax.config import Settings
from softprompt_jax.field_comments import comments

_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "at least"}


_SAID = """# Settings

What a run's YAML may say, and the same on the command line:

    softprompt train mine.yaml steps=500 optimizer.learning_rate=0.1 'methods=[{kind: lora, rank: 4}]'

A file may state `base: FILE` (relative to it) and then only what differs; dotted names as above change a part.

What has a `kind` is chosen by it. A run's folder has all of its settings, those too that were left out, in
`config.yaml`."""


def page(root: type[Settings]) -> str:
    """Return a page with a section for `root` and for every class of settings that can stand in it."""
    found = titles(root)
    sections = [_SAID]
    sections += [f"## {title}\n\n{prose(cls)}\n\n{table(cls, found)}" for cls, title in found.items()]
    return "\n\n".join(sections) + "\n"


def titles(root: type[Settings]) -> dict[type[Settings], str]:
    """Return the heading of each class of settings that can stand in `root`, in the order of the page."""
    found: dict[type[Settings], str] = {}
    later = {each for field in root.model_fields.values() for each in _classes(field.annotation)}
    _collect(root, "run", found, later)
    return found


def anchor(title: str) -> str:
    """Return what a heading of these is linked by."""
    return title.replace(": ", "-")


def prose(cls: type[Settings]) -> str:
    """Return a class's docstring, and what those it inherits fields from say of them; a line for each paragraph."""
    paragraphs = inspect.cleandoc(vars(cls).get("__doc__") or "").split("\n\n")
    for each in cls.__mro__[1:]:
        if issubclass(each, Settings) and each.model_fields:
            paragraphs += inspect.cleandoc(vars(each).get("__doc__") or "").split("\n\n")[1:]
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def table(cls: type[Settings], headings: dict[type[Settings], str], page: str = "") -> str:
    """Return the fields of a class as a table; classes in `headings` are linked to their sections on `page`."""
    said = comments(cls)
    rows = ["| setting | takes | default | |", "|---|---|---|---|"]
    for name, field in sorted(cls.model_fields.items(), key=lambda item: _depth(cls, item[0])):
        if name == "kind":
            continue
        takes = " or ".join(dict.fromkeys(_types(field.annotation, headings, page)))
        cells = (
            f"`{name}`",
            takes + _limits(field),
            _default(field),
            (field.description or said.get(name, "")).replace("None", "null"),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return "\n".join(rows) if len(rows) > 2 else "No settings of its own."


def _depth(cls: type[Settings], name: str) -> int:
    """Return how far up a field is declared, so that a class's own come first."""
    return next(depth for depth, each in enumerate(cls.__mro__) if name in inspect.get_annotations(each))


def _collect(cls: type[Settings], path: str, found: dict[type[Settings], str], later: set[type[Settings]]) -> None:
    """Add a class and those below it; those of `later`, the root's own, come in the order of the root."""
    if cls in found:
        return
    kind = cls.model_fields.get("kind")
    chosen = kind.default if kind is not None and isinstance(kind.default, str) else ""
    found[cls] = path if chosen in ("", path) else f"{path}: {chosen}"
    for name, field in cls.model_fields.items():
        for each in _classes(field.annotation):
            if path == "run" or each not in later:
                _collect(each, name, found, later)


def _classes(annotation: Any) -> typing.Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    elif typing.get_origin(annotation) is not typing.Literal:
        for part in typing.get_args(annotation):
            yield from _classes(part)


def _types(annotation: Any, headings: dict[type[Settings], str], page: str) -> typing.Iterator[str]:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _types(parts[0], headings, page)
    elif origin is typing.Literal:
        yield from (f"`{value}`" for value in parts)
    elif origin in (typing.Union, types.UnionType):
        for part in parts:
            yield from _types(part, headings, page)
    elif origin in (list, tuple):
        inner = " or ".join(dict.fromkeys(name for p in parts if p is not ... for name in _types(p, headings, page)))
        yield f"list of {inner}"
    elif origin is dict:
        yield f"{' or '.join(_types(parts[0], headings, page))} to {' or '.join(_types(parts[1], headings, page))}"
    elif isinstance(annotation, type) and issubclass(annotation, Settings):
        title = headings[annotation]
        yield f"[{title}]({page}#{anchor(title)})"
    else:
        known = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", type(None): "`null`"}
        yield known[annotation]


def _limits(field: FieldInfo) -> str:
    signs = [f"{sign} {getattr(each, name)}" for each in field.metadata for name, sign in _SIGNS.items()
             if getattr(each, name, None) is not None]  # fmt: skip
    return f", {' and '.join(signs)}" if signs else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Settings):
        return f"`{getattr(value, 'kind', '{}')}`"
    if isinstance(value, list) and value and isinstance(value[0], Settings):
        return f"`[{', '.join(getattr(each, 'kind', '{}') for each in value)}]`"
    text = json.dumps(value, ensure_ascii=False)
    return f"`{value}`" if isinstance(value, str) and value else f"`{text}`"
