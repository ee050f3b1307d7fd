# SPDX-License-Identifier: Apache-2.0
"""Counters of a server in Prometheus' form. Labels have few values, independent of what clients send."""

from collections.abc import Callable, Mapping
from typing import Any

from .request_log import CLIENT_LEFT, Record

__all__ = ["Metrics"]

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The metrics of one server, in their own registry.

    Args:
        gauges: name, without prefix, to a description and a function that returns the present value.

    Raises:
        ImportError: prometheus_client is not installed.
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        to_here: dict[str, Any] = {"namespace": "fastvlm", "registry": self.registry}
        self._requests = Counter("requests", "Requests that have ended.", ["endpoint", "status"], **to_here)
        self._refused = Counter(
            "requests_refused", "Requests answered with an error, by its code.", ["reason"], **to_here
        )
        self._answers = Counter("answers", "Answers that have ended, by finish reason.", ["finish_reason"], **to_here)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts, images included.", **to_here)
        self._completion = Counter("completion_tokens", "Tokens of answers.", **to_here)
        self._first = Histogram(
            "time_to_first_token_seconds",
            "From the head of a request to its first token.",
            buckets=_FIRST_TOKEN,
            **to_here,
        )
        self._whole = Histogram(
            "request_seconds", "From the head of a request to the end of its answer.", buckets=_WHOLE, **to_here
        )
        for name, (description, value) in gauges.items():
            Gauge(name, description, **to_here).set_function(value)

    def count(self, record: Record) -> None:
        """Count a request that has ended."""
        self._requests.labels(record.endpoint, str(record.status)).inc()
        if record.status >= 400 and record.status != CLIENT_LEFT:
            self._refused.labels(record.code or f"status_{record.status}").inc()
        for reason in record.finish_reasons:
            self._answers.labels(reason).inc()
        self._prompt.inc(record.prompt_tokens)
        self._completion.inc(record.completion_tokens)
        if record.first_token_at is not None:
            self._first.observe(record.first_token_at - record.start)
        if record.id is not None:
            self._whole.observe(record.seconds["total"])

    def page(self) -> tuple[bytes, str]:
        """Return all metrics in Prometheus' text form, and its media type."""
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
