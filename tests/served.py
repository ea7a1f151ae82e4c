"""A small bank behind HTTP in this process, and a client of the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softprompt_jax import PromptBank, load_backbone
from softprompt_jax.serve.engine import Engine
from softprompt_jax.serve.limits import Limits
from softprompt_jax.serve.server import make_server
from softprompt_jax.serve.uploads import Store

for _package in ("fastapi", "uvicorn", "prometheus_client"):  # whoever imports this is skipped where one is missing
    pytest.importorskip(_package, reason="needs the extra `serve`, which `dev` has")

WIDTH, TOKENS = 16, 6
PATIENCE_S = 900  # on a machine that is busy with other things
# One compiled length, so that the tests wait for few programs.
LIMITS = {
    **{"slots": 8, "max_input_tokens": 16, "max_prompt_rows": 12, "max_tokens": TOKENS},
    **{"timeout_s": PATIENCE_S, "max_body_bytes": 4000, "max_prompt_bytes": 8000},
}


def rows(length: int, seed: int, width: int = WIDTH) -> np.ndarray:
    return 3 * np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


def engine_of(backbone: Path, width: int = WIDTH, **limits: Any) -> Engine:
    """Return an engine over eight prompts of unlike lengths."""
    bank = PromptBank(load_backbone(str(backbone)), device_rows=64)
    for number in range(8):
        bank.add(f"p{number}", rows(1 + number % 3, number, width))
    return Engine(bank, Limits(**LIMITS | limits))


@contextlib.contextmanager
def serving(engine: Engine, token: str | None = None, store: Store | None = None) -> Iterator[int]:
    """Serve in a thread of this process; yield the port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = make_server(engine, token, loopback=True, store=store)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask(
    port: int, method: str, path: str, body: bytes | dict | None = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Return the status, the JSON or text, and the headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    if isinstance(body, dict):
        body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    data = response.read().decode()
    told = {name.lower(): value for name, value in response.getheaders()}
    connection.close()
    return response.status, json.loads(data) if "json" in told.get("content-type", "") else data, told


def events(text: str) -> list[tuple[str, Any]]:
    """Take a stream of server-sent events apart."""
    parts = [part.split("\n", 1) for part in text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in parts]
