"""What the command line does to its own process, and the library never does: environment, loggers, signals, end."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import typer

from softprompt_jax.cli.allocator import keep_freed_memory
from softprompt_jax.cli.options import note
from softprompt_jax.config import Preempted

PREEMPTED = 75  # exit code of a run that was told to stop and has saved: start it again (EX_TEMPFAIL)
INTERRUPTED = 130
EXIT_SECONDS = 30  # for a save under way when interrupted


def prepare() -> None:
    """Set the allocator, the environment and the loggers; before JAX is imported."""
    keep_freed_memory()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it announces the absence of torch
    if importlib.util.find_spec("libtpu") and not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio").exists():
        # An installed libtpu would look for a TPU, and wait for it.
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if Path("/dev/nvidia0").exists() else "cpu")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry of an unreachable hub
    # Orbax warns through absl of what is meant here, such as opening a folder to read only. Errors of its threads are
    # raised again where a save is waited for, so that both would tell them twice.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Let SIGTERM end a command that trains with PREEMPTED: at once while nothing is unsaved, else once it is saved."""

    def leave(*_: object) -> None:  # by no exception: one that meets a callback of the garbage collector is lost
        os.write(2, b"softprompt: told to stop while nothing was unsaved; the same command goes on\n")
        os._exit(PREEMPTED)

    hook, before = threading.excepthook, None
    threading.excepthook = lambda _: None  # what fails in a thread that saves is raised where the save is waited for
    with contextlib.suppress(ValueError):  # not the main thread: whoever owns it decides
        before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except Preempted as error:
        note(f"softprompt: {error}")
        raise typer.Exit(PREEMPTED) from None
    finally:
        threading.excepthook = hook
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
