"""Counters of a server in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from softprompt_jax.serve.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ServerMetrics:
    """Counts answers, errors and seconds; reads the rest from the engine on request."""

    def __init__(self, engine: Engine):
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._registry = CollectorRegistry()
        self._seconds = Histogram(
            "softprompt_request_seconds",
            "From a request's arrival to its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._refused = Counter(
            "softprompt_refused_total", "Requests not answered, by HTTP status.", ["status"], registry=self._registry
        )
        self._registry.register(_EngineCollector(engine))  # type: ignore[arg-type]

    def answered(self, seconds: float) -> None:
        """Count an answered request."""
        self._seconds.observe(seconds)

    def refused(self, status: int) -> None:
        """Count a request that was not answered."""
        self._refused.labels(str(status)).inc()

    def text(self) -> str:
        """Return everything in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry).decode()


class _EngineCollector:
    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        engine = self._engine
        yield CounterMetricFamily("softprompt_tokens", "Tokens written.", value=engine.tokens)
        yield GaugeMetricFamily("softprompt_waiting_requests", "Requests that wait for a slot.", value=engine.waiting)
        yield GaugeMetricFamily("softprompt_working_slots", "Answers that are decoded.", value=engine.working)
        yield GaugeMetricFamily("softprompt_slots", "Answers that can be decoded at once.", value=engine.limits.slots)
        yield GaugeMetricFamily("softprompt_prompts", "Prompts in the bank.", value=len(engine.bank.names))
