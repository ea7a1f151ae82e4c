"""The HTTP API around the engine. Every error is a status and {"error": {"message", "type", "param", "code"}}."""

# No postponed annotations here: FastAPI reads them, and knows only names of the module.
import asyncio
import concurrent.futures
import functools
import hmac
import ipaddress
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from softprompt_jax.config import UserError
from softprompt_jax.inference.prompt_cache import HostPrompt
from softprompt_jax.serve import openai
from softprompt_jax.serve.engine import Engine
from softprompt_jax.serve.jobs import Job
from softprompt_jax.serve.limits import RequestError, error_body
from softprompt_jax.serve.metrics import ServerMetrics
from softprompt_jax.serve.openapi import described
from softprompt_jax.serve.requests import Request, TextStream, make_job, parse, reply
from softprompt_jax.serve.uploads import Store, read_prompt

Notify = Callable[[Any], object]
Written = Callable[[bool, list[Job]], Iterator[str]]  # the events of a change
Failed = Callable[[RequestError], str]

_PAGE = Path(__file__).parent / "page"
_NAME = r"(?!\.+$)[\w.-]{1,100}"  # dots alone are folders
_LONG = 16_384  # bytes of a request from which on it is tokenized outside the event loop
_MARGIN_S = 1.0  # seconds that the engine has after a deadline to report it itself
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def make_app(engine: Engine, token: str | None, loopback: bool, store: Store | None = None) -> Any:
    """Return the ASGI application. `store`: where uploaded prompts are kept, None: in memory only.

    `token`: clients must send it as a bearer token. None: no token is needed, which only `loopback` allows. Then
    requests for other host names are refused, so that no web page can reach the server through its visitor's browser.
    """
    import fastapi
    from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse

    from softprompt_jax import __version__

    app = fastapi.FastAPI(
        title="softprompt", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    # Files are read here, one after the other: neither in the event loop nor between two steps of the engine.
    reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="reader")
    uploads = 0  # in progress, whose bodies are in memory
    at_start = {*engine.bank.names} - (set() if store is None else store.names)
    measures, created = ServerMetrics(engine), int(time.time())
    limits = engine.limits

    async def check_token(request: fastapi.Request) -> None:
        if token is None:
            if not is_this_machine(request.headers.get("host", "")):
                raise RequestError(403, "Host: not this machine; expected localhost; start the server with a token")
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise RequestError(401, "Authorization: no valid token; expected 'Bearer TOKEN', the server's own")

    guarded = [fastapi.Depends(check_token)]

    def json_response(values: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        return Response(_json(values), status, headers, "application/json")

    def error_response(error: UserError, headers: dict[str, str] | None = None) -> Response:
        status = error.status if isinstance(error, RequestError) else 422
        headers = headers or {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status)
        return json_response(error_body(error), status, headers)

    @app.exception_handler(UserError)
    async def user_error(request: fastapi.Request, error: Any) -> Response:
        return error_response(error)

    @app.exception_handler(fastapi.exceptions.StarletteHTTPException)  # pyright: ignore[reportPrivateImportUsage]
    async def not_found(request: fastapi.Request, error: Any) -> Response:
        where = f"{request.method} {request.url.path[:200]}"
        expected = "/v1/generate, /v1/prompts, /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics"
        told = RequestError(error.status_code, f"{where}: {error.detail}; expected {expected}")
        headers = dict(error.headers or {})
        if error.status_code == 405:  # Starlette names the methods of one function only
            on_path = [route for route in app.routes if route.path_regex.fullmatch(request.url.path)]  # type: ignore[attr-defined]
            headers["Allow"] = ", ".join(sorted({method for route in on_path for method in route.methods}))  # type: ignore[attr-defined]
        return error_response(told, headers)

    @app.exception_handler(fastapi.exceptions.RequestValidationError)
    async def invalid(request: fastapi.Request, error: Any) -> Response:
        problem = error.errors()[0]
        return error_response(RequestError(422, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"))

    @app.exception_handler(Exception)  # a defect of ours, whose traceback is in the log
    async def failed(request: fastapi.Request, error: Any) -> Response:
        return error_response(RequestError(500, "server: failed; expected none of this; see its log"))

    async def body(request: fastapi.Request, most: int) -> bytes:
        """Read a body within the limits of size and time."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.timeout_s):
                more = True
                while more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError(499, "client: has gone in the middle of its body; expected all of it")
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if size > most:
                        raise RequestError(413, f"body: over {most} bytes; expected at most so many; send less")
        except TimeoutError:
            raise RequestError(408, f"body: not complete after {limits.timeout_s:g} s; expected it sooner") from None
        return b"".join(parts)

    async def read_json(request: fastapi.Request) -> tuple[dict[str, Any], int]:
        """Return what is asked, and the size of the body."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RequestError(415, "Content-Type: not application/json; expected a body of JSON")
        try:
            data = await body(request, limits.max_body_bytes)
            values = json.loads(data.decode(), parse_constant=_no_constant, parse_float=_number)
        except UnicodeDecodeError as error:
            raise RequestError(400, f"body: not UTF-8 at byte {error.start}; expected JSON in UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise RequestError(
                400, f'body: not JSON ({error}); expected an object such as {{"inputs": "...", "prompt": "..."}}'
            ) from None
        if not isinstance(values, dict):
            raise RequestError(400, f"body: found {type(values).__name__}; expected a JSON object")
        return values, len(data)

    async def made(size: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call what tokenizes the texts of a body of this size."""
        return function(*arguments) if size < _LONG else await asyncio.to_thread(function, *arguments)

    async def result_of(work: concurrent.futures.Future) -> Any:
        """Wait for the work of another thread, at most `timeout_s`."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), limits.timeout_s)
        except TimeoutError:
            raise RequestError(504, f"request: took longer than {limits.timeout_s:g} s; try again later") from None

    async def events(
        request: fastapi.Request, make: Callable[[Notify], list[Job]], size: int
    ) -> AsyncGenerator[tuple[bool, list[Job]]]:
        """Submit a request; yield (is it done, its jobs) at every change. If the client leaves, they are cancelled."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue()
        started = time.monotonic()

        def notify(event: Any) -> None:
            loop.call_soon_threadsafe(news.put_nowait, event)

        works = await made(size, make, notify)
        left = RequestError(499, "client: has gone; expected it to wait")
        gone = asyncio.ensure_future(request.receive())  # after the body, only a disconnect can come
        gone.add_done_callback(lambda _: news.put_nowait(left))
        try:
            for work in works:
                engine.submit(work)
            pending = len(works)
            while pending:
                seconds = max(0.0, works[0].deadline - time.monotonic()) + _MARGIN_S
                try:
                    found = [await asyncio.wait_for(news.get(), seconds)]
                except TimeoutError:
                    if not engine.alive:
                        engine.check_open()  # says why
                    late = "request: the engine is busy with one step for too long; try again later"
                    raise RequestError(504, late) from None
                found += [news.get_nowait() for _ in range(news.qsize())]
                if errors := [event for event in found if isinstance(event, RequestError)]:
                    raise errors[0]
                pending -= sum(map(bool, found))
                if pending:
                    yield False, works
            measures.answered(time.monotonic() - started)
            yield True, works
        finally:
            gone.cancel()
            for work in works:
                engine.cancel(work)

    async def stream(first: Any, rest: AsyncGenerator[Any], written: Written, failed: Failed) -> AsyncIterator[str]:
        try:
            done, works = first
            while True:
                for event in written(done, works):
                    yield event
                if done:
                    return
                done, works = await anext(rest)
        except RequestError as error:
            measures.refused(error.status)
            yield failed(error)
        finally:
            await rest.aclose()

    async def respond(
        changes: AsyncGenerator[Any], whole: Callable[[list[Job]], Any], written: Written | None, failed: Failed
    ) -> Response:
        """Answer at the end with the `whole`, or, where `written` gives the events of a change, with a stream."""
        first = await anext(changes)
        if written is not None:
            return StreamingResponse(stream(first, changes, written, failed), media_type="text/event-stream")
        while not first[0]:
            first = await anext(changes)
        await changes.aclose()
        return json_response(whole(first[1]))

    @app.post("/v1/generate", dependencies=guarded)
    async def generate(request: fastapi.Request) -> Response:
        """Answer a text under a prompt, score words as its answers, or both; as events with `stream`."""
        try:
            values, size = await read_json(request)
            asked = parse(values)
            changes = events(request, lambda notify: [make_job(asked, engine, notify)], size)
            written = generated(asked) if asked.stream else None
            return await respond(changes, lambda jobs: reply(asked, jobs[0]), written, failed_event)
        except UserError as error:
            measures.refused(error.status if isinstance(error, RequestError) else 422)
            raise

    async def echo(asked: openai.Completion) -> None:
        """Score the texts of a request, where it asks for that, one after the other: the engine steps in between."""
        try:
            async with asyncio.timeout(limits.timeout_s):
                for ids in asked.texts if asked.echoes else ():
                    scores = None
                    if asked.scores_texts:
                        await asyncio.to_thread(engine.warm_scores, asked.model, ids)
                        score = functools.partial(engine.score_context, asked.model, ids)
                        scores = await result_of(engine.call(score))
                    await asyncio.to_thread(asked.add_echo, scores)
        except TimeoutError:
            raise RequestError(504, f"request: took longer than {limits.timeout_s:g} s; send fewer texts") from None

    async def complete(request: fastapi.Request, kind: type[openai.CompletionRequest | openai.ChatRequest]) -> Response:
        try:
            values, size = await read_json(request)
            asked: openai.Completion = await made(size, openai.read, engine, kind, values)
            await echo(asked)
            written = asked.chunks if values.get("stream") else None
            return await respond(events(request, asked.jobs, 0), asked.whole, written, openai.failed_event)
        except UserError as error:
            told = openai.refusal(error)
            measures.refused(told.status)
            raise told from None

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(request: fastapi.Request) -> Response:
        """Continue texts, as OpenAI's API does; `model` is a prompt or the bare backbone."""
        return await complete(request, openai.CompletionRequest)

    @app.post("/v1/chat/completions", dependencies=guarded, include_in_schema=engine.bank.tokenizer.has_chat_template)
    async def chat_completions(request: fastapi.Request) -> Response:
        """Answer a conversation, as OpenAI's API does, where the tokenizer has a chat template."""
        return await complete(request, openai.ChatRequest)

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> Any:
        """List the prompts and the bare backbone as OpenAI's API lists models."""
        return openai.models(engine.bank, created)

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def model(name: str) -> Any:
        """Describe one model."""
        return openai.about_model(engine.bank, name, created)

    @app.get("/v1/prompts", dependencies=guarded)
    async def prompts() -> Any:
        """List the prompts."""
        bank = engine.bank
        return {"backbone": bank.bare, "prompts": [_about(engine, name) for name in bank.names if name in bank]}

    @app.put("/v1/prompts/{name}", dependencies=guarded, status_code=201)
    async def add(name: str, request: fastapi.Request) -> Any:
        """Add a prompt, or replace the one of this name: the body is a .safetensors or .npy file.

        It is kept where the server was started with `--store`, else it is gone when the server ends.
        """
        nonlocal uploads
        if not re.fullmatch(_NAME, name) or len(name.encode()) > 200:  # of a file's name at most 255 bytes
            raise RequestError(
                422, f"prompt {name[:100]!r}: not a name; expected letters, digits, . _ and - (100 at most)", "name"
            )
        if uploads >= limits.max_uploads:
            raise RequestError(
                429, f"server: receives {uploads} prompts already; expected fewer; try again in a second"
            )

        def read(data: bytes) -> tuple[HostPrompt, Path | None]:
            stored = read_prompt(engine.bank, name, data)
            return stored, None if store is None else store.write(data, stored)

        def put(stored: HostPrompt, file: Path | None) -> dict[str, Any]:
            added = {*engine.bank.names, name} - at_start
            if len(added) > limits.max_prompts:
                raise RequestError(
                    429, f"server: {limits.max_prompts} prompts were added already; expected fewer; delete one", "name"
                )
            engine.check_prompt(name, stored)
            if store is not None and file is not None:
                store.keep(name, file)
            engine.bank.put(name, stored)
            return _about(engine, name)

        uploads += 1
        try:
            work = reader.submit(read, await body(request, limits.max_prompt_bytes))
            try:
                stored, file = await result_of(work)
                return await result_of(engine.call(functools.partial(put, stored, file)))
            finally:
                work.add_done_callback(_discard)  # at once, or when what took too long is over
        finally:
            uploads -= 1

    @app.delete("/v1/prompts/{name}", dependencies=guarded, status_code=204)
    async def remove(name: str) -> Response:
        """Remove a prompt; requests in progress still finish with it."""

        def forget() -> None:
            engine.bank.check_name(name)
            if store is not None:
                store.remove(name)
            engine.bank.remove(name)

        try:
            await result_of(engine.call(forget))
        except UserError as error:
            raise error if isinstance(error, RequestError) else RequestError(404, str(error), "name") from None
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

    @app.get("/openapi.json", dependencies=guarded, include_in_schema=False)
    async def openapi() -> Response:
        return json_response(description)

    @app.get("/", include_in_schema=False)
    @app.get("/{name}", include_in_schema=False)
    async def page(name: str = "index.html") -> Response:
        if name not in ("index.html", "page.css", "page.js"):
            raise fastapi.HTTPException(404, "Not Found")
        return FileResponse(_PAGE / name)

    description = described(app.openapi(), engine, token is not None)

    async def with_headers(scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = message | {"headers": [*message["headers"], *added]}
            await send(message)

        await app(scope, receive, sent)

    return with_headers


def is_this_machine(host: str) -> bool:
    """Tell whether a `Host` header names this machine itself: localhost or a loopback address, with or without port."""
    try:
        parsed = urlsplit(f"//{host}")
        name, _ = (parsed.hostname or "").removesuffix("."), parsed.port  # what is no port is a ValueError
        if parsed.netloc != host or "@" in host:
            return False
        address = ipaddress.ip_address("127.0.0.1" if name == "localhost" else name)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return False


def _json(values: Any) -> str:
    """Return JSON in ASCII, whatever a text holds; NaN, which JSON has not, is an error."""
    return json.dumps(values, allow_nan=False)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _number(text: str) -> int | float:
    """Return a number with a fraction or exponent; 3.0 is an integer too, as in JSON Schema."""
    number = float(text)
    return int(number) if number.is_integer() and -(2**63) <= number < 2**63 else number


def generated(asked: Request) -> Written:
    """Return what writes the answers of /v1/generate as events."""
    pieces = None

    def written(done: bool, jobs: list[Job]) -> Iterator[str]:
        nonlocal pieces
        answers, reader = jobs[0].answers[: len(jobs[0].answers) - len(asked.words)], jobs[0].reader
        assert reader is not None
        stops = () if reader.text.stop is None else (reader.text.stop,)
        pieces = pieces or TextStream([reader.decode] * len(answers), stops)
        for index, text in pieces.new_pieces(answers):
            yield _event("text", {"answer": index, "text": text})
        if done:
            yield _event("done", reply(asked, jobs[0]))

    return written


def _discard(read: concurrent.futures.Future) -> None:
    """Delete the file that an upload has written, unless it was kept."""
    if not read.cancelled() and read.exception() is None and (file := read.result()[1]) is not None:
        file.unlink(missing_ok=True)


def failed_event(error: RequestError) -> str:
    """Return the last event of a stream of /v1/generate that cannot go on."""
    return _event("error", error_body(error) | {"status": error.status})


def _event(kind: str, values: Any) -> str:
    return f"event: {kind}\ndata: {_json(values)}\n\n"


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
