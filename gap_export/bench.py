"""Latency of bundles, measured against each other in one run: time to first token, time per output token, the parts.

Machines drift (clocks, neighbours, caches), so figures from two runs do not compare. Here all contenders answer the same
request in turn, round after round, and every ratio is taken between rounds that lie milliseconds apart.

Every request generates the same number of tokens, end tokens ignored: all contenders do the same work. Clocks start with
finished pixel values and token ids; reading and resizing a picture is not part of any figure.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gap_export.bundle import Bundle
from gap_export.errors import InputError
from gap_export.positions import Ids, advance
from gap_export.runtime.prompt import encode_prompts, load_tokenizer
from gap_export.runtime.session import Session

if TYPE_CHECKING:
    from rich.table import Table

EXPRESSION = "the small red circle on the left"
QUANTITIES = ("encode_ms", "splice_ms", "prefill_ms", "ttft_ms", "tpot_ms", "total_ms")
"""Columns of a round, in the order of `_columns`."""

Clock = Callable[[], float]
"""Seconds from an arbitrary start, never going back."""

_RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)
_CACHE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_PACKAGES = ("gap-export", "numpy", "onnxruntime", "tensorrt-rtx", "tensorrt")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Percentiles(_Record):
    """Over all rounds, in milliseconds, linearly interpolated."""

    p50: float
    p90: float
    p99: float


class Row(_Record):
    """One contender.

    Attributes:
        name: as the caller called it.
        backend: runtime.
        precision: of weights and activations.
        positions: numbering policy.
        pruner: strategy.
        keep: fraction of visual tokens kept.
        kept: the count.
        visual_tokens: before pruning.
        batch: pictures per request.
        prompt_slots: cache slots the longest prompt of the batch takes, kept visual tokens included.
        capacity: cache slots; attention reads all of them, filled or not.
        cache_bytes: of keys and values of all layers, for the batch.
        new_tokens: generated per picture.
        encode_ms: vision tower, pruner, projector.
        splice_ms: visual tokens into the prompt, position ids.
        prefill_ms: decoder over the prompt.
        ttft_ms: time to first token, the sum of the three above.
        tpot_ms: time per output token after the first, the mean over one request; 0 when only one was asked for.
        total_ms: the whole request.
    """

    name: str
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


class Ratio(_Record):
    """Median of one contender over median of another, same rounds.

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


class BenchRecord(_Record):
    """One run.

    Attributes:
        device: what it ran on.
        versions: package -> version.
        requests: rounds measured; every contender answered one request per round.
        warmup: rounds before them that were not measured.
        peak_rss_bytes: of the process with all contenders loaded; None where the system does not tell.
        rows: contenders, in the caller's order.
        ratios: every pair of rows, every quantity.
    """

    device: str
    versions: dict[str, str]
    requests: int
    warmup: int
    peak_rss_bytes: int | None
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]


@dataclass(frozen=True)
class Contender:
    """A loaded bundle and the request it answers.

    Attributes:
        name: unique among the contenders of a run.
        bundle: opened.
        session: the bundle, loaded.
        pixel_values_BCHW: [B, 3, size, size] float32.
        input_ids_BT: [B, T] int64, one placeholder per row.
    """

    name: str
    bundle: Bundle
    session: Session
    pixel_values_BCHW: NDArray[np.float32]
    input_ids_BT: Ids


def contender(
    name: str, bundle: Bundle, session: Session, *, batch: int = 1, new_tokens: int | None = None
) -> Contender:
    """A contender with a stand-in request: the bundle's own prompt around a short expression, noise for a picture.

    What a dense model costs depends on shapes, not on values.

    Args:
        name: unique among the contenders of a run.
        bundle: opened.
        session: the bundle, loaded.
        batch: pictures per request.
        new_tokens: that will be asked for; the bundle's longest answer by default.

    Raises:
        InputError: prompt and answer do not fit into the cache.
    """
    manifest = bundle.manifest
    prompts = encode_prompts(
        load_tokenizer(bundle.tokenizer_path),
        manifest.prompt,
        [EXPRESSION] * batch,
        kept=manifest.pruning.kept,
        capacity=manifest.capacity,
        max_new_tokens=new_tokens or manifest.max_new_tokens,
    )
    side = manifest.preprocessing.size
    noise = np.random.default_rng(0).standard_normal((batch, 3, side, side), np.float32)
    return Contender(name, bundle, session, noise, prompts.input_ids)


def measure(
    contenders: Sequence[Contender],
    *,
    requests: int,
    new_tokens: int,
    warmup: int = 10,
    device: str = "",
    clock: Clock = time.perf_counter,
    tick: Callable[[], None] = lambda: None,
) -> BenchRecord:
    """Let all contenders answer in turn, round after round.

    The first of a round changes from round to round, so that nobody always runs in the wake of the same other.

    Args:
        contenders: at least one, names distinct.
        requests: rounds to measure.
        new_tokens: generated per picture.
        warmup: rounds before the first measured one.
        device: what it runs on; the CPU's name by default.
        clock: for tests.
        tick: called after every round, warm-up included.

    Raises:
        InputError: nothing to measure, or two contenders of one name.
    """
    names = [each.name for each in contenders]
    if requests < 1 or new_tokens < 1 or warmup < 0 or not names:
        raise InputError(
            "needs at least one bundle, one request and one token",
            subject="bench",
            hint="try --requests 100 --new-tokens 12",
        )
    if len(set(names)) != len(names):
        raise InputError("are not distinct", subject=f"names {', '.join(names)}", hint="rename one of them")
    rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for number in range(-warmup, requests):
        first = number % len(contenders)
        for each in (*contenders[first:], *contenders[:first]):
            columns = _columns(time_request(each, new_tokens, clock))
            if number >= 0:
                rounds[each.name].append(columns)
        tick()
    table = {name: np.array(columns) * 1e3 for name, columns in rounds.items()}
    return BenchRecord(
        device=device or cpu_name(),
        versions=versions(),
        requests=requests,
        warmup=warmup,
        peak_rss_bytes=peak_rss_bytes(),
        rows=tuple(_row(each, table[each.name], new_tokens) for each in contenders),
        ratios=tuple(
            ratio(one, other, quantity, table[one][:, column], table[other][:, column])
            for one, other in combinations(names, 2)
            for column, quantity in enumerate(QUANTITIES)
            if table[other][:, column].all()
        ),
    )


def time_request(each: Contender, new_tokens: int, clock: Clock = time.perf_counter) -> list[float]:
    """Answer one request greedily, end tokens ignored.

    Returns:
        Clock readings in seconds: at the start, after `encode`, `splice`, `prefill`, and after every further token
        (choosing a token counts with the step that it is fed to). 3 + `new_tokens` readings.
    """
    session = each.session
    readings = [clock()]
    visual = session.encode(each.pixel_values_BCHW)
    readings.append(clock())
    spliced = session.splice(each.input_ids_BT, visual)
    readings.append(clock())
    logits = session.prefill(spliced.embeds, spliced.placement)
    readings.append(clock())
    turn = spliced.placement
    for _ in range(new_tokens - 1):
        turn = advance(turn)
        logits = session.step(logits.argmax(axis=-1).astype(np.int64), turn)
        readings.append(clock())
    return readings


def percentiles(samples: NDArray[np.float64]) -> Percentiles:
    """The 50th, 90th and 99th of [R] samples."""
    p50, p90, p99 = (float(value) for value in np.percentile(samples, (50, 90, 99)))
    return Percentiles(p50=p50, p90=p90, p99=p99)


def ratio(
    one: str,
    other: str,
    quantity: str,
    samples_one_R: NDArray[np.float64],
    samples_other_R: NDArray[np.float64],
) -> Ratio:
    """Ratio of medians with its 95% interval.

    Rounds are resampled in pairs, one draw for both contenders: what slowed a whole round down cancels out. The draws are
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
        ratio=float(np.median(samples_one_R) / np.median(samples_other_R)),
        low=float(low),
        high=float(high),
    )


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; None where there is no /proc.

    `getrusage` is not asked: after a fork it reports the parent's peak where that was larger.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def cpu_name() -> str:
    """Model name of the processor."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def tables(record: BenchRecord) -> list[Table]:
    """The record for the screen: medians of every contender, then ratios."""
    from rich.table import Table

    rows = Table(title=f"median over {record.requests} requests, ms (p90 in brackets)")
    for heading in ("", "kept", "slots", "encode", "splice", "prefill", "TTFT", "TPOT", "total"):
        rows.add_column(heading, justify="right" if heading else "left")
    for row in record.rows:
        spans = [getattr(row, quantity) for quantity in QUANTITIES]
        rows.add_row(
            row.name,
            f"{row.kept} of {row.visual_tokens}",
            f"{row.prompt_slots} of {row.capacity}",
            *(f"{span.p50:.3f} ({span.p90:.3f})" for span in spans),
        )
    pairs = Table(title="ratio of medians, same rounds (95% interval)")
    for heading in ("", *(quantity.removesuffix("_ms") for quantity in QUANTITIES)):
        pairs.add_column(heading, justify="right" if heading else "left")
    for one, other in combinations([row.name for row in record.rows], 2):
        found = {r.quantity: r for r in record.ratios if (r.numerator, r.denominator) == (one, other)}
        pairs.add_row(
            f"{one} / {other}",
            *(
                f"{found[q].ratio:.3f} ({found[q].low:.3f} to {found[q].high:.3f})" if q in found else ""
                for q in QUANTITIES
            ),
        )
    return [rows, pairs] if len(record.rows) > 1 else [rows]


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


def _row(each: Contender, samples_RQ: NDArray[np.float64], new_tokens: int) -> Row:
    manifest = each.bundle.manifest
    model, pruning = manifest.model, manifest.pruning
    batch = len(each.input_ids_BT)
    longest = each.input_ids_BT.shape[1]
    cache_elements = 2 * model.layers * model.kv_heads * model.head_dim * manifest.capacity * batch
    spans = {quantity: percentiles(samples_RQ[:, column]) for column, quantity in enumerate(QUANTITIES)}
    return Row(
        name=each.name,
        backend=each.session.backend,
        precision=manifest.precision,
        positions=pruning.positions,
        pruner=pruning.pruner,
        keep=pruning.keep,
        kept=pruning.kept,
        visual_tokens=model.visual_tokens,
        batch=batch,
        prompt_slots=longest - 1 + pruning.kept,
        capacity=manifest.capacity,
        cache_bytes=cache_elements * _CACHE_BYTES[manifest.precision],
        new_tokens=new_tokens,
        **spans,
    )
