"""Every command of the program as Markdown: help, arguments and options, as `softprompt COMMAND --help` prints them."""

from __future__ import annotations

import typing
from typing import Any

import typer

from softprompt_jax.cli.main import app

_INTRO = """# Command line

`softprompt COMMAND --help` prints the same. Settings of a run are `KEY=VALUE` after the config, as in
`softprompt train mine.yaml steps=500 methods.0.length=50`; [Settings](settings.md) lists them.

Exit codes: 0 done; 2 bad input; 3 a plan that does not fit; 75 stopped and saved (the same command goes on)."""


def page() -> str:
    """Return a page with a section for each group of commands, in the order of the help."""
    program: Any = typer.main.get_command(app)
    groups: dict[str, list[str]] = {}
    for name, command in program.commands.items():
        groups.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append(_command(name, command))
    sections = [_INTRO] + [f"## {title}\n\n" + "\n\n".join(commands) for title, commands in groups.items()]
    return "\n\n".join(sections) + "\n"


def _command(name: str, command: Any) -> str:
    by_type: dict[str, list[Any]] = {"option": [], "argument": []}
    for parameter in command.params:
        by_type[parameter.param_type_name].append(parameter)
    options = [option for option in by_type["option"] if option.name != "help"]
    arguments = " ".join(_argument(argument) for argument in by_type["argument"])
    text = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    parts = [f"### {name}", text, f"    softprompt {name} {arguments}".rstrip()]
    said = [(_argument(argument).strip("[]"), _said(argument)) for argument in by_type["argument"]]
    rows = [f"| `{name.replace('|', chr(92) + '|')}` | {text} |" for name, text in said if text]
    rows += [f"| {_names(option)} | {_said(option)} |" for option in options]
    if rows:
        parts.append("\n".join(["| argument or option | |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _argument(argument: Any) -> str:
    name = (argument.metavar or argument.name).upper().strip("[]. ")
    name = f"{name}..." if argument.nargs == -1 else name
    return name if argument.required else f"[{name}]"


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return f"{names} (required)" if option.required else names


def _said(option: Any) -> str:
    annotation = option.type_descriptor.annotation
    choices = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()
    default = option.show_default if isinstance(option.show_default, str) else option.default
    shown = "" if default in (None, False, "", ()) or callable(default) else f" (default: `{default}`)"
    among = f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else ""
    return " ".join((option.help or "").split()).replace("|", "\\|") + among + shown
