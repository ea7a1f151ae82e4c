"""What every test runs under: shapes and types checked, programs compiled once, no hub, one CPU device."""

from __future__ import annotations

import os
from pathlib import Path

import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before softprompt_jax is imported: every annotated call is checked, shapes included. Tests only; users pay nothing.
jaxtyping.install_import_hook("softprompt_jax", "beartype.beartype")


def pytest_configure() -> None:
    # Set in the environment, and before jax is imported, so that the command lines that tests start see it too.
    # A setting from outside wins: JAX_PLATFORMS=cuda pytest -m gpu.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Each checkout has its own cache: programs compiled for one machine's CPU may not run on another's.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    """Return the folder of numbers made by other implementations, which lies beside the checkout."""
    path = ROOT.parent / "shared" / "fixtures"
    if not path.is_dir():
        pytest.skip(f"no {path.relative_to(ROOT.parent)} beside the checkout")
    return path
