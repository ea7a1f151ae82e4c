"""One HTTP connection: uvicorn's, but one that ends when its client is too slow, and that refuses in JSON."""

from __future__ import annotations

import json
from typing import Any

from softprompt_jax.serve.limits import Limits, RequestError, error_body


def connection_class(limits: Limits) -> type[Any]:
    """Return a protocol for uvicorn with these timeouts.

    A connection is closed where a request's header is not complete after `header_timeout_s`, where nothing comes for
    `keep_alive_s` after an answer, and where a client takes nothing of an answer for `timeout_s`. Bodies have their
    time in app.py.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        _late: Any = None  # closes it unless a header is complete before
        _stuck: Any = None  # closes it unless the client reads before

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_header(0.0)

        def _await_header(self, idle_s: float) -> None:
            self._late = self.loop.call_later(idle_s + limits.header_timeout_s, self.transport.abort)

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:
                self._late = _cancelled(self._late)

        def on_response_complete(self) -> None:
            self.timeout_keep_alive = limits.keep_alive_s
            self._await_header(limits.keep_alive_s)  # also the time for the rest of a body that nobody reads
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stuck = self.loop.call_later(limits.timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stuck = _cancelled(self._stuck)

        def connection_lost(self, exc: Exception | None) -> None:
            self._late, self._stuck = _cancelled(self._late), _cancelled(self._stuck)
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            body = json.dumps(error_body(RequestError(400, f"request: {msg}"))).encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Connection


def _cancelled(timer: Any) -> None:
    if timer is not None:
        timer.cancel()
