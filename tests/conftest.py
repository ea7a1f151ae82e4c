"""What every test runs under: shapes and types checked, programs compiled once, no hub, one CPU device."""

from __future__ import annotations

import gc
import io
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest

if TYPE_CHECKING:
    import small_runs

ROOT = Path(__file__).resolve().parents[1]

# Before softprompt_jax is imported: every annotated call is checked, shapes included. Tests only; users pay nothing.
jaxtyping.install_import_hook("softprompt_jax", "beartype.beartype")


def pytest_configure() -> None:
    # Set in the environment, and before jax is imported, so that the command lines that tests start see it too.
    # A setting from outside wins: JAX_PLATFORMS=cuda pytest -m gpu.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["XDG_STATE_HOME"] = str(ROOT / ".pytest_cache" / "state")  # what tests have trained with
    # Each checkout has its own cache: programs compiled for one machine's CPU may not run on another's.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    # A sixth of the time to compile; nearly every program here runs once or twice.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    quick += " --xla_cpu_parallel_codegen_split_count=1"
    if sys.version_info < (3, 12):  # jax 0.12 aborts where it does not know a flag
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", quick)
    gc.set_threshold(50_000, 20, 50)  # thousands of programs stay alive: going through them was a tenth of the time


_MOST_MAPPINGS = 25_000  # of memory; Linux allows a process 65,530, and with no more XLA crashes in compiling
_tests_done = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Forget compiled programs, of which each takes several mappings of memory, before there are too many."""
    maps = Path("/proc/self/maps")
    if next(_tests_done) % 20 == 0 and "jax" in sys.modules and maps.exists():
        with maps.open("rb") as lines:
            count = sum(1 for _ in lines)
        if count > _MOST_MAPPINGS:
            sys.modules["jax"].clear_caches()
            gc.collect()


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    """Return the folder of numbers made by other implementations, which lies beside the checkout."""
    path = ROOT.parent / "shared" / "fixtures"
    if not path.is_dir():
        pytest.skip(f"no {path.relative_to(ROOT.parent)} beside the checkout")
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> small_runs.Files:
    """Return a folder with a small backbone and a task that it can learn."""
    import small_runs

    from softprompt_jax.config import parse
    from softprompt_jax.run import Run
    from softprompt_jax.trust import remember

    made = small_runs.write_files(tmp_path_factory.mktemp("small"))
    remember(parse(Run, made.short, "small"))
    return made


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what runs cache out of the home folder."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def _finished(settings: dict[str, Any], folder: Path) -> Path:
    import softprompt_jax
    from softprompt_jax.config import parse

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTPROMPT_CACHE", str(folder.parent / "cache"))
        softprompt_jax.train(parse(softprompt_jax.Run, settings, "test"), folder)
    return folder


@pytest.fixture(scope="session")
def prompt_run(small: small_runs.Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished prompt run; leave it as it is."""
    return _finished(small.short, tmp_path_factory.mktemp("finished") / "prompt")


@pytest.fixture(scope="session")
def full_run(small: small_runs.Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished full-tuning run, which has learnt the task; leave it as it is."""
    return _finished(small.full, tmp_path_factory.mktemp("finished") / "full")


@pytest.fixture(scope="session")
def engine(small: small_runs.Files) -> Iterator[Any]:
    """Return an engine over a small bank, which answers; needs the extra `serve`."""
    import served

    made = served.engine_of(small.backbone)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def softprompt(monkeypatch, capsys):
    """Run a command in this process; return its exit code, standard output and standard error."""

    from softprompt_jax.cli.main import main

    def run(*arguments, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # main changes these
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        monkeypatch.setattr(sys, "argv", ["softprompt", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


@pytest.fixture
def refused(softprompt):
    """Run a command that is refused and return its one line."""

    def run(*arguments, stdin: bytes = b"") -> str:
        code, out, err = softprompt(*arguments, stdin=stdin)
        assert code == 2, err
        assert err.startswith("softprompt: ")
        assert err.count("\n") == 1, err
        assert "Traceback" not in out + err
        return err

    return run
