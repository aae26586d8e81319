"""Prometheus metrics at `/metrics`: counts and latencies of requests, tokens and captures.

Only the replicas know what a generation cost, and only the ingress sees whole requests. So a replica sends small
`RequestStats` with each reply, and the ingress, which has the registry, observes them. The engines' load is requested from
the replicas when `/metrics` is read.
"""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from serve_app.engines.protocol import Load
from serve_app.requests.stats import RequestStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class _Engines(Collector):
    """Collects the load that the replicas' engines report when the registry is read."""

    def __init__(self) -> None:
        self.loads: Mapping[str, Load] = {}

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("roentgen_generations_running", "Generations in the batch now.", labels=["replica"])
        waiting = GaugeMetricFamily("roentgen_generations_waiting", "Generations in the queue now.", labels=["replica"])
        sizes = HistogramMetricFamily(
            "roentgen_batch_size", "Generations that one decoding step advances.", labels=["replica"]
        )
        held = GaugeMetricFamily(
            "roentgen_prefix_cache_bytes", "Size of the prefix cache, captured rows included.", labels=["replica"]
        )
        hits = CounterMetricFamily(
            "roentgen_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.", labels=["replica"]
        )
        misses = CounterMetricFamily(
            "roentgen_prefix_cache_miss_tokens", "Prompt tokens not found in the prefix cache.", labels=["replica"]
        )
        for replica, load in self.loads.items():
            held.add_metric([replica], load.cache_bytes)
            hits.add_metric([replica], load.cache_hits)
            misses.add_metric([replica], load.cache_misses)
            running.add_metric([replica], load.running)
            waiting.add_metric([replica], load.waiting)
            below = [(str(float(most)), sum(n for size, n in load.steps.items() if size <= most)) for most in BATCH]
            total = sum(load.steps.values())
            sizes.add_metric([replica], [*below, ("+Inf", total)], sum(size * n for size, n in load.steps.items()))
        yield from (running, waiting, sizes, held, hits, misses)


class Metrics:
    """The metrics registry of one ingress."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        by_route = ["route", "method"]
        self._requests = Counter(
            "roentgen_requests", "Requests answered.", ["route", "method", "status"], registry=registry
        )
        self._in_flight = Gauge("roentgen_requests_in_flight", "Requests in flight.", registry=registry)
        self._seconds = Histogram(
            "roentgen_request_seconds", "Time from a request's arrival to the end of its reply.", by_route,
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._prompt = Counter("roentgen_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._completion = Counter("roentgen_completion_tokens", "Tokens generated.", registry=registry)
        self._queued = Histogram(
            "roentgen_queue_seconds", "Time from submission until a generation's prefill starts.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._first = Histogram(
            "roentgen_time_to_first_token_seconds", "Time from submission to a generation's first token.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._between = Histogram(
            "roentgen_inter_token_seconds", "Mean time between a generation's tokens.",
            buckets=TOKEN_SECONDS, registry=registry,
        )  # fmt: skip
        self._capture = Counter("roentgen_capture_bytes", "Bytes of activations committed.", registry=registry)
        self._commit = Histogram(
            "roentgen_commit_seconds", "Time to commit a rollout's activations.", buckets=SECONDS, registry=registry
        )
        self._engines = _Engines()
        registry.register(self._engines)

    def began(self) -> None:
        """Count the start of a request."""
        self._in_flight.inc()

    def ended(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count the end of a request."""
        self._in_flight.dec()
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route, method).observe(seconds)

    def observe(self, stats: RequestStats) -> None:
        """Add the statistics of a request."""
        self._prompt.inc(stats.prompt_tokens)
        self._completion.inc(stats.completion_tokens)
        for choice in stats.choices:
            self._queued.observe(choice.queued_s)
            self._first.observe(choice.first_token_s)
            if choice.tokens > 1:
                self._between.observe((choice.total_s - choice.first_token_s) / (choice.tokens - 1))
            if choice.commit_s is not None:
                self._capture.inc(choice.capture_bytes)
                self._commit.observe(choice.commit_s)

    def text(self, loads: dict[str, Load]) -> bytes:
        """Return all metrics in Prometheus format, with the current `loads` of the replicas."""
        self._engines.loads = loads
        return generate_latest(self._registry)
