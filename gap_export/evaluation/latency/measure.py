"""Latency of bundles, measured against each other in one run: time to first token, time per output token, the parts.

Machines drift (clocks, neighbours, caches), so figures from two runs do not compare. Here all candidates answer the same
request in turn, round after round, and every ratio compares requests that lie milliseconds apart.

Every request generates the same number of tokens, end tokens ignored: all candidates do the same work. Clocks start with
finished pixel values and token ids; reading and resizing an image is not part of any figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.environment import cpu_name, peak_rss_bytes, versions
from gap_export.errors import InputError
from gap_export.evaluation.latency.candidate import Candidate
from gap_export.evaluation.latency.cost import cache_bytes, cost_of
from gap_export.evaluation.latency.record import QUANTITIES, BenchRecord, Device, Percentiles, Ratio, Row
from gap_export.positions import advance
from gap_export.progress import SILENT, Progress
from gap_export.runtime.generate import encode

Clock = Callable[[], float]
"""Seconds from an arbitrary start, never going back."""

_DIGITS = 4
_RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)


def measure(
    candidates: Sequence[Candidate],
    *,
    requests: int,
    new_tokens: int,
    warmup: int = 10,
    device: str = "",
    roofline: Device | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress = SILENT,
) -> BenchRecord:
    """Let all candidates answer in turn, round after round.

    The order is drawn anew for every round (the same draws in every run): a request finds the processor's caches as the one
    before left them, so no candidate may always follow the same other.

    Args:
        candidates: at least one, names distinct.
        requests: rounds to measure.
        new_tokens: generated per image.
        warmup: rounds before the first measured one.
        device: what it runs on; the CPU's name by default.
        roofline: what that can do at best, for the cost card.
        clock: for tests.
        progress: told of every round, warm-up included.

    Raises:
        InputError: nothing to measure, two candidates of one name, or more tokens than a cache has slots for.
    """
    names = [each.name for each in candidates]
    if requests < 1 or new_tokens < 1 or warmup < 0 or not names:
        raise InputError(
            "needs at least one bundle, one request and one token",
            subject="bench",
            hint="try --requests 100 --new-tokens 12",
        )
    if len(set(names)) != len(names):
        raise InputError("are not distinct", subject=f"names {', '.join(names)}", hint="rename one of them")
    for each in candidates:
        # The last token generated is never fed back, so it needs no slot.
        needed = each.prompt_slots + new_tokens - 1
        if needed > each.bundle.manifest.capacity:
            raise InputError(
                f"needs {needed} cache slots, the bundle has {each.bundle.manifest.capacity}",
                subject=f"{each.name} with {new_tokens} new tokens",
                hint="ask for fewer new tokens, or build with a larger --capacity",
            )
    progress.stage("measuring", total=warmup + requests)
    rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    order = np.random.default_rng(0)
    for number in range(-warmup, requests):
        for each in (candidates[index] for index in order.permutation(len(candidates))):
            columns = _columns(time_request(each, new_tokens, clock))
            if number >= 0:
                rounds[each.name].append(columns)
        progress.advance()
    table = {name: np.array(columns) * 1e3 for name, columns in rounds.items()}
    return BenchRecord(
        device=device or cpu_name(),
        versions=versions(),
        requests=requests,
        warmup=warmup,
        peak_rss_bytes=peak_rss_bytes(),
        roofline=roofline,
        rows=tuple(_row(each, table[each.name], new_tokens, roofline) for each in candidates),
        ratios=tuple(
            ratio(one, other, quantity, table[one][:, column], table[other][:, column])
            for one, other in combinations(names, 2)
            for column, quantity in enumerate(QUANTITIES)
            if table[other][:, column].all()
        ),
    )


def time_request(each: Candidate, new_tokens: int, clock: Clock = time.perf_counter) -> list[float]:
    """Answer one request greedily, end tokens ignored.

    Returns:
        Clock readings in seconds: at the start, after `encode`, `splice`, `prefill`, and after every further token
        (choosing a token counts with the step that it is fed to). 3 + `new_tokens` readings.
    """
    session = each.session
    readings = [clock()]
    visual = encode(session, each.images, text_ids_BL=each.text_ids_BL, keep_counts=each.keep_counts)
    readings.append(clock())
    spliced = session.splice(each.input_ids_BT, visual)
    readings.append(clock())
    logits = session.prefill(spliced.embeds, spliced.placement, reserve=new_tokens).logits
    readings.append(clock())
    placement = spliced.placement
    for _ in range(new_tokens - 1):
        placement = advance(placement)
        logits = session.step(logits.argmax(axis=-1).astype(np.int64), placement)
        readings.append(clock())
    return readings


def percentiles(samples: NDArray[np.float64]) -> Percentiles:
    """The 50th, 90th and 99th of [R] samples."""
    p50, p90, p99 = (round(float(value), _DIGITS) for value in np.percentile(samples, (50, 90, 99)))
    return Percentiles(p50=p50, p90=p90, p99=p99)


def ratio(
    one: str,
    other: str,
    quantity: str,
    samples_one_R: NDArray[np.float64],
    samples_other_R: NDArray[np.float64],
) -> Ratio:
    """Ratio of medians with its 95% interval.

    Rounds are resampled in pairs, one draw for both candidates: what slowed a whole round down cancels out. The draws are
    the same in every run (Efron's percentile bootstrap with a fixed seed).

    Args:
        one: name of the numerator.
        other: name of the denominator.
        quantity: what was sampled.
        samples_one_R: [R], round by round.
        samples_other_R: [R], the same rounds.
    """
    rounds = len(samples_one_R)
    draws = np.random.default_rng(0).integers(0, rounds, (_RESAMPLES, rounds))
    resampled = np.median(samples_one_R[draws], axis=1) / np.median(samples_other_R[draws], axis=1)
    low, high = np.percentile(resampled, _INTERVAL)
    return Ratio(
        numerator=one,
        denominator=other,
        quantity=quantity,
        ratio=round(float(np.median(samples_one_R) / np.median(samples_other_R)), _DIGITS),
        low=round(float(low), _DIGITS),
        high=round(float(high), _DIGITS),
    )


def _columns(readings: list[float]) -> tuple[float, ...]:
    """Clock readings of one request -> seconds, in the order of `QUANTITIES`."""
    start, encoded, spliced, first, *later = readings
    last = later[-1] if later else first
    return (
        encoded - start,
        spliced - encoded,
        first - spliced,
        first - start,
        (last - first) / len(later) if later else 0.0,
        last - start,
    )


def _row(each: Candidate, samples_RQ: NDArray[np.float64], new_tokens: int, device: Device | None) -> Row:
    manifest = each.bundle.manifest
    model, pruning = manifest.spec, manifest.pruning
    batch = len(each.input_ids_BT)
    capacities = each.capacities(new_tokens)
    cost = None if device is None else cost_of(each, each.prompt_slots, capacities, device)
    spans: dict[str, Any] = {
        quantity: percentiles(samples_RQ[:, column]) for column, quantity in enumerate(QUANTITIES)
    }
    return Row(
        name=each.name,
        backend=each.session.backend,
        precision=manifest.precision,
        positions=pruning.positions,
        pruner=pruning.pruner,
        keep=pruning.keep if each.keep is None else each.keep,
        kept=each.kept,
        visual_tokens=model.visual_tokens,
        batch=batch,
        prompt_slots=each.prompt_slots,
        capacity=capacities[0],
        cache_bytes=cache_bytes(each, batch, capacities),
        new_tokens=new_tokens,
        **spans,
        cost=cost,
        roofline_fraction=_fraction(None if cost is None else cost.first_token_ms, spans["ttft_ms"]),
        tpot_roofline_fraction=_fraction(None if cost is None else cost.decode.roofline_ms, spans["tpot_ms"]),
    )


def _fraction(least_ms: float | None, measured: Percentiles) -> float | None:
    return None if not least_ms or not measured.p50 else round(least_ms / measured.p50, _DIGITS)
