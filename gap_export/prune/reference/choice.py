"""What the twins of pruners give, and the float64 arithmetic that they share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gap_export.prune.features import VisionFeatures

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def given(array: Floats | None) -> Floats:
    """What a pruner reads.

    Raises:
        ValueError: the tower does not have it.
    """
    if array is None:
        raise ValueError("the pruner reads what this tower does not have")
    return array


@dataclass(frozen=True)
class Choice:
    """What a pruner chose.

    Attributes:
        indices_K: best first, no padding.
        patches_KE: features where they are not the patches at the indices.
        margin: the smallest difference that any choice of a token was made by: relative for attention, absolute for cosines.
        merge_margin: smallest margin of what goes into merged tokens, which changes features and not indices.
        needed: where the image says how many tokens it needs, that many; more than the indices where the bound is too low.
    """

    indices_K: Ids
    patches_KE: Floats | None = None
    margin: float = np.inf
    merge_margin: float = np.inf
    needed: int | None = None


@dataclass
class Margin:
    """By how little a choice was made: the smallest difference so far between what was taken and what was not."""

    smallest: float = np.inf

    def cut(self, values: Floats, count: int, *, relative: bool) -> None:
        """`values` in the order of choice, the first `count` of them chosen."""
        if 0 < count < len(values):
            self._add(abs(values[count - 1] - values[count]), values[count - 1], relative)

    def order(self, values: Floats, *, relative: bool) -> None:
        """The whole order matters."""
        for first, second in pairwise(values):
            self._add(abs(first - second), first, relative)

    def _add(self, difference: float, size: float, relative: bool) -> None:
        self.smallest = min(self.smallest, difference / max(abs(size), 1e-300) if relative else difference)


def softmax(logits: Floats) -> Floats:
    """Of one row."""
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum(), np.float64)


def unit(rows: Floats) -> Floats:
    """Rows of length one."""
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float64)


def descending(values: Floats) -> Ids:
    """Places from the largest value on."""
    return np.argsort(-values, kind="stable").astype(np.int64)


def class_attention(query_AD: Floats, keys_ATD: Floats) -> Floats:
    """[N]: softmax of the class token's query over all keys, per head, mean over heads, class column dropped."""
    rows = [
        softmax(keys @ query / np.sqrt(len(query))) for query, keys in zip(query_AD, keys_ATD, strict=True)
    ]
    return np.asarray(np.mean(rows, axis=0)[1:], np.float64)


def received_attention(query_APD: Floats, keys_APD: Floats) -> Floats:
    """[P]: softmax of every patch's query over all keys, per head, mean over heads and patches."""
    received = []
    for query_PD, keys_PD in zip(query_APD, keys_APD, strict=True):
        logits_PP = query_PD @ keys_PD.T / np.sqrt(query_PD.shape[1])
        powers_PP = np.exp(logits_PP - logits_PP.max(axis=1, keepdims=True))
        received.append((powers_PP / powers_PP.sum(axis=1, keepdims=True)).mean(axis=0))
    return np.asarray(np.mean(received, axis=0), np.float64)


def matching(features: VisionFeatures[Floats], similarity_N: Floats) -> Floats:
    """More for patches that match the expression better."""
    return -similarity_N if features.aligned_inversely else similarity_N


def text_cosine(features: VisionFeatures[Floats]) -> Floats:
    """[N]: match of each patch with the expression, by cosine."""
    return matching(features, unit(given(features.aligned)) @ unit(given(features.text)))
