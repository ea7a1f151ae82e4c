"""The documentation of settings: the comment beside each field, for `help()`, notebooks and docs/settings.md."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize

import pydantic


def described(cls: type[pydantic.BaseModel]) -> str:
    """Return a class's docstring with a line for each of its fields: its name, its default and the comment on it."""
    said = inspect.cleandoc(vars(cls).get("__doc__") or "")
    try:
        found = comments(cls)
    except (OSError, TypeError):  # there is no source
        return said
    lines = []
    for name, field in cls.model_fields.items():
        default = "" if field.is_required() else f" = {field.get_default(call_default_factory=True)!r}"
        lines.append(f"    {name}{default}" + (f": {found[name]}" if name in found else ""))
    return "\n".join([said, "", "Fields:", *lines]).strip() if lines else said


def comments(cls: type[pydantic.BaseModel]) -> dict[str, str]:
    """Return the comment on each field: behind it (and on the lines below that go on), or on the lines above."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if not (issubclass(each, pydantic.BaseModel) and each.model_fields):
            continue
        source = textwrap.dedent(inspect.getsource(each))
        at: dict[int, str] = {}
        alone = set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                at[token.start[0]] = token.string.lstrip("# ")
                if token.line.strip().startswith("#"):
                    alone.add(token.start[0])
        (body,) = ast.parse(source).body
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            lines = [line for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in at]
            if lines:
                while lines[-1] + 1 in alone:
                    lines.append(lines[-1] + 1)
            else:
                above = node.lineno
                while above - 1 in alone:
                    above -= 1
                lines = list(range(above, node.lineno))
            if lines:
                found[node.target.id] = " ".join(at.pop(line) for line in lines)
                alone.difference_update(lines)
    return found
