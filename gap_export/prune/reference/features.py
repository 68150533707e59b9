"""What the reference sees of an image, what it gives, and the float64 arithmetic that its strategies share."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def _nothing() -> Floats:
    return np.empty(0)


@dataclass(frozen=True)
class Seen:
    """What one image's tower shows; the parts that a strategy does not read may be empty.

    Attributes:
        patches_NE: output of the feature layer, class token dropped.
        grid: (rows, columns); None where images differ.
        attention_N: attention of the class token to each patch in the feature layer, mean over heads.
        class_token_E: output of the feature layer at the class token.
        keys_ND: keys of the feature layer, mean over heads, class token dropped.
        following_query_E: class token's query in the following layer, full width.
        following_keys_TE: keys there, class token first.
        following_attention_N: attention there, where it does not follow from the two above: of tiles that have a class token
            each.
        projected_NH: patches after the projector.
        aligned_NP: patches in the space shared with text, not normalised.
        text_P: the expression there, not normalised.
        tile_N: which tile saw each patch; empty where one saw all.
        aligned_inversely: whether patches that match are less similar to the text than others.
    """

    patches_NE: Floats
    grid: tuple[int, int] | None
    attention_N: Floats = field(default_factory=_nothing)
    class_token_E: Floats = field(default_factory=_nothing)
    keys_ND: Floats = field(default_factory=_nothing)
    following_query_E: Floats = field(default_factory=_nothing)
    following_keys_TE: Floats = field(default_factory=_nothing)
    following_attention_N: Floats = field(default_factory=_nothing)
    projected_NH: Floats = field(default_factory=_nothing)
    aligned_NP: Floats = field(default_factory=_nothing)
    text_P: Floats = field(default_factory=_nothing)
    tile_N: Floats = field(default_factory=_nothing)
    aligned_inversely: bool = True


@dataclass(frozen=True)
class Choice:
    """What the reference chose.

    Attributes:
        indices_K: best first, no padding.
        patches_KE: features where they are not the patches at the indices.
        margin: the smallest gap that any choice of a token was made by: relative for attention, absolute for cosines.
        merge_margin: the same for what goes into merged tokens, which changes features and not indices.
        needed: where the image says how many tokens it needs, that many; more than the indices where the bound is too low.
    """

    indices_K: Ids
    patches_KE: Floats | None = None
    margin: float = np.inf
    merge_margin: float = np.inf
    needed: int | None = None


@dataclass
class Gap:
    """The smallest gap seen so far."""

    smallest: float = np.inf

    def cut(self, values: Floats, count: int, *, relative: bool) -> None:
        """`values` in the order of choice, the first `count` of them chosen."""
        if 0 < count < len(values):
            self._see(abs(values[count - 1] - values[count]), values[count - 1], relative)

    def order(self, values: Floats, *, relative: bool) -> None:
        """The whole order matters."""
        for first, second in pairwise(values):
            self._see(abs(first - second), first, relative)

    def _see(self, gap: float, size: float, relative: bool) -> None:
        self.smallest = min(self.smallest, gap / max(abs(size), 1e-300) if relative else gap)


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


def matching(seen: Seen, similarity_N: Floats) -> Floats:
    """More for patches that match the expression better."""
    return -similarity_N if seen.aligned_inversely else similarity_N


def text_cosine(seen: Seen) -> Floats:
    """[N]: match of each patch with the expression, by cosine."""
    return matching(seen, unit(seen.aligned_NP) @ unit(seen.text_P))
