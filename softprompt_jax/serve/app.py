"""The HTTP API around the engine. Every error is a status and {"error": "one line"}."""

# No postponed annotations here: FastAPI reads them, and knows only names of the module.
import asyncio
import concurrent.futures
import hmac
import json
import re
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

from softprompt_jax.config import UserError
from softprompt_jax.inference.bank import PromptBank
from softprompt_jax.inference.prompt_cache import HostPrompt
from softprompt_jax.serve.engine import Engine, Job
from softprompt_jax.serve.limits import RequestError
from softprompt_jax.serve.metrics import ServerMetrics
from softprompt_jax.serve.requests import Request, TextStream, make_job, parse, reply

_PAGE = Path(__file__).parent / "page"
_NAME = re.compile(r"[\w.-]{1,100}")
_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")
_NPY = b"\x93NUMPY"
_MARGIN_S = 1.0  # seconds that the engine has after a deadline to report it itself
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def make_app(engine: Engine, token: str | None, loopback: bool) -> Any:
    """Return the ASGI application.

    `token`: clients must send it as a bearer token. None: no token is needed, which only `loopback` allows. Then
    requests for other host names are refused, so that no web page can reach the server through its visitor's browser.
    """
    import fastapi
    from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse

    from softprompt_jax import __version__

    app = fastapi.FastAPI(title="softprompt", version=__version__, docs_url=None, redoc_url=None)
    # Files are read here, one after the other: neither in the event loop nor between two steps of the engine.
    reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="reader")
    measures = ServerMetrics(engine)
    limits = engine.limits

    async def check_token(request: fastapi.Request) -> None:
        if token is None:
            if not _LOOPBACK.fullmatch(request.headers.get("host", "")):
                raise RequestError(403, "Host: not this machine; expected localhost; start the server with a token")
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise RequestError(401, "Authorization: no valid token; expected 'Bearer TOKEN', the server's own")

    guarded = [fastapi.Depends(check_token)]

    def json_response(values: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        return Response(json.dumps(values), status, headers, "application/json")  # ASCII, whatever a text holds

    def error_response(status: int, message: str) -> Response:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status, {})
        return json_response({"error": " ".join(message.split())}, status, headers)

    @app.exception_handler(UserError)
    async def user_error(request: fastapi.Request, error: Exception) -> Response:
        return error_response(error.status if isinstance(error, RequestError) else 422, str(error))

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def not_found(request: fastapi.Request, error: Any) -> Response:
        where = f"{request.method} {request.url.path}"
        return error_response(
            error.status_code, f"{where}: {error.detail}; expected /v1/generate, /v1/prompts, /health, /metrics"
        )

    async def body(request: fastapi.Request, most: int) -> bytes:
        """Read a body within the limits of size and time."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise RequestError(413, f"body: over {most} bytes; expected at most so many; send less")
                    parts.append(part)
        except TimeoutError:
            raise RequestError(408, f"body: not complete after {limits.timeout_s:g} s; expected it sooner") from None
        return b"".join(parts)

    async def read_request(request: fastapi.Request) -> Request:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RequestError(415, "Content-Type: not application/json; expected a body of JSON")
        data = await body(request, limits.max_body_bytes)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise RequestError(400, f"body: not UTF-8 at byte {error.start}; expected JSON in UTF-8") from None
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                400, f'body: not JSON ({error}); expected an object such as {{"inputs": "...", "prompt": "..."}}'
            ) from None
        if not isinstance(values, dict):
            raise RequestError(400, f"body: found {type(values).__name__}; expected a JSON object")
        return parse(values)

    async def result_of(work: concurrent.futures.Future) -> Any:
        """Wait for the work of another thread, at most `timeout_s`."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), limits.timeout_s)
        except TimeoutError:
            raise RequestError(504, f"request: took longer than {limits.timeout_s:g} s; try again later") from None

    async def events(request: fastapi.Request, asked: Request) -> AsyncGenerator[tuple[bool, Job]]:
        """Submit a request; yield (is it done, its job) at every change. If the client leaves, the job is cancelled."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue()
        started = time.monotonic()
        work = make_job(asked, engine, lambda event: loop.call_soon_threadsafe(news.put_nowait, event))
        engine.submit(work)
        gone = asyncio.ensure_future(request.receive())  # after the body, only a disconnect can come
        try:
            while True:
                event = asyncio.ensure_future(news.get())
                left = max(0.0, work.deadline - time.monotonic()) + _MARGIN_S
                await asyncio.wait((event, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    if gone.done():
                        raise RequestError(499, "client: has gone; expected it to wait")
                    if not engine.alive:
                        engine.check_open()  # says why
                    raise RequestError(504, "request: the engine is busy with one step for too long; try again later")
                if isinstance(event.result(), RequestError):
                    raise event.result()
                if event.result():
                    measures.answered(time.monotonic() - started)
                yield bool(event.result()), work
                if event.result():
                    return
        finally:
            gone.cancel()
            engine.cancel(work)

    async def stream(first: Any, rest: AsyncGenerator[Any], asked: Request) -> AsyncIterator[str]:
        made = None
        try:
            done, work = first
            made = TextStream(engine, len(work.answers) - len(asked.words))
            while True:
                for index, text in made.new_pieces(work.answers):
                    yield _event("text", {"answer": index, "text": text})
                if done:
                    yield _event("done", reply(asked, work, engine))
                    return
                done, work = await anext(rest)
        except RequestError as error:
            measures.refused(error.status)
            yield _event("error", {"error": str(error), "status": error.status})
        finally:
            await rest.aclose()

    @app.post("/v1/generate", dependencies=guarded, openapi_extra=_json_body(Request.model_json_schema()))
    async def generate(request: fastapi.Request) -> Response:
        """Answer a text under a prompt, score words as its answers, or both; as events with `stream`."""
        try:
            asked = await read_request(request)
            changes = events(request, asked)
            first = await anext(changes)
            if asked.stream:
                return StreamingResponse(stream(first, changes, asked), media_type="text/event-stream")
            while not first[0]:
                first = await anext(changes)
            await changes.aclose()
            return json_response(reply(asked, first[1], engine))
        except UserError as error:
            measures.refused(error.status if isinstance(error, RequestError) else 422)
            raise

    @app.get("/v1/prompts", dependencies=guarded)
    async def prompts() -> Any:
        """List the prompts."""
        return {"backbone": engine.bank.backbone.identity, "prompts": [_about(engine, n) for n in engine.bank.names]}

    @app.put("/v1/prompts/{name}", dependencies=guarded, status_code=201, openapi_extra=_FILE_BODY)
    async def add(name: str, request: fastapi.Request) -> Any:
        """Add a prompt, or replace the one of this name: the body is a .safetensors or .npy file. Not kept on disk."""
        if not _NAME.fullmatch(name) or len(name.encode()) > 200:  # of a file's name at most 255 bytes
            raise RequestError(
                422, f"prompt {name[:100]!r}: not a name; expected letters, digits, . _ and - (100 at most)"
            )
        data = await body(request, limits.max_prompt_bytes)
        stored = await result_of(reader.submit(_read_prompt, engine.bank, name, data))

        def put() -> dict[str, Any]:
            engine.check_prompt(name, stored)
            engine.bank.put(name, stored)
            return _about(engine, name)

        return await result_of(engine.call(put))

    @app.delete("/v1/prompts/{name}", dependencies=guarded, status_code=204)
    async def remove(name: str) -> Response:
        """Remove a prompt; requests in progress still finish with it."""
        try:
            await result_of(engine.call(lambda: engine.bank.remove(name)))
        except UserError as error:
            raise error if isinstance(error, RequestError) else RequestError(404, str(error)) from None
        return Response(status_code=204)

    @app.get("/health")
    async def health() -> Response:
        """Report the state: 200 if requests are answered, 503 if the server stops or its engine has failed."""
        about = {"status": engine.status, "waiting": engine.waiting, "working": engine.working}
        return json_response(about, 200 if engine.alive else 503)

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        """Report counters in the format of Prometheus."""
        return PlainTextResponse(measures.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE / "index.html")

    @app.get("/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in ("page.css", "page.js"):
            raise fastapi.HTTPException(404, "Not Found")
        return FileResponse(_PAGE / name)

    async def with_headers(scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = message | {"headers": [*message["headers"], *added]}
            await send(message)

        await app(scope, receive, sent)

    return with_headers


def _event(kind: str, values: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(values)}\n\n"


def _read_prompt(bank: PromptBank, name: str, data: bytes) -> HostPrompt:
    """Read the bytes of a prompt file. Errors: RequestError, without the name of the folder that they lay in."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (f"{name}.npy" if data.startswith(_NPY) else f"{name}.safetensors")
        path.write_bytes(data)
        try:
            return bank.read(name, path)
        except UserError as error:
            raise RequestError(422, str(error).replace(f"{folder}/", "")) from None


def _about(engine: Engine, name: str) -> dict[str, Any]:
    stored = engine.bank.prompt(name)
    return {
        "name": name,
        "rows": len(stored.rows),
        "place": stored.place,
        "extras": stored.kinds,
        "task": stored.task,
        "label_words": list(stored.label_words),
    }


def _json_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_FILE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
