"""What is counted, for Prometheus: names and meanings as operators of inference servers know them, and what pruning does beside.

    metrics = ServerMetrics()
    with Engine(model, limits, observer=metrics) as engine:
        metrics.watch(engine)
        metrics.render()

Labels have few values that are known beforehand, whatever clients send: what is none of them is counted as `other`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from gap_export.errors import (
    GapExportError,
    InputError,
    MissingRequirementError,
    RecipeError,
    SessionError,
)
from gap_export.serving.engine import Engine
from gap_export.serving.work import Refused, Result

REJECTIONS = ("full", "draining", "broken", "not_ready", "other")
"""Why a request is not admitted."""
FAILURES = ("deadline", "cancelled", "draining", "invalid", "runtime", "other")
"""Why a question that was admitted has no answer."""
STAGES = ("decode_image", "vision", "prefill", "decode")
"""Of an answer, as in `work.Spent`."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class ServerMetrics:
    """Counts what an engine does for clients; it is an `observer.Observer`.

    Attributes:
        registry: of these metrics and no others, so that several servers in a process do not share theirs.
        content_type: of what `render` gives.
    """

    content_type: str = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._published = _WithoutTimes(registry)
        self._first_token = _histogram(
            registry, "gap_time_to_first_token_seconds", "From admission to an answer's first token."
        )
        self._interval = _histogram(
            registry, "gap_inter_token_latency_seconds", "Between two tokens of an answer.", _TOKEN_SECONDS
        )
        self._whole = _histogram(
            registry, "gap_e2e_request_latency_seconds", "From admission to an answer's last token."
        )
        self._queue = _histogram(
            registry,
            "gap_request_queue_time_seconds",
            "From admission until an answer was begun, fetching and decoding of images left out.",
        )
        self._stages = Histogram(
            "gap_stage_seconds",
            "Of an answer, by stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._keep = _histogram(
            registry, "gap_keep_ratio", "Share of the visual tokens that an answer was given with.", _SHARES
        )
        self._rows = _histogram(registry, "gap_decode_rows", "Rows that were decoded together.", _ROWS)
        self._succeeded = Counter(
            "gap_request_success", "Answers, by how they ended.", ["finish_reason"], registry=registry
        )
        self._failed = Counter(
            "gap_request_failure",
            "Questions that were admitted and not answered.",
            ["reason"],
            registry=registry,
        )
        self._rejected = Counter(
            "gap_admission_rejections", "Requests that were not admitted.", ["reason"], registry=registry
        )
        self._visual = Counter(
            "gap_visual_tokens",
            "Visual tokens of answers, by what became of them.",
            ["fate"],
            registry=registry,
        )
        self._tokens = Counter("gap_generation_tokens", "Tokens of answers.", registry=registry)
        self._mismatches = Counter(
            "gap_receipt_mismatch",
            "Answers that were not computed as their receipt would have said.",
            registry=registry,
        )
        for counter, label, values in (
            (self._succeeded, "finish_reason", ("stop", "length")),
            (self._failed, "reason", FAILURES),
            (self._rejected, "reason", REJECTIONS),
            (self._visual, "fate", ("kept", "pruned")),
        ):
            for value in values:  # at 0 from the beginning: a rate over a series that is not there is nothing
                counter.labels(**{label: value})
        for stage in STAGES:
            self._stages.labels(stage=stage)

    def watch(self, engine: Engine) -> None:
        """Read an engine's queue, rows and cache whenever metrics are asked for.

        Args:
            engine: that tells this observer what it does.
        """
        self.registry.register(_OfEngine(engine))

    def render(self) -> bytes:
        """All of it by now, in Prometheus' text format."""
        return generate_latest(self._published)

    def receipt_mismatch(self) -> None:
        """An answer was not computed as its receipt would say."""
        self._mismatches.inc()

    # Of the engine

    def refused(self, reason: str) -> None:
        """A request was not admitted."""
        self._rejected.labels(reason=reason if reason in REJECTIONS else "other").inc()

    def answered(self, result: Result) -> None:
        """An answer was given."""
        spent = result.spent
        self._succeeded.labels(finish_reason=result.finish_reason).inc()
        self._first_token.observe(spent.queue + spent.decode_image + spent.vision + spent.prefill)
        self._whole.observe(spent.total)
        self._queue.observe(spent.queue)
        for stage in STAGES:
            self._stages.labels(stage=stage).observe(getattr(spent, stage))
        self._tokens.inc(len(result.ids))
        if result.visual_tokens:
            self._keep.observe(result.kept / result.visual_tokens)
            self._visual.labels(fate="kept").inc(result.kept)
            self._visual.labels(fate="pruned").inc(max(0, result.visual_tokens - result.kept))

    def failed(self, error: GapExportError) -> None:
        """A question that was admitted has an error for an answer."""
        reason: str
        if isinstance(error, Refused):
            reason = "runtime" if error.reason == "broken" else error.reason
        elif isinstance(error, InputError | RecipeError):
            reason = "invalid"
        elif isinstance(error, SessionError | MissingRequirementError):
            reason = "runtime"
        else:
            reason = "other"
        self._failed.labels(reason=reason if reason in FAILURES else "other").inc()

    def stepped(self, seconds: float, intervals: Sequence[float]) -> None:
        """One token of several rows was decoded."""
        self._rows.observe(len(intervals))
        for interval in intervals:
            self._interval.observe(interval)


class _OfEngine(Collector):
    """What an engine is at, read when it is asked for.

    Args:
        engine: that is read.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """Queue, rows, cache, and images decoded."""
        engine = self._engine
        for name, meaning, value in (
            ("gap_num_requests_waiting", "Requests that were admitted and have not begun.", engine.waiting),
            (
                "gap_num_requests_running",
                "Questions that are being computed, each in a row of the cache.",
                engine.running,
            ),
            ("gap_kv_cache_usage_perc", "Share of the cache's slots in use, from 0 to 1.", engine.used_slots),
            (
                "gap_queue_oldest_wait_seconds",
                "How long a request has waited for others to be begun, the longest of all; fetching and decoding of its images left out.",
                engine.oldest_wait(),
            ),
        ):
            yield GaugeMetricFamily(name, meaning, value=value)
        yield CounterMetricFamily(
            "gap_images_decoded", "Images that were decoded.", value=engine.images_decoded
        )


class _WithoutTimes(Collector):
    """Metrics without the times at which their series were made, which nothing asks for and which double their number.

    Args:
        registry: of the metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """Every metric."""
        for metric in self._registry.collect():
            metric.samples = [each for each in metric.samples if not each.name.endswith("_created")]
            yield metric


def _histogram(
    registry: CollectorRegistry, name: str, meaning: str, buckets: Sequence[float] = _SECONDS
) -> Histogram:
    return Histogram(name, meaning, buckets=buckets, registry=registry)
