"""What Prometheus reads at /metrics: counters of the engine as they are when it asks, and of the
requests.

Of the latter: how many by path and status, how long they waited for their turn and for their first
token. Nothing that a client sends becomes a label.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from flexinfer.engine.engine import Engine
from flexinfer.serve.line import Line

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
# Counter in Engine.stats() -> metric and description.
COUNTERS = {
    "passes": ("flexinfer_passes", "passes over the weights"),
    "bytes_read": ("flexinfer_read_bytes", "bytes read from disk"),
    "wait_s": ("flexinfer_wait_seconds", "seconds that kernels waited for a read"),
    "compute_s": ("flexinfer_compute_seconds", "seconds of passes without the waits"),
}


class Metrics:
    """The registry of one server."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "flexinfer_requests",
            "requests by path and status",
            ("path", "status"),
            registry=registry,
        )
        self.tokens = Counter(
            "flexinfer_tokens", "tokens of prompts and answers", ("of",), registry=registry
        )
        self.waited = Histogram(
            "flexinfer_turn_wait_seconds", "waiting for a turn", buckets=SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "flexinfer_first_token_seconds",
            "from the turn to the first token",
            buckets=SECONDS,
            registry=registry,
        )

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class EngineCollector:
    """What `engine` counts, and how full the line of requests is, at the moment of asking."""

    def __init__(self, engine: Engine, line: Line) -> None:
        self._engine, self._line = engine, line

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        stats, plan = self._engine.stats(), self._engine.plan
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, stats[field])
        gauges = {
            "flexinfer_budget_bytes": ("memory of the whole process", plan.budget_bytes),
            "flexinfer_peak_bytes": ("the most that was in use", stats["peak_bytes"]),
            "flexinfer_locked_bytes": ("weights that stay in memory", plan.locked_bytes),
            "flexinfer_streamed_bytes": ("weights read for each pass", plan.streamed_bytes),
            "flexinfer_bound_tokens_per_second": ("no system is faster", plan.bound_tokens_per_s),
            "flexinfer_context_tokens": ("of a prompt and its answer", self._engine.context),
            "flexinfer_queue_places": ("requests that may wait", self._line.places),
            "flexinfer_queue_waiting": ("requests that wait", self._line.waiting),
            "flexinfer_generating": ("requests that have the turn", int(self._line.busy)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
