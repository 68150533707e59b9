"""Which token comes next: greedily, or drawn from the model's distribution, cut down as a request asks for.

What is done, and in which order, is what `generate` of transformers does: a penalty on the logits of tokens that were there before,
the temperature, then top-k, top-p and min-p, each on what the one before has left. Numbers are float64 throughout.

A draw depends on the seed and on the number of the token alone, so that the text of an answer does not change with what else is in
its batch.

Shape letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from gap_export.errors import InputError, shown
from gap_export.records import Record

HOTTEST = 100.0
"""Largest temperature: the distribution is flat long before."""
LARGEST_SEED = 2**63 - 1

_RANGES = {
    "temperature": f"a number from 0 to {HOTTEST:.0f}",
    "top_p": "a number above 0 and at most 1",
    "top_k": "a whole number from 0 up, 0 for all tokens",
    "min_p": "a number from 0 to 1",
    "repetition_penalty": "a finite number above 0",
    "seed": f"a whole number from 0 to {LARGEST_SEED}",
}
"""Parameter -> what it can be, in words; `Sampling` holds the same bounds."""

_Float = Annotated[float, Field(strict=True)]
_Whole = Annotated[int, Field(strict=True)]

Logits = NDArray[np.float32]
"""[V]."""
LogProbs = NDArray[np.float64]
"""[V]; -inf for tokens that cannot be drawn."""


class Sampling(Record):
    """How tokens are chosen. Every default changes nothing: tokens are the greedy ones.

    Attributes:
        temperature: divides the logits; 0 is greedy, and 1 leaves the model's own distribution.
        top_p: only the most probable tokens that together have this probability are left; 1 for all.
        top_k: only that many of the most probable tokens are left, and those that are as probable as the last; 0 for all.
        min_p: only tokens are left whose probability is at least this share of the largest; 0 for all.
        repetition_penalty: logits of tokens that were there before are divided by it, and negative ones multiplied.
        seed: of the draws.
    """

    temperature: _Float = Field(default=0.0, ge=0, le=HOTTEST)
    top_p: _Float = Field(default=1.0, gt=0, le=1)
    top_k: _Whole = Field(default=0, ge=0)
    min_p: _Float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: _Float = Field(default=1.0, gt=0)
    seed: _Whole = Field(default=0, ge=0, le=LARGEST_SEED)

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Parameters from a user.

        Args:
            given: by the names of the fields; those left out have their defaults.

        Raises:
            InputError: a name that is no parameter, or a value outside its range; the message says which range.
        """
        try:
            return cls.model_validate(given)
        except ValidationError as reason:
            name = str(reason.errors()[0]["loc"][0])
            if name not in _RANGES:
                raise InputError(
                    "is not a parameter of sampling",
                    subject=shown(name),
                    hint=f"there are {', '.join(_RANGES)}",
                ) from reason
            raise InputError(
                f"is not {_RANGES[name]}",
                subject=f"{name} {shown(given[name])}",
                hint="choose another value",
            ) from reason

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


def choose(logits_V: Logits, sampling: Sampling, seen_ids: Collection[int], number: int) -> int:
    """The next token.

    Args:
        logits_V: [V] float32, none of them NaN.
        sampling: how to choose.
        seen_ids: ids of the prompt and of what was generated, for the penalty; those outside [0, V) are left out.
        number: of the token in its answer, from 0.

    Returns:
        A token id; without temperature the first of the largest logits.

    Raises:
        ValueError: no logit is finite, or one is +inf.
    """
    if sampling.is_greedy and sampling.repetition_penalty == 1:
        return int(logits_V.argmax())
    if sampling.is_greedy:
        return int(_penalised(logits_V, sampling.repetition_penalty, seen_ids).argmax())
    probabilities_V = np.exp(filtered_log_probs(logits_V, sampling, seen_ids))
    (possible,) = np.nonzero(probabilities_V)
    cumulative = np.cumsum(probabilities_V[possible])
    place = np.searchsorted(cumulative, uniform(sampling.seed, number) * cumulative[-1], side="right")
    return int(possible[min(int(place), len(possible) - 1)])


def uniform(seed: int, number: int) -> float:
    """The number in [0, 1) that token `number` of an answer with this seed is drawn with.

    Args:
        seed: of the answer.
        number: of the token, from 0.
    """
    return float(np.random.Generator(np.random.Philox(key=seed, counter=number)).random())


def filtered_log_probs(logits_V: Logits, sampling: Sampling, seen_ids: Collection[int]) -> LogProbs:
    """The distribution that a token is drawn from.

    Args:
        logits_V: [V] float32, none of them NaN.
        sampling: how to choose.
        seen_ids: ids for the penalty; those outside [0, V) are left out.

    Returns:
        [V] float64 natural logarithms of probabilities that add up to 1; without temperature all lies on the greedy token.

    Raises:
        ValueError: no logit is finite, or one is +inf.
    """
    scores_V = _penalised(logits_V, sampling.repetition_penalty, seen_ids)
    largest = scores_V.max()
    if not np.isfinite(largest):
        raise ValueError("the largest logit is not finite: there is no distribution")
    if sampling.is_greedy:
        greedy_V = np.full_like(scores_V, -np.inf)
        greedy_V[scores_V.argmax()] = 0.0
        return greedy_V
    with np.errstate(over="ignore"):  # far below the largest: its probability is 0 all the same
        scores_V -= largest
        scores_V /= sampling.temperature
    _keep_top_k(scores_V, sampling.top_k)
    if sampling.top_p < 1:
        _keep_top_p(scores_V, sampling.top_p)
    if sampling.min_p > 0:
        scores_V[np.exp(scores_V) < sampling.min_p] = -np.inf  # the largest probability is exp(0)
    scores_V -= np.log(np.exp(scores_V).sum())
    return scores_V


def _penalised(logits_V: Logits, penalty: float, seen_ids: Collection[int]) -> LogProbs:
    """[V] float64 scores, a copy: those of tokens seen before are divided by the penalty, negative ones multiplied."""
    scores_V = logits_V.astype(np.float64)
    if penalty == 1:
        return scores_V
    seen = np.fromiter(seen_ids, np.int64, len(seen_ids))
    seen = np.unique(seen[(seen >= 0) & (seen < len(scores_V))])
    before = scores_V[seen]
    with np.errstate(over="ignore", divide="ignore"):
        after = np.where(before < 0, before * penalty, before / penalty)
    # A penalty near 0 or near the largest number must not make a finite logit infinite.
    most = np.finfo(np.float64).max
    scores_V[seen] = np.where(np.isfinite(before), np.clip(after, -most, most), before)
    return scores_V


def _keep_top_k(scores_V: LogProbs, top_k: int) -> None:
    """Filter in place; scores that equal the k-th largest stay."""
    if 0 < top_k < len(scores_V):
        scores_V[scores_V < np.partition(scores_V, -top_k)[-top_k]] = -np.inf


def _keep_top_p(scores_V: LogProbs, top_p: float) -> None:
    """Filter in place: from the least probable token on, tokens are taken away while all taken have at most 1 - top_p together.

    Of tokens that are equally probable, those with the smaller ids are taken first. The last token stays in any case.
    """
    probabilities_V = np.exp(scores_V)
    probabilities_V /= probabilities_V.sum()
    dropped = 1 - top_p
    # All V tokens below a V-th of what is dropped are dropped for certain: the others alone need sorting.
    small_V = probabilities_V < dropped / len(scores_V)
    (large,) = np.nonzero(~small_V)
    ascending = large[np.argsort(probabilities_V[large], kind="stable")]
    cumulative = probabilities_V[small_V].sum() + np.cumsum(probabilities_V[ascending])
    scores_V[small_V] = -np.inf
    scores_V[ascending[:-1][cumulative[:-1] <= dropped]] = -np.inf
