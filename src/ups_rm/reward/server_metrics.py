"""What the reward server tells Prometheus at `/metrics`; docs/guides/rm-server.md lists the names."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ups_rm.reward.batch_queue import BatchQueue, BatchReport

ENDPOINTS = frozenset({"/score", "/get_reward", "/classify", "/health", "/metrics"})
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class ServerMetrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        on = self.registry
        self.requests = Counter(
            "ups_rm_requests", "Answers by endpoint and status.", ["endpoint", "status"], registry=on
        )
        self.request_seconds = Histogram(
            "ups_rm_request_seconds", "From head to answer.", ["endpoint"], buckets=SECONDS, registry=on
        )
        self.conversations = Counter("ups_rm_conversations", "Conversations scored.", registry=on)
        self.truncated = Counter("ups_rm_truncated", "Of these, cut to the RM's limit.", registry=on)
        self.tokens = Counter(
            "ups_rm_tokens",
            "RM tokens read, a shared prompt once, no padding.",
            ["device"],
            registry=on,
        )
        self.padding = Counter("ups_rm_padding_tokens", "Padding of batches.", ["device"], registry=on)
        self.model_seconds = Counter("ups_rm_model_seconds", "Time in models.", ["device"], registry=on)
        self.batch_rows = Histogram(
            "ups_rm_batch_rows", "Conversations per batch.", ["device"], buckets=ROWS, registry=on
        )
        self.wait_seconds = Histogram(
            "ups_rm_queue_wait_seconds", "Longest wait in the queue, per batch.", buckets=SECONDS, registry=on
        )

    def watch(self, queue: BatchQueue) -> None:
        """Show the queue's state as it is when somebody asks."""
        waiting = Gauge("ups_rm_waiting_conversations", "Accepted and not yet answered.", registry=self.registry)
        waiting.set_function(lambda: queue.waiting)
        limit = Gauge("ups_rm_waiting_limit", "Above which requests get 429.", registry=self.registry)
        limit.set(queue.max_waiting)
        tokens = Gauge("ups_rm_queued_tokens", "RM tokens that wait for a model.", registry=self.registry)
        tokens.set_function(lambda: queue.queued_tokens)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count an answer; paths that are not ours count as one, so that nobody can grow the registry."""
        endpoint = path if path in ENDPOINTS else "other"
        self.requests.labels(endpoint, str(status)).inc()
        self.request_seconds.labels(endpoint).observe(seconds)

    def batch(self, report: BatchReport) -> None:
        """Count a batch; called from models' threads."""
        self.tokens.labels(report.device).inc(report.tokens)
        self.padding.labels(report.device).inc(report.padding)
        self.model_seconds.labels(report.device).inc(report.seconds)
        self.batch_rows.labels(report.device).observe(report.conversations)
        self.wait_seconds.observe(report.longest_wait)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
