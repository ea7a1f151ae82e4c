"""How SIGTERM and Ctrl-C end a command that trains."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from softprompt_jax.cli.options import note
from softprompt_jax.config import Interrupted, Preempted

if TYPE_CHECKING:
    from softprompt_jax.progress import Reporter

PREEMPTED = 75  # exit code of a run that was told to go and has saved: start it again (EX_TEMPFAIL)
INTERRUPTED = 130  # exit code after Ctrl-C
_INTERRUPTED = "interrupted; the same command goes on, from the last checkpoint if there is one"
_SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar hides


@contextlib.contextmanager
def preemptible(quiet: bool = False) -> Iterator[Reporter]:
    """Let SIGTERM and Ctrl-C end a command: at once while nothing is unsaved, else once a run has saved.

    Yields the command's reporter, and ends its bar. A run has handlers of its own (multihost.Preemption). The second
    Ctrl-C ends the command at once in any case.
    """

    def leave(number: int, _: object) -> None:
        if number == signal.SIGINT:
            _leave(INTERRUPTED, _INTERRUPTED)
        _leave(PREEMPTED, "told to stop while nothing was unsaved; the same command goes on")

    with contextlib.ExitStack() as restored:
        with contextlib.suppress(ValueError):  # not the main thread: whoever owns it decides
            for number in (signal.SIGTERM, signal.SIGINT):
                if (before := signal.getsignal(number)) is not signal.SIG_IGN:  # as in the background of a shell
                    signal.signal(number, leave)
                    restored.callback(signal.signal, number, before)
            # Python's handlers wait until a compilation or a step ends; this thread hears of signals at once.
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            restored.callback(os.close, writing)  # which ends the thread
            restored.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writing, warn_on_full_buffer=False))
            threading.Thread(target=_watch_interrupts, args=(reading,), daemon=True).start()
        from softprompt_jax.progress import Reporter  # only now that signals are heard

        try:
            with contextlib.ExitStack() as shown:
                shown.callback((reporter := Reporter(quiet)).stop)  # before anything else is printed
                yield reporter
        except Preempted as stopped:
            note(f"softprompt: {stopped}")
            raise SystemExit(INTERRUPTED if isinstance(stopped, Interrupted) else PREEMPTED) from None


def _watch_interrupts(reading: int) -> None:
    """Answer the first Ctrl-C with a line where a run is under way, the second by leaving; end at the pipe's end."""
    count = 0
    with open(reading, "rb", buffering=0) as signals:
        while numbers := signals.read(16):
            for _ in range(numbers.count(signal.SIGINT)):
                count += 1
                multihost = sys.modules.get("softprompt_jax.distributed.multihost")
                if count > 1:
                    _leave(INTERRUPTED, _INTERRUPTED)
                if multihost is not None and multihost.Preemption.watches():
                    os.write(2, b"\nsoftprompt: interrupted; saving after this step; Ctrl-C again leaves at once\n")


def _leave(code: int, message: str) -> NoReturn:
    """End the process here and now.

    Not by an exception: one that meets a callback of the garbage collector is lost, and threads of a library that is
    still loading or compiling would be waited for.
    """
    os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + f"softprompt: {message}\n".encode())
    os._exit(code)
