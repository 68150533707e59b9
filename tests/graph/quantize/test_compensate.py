"""Compensated rounding, against a float64 twin that rounds column by column, and against rounding that makes up for nothing."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gap_export.graph.quantize import int4, uint4
from gap_export.graph.quantize.compensate import DAMPING, Shares, compensated
from gap_export.graph.quantize.rounding import Grid
from gap_export.graph.quantize.scheme import BlockScheme, Weight, load_scheme
from gap_export.precision import FP16, FP32, PRECISIONS, Activations

BLOCK = 32
SCHEMES = pytest.mark.parametrize("scheme", [uint4, int4], ids=["uint4", "int4"])
Floats = NDArray[np.float64]


def weight_of(rows_NK: NDArray[np.float32], activations: Activations = FP32) -> Weight:
    return Weight(*rows_NK.shape, activations, lambda: float(np.abs(rows_NK).max()))


def drawn(seed: int, columns: int, inner: int, tokens: int = 300) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows, and moments of activations that go together, some channels much larger than others."""
    random = np.random.default_rng(seed)
    mixed_KK = random.normal(size=(inner, inner)) * random.lognormal(0, 1, inner)
    activations = (random.normal(size=(tokens, inner)) @ mixed_KK + random.normal(size=inner)).astype(
        np.float32
    )
    return random.normal(size=(columns, inner)).astype(np.float32), activations.T @ activations


def damped(moments_KK: NDArray[np.float32]) -> Floats:
    wide_KK = moments_KK.astype(np.float64)
    mean = wide_KK.diagonal().mean()
    return wide_KK + np.eye(len(wide_KK)) * (DAMPING * mean or 1.0)


def twin(
    rows_NK: NDArray[np.float32], moments_KK: NDArray[np.float32], scheme: BlockScheme, weight: Weight
) -> tuple[Floats, Floats]:
    """(numbers, floats) by the textbook: after every column the inverse of H is that of the columns left (optimal brain surgeon)."""
    left_NK, hessian_KK = rows_NK.astype(np.float64), damped(moments_KK)
    inverse_KK = np.linalg.inv(hessian_KK)
    numbers_NK, floats_NK = np.empty_like(left_NK), np.empty_like(left_NK)
    for column in range(rows_NK.shape[1]):
        if column % BLOCK == 0:
            block = slice(column, column + BLOCK)
            importance = hessian_KK.diagonal()[block].astype(np.float32)
            grid = scheme.grid(left_NK[:, block].astype(np.float32), weight, importance)
            scales_N, zeros_N = grid.scales_B1[:, 0].astype(np.float64), grid.zeros_B1[:, 0]
        numbers_N = np.clip(np.rint(left_NK[:, column] / scales_N) + zeros_N, grid.least, grid.most)
        floats_NK[:, column] = (numbers_N - zeros_N) * scales_N
        numbers_NK[:, column] = numbers_N
        error_N = left_NK[:, column] - floats_NK[:, column]
        pivot = inverse_KK[column, column]
        left_NK -= error_N[:, None] * inverse_KK[column] / pivot
        inverse_KK -= np.outer(inverse_KK[:, column], inverse_KK[column]) / pivot
    return numbers_NK, floats_NK


def floats_of(encoded: tuple[NDArray[Any], ...]) -> Floats:
    numbers_NK, scales_NB, *zeros = (each.astype(np.float64) for each in encoded)
    zeros_NB = zeros[0] if zeros else np.zeros_like(scales_NB)
    return (numbers_NK - zeros_NB.repeat(BLOCK, axis=1)) * scales_NB.repeat(BLOCK, axis=1)


def loss(rows_NK: NDArray[Any], floats_NK: Floats, moments_KK: NDArray[Any]) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    errors_NK = rows_NK - floats_NK
    return float((errors_NK @ moments_KK.astype(np.float64) * errors_NK).sum())


@SCHEMES
@pytest.mark.parametrize("activations", [FP32, FP16], ids=["fp32", "fp16"])
def test_it_is_gptq(scheme: BlockScheme, activations: Activations) -> None:
    rows_NK, moments_KK = drawn(1, 24, 4 * BLOCK)
    weight = weight_of(rows_NK, activations)
    encoded = compensated(rows_NK, Shares.of(moments_KK), scheme, weight)
    numbers_NK, floats_NK = twin(rows_NK, moments_KK, scheme, weight)
    # A number on the edge between two may go either way in float32; what follows in its row differs then.
    same_N = (encoded[0] == numbers_NK).all(axis=1)
    assert same_N.mean() > 0.9
    np.testing.assert_allclose(floats_of(encoded)[same_N], floats_NK[same_N], rtol=1e-3, atol=1e-4)
    ours, theirs = (loss(rows_NK, each, moments_KK) for each in (floats_of(encoded), floats_NK))
    assert ours == pytest.approx(theirs, rel=0.02)


@SCHEMES
def test_scales_are_numbers_of_the_type_of_activations(scheme: BlockScheme) -> None:
    rows_NK, moments_KK = drawn(2, 8, 2 * BLOCK)
    scales = compensated(rows_NK, Shares.of(moments_KK), scheme, weight_of(rows_NK, FP16))[1]
    np.testing.assert_array_equal(scales, scales.astype(np.float16))


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), blocks=st.integers(2, 4), name=st.sampled_from(["uint4", "int4"]))
def test_outputs_change_less(seed: int, blocks: int, name: str) -> None:
    rows_NK, moments_KK = drawn(seed, 16, blocks * BLOCK)
    scheme, weight = load_scheme(name), weight_of(rows_NK)
    assert isinstance(scheme, BlockScheme)
    before_NK = rows_NK.copy()
    mine = floats_of(compensated(rows_NK, Shares.of(moments_KK), scheme, weight))
    plain = floats_of(scheme.encode(rows_NK, weight))
    np.testing.assert_array_equal(rows_NK, before_NK)
    assert loss(rows_NK, mine, damped(moments_KK)) < loss(rows_NK, plain, damped(moments_KK))


@SCHEMES
def test_nothing_is_made_up_for_where_channels_are_independent(scheme: ModuleType) -> None:
    """With the same scales, rounding is plain where H is diagonal; with a diagonal of zeros it is so whatever the text was."""
    rows_NK, _ = drawn(3, 16, 3 * BLOCK)
    weight, (plain, *scales) = weight_of(rows_NK), scheme.encode(rows_NK, weight_of(rows_NK))
    blocks = iter(range(3))

    def given_grid(*_: Any) -> Grid:
        block = next(blocks)
        scales_N1, zeros_N1 = (
            each[:, block : block + 1].astype(np.float32) for each in (*scales, np.zeros_like(scales[0]))[:2]
        )
        return Grid(scales_N1, zeros_N1, scheme.LEAST, scheme.MOST)

    fixed: Any = SimpleNamespace(BLOCK=BLOCK, grid=given_grid, arranged=scheme.arranged)
    diagonal = np.random.default_rng(4).lognormal(0, 2, 3 * BLOCK).astype(np.float32)
    encoded = compensated(rows_NK, Shares.of(np.diag(diagonal)), fixed, weight)
    for mine, wanted in zip(encoded, (plain, *scales), strict=True):
        np.testing.assert_array_equal(mine, wanted)


@SCHEMES
def test_channels_that_were_never_active(scheme: BlockScheme) -> None:
    """Alone in a block, among others, and everywhere."""
    rows_NK, moments_KK = drawn(5, 8, 3 * BLOCK)
    silent = np.r_[3, 40, 2 * BLOCK : 3 * BLOCK]
    moments_KK[silent], moments_KK[:, silent] = 0, 0
    for moments in (moments_KK, np.zeros_like(moments_KK)):
        floats_NK = floats_of(compensated(rows_NK, Shares.of(moments), scheme, weight_of(rows_NK)))
        assert np.abs(floats_NK[:, silent] - rows_NK[:, silent]).max() < 1


def test_fewer_tokens_than_channels() -> None:
    rows_NK, moments_KK = drawn(6, 8, 2 * BLOCK, tokens=5)
    shares = Shares.of(moments_KK)
    np.testing.assert_allclose(
        shares.factor_KK.T @ shares.factor_KK @ damped(moments_KK), np.eye(2 * BLOCK), atol=1e-3
    )
    assert np.isfinite(floats_of(compensated(rows_NK, shares, uint4, weight_of(rows_NK)))).all()


@SCHEMES
def test_rows_do_not_depend_on_each_other(scheme: BlockScheme) -> None:
    """The store rounds some rows at a time."""
    rows_NK, moments_KK = drawn(7, 12, 2 * BLOCK)
    weight, shares = weight_of(rows_NK), Shares.of(moments_KK)
    whole = compensated(rows_NK, shares, scheme, weight)
    halves = [compensated(rows_NK[part], shares, scheme, weight) for part in (slice(0, 4), slice(4, 12))]
    same_N = (np.concatenate([half[0] for half in halves]) == whole[0]).all(axis=1)
    assert same_N.mean() > 0.9, "products of other shapes may round otherwise"


def test_precisions_that_take_a_calibration_have_such_a_scheme() -> None:
    for row in PRECISIONS.values():
        scheme = None if row.decoder is None else load_scheme(row.decoder)
        assert row.takes_calibration == isinstance(scheme, BlockScheme), row.name
