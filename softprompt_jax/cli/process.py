"""What the command line does to its own process, and the library never does: allocator, environment, loggers."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
import traceback
from pathlib import Path

from softprompt_jax.cli.allocator import keep_freed_memory


def prepare() -> None:
    """Set the allocator, the environment and the loggers; before JAX is imported."""
    keep_freed_memory()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it announces the absence of torch
    if importlib.util.find_spec("libtpu") and not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio").exists():
        # An installed libtpu would look for a TPU, and wait for it.
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if Path("/dev/nvidia0").exists() else "cpu")
    if not any(Path("/dev").glob("nvidia*")) and not Path("/dev/dxg").exists():
        # An installed plugin for NVIDIA GPUs would ask the driver, which is not here, for its version.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    logging.getLogger("jax._src.xla_bridge").addFilter(_in_one_line)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry of an unreachable hub
    # Orbax warns through absl of what is meant here, such as opening a folder to read only. What fails in its threads
    # is raised again where a save is waited for: tell it once.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.excepthook = lambda _: None
    # TensorStore tells here of writes that Orbax no longer waits for, since another one has failed.
    before = sys.unraisablehook
    sys.unraisablehook = lambda told: None if str(told.exc_value) == "Event loop is closed" else before(told)


def _in_one_line(record: logging.LogRecord) -> bool:
    """Say what JAX tells of a plugin that does not start, such as a library that it misses, without the traceback."""
    if record.exc_info:
        record.msg, record.args, record.exc_info = f"{record.getMessage()}: {record.exc_info[1]}", (), None
    return True


def told_of_devices(error: Exception) -> str | None:
    """Return one line for an error with which JAX refuses to start on the devices it was told; None for any other."""
    asked, frames = os.environ.get("JAX_PLATFORMS"), traceback.extract_tb(error.__traceback__)
    if not asked or not frames or Path(frames[-1].filename).name != "xla_bridge.py":
        return None
    reason = " ".join(str(error).split("(set JAX_PLATFORMS")[0].split()) or "no such device is here"
    return (
        f"JAX_PLATFORMS={asked}: JAX cannot compute there ({reason}); expected the device, its driver and the extra "
        "cuda13, cuda12 or tpu; install them, or unset JAX_PLATFORMS"
    )


def keep_results_apart() -> None:
    """Send to standard error what libraries print by themselves, as Gloo does of several processes on CPUs."""
    results = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = os.fdopen(results, "w", encoding=sys.stdout.encoding)
