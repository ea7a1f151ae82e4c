"""Command lines in forked children: cheap, since the parent has imported everything and JAX has not started in it.

A child may not connect, resolve a name or start a program: that is noted and refused. Its memory is bounded.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

GIB = 2**30
LIMIT_S, ADDRESSES, GROWTH = 120, 6 * GIB, GIB  # of a command; bytes on top of what the parent has
FORBIDDEN = {
    *("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen"),
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"),
}


class Ended(NamedTuple):
    """How a command has ended; `code` below 0 is a signal. `asked` is what it tried and must not do."""

    code: int
    out: str
    error: str
    seconds: float
    grown_bytes: int
    asked: str

    @property
    def last(self) -> str:
        return self.error.strip().rpartition("\n")[2]

    def problem(self, code: int | None, only_line: bool = True) -> str:
        """Say what is wrong with it, if it was to end with this code, or, if None, with 0 or 2."""
        if self.asked:
            return f"tried what no file may cause: {self.asked}"
        if self.code == -signal.SIGKILL:
            return f"hangs: killed after {self.seconds:.0f} s"
        if "Traceback" in self.error or self.code not in (0, 2):
            return f"code {self.code}, traceback: {self.last[:300]}"
        if code is not None and self.code != code:
            return f"code {self.code}, expected {code}: {self.last[:300] or self.out[-300:]}"
        if self.grown_bytes > GROWTH:
            return f"takes {self.grown_bytes / GIB:.1f} GiB"
        lines = self.error.strip().splitlines()
        told = sum(line.startswith("softprompt: ") for line in lines)
        if self.code == 2 and (told != 1 or not self.last.startswith("softprompt: ") or (only_line and len(lines) > 1)):
            return f"not one line: {lines[-3:]}"
        return f"a line of {len(self.last)} characters" if len(self.last) > 2000 else ""


class Child:
    """A forked process that calls `function`; its output lies in files."""

    def __init__(self, function: Callable[[], Any], folder: Path, stdin: bytes = b"", address_bytes: int = ADDRESSES):
        self._files = [tempfile.TemporaryFile() for _ in range(4)]  # noqa: SIM115
        self._files[0].write(stdin)
        self._files[0].seek(0)
        self._start, self._before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(function, folder, address_bytes)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(self.pid, self.pid)  # here too: a kill may come before the child has done it

    def _become(self, function: Callable[[], Any], folder: Path, address_bytes: int) -> NoReturn:
        code: Any = 1
        try:
            os.setpgid(0, 0)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            for number, file in enumerate(self._files[:3]):
                os.dup2(file.fileno(), number)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - a pool's worker has none
            size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (size + address_bytes, size + address_bytes))
            os.chdir(folder)
            sys.addaudithook(self._audit)
            function()
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            os.write(self._files[3].fileno(), f"{event} {arguments[-1:]!r:.100}; ".encode())
            raise ConnectionRefusedError(f"{event} is not allowed here")

    def said(self, number: int = 2) -> str:
        """Return standard output (1), the errors (2) or what was asked for (3) so far."""
        size = os.fstat(self._files[number].fileno()).st_size
        return os.pread(self._files[number].fileno(), size, 0).decode("utf-8", "replace")

    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self, after_s: float = LIMIT_S, killed: Callable[[], bool] = lambda: False) -> Ended:
        """Wait for the end, which is SIGKILL after so many seconds since the start, or once `killed` says so."""
        while self.running():
            if time.monotonic() > self._start + after_s or killed():
                os.killpg(self.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        _, status, used = os.wait4(self.pid, 0)
        seconds = time.monotonic() - self._start
        out, error, asked = map(self.said, (1, 2, 3))
        for file in self._files:
            file.close()
        grown = (used.ru_maxrss - self._before) * 1024
        return Ended(os.waitstatus_to_exitcode(status), out, error, seconds, grown, asked)


def command(arguments: Sequence[object], exact: bool = False, **environment: str) -> Callable[[], None]:
    """Return a call of the command line. `exact`: predictions carry their scores, so that any other number is seen."""

    def run() -> None:
        from softprompt_jax.cli.main import main
        from softprompt_jax.inference import bank, predictor, texts

        def with_scores(rows: Any, read: Any, answers: Any, *how: Any) -> Any:
            def scored(asked: Any, first: int) -> Any:
                return [[(f"{text} {score!r}", score) for text, score in found] for found in answers(asked, first)]

            return texts.answer_lines(rows, read, scored, *how)

        if exact:
            bank.answer_lines = predictor.answer_lines = with_scores
        os.environ.update(environment)
        sys.argv = ["softprompt", *map(str, arguments)]
        main()

    return run


def call(
    arguments: Sequence[object], folder: Path, stdin: bytes = b"", exact: bool = False, **environment: str
) -> Ended:
    """Run a command to its end."""
    return Child(command(arguments, exact, **environment), folder, stdin).end()


def do(function: Callable[[], Any], folder: Path) -> None:
    """Call a function in a child. Errors: RuntimeError if it fails there."""
    ended = Child(function, folder).end()
    if ended.code:
        raise RuntimeError(ended.error)
