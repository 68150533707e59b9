"""IoU against counting pixels, and the conventions that make two evaluators disagree."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.boxes.codecs import Box
from gap_export.boxes.metrics import accuracy, agreement, as_rows, iou, mean_iou, paired_difference

CELLS = 14


@st.composite
def cell_boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """A box on whole cells, possibly without area."""
    x1, x2 = sorted(draw(st.tuples(st.integers(0, CELLS), st.integers(0, CELLS))))
    y1, y2 = sorted(draw(st.tuples(st.integers(0, CELLS), st.integers(0, CELLS))))
    return x1, y1, x2, y2


def counted(first: tuple[int, ...], second: tuple[int, ...], *, edge: int) -> float:
    """IoU by counting cells; with `edge` 1 the last cell belongs to the box."""
    masks = np.zeros((2, CELLS + 1, CELLS + 1), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, (first, second), strict=True):
        mask[y1 : y2 + edge, x1 : x2 + edge] = True
    either = (masks[0] | masks[1]).sum()
    return float((masks[0] & masks[1]).sum() / either) if either else 0.0


class TestIou:
    @settings(deadline=None)
    @given(first=cell_boxes(), second=cell_boxes())
    def test_counting_cells(self, first: tuple[int, ...], second: tuple[int, ...]) -> None:
        assert iou(first, second) == pytest.approx(counted(first, second, edge=0), abs=1e-12)

    @settings(deadline=None)
    @given(first=cell_boxes(), second=cell_boxes())
    def test_counting_pixels_both_edges_included(
        self, first: tuple[int, ...], second: tuple[int, ...]
    ) -> None:
        assert iou(first, second, area="inclusive_pixels") == pytest.approx(
            counted(first, second, edge=1), abs=1e-12
        )

    @settings(deadline=None)
    @given(st.lists(st.tuples(cell_boxes(), cell_boxes()), min_size=1, max_size=8))
    def test_rows_are_independent(self, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        first, second = (np.array(boxes, float) for boxes in zip(*pairs, strict=True))
        together = iou(first, second)
        assert together.shape == (len(pairs),)
        assert together.dtype == np.float64
        assert together.tolist() == [float(iou(a, b)) for a, b in pairs]
        assert together.tolist() == iou(second, first).tolist()

    @settings(deadline=None)
    @given(
        box=cell_boxes(),
        other=cell_boxes(),
        scale=st.floats(1e-3, 1e3),
        shift=st.tuples(st.floats(-100, 100), st.floats(-100, 100)),
    )
    def test_scale_and_shift_change_nothing(
        self, box: tuple[int, ...], other: tuple[int, ...], scale: float, shift: tuple[float, float]
    ) -> None:
        moved = [np.array(b, float) * scale + np.tile(shift, 2) for b in (box, other)]
        assert iou(*moved) == pytest.approx(float(iou(box, other)), abs=1e-6)

    def test_the_two_conventions_differ(self) -> None:
        assert iou((0, 0, 9, 9), (0, 0, 9, 4)) == pytest.approx(36 / 81)
        assert iou((0, 0, 9, 9), (0, 0, 9, 4), area="inclusive_pixels") == pytest.approx(50 / 100)

    def test_one_against_many(self) -> None:
        many = np.array([[0, 0, 2, 2], [0, 0, 1, 2], [5, 5, 6, 6]], float)
        assert iou((0, 0, 2, 2), many).tolist() == [1.0, 0.5, 0.0]

    @pytest.mark.parametrize("area", ["continuous", "inclusive_pixels"])
    @pytest.mark.parametrize(
        "box",
        [
            (np.nan, 0, 1, 1),
            (np.nan,) * 4,
            (0, 0, np.inf, 1),
            (-np.inf, 0, np.inf, 1),
            (1, 0, 0, 1),
            (0, 1, 1, 0),
            (1, 1, 0, 0),
        ],
    )
    def test_unsound_boxes_score_nothing_and_warn_of_nothing(self, box: Box, area: str) -> None:
        with np.errstate(all="raise"):
            assert iou(box, (0, 0, 1, 1), area=area) == 0.0  # type: ignore[arg-type]
            assert iou((0, 0, 1, 1), box, area=area) == 0.0  # type: ignore[arg-type]
            assert iou(box, box, area=area) == 0.0  # type: ignore[arg-type]

    def test_no_area_at_all(self) -> None:
        assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0
        assert iou((1, 1, 1, 1), (1, 1, 1, 1), area="inclusive_pixels") == 1.0

    def test_touching_boxes_do_not_overlap(self) -> None:
        assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0.0

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="four coordinates"):
            iou((0, 0, 1), (0, 0, 1))
        with pytest.raises(ValueError, match="unknown area"):
            iou((0, 0, 1, 1), (0, 0, 1, 1), area="pixels")  # type: ignore[arg-type]


class TestAccuracy:
    def test_the_comparator_decides_at_the_threshold(self) -> None:
        ious = iou((0.0, 0.0, 1.0, 1.0), as_rows([(0, 0, 1, 0.5), (0, 0, 1, 0.51), (0, 0, 1, 0.49), None]))
        assert ious.tolist() == [0.5, 0.51, 0.49, 0.0]
        assert accuracy(ious, comparator=">").hits == 1
        assert accuracy(ious, comparator=">=").hits == 2

    def test_result_carries_its_convention(self) -> None:
        result = accuracy([0.9, 0.1, 0.2, 0.8], comparator=">", threshold=0.7)
        assert (result.value, result.hits, result.count) == (0.5, 2, 4)
        assert (result.comparator, result.threshold) == (">", 0.7)
        assert result.standard_error == pytest.approx(0.25)

    def test_standard_error_is_the_spread_of_repeated_draws(self) -> None:
        rng = np.random.default_rng(3)
        shares = [accuracy(rng.random(400) < 0.3, comparator=">").value for _ in range(2000)]
        assert accuracy(np.arange(400) < 120, comparator=">").standard_error == pytest.approx(
            np.std(shares), rel=0.1
        )

    def test_wilson_interval(self) -> None:
        # Reference values: 8 of 10 and 0 of 10 (Brown, Cai and DasGupta 2001, by the formula).
        low, high = accuracy([1.0] * 8 + [0.0] * 2, comparator=">").interval()
        assert (low, high) == pytest.approx((0.4902, 0.9433), abs=2e-4)
        low, high = accuracy([0.0] * 10, comparator=">").interval()
        assert low == 0.0
        assert high == pytest.approx(0.2775, abs=2e-4)

    @settings(deadline=None)
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
    def test_the_strict_comparator_never_counts_more(self, ious: list[float]) -> None:
        strict, loose = (accuracy(ious, comparator=c) for c in (">", ">="))
        assert strict.hits <= loose.hits
        low, high = loose.interval()
        assert 0 <= low <= loose.value + 1e-12
        assert loose.value - 1e-12 <= high <= 1

    @pytest.mark.parametrize("ious", [[], [0.5, np.nan], [[0.5]]])
    def test_refused(self, ious: list[float]) -> None:
        with pytest.raises(ValueError, match="IoU"):
            accuracy(ious, comparator=">")
        with pytest.raises(ValueError, match="IoU"):
            mean_iou(ious)

    def test_unknown_comparator(self) -> None:
        with pytest.raises(ValueError, match="comparator"):
            accuracy([0.5], comparator="gt")  # type: ignore[arg-type]


def test_mean_iou() -> None:
    result = mean_iou([0.0, 0.5, 1.0, 0.5])
    assert (result.value, result.count) == (0.5, 4)
    assert result.standard_error == pytest.approx(np.sqrt(0.125 / 4))


class TestPairedDifference:
    def test_counts(self) -> None:
        result = paired_difference([1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0])
        assert (result.gained, result.lost, result.count) == (3, 1, 6)
        assert result.value == pytest.approx(2 / 6)
        other = paired_difference([1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 1])
        assert (other.value, other.low, other.high) == pytest.approx(
            (-result.value, -result.high, -result.low)
        )

    @pytest.mark.parametrize(
        ("gains", "loses"), [(0.5, 0.1), (0.3, 0.3), (0.1, 0.02), (0.02, 0.0), (0.9, 0.0)]
    )
    def test_the_interval_covers_the_truth_in_95_of_100_cases(self, gains: float, loses: float) -> None:
        """Every outcome of 30 expressions, weighed by its probability."""
        count, covered = 30, 0.0
        for gained in range(count + 1):
            for lost in range(count + 1 - gained):
                same = count - gained - lost
                first = [True] * gained + [False] * (lost + same)
                second = [False] * gained + [True] * lost + [False] * same
                result = paired_difference(first, second)
                if result.low <= gains - loses <= result.high:
                    weight = comb(count, gained) * comb(count - gained, lost)
                    covered += weight * gains**gained * loses**lost * (1 - gains - loses) ** same
        assert 0.93 < covered <= 1

    def test_few_expressions_prove_nothing(self) -> None:
        assert paired_difference([True], [False]).low < 0
        same = paired_difference([True] * 500, [True] * 500)
        assert same.value == 0
        assert same.low < 0 < same.high
        assert paired_difference([True] * 500, [False] * 500).low > 0.98

    @pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False]), ([[True]], [[True]])])
    def test_refused(self, first: list[bool], second: list[bool]) -> None:
        with pytest.raises(ValueError, match="N >= 1"):
            paired_difference(first, second)


class TestAgreement:
    BOX: Box = (0.0, 0.0, 1.0, 1.0)

    def test_each_kind_of_row(self) -> None:
        first = [self.BOX, self.BOX, self.BOX, None, None, (0.5, 0.5, 0.5, 0.5)]
        second = [self.BOX, (0.0, 0.0, 1.0, 0.9), None, None, self.BOX, (0.5, 0.5, 0.5, 0.5)]
        result = agreement(first, second)
        assert result.count == 6
        assert result.identical == pytest.approx(3 / 6)
        assert result.value == pytest.approx(4 / 6)
        assert result.missing_in_one == 2
        assert result.mean_iou == pytest.approx((1 + 0.9 + 0 + 1 + 0 + 1) / 6)
        assert result.lowest_iou == 0.0

    def test_a_run_agrees_with_itself(self) -> None:
        boxes = [self.BOX, None, (0.2, 0.2, 0.2, 0.2)]
        result = agreement(boxes, list(boxes))
        assert (result.value, result.identical, result.mean_iou, result.lowest_iou) == (1, 1, 1, 1)

    def test_threshold(self) -> None:
        pair = [self.BOX], [(0.0, 0.0, 1.0, 0.9)]
        assert agreement(*pair, threshold=0.9).value == 1
        assert agreement(*pair, threshold=0.95).value == 0

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="different length"):
            agreement([self.BOX], [])
        with pytest.raises(ValueError, match="no rows"):
            agreement([], [])


def test_as_rows_of_nothing() -> None:
    assert as_rows([]).shape == (0, 4)
