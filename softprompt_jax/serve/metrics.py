"""Counters of a server in the format of Prometheus."""

from __future__ import annotations

from typing import Any

from softprompt_jax.serve.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ServerMetrics:
    """Counts answers, errors and seconds; reads the rest from the engine on request."""

    def __init__(self, engine: Engine):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._engine, self._registry = engine, CollectorRegistry()
        to: dict[str, Any] = {"registry": self._registry}
        seconds = "From a request's arrival to its answer."
        self._seconds = Histogram("softprompt_request_seconds", seconds, buckets=_SECONDS, **to)
        self._refused = Counter("softprompt_refused_total", "Requests not answered, by HTTP status.", ["status"], **to)
        self._tokens, self._counted = Counter("softprompt_tokens", "Tokens written.", **to), 0
        for name, about, value in (
            ("waiting_requests", "Requests that wait for a slot.", lambda: engine.waiting),
            ("working_slots", "Answers that are decoded.", lambda: engine.working),
            ("slots", "Answers that can be decoded at once.", lambda: engine.limits.slots),
            ("prompts", "Prompts in the bank.", lambda: len(engine.bank)),
        ):
            Gauge(f"softprompt_{name}", about, **to).set_function(value)

    def answered(self, seconds: float) -> None:
        """Count an answered request."""
        self._seconds.observe(seconds)

    def refused(self, status: int) -> None:
        """Count a request that was not answered."""
        self._refused.labels(str(status)).inc()

    def text(self) -> str:
        """Return everything in Prometheus' text format."""
        from prometheus_client import generate_latest

        written = self._engine.tokens
        self._tokens.inc(written - self._counted)
        self._counted = written
        return generate_latest(self._registry).decode()
