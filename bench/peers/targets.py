"""What a comparison has to show, and whether it did: nothing here runs anything.

A peer may answer with its first token from one mode and decode in another; ours has one mode for both, the one with the least median time of a
whole answer. A mode whose KL from fp32 is above `MOST_KL` is nobody's best.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, Self

import numpy as np
from modes import Mode
from pydantic import BaseModel, ConfigDict, model_validator

from gap_export.evaluation.latency.measure import ratio

Quantity = Literal["ttft_ms", "tpot_ms"]
QUANTITIES: tuple[Quantity, ...] = ("ttft_ms", "tpot_ms")
Samples = Mapping[str, Mapping[Quantity, Sequence[float]]]
"""Name of a mode -> quantity -> milliseconds of every round."""
MOST_KL = 0.02
SHARE_OF_OPERATIONS = 0.85
"""Of the operations that pruning saves, how many must be saved in time to the first token."""
_SLACK, _SLACK_IN_OPENVINO = (1.0, 0.95), (0.97, 0.93)
"""Of a goal: what the ratio of medians and the lower end of its interval must reach."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Target(_Stored):
    """One ratio, peer / ours, and what it must reach.

    Attributes:
        name: of what is shown.
        quantity: of a request, in milliseconds.
        ours: mode.
        peer: mode of the fastest one.
        ratio: of medians, above 1 where ours is faster.
        low: end of the interval that holds 95 % of resampled rounds.
        high: its other end.
        at_least: what `ratio` must reach.
        low_at_least: what `low` must reach.
        met: both are reached.
    """

    name: str
    quantity: Quantity
    ours: str
    peer: str
    ratio: float
    low: float
    high: float
    at_least: float
    low_at_least: float
    met: bool

    @model_validator(mode="after")
    def _as_measured(self) -> Self:
        if self.met != (self.ratio >= self.at_least and self.low >= self.low_at_least):
            raise ValueError(f"met is {self.met}, which its ratio contradicts")
        return self


class Span(_Stored):
    """Median and 90th percentile over rounds."""

    p50: float
    p90: float


class Row(_Stored):
    """A mode as it was measured.

    Attributes:
        versions: package -> version.
        load_s: seconds of loading.
        peak_rss_bytes: of its process, exporting left out where that is a process of its own.
        ttft_ms: time to the first token.
        tpot_ms: time per further token.
        late_over_early_steps: time of the second half of the tokens, of the first's.
        kl: mean KL from fp32 on a decoder that was trained.
        export_s: seconds.
        export_peak_rss_bytes: of the process that exports.
        written_bytes: of the export.
        first_token_flops: operations, by the cost card of a bundle.
        compiled_for: what a library says of the instructions that it was compiled with.
    """

    versions: dict[str, str]
    load_s: float
    peak_rss_bytes: int
    ttft_ms: Span
    tpot_ms: Span
    late_over_early_steps: float
    kl: float
    export_s: float | None = None
    export_peak_rss_bytes: int | None = None
    written_bytes: int | None = None
    first_token_flops: int | None = None
    compiled_for: str | None = None


class Part(_Stored):
    """One part of the comparison.

    Attributes:
        rows: of every mode.
        counted: names of those whose KL is small enough to be somebody's best.
        skipped: modes that did not run -> why.
        same_tokens_as_ours: whether a mode gave the tokens of our fp32, unpruned.
        ratios: `one / other` -> quantity -> [ratio of medians, low, high].
        targets: what was to be shown.
    """

    rows: dict[str, Row]
    counted: list[str]
    skipped: dict[str, str]
    same_tokens_as_ours: dict[str, bool]
    ratios: dict[str, dict[Quantity, tuple[float, float, float]]]
    targets: list[Target]


def counted(losses: Mapping[str, float]) -> list[str]:
    """Names of modes whose KL lets them be somebody's best."""
    return [name for name, loss in losses.items() if loss <= MOST_KL]


def best_of_ours(names: Collection[str], samples: Samples, new_tokens: int) -> str:
    """The mode with the least median time of an answer of so many tokens: to the first one, and per token after it."""
    return min(
        names,
        key=lambda name: (
            np.median(samples[name]["ttft_ms"]) + (new_tokens - 1) * np.median(samples[name]["tpot_ms"])
        ),
    )


def fastest(names: Collection[str], samples: Samples, quantity: Quantity) -> str:
    """The mode with the least median."""
    return min(names, key=lambda name: np.median(samples[name][quantity]))


def held(
    name: str,
    ours: Mode,
    peer: str,
    quantity: Quantity,
    samples: Samples,
    *,
    goal: float = 1.0,
) -> Target:
    """Hold one ratio against its goal.

    Args:
        name: of what is shown.
        ours: mode. Where OpenVINO reads its prompts, time to the first token is measured through the peer's own runtime, and has more slack.
        peer: name of its mode.
        quantity: compared.
        samples: of both.
        goal: of the ratio of medians.
    """
    found = interval(samples[peer][quantity], samples[ours.name][quantity])
    slack = _SLACK_IN_OPENVINO if ours.through_openvino and quantity == "ttft_ms" else _SLACK
    at_least, low_at_least = (round(share * goal, 4) for share in slack)
    return Target(
        name=name,
        quantity=quantity,
        ours=ours.name,
        peer=peer,
        ratio=found[0],
        low=found[1],
        high=found[2],
        at_least=at_least,
        low_at_least=low_at_least,
        met=found[0] >= at_least and found[1] >= low_at_least,
    )


def targets_of(
    part: str,
    modes: Sequence[Mode],
    losses: Mapping[str, float],
    samples: Samples,
    flops: Callable[[str], int | None],
    new_tokens: int,
) -> list[Target]:
    """All targets of a part for which there is somebody to compare.

    Args:
        part: `fp32` or `best`.
        modes: that ran.
        losses: KL of each.
        samples: of each.
        flops: name of one of ours -> operations to the first token.
        new_tokens: of an answer.
    """
    enough = [mode for mode in modes if mode.name in counted(losses)]
    ours = {mode.name: mode for mode in enough if mode.ours}
    peers = [mode.name for mode in enough if not mode.ours]
    whole = [name for name, mode in ours.items() if mode.keep == 1.0]
    pruned = [name for name, mode in ours.items() if mode.keep < 1.0]
    found: list[Target] = []
    if not peers:
        return found
    first = {quantity: fastest(peers, samples, quantity) for quantity in QUANTITIES}
    if whole:
        best = ours[best_of_ours(whole, samples, new_tokens)]
        name = "equal tokens, fp32" if part == "fp32" else "best modes, nothing pruned"
        found += [held(name, best, first[quantity], quantity, samples) for quantity in QUANTITIES]
    if part == "best" and pruned:
        best = ours[best_of_ours(pruned, samples, new_tokens)]
        name = f"best modes, ours at keep {best.keep}, the peer unpruned"
        before = next((each.name for each in ours.values() if _unpruned(best, each)), None)
        operations = before and (flops(before) or 0) / (flops(best.name) or 1)
        if operations:
            goal = SHARE_OF_OPERATIONS * operations
            found.append(held(name, best, first["ttft_ms"], "ttft_ms", samples, goal=goal))
        found.append(held(name, best, first["tpot_ms"], "tpot_ms", samples))
    return found


def interval(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """(ratio of medians, low, high): 95 % of resampled rounds, drawn in pairs."""
    found = ratio("one", "other", "", np.array(one), np.array(other))
    return found.ratio, found.low, found.high


def _unpruned(pruned: Mode, other: Mode) -> bool:
    """The same bundle and runtime but for `keep`, which comes first among the arguments."""
    return other.keep == 1.0 and other.command[2:] == pruned.command[2:]
