"""A server process: its address and token, uvicorn around the app, and an orderly end."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import resource
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from softprompt_jax.config import UserError, parse
from softprompt_jax.distributed.mesh import make_mesh
from softprompt_jax.inference import memory
from softprompt_jax.inference.bank import PromptBank
from softprompt_jax.serve.engine import Engine
from softprompt_jax.serve.limits import Limits
from softprompt_jax.serve.uploads import Store

TOKEN = "SOFTPROMPT_TOKEN"  # the environment variable


def serve(
    bank: PromptBank, limits: Limits, host: str, port: int, token: str | None, store: Store | None = None
) -> None:
    """Serve a bank until SIGTERM or SIGINT; then answer the open requests and return. Port 0: any that is free.

    `store`: where uploaded prompts are kept; its own are in the bank already.

    Errors: UserError for an address that is not this machine's loopback and no token, or that cannot be had.
    """
    loopback = is_loopback(host)
    if token is None and not loopback:
        raise UserError(
            f"--host {host}: others can reach it, and there is no token; expected one; set {TOKEN} or --token-file"
        )
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}; expected an address that is free here"
        ) from None
    engine = Engine(bank, limits)
    server = make_server(engine, token, loopback, store)
    _many_connections()
    engine.start()
    shown = f"[{host}]" if ":" in host else host
    print(
        f"softprompt: serving {len(bank.names)} prompts over {bank.backbone.identity} on "
        f"http://{shown}:{listener.getsockname()[1]}",
        file=sys.stderr,
        flush=True,
    )
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises a caught SIGINT once more, when all is answered
        pass
    finally:
        engine.stop()


def make_server(engine: Engine, token: str | None, loopback: bool, store: Store | None = None) -> Any:
    """Return a uvicorn server that on a signal accepts no more requests and finishes the open ones."""
    try:
        import uvicorn

        from softprompt_jax.serve.app import make_app
        from softprompt_jax.serve.connection import connection_class

        app = make_app(engine, token, loopback, store)
    except ImportError as error:
        raise UserError(
            f"serve: {error.name} is not installed; expected it; pip install 'softprompt-jax[serve]'"
        ) from None

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            engine.drain()
            super().handle_exit(sig, frame)

    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        http=connection_class(engine.limits),
        ws="none",
        timeout_graceful_shutdown=round(engine.limits.timeout_s) + 1,
    )
    return Server(settings)


def serve_folder(
    folder: str,
    backbone: str | None,
    host: str,
    port: int,
    token_file: str | None,
    limits: list[str],
    trust: bool = False,
    store: str | None = None,
    **settings: Any,
) -> None:
    """Serve the prompts of a folder, and those of the folder `store`.

    `limits` are KEY=VALUE, `settings` those of the bank. Where no `slots` are given there are as many as fit beside the
    weights, up to 32 for each share of the rows.
    """
    chosen = parse(Limits, {key: value for key, _, value in (one.partition("=") for one in limits)}, "--limit")
    token = read_token(token_file)
    make_mesh(settings.get("mesh"))
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; expected one with prompt files and finished runs")
    bank = PromptBank.open(folder, backbone, trust, **settings)
    for name in bank.names:
        if (step := bank.prompt(name).step) is not None:
            print(f"softprompt: {name} has not finished; step {step} is used", file=sys.stderr, flush=True)
    if "slots" not in chosen.model_fields_set:
        chosen = chosen.model_copy(update={"slots": default_slots(bank, chosen)})
    kept = None if store is None else Store(store)
    if kept is not None:
        kept.load(bank)
    serve(bank, chosen, host, port, token, kept)


def default_slots(bank: PromptBank, limits: Limits) -> int:
    """Return how many slots fit into the memory that a device has left beside the weights."""
    model = bank.backbone.model
    lengths = limits.max_input_tokens + limits.max_prompt_rows, limits.max_tokens + limits.max_decoder_rows
    with bank.computing():
        return memory.slots_that_fit(model.settings, model.dtype, *lengths, memory.free_bytes(), limits.slots)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(file: str | None) -> str | None:
    """Return the token of a file, or of the environment; None: there is none."""
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); expected a file with the token") from None
    if not token:
        raise UserError(f"{file}: is empty; expected the token")
    return token


def _many_connections() -> None:
    """Raise the process's limit of open connections to its maximum."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit, and does not take it either
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
