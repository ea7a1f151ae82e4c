"""The program: its commands in the order of a workflow, and its errors.

Bad input gets one line and exit code 2; a defect of ours keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from softprompt_jax import __version__
from softprompt_jax.cli import analyse, benchmarks, data, harness, process, share, signals, train, use
from softprompt_jax.cli.options import note
from softprompt_jax.config import UserError

_NOT_A_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


class _Commands(TyperGroup):
    """Wrong usage is bad input too: one line and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs | {"standalone_mode": False})
        except Exception as error:  # the classes of typer's usage errors are private; they have `format_message`
            format_message = getattr(error, "format_message", None)
            if format_message is None:
                raise
            message = format_message().replace("Value error, ", "").rstrip(".?")
            if not message:  # no argument at all: the help has been shown
                return 2
            context = getattr(error, "ctx", None)
            raise UserError(f"{message}; see {context.command_path if context else 'softprompt'} --help") from None


_LONGEST = 1500  # characters of an error, which may quote input

app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Start: softprompt train configs/quickstart.yaml --out runs/first",
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"softprompt {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Adapt a frozen language model to text-to-text tasks by training a soft prompt."""


for _group in (data, train, use, harness, analyse, share, benchmarks):
    for _name, _command in _group.COMMANDS.items():
        # Each paragraph on one line, so that the terminal breaks it where it ends.
        _help = "\n\n".join(" ".join(part.split()) for part in (_command.__doc__ or "").split("\n\n"))
        _settings: dict[str, Any] = getattr(_group, "SETTINGS", {}).get(_name, {})
        app.command(_name, help=_help, rich_help_panel=_group.PANEL, **_settings)(_command)


def main() -> None:
    """Run the command line and exit."""
    process.prepare()
    try:
        code = app(prog_name="softprompt")
    except UserError as error:
        _fail(" ".join(str(error).split()))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno in _NOT_A_PATH or error.filename == "":
            _fail(f"{error.filename!r}: is no path ({error.strerror}); expected a file or folder; give another name")
        if error.errno not in _NOT_WRITABLE:
            raise
        _fail(
            f"{error.filename or 'output'}: cannot be written ({error.strerror}); expected a writable place with space"
        )
    except (AssertionError, RuntimeError) as error:
        if (told := process.told_of_devices(error)) is None:
            raise
        _fail(told)
    if code == signals.INTERRUPTED:
        note("softprompt: interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    message = message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    print(f"softprompt: {message}", file=sys.stderr)
    sys.exit(2)
