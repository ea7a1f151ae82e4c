"""How SIGTERM and Ctrl-C end a command that trains."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import typer

from softprompt_jax.cli.options import note
from softprompt_jax.config import Preempted

PREEMPTED = 75  # exit code of a run that was told to stop and has saved: start it again (EX_TEMPFAIL)
INTERRUPTED = 130
EXIT_SECONDS = 30  # for a save under way when interrupted


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Let SIGTERM end a command that trains with PREEMPTED: at once while nothing is unsaved, else once it is saved."""

    def leave(*_: object) -> None:  # by no exception: one that meets a callback of the garbage collector is lost
        os.write(2, b"softprompt: told to stop while nothing was unsaved; the same command goes on\n")
        os._exit(PREEMPTED)

    before = None
    with contextlib.suppress(ValueError):  # not the main thread: whoever owns it decides
        before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except Preempted as error:
        note(f"softprompt: {error}")
        raise typer.Exit(PREEMPTED) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def end_after_interrupt() -> None:
    """End the process though a thread does not: Orbax waits ten minutes for the rest of an interrupted save."""

    def give_up() -> None:
        threading.main_thread().join()  # who calls the program as a function lives on
        time.sleep(EXIT_SECONDS)
        os._exit(INTERRUPTED)

    note("softprompt: interrupted; a run goes on with the same command")
    threading.Thread(target=give_up, daemon=True).start()
