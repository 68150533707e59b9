"""The record of a latency measurement."""

from __future__ import annotations

from gap_export.records import Amount, Record

QUANTITIES = {
    "encode_ms": "vision",
    "splice_ms": "splice",
    "prefill_ms": "prefill",
    "ttft_ms": "time to first token",
    "tpot_ms": "time per output token",
    "total_ms": "whole request",
}
"""Field of a row -> label on the screen, in the order in which they are measured."""


class Percentiles(Record):
    """Over all rounds, in milliseconds, linearly interpolated."""

    p50: Amount
    p90: Amount
    p99: Amount


class Device(Record):
    """What the machine can do at best, measured: see `cost.measure_device`."""

    flops_per_second: float
    bytes_per_second: float
    threads: int


class PhaseCost(Record):
    """One phase of a request.

    Attributes:
        flops: operations; None where the bundle does not tell.
        bytes: of weights read once and of the cache that is read or written.
        roofline_ms: no less time than this, on the device of the record.
    """

    flops: int | None
    bytes: int
    roofline_ms: float | None


class Cost(Record):
    """The cost card of a candidate's request; `decode` is one token of every row."""

    vision: PhaseCost
    prefill: PhaseCost
    decode: PhaseCost
    cache_bytes: int

    @property
    def first_token_flops(self) -> int | None:
        """Up to the first token."""
        parts = (self.vision.flops, self.prefill.flops)
        return None if None in parts else sum(part or 0 for part in parts)

    @property
    def first_token_ms(self) -> float | None:
        """No less time than this up to the first token."""
        parts = (self.vision.roofline_ms, self.prefill.roofline_ms)
        return None if None in parts else sum(part or 0.0 for part in parts)


class Row(Record):
    """One candidate.

    Attributes:
        name: as the caller called it.
        manifest_sha256: of its bundle; None in records of earlier versions.
        backend: runtime.
        precision: of weights and activations.
        positions: numbering policy.
        pruner: name.
        keep: fraction of visual tokens kept.
        kept: the count.
        visual_tokens: before pruning.
        batch: images per request.
        prompt_slots: cache slots the longest prompt of the batch takes, kept visual tokens included.
        capacity: cache slots; attention reads all of them, filled or not.
        cache_bytes: of keys and values of all layers, for the batch.
        new_tokens: generated per image.
        encode_ms: vision tower, pruner, projector.
        splice_ms: visual tokens into the prompt, position ids.
        prefill_ms: decoder over the prompt.
        ttft_ms: time to first token, the sum of the three above.
        tpot_ms: time per output token after the first, the mean over one request; 0 when only one was asked for.
        total_ms: the whole request.
        cost: of one request; None where no device was measured.
        roofline_fraction: least time to the first token that the device allows, over its median.
        tpot_roofline_fraction: measured time of a token as a fraction of the roofline's.
        peak_rss_bytes: of a process that holds this candidate alone; None where it was not measured.
    """

    name: str
    manifest_sha256: str | None = None
    backend: str
    precision: str
    positions: str
    pruner: str
    keep: float
    kept: int
    visual_tokens: int
    batch: int
    prompt_slots: int
    capacity: int
    cache_bytes: int
    new_tokens: int
    encode_ms: Percentiles
    splice_ms: Percentiles
    prefill_ms: Percentiles
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    total_ms: Percentiles
    cost: Cost | None = None
    roofline_fraction: float | None = None
    tpot_roofline_fraction: float | None = None
    peak_rss_bytes: int | None = None


class Ratio(Record):
    """Median of one candidate over median of another, same rounds.

    Attributes:
        numerator: name of a row.
        denominator: name of a row.
        quantity: one of `QUANTITIES`.
        ratio: of the medians.
        low: lower end of the interval that holds 95% of resampled rounds (paired bootstrap).
        high: upper end.
    """

    numerator: str
    denominator: str
    quantity: str
    ratio: float
    low: float
    high: float


class BenchRecord(Record):
    """One run.

    Attributes:
        manifest_sha256: of the bundle among whose reports it lies; None before it is stored.
        device: what it ran on.
        versions: package -> version.
        requests: rounds measured; every candidate answered one request per round.
        warmup: rounds before them that were not measured.
        roofline: what the device can do; None where it was not measured.
        peak_rss_bytes: of the process with all candidates loaded; None where the system does not tell.
        rows: candidates, in the caller's order.
        ratios: every pair of rows, every quantity.
    """

    manifest_sha256: str | None = None
    device: str
    versions: dict[str, str]
    requests: int
    warmup: int
    roofline: Device | None = None
    peak_rss_bytes: int | None
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
