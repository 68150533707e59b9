"""What a product of few bits is: ONNX Runtime against NumPy, and how far it may be from the product of floats.

Shape letters: B batch, S tokens, N columns of the product, K its inner extent, L elements of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import nn

from gap_export.bundle.spec import GraphSpec
from gap_export.graph.quantize import int8, int8_fine, schemes_of
from gap_export.modeling.components import Component
from gap_export.precision import FP16, FP32, PRECISIONS, Activations
from tests.graph.quantize.small_products import Layer

Floats = NDArray[np.float64]

COLUMNS, INNER, LONG = 6, 64, 32
_LEVEL = "session.qdq_matmulnbits_accuracy_level"
IN_FLOATS, IN_8_BITS = ((_LEVEL, "1"),), ((_LEVEL, "4"),)
"""What ONNX Runtime multiplies blocks of weights with: activations as they are; or rounded to eight bits, as in sessions of the package."""


def weight(seed: int = 0) -> NDArray[np.float32]:
    """[N, K]: one column of zeros, one that is tiny, one with an outlier, one to one side of zero."""
    rows_NK = np.random.default_rng(seed).standard_normal((COLUMNS, INNER)).astype(np.float32)
    rows_NK[1] = 0
    rows_NK[2] *= 1e-6
    rows_NK[3, 5] = 40
    rows_NK[4] = np.abs(rows_NK[4])
    return rows_NK


@cache
def layer(
    scheme: str, activations: Activations = FP32, largest: float | None = None, blocks_in_8_bits: bool = False
) -> Layer:
    return Layer(scheme, weight(), activations, largest, IN_8_BITS if blocks_in_8_bits else IN_FLOATS)


# Numbers as they are stored, in float64


def restored(of: Layer) -> Floats:
    """[K, N]: what the stored numbers stand for."""
    pieces = {name: content.astype(np.float64) for name, content in of.pieces.items()}
    numbers_KN = next(iter(pieces.values()))
    scale, zero = pieces["scale"], pieces.get("zero", np.zeros(()))
    if scale.ndim == 2:
        scale = np.repeat(scale, LONG, axis=0)
        zero = np.repeat(zero, LONG, axis=0) if zero.ndim else zero
    restored_KN: Floats = (numbers_KN - zero) * scale
    return restored_KN


def by_int8(x_BSK: NDArray[np.float32], of: Layer) -> Floats:
    """Steps in float32, as a graph has them; whole numbers are multiplied as whole numbers."""
    most, least = (x_BSK.max(-1, keepdims=True), x_BSK.min(-1, keepdims=True))
    middle = (most + least) * np.float32(0.5)
    step = np.maximum(most - least, np.float32(1e-30)) * np.float32(1 / 255)
    whole_BSK = np.clip(np.rint((x_BSK - middle) / step), -128, 127).astype(np.int64)
    product = (whole_BSK @ of.pieces["int8"].astype(np.int64)).astype(np.float64)
    return product * of.pieces["scale"] * step + middle.astype(np.float64) * restored(of).sum(axis=0)


def by_int8_fine(x_BSK: NDArray[np.float32], of: Layer) -> Floats:
    most, finer = int8_fine.PIECE_MAX, np.float32(int8_fine.FINER)
    step = np.maximum(np.abs(x_BSK).max(-1, keepdims=True), np.float32(1e-30)) * np.float32(1 / most)
    scaled = x_BSK / step
    coarse = np.rint(scaled)
    rest = np.rint((scaled - coarse) * finer)
    numbers_KN = of.pieces["int8"].astype(np.int64)
    first, second = (part.astype(np.int64) @ numbers_KN for part in (coarse, rest))
    return (first + second / float(finer)) * of.pieces["scale"] * step


def by_floats(x_BSK: NDArray[np.float32], of: Layer) -> Floats:
    """Blocks: activations stay as they are."""
    return x_BSK.astype(np.float64) @ restored(of)


def by_fp8(x_BSK: NDArray[np.float32], of: Layer) -> Floats:
    assert of.largest is not None
    step = np.float16(of.largest / 448)
    scaled = np.clip(x_BSK.astype(np.float16).astype(np.float32) / np.float32(step), -448, 448)
    low = scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * float(step)
    return low @ restored(of)


REFERENCES: dict[str, tuple[Callable[[NDArray[np.float32], Layer], Floats], dict[str, Any], float]] = {
    "int8": (by_int8, {}, 2e-6),
    "int8_fine": (by_int8_fine, {}, 2e-6),
    "int8_blocks": (by_floats, {}, 2e-6),
    "uint4": (by_floats, {}, 2e-6),
    "int4": (by_floats, {}, 2e-6),
    "fp8": (by_fp8, {"activations": FP16, "largest": 8.0}, 2e-3),
}
"""Scheme -> (what it computes, options of its layer, error of the sums, relative to the sum of magnitudes)."""


def tokens(seed: int = 1) -> NDArray[np.float32]:
    """[B, S, K]: usual ones, zeros, one number throughout, one side of zero, an outlier, sizes from tiny to large."""
    x_BSK = np.random.default_rng(seed).standard_normal((2, 5, INNER)).astype(np.float32)
    x_BSK[0, 1] = 0
    x_BSK[0, 2] = -1.7
    x_BSK[0, 3] = -np.abs(x_BSK[0, 3])
    x_BSK[1, 0, 7] = 6
    x_BSK[1, 1] *= 1e-4
    x_BSK[1, 2] += 5
    x_BSK[1, 3, ::2] = 0
    return x_BSK


@pytest.mark.parametrize("scheme", REFERENCES)
def test_graphs_compute_what_numpy_does(scheme: str) -> None:
    reference, options, error = REFERENCES[scheme]
    of, x_BSK = layer(scheme, **options), tokens()
    mine, theirs = of.run(x_BSK), reference(x_BSK, of)
    # Weights that are restored to half precision may be less than it knows.
    least = np.finfo(of.activations.dtype).smallest_subnormal
    sizes = np.abs(x_BSK).astype(np.float64) @ (np.abs(restored(of)) + least / error)
    assert (np.abs(mine - theirs) <= error * sizes + 1e-30).all()
    assert (mine[..., 1] == 0).all(), "the column of zeros"
    assert (mine[0, 1] == 0).all(), "the token of zeros"


def test_all_schemes_that_run_here_have_a_reference() -> None:
    rows = [row for row in PRECISIONS.values() if row.cpu]
    named = {getattr(row, place) for row in rows for place in ("decoder", "wide", "head", "elsewhere")}
    assert named - {None} == set(REFERENCES)


# How far from the product of floats

rows_of_tokens = arrays(
    np.float32,
    (1, 1, INNER),
    elements=st.one_of(
        st.floats(-4, 4, width=32), st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, 1e4, -1e4])
    ),
)


def allowed(half_steps: Any, x_BSK: NDArray[np.float32], of: Layer) -> Floats:
    """Half a step for every number of the token, and what float32 loses in sums."""
    rounding: Floats = (half_steps * 1.001 * np.abs(restored(of))).sum(axis=0)
    return rounding + 2e-6 * (np.abs(x_BSK).astype(np.float64) @ summed(of)) + 1e-30


def summed(of: Layer) -> Floats:
    """[K, N]: magnitudes that are added up. Kernels for blocks take the zero point out at the end, and add up numbers without a sign."""
    scale_BN = of.pieces["scale"].astype(np.float64)
    if scale_BN.ndim == 1:
        return np.abs(restored(of))
    largest = {"int8": 255, "int4": 15, "uint4": 15}[next(iter(of.pieces))]
    return largest * np.abs(np.repeat(scale_BN, LONG, axis=0))


def bound(scheme: str, x_BSK: NDArray[np.float32], of: Layer) -> Floats:
    wide = x_BSK[0, 0].astype(np.float64)
    if scheme == "int8":
        return allowed((wide.max() - wide.min()) / int8.STEPS / 2, x_BSK, of)
    if scheme == "int8_fine":
        largest = np.abs(wide).max()
        return allowed(largest / int8_fine.PIECE_MAX / int8_fine.FINER / 2, x_BSK, of)
    # Activations of a block are rounded to 127 steps of its own.
    largest = np.abs(wide.reshape(-1, LONG)).max(axis=1).repeat(LONG)
    return allowed(largest[:, None] / 127 / 2, x_BSK, of)


@pytest.mark.parametrize("scheme", ["int8", "int8_fine", "int8_blocks", "uint4", "int4"])
@settings(max_examples=60, deadline=None)
@given(x_BSK=rows_of_tokens)
@example(x_BSK=np.zeros((1, 1, INNER), np.float32))
@example(x_BSK=np.full((1, 1, INNER), -3.3, np.float32))
@example(x_BSK=np.linspace(-7, -6, INNER, dtype=np.float32).reshape(1, 1, INNER))
@example(x_BSK=np.r_[np.float32(1e6), np.ones(INNER - 1, np.float32)].reshape(1, 1, INNER))
@example(x_BSK=np.full((1, 1, INNER), 1e-38, np.float32))
def test_a_token_is_off_by_its_own_steps_alone(scheme: str, x_BSK: NDArray[np.float32]) -> None:
    of = layer(scheme, blocks_in_8_bits=True)
    exact = x_BSK.astype(np.float64) @ restored(of)
    assert (np.abs(of.run(x_BSK) - exact) <= bound(scheme, x_BSK, of)).all()


def test_an_outlier_costs_one_piece_what_it_does_not_cost_two() -> None:
    """One activation of great size: the step of the others is a 255th of it, or a 16000th."""
    x_BSK = tokens()[:1, :1].copy()
    x_BSK[0, 0, 0] = 1000
    coarse, fine = (
        np.abs(layer(scheme).run(x_BSK) - x_BSK.astype(np.float64) @ restored(layer(scheme))).max()
        for scheme in ("int8", "int8_fine")
    )
    assert coarse > 1, "or nothing is shown"
    assert fine < coarse / 10


def test_two_pieces_never_overflow_where_pairs_of_products_are_added_in_sixteen_bits() -> None:
    """As VPMADDUBSW does on processors without VNNI: activations without a sign by weights with one, two neighbours at a time."""
    of = Layer("int8_fine", np.full((2, INNER), 3, np.float32) * np.array([[1], [-1]], np.float32))
    (weight_N,) = np.unique(of.pieces["int8"], axis=0)
    assert sorted(weight_N) == [-127, 127]
    largest = int8_fine.ZERO + int8_fine.PIECE_MAX
    assert 2 * largest * 127 <= np.iinfo(np.int16).max
    assert int8_fine.ZERO - int8_fine.PIECE_MAX >= 0
    x_BSK = np.full((1, 1, INNER), 5, np.float32)
    x_BSK[..., 1::2] = 4.96  # either piece at its ends
    for sign in (1, -1):
        np.testing.assert_allclose(of.run(sign * x_BSK), by_int8_fine(sign * x_BSK, of), rtol=1e-6)


def test_a_constant_token_loses_nothing_in_one_piece() -> None:
    x_BSK = np.full((1, 1, INNER), 123.456, np.float32)
    exact = x_BSK.astype(np.float64) @ restored(layer("int8"))
    np.testing.assert_allclose(layer("int8").run(x_BSK), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scheme", ["int8", "int8_fine", "int8_blocks", "uint4", "int4"])
@settings(max_examples=20, deadline=None)
@given(other=rows_of_tokens)
def test_a_token_is_as_it_is_whatever_stands_beside_it(scheme: str, other: NDArray[np.float32]) -> None:
    of, mine = layer(scheme, blocks_in_8_bits=True), tokens()[:1, :1]
    beside = [
        of.run(np.concatenate([mine, each], axis=axis))[0, 0] for each in (other, mine) for axis in (0, 1)
    ]
    for each in beside[1:]:
        np.testing.assert_array_equal(each, beside[0])


# Which layers get which scheme


def component(graph: str) -> tuple[Component, list[str]]:
    """Layers of every kind of shape, and their parameters."""
    module = nn.ModuleDict(
        {
            "square": nn.Linear(64, 64, bias=False),
            "wide": nn.Linear(64, 96, bias=False),
            "narrow": nn.Linear(96, 64, bias=False),
            "ragged": nn.Linear(40, 24, bias=False),
            "ragged_wide": nn.Linear(40, 64, bias=False),
            "odd": nn.Linear(64, 33, bias=False),
            "lm_head": nn.Linear(64, 128, bias=False),
        }
    )
    spec = GraphSpec(name=graph, inputs=(), outputs=())  # type: ignore[arg-type]
    return Component(module=module, spec=spec, weight_key=str), [f"{name}.weight" for name in module]


@pytest.mark.parametrize(
    ("precision", "graph", "expected"),
    [
        ("int8", "decoder", "fine one fine fine one fine fine"),
        ("int8", "vision", "one one one one one one one"),
        ("int8-blocks", "decoder", "blocks blocks blocks fine fine blocks fine"),
        ("int8-blocks", "vision", "blocks blocks blocks - - blocks blocks"),
        ("int4", "decoder", "uint4 uint4 uint4 fine fine fine fine"),
        ("int4", "vision", "- - - - - - -"),
        ("int4-fp16", "decoder", "int4 int4 int4 - - - -"),
        ("fp8", "decoder", "fp8 fp8 fp8 fp8 fp8 fp8 -"),
        ("fp16", "decoder", "- - - - - - -"),
    ],
)
def test_shapes_that_a_scheme_does_not_fit_get_that_of_the_head(
    precision: str, graph: str, expected: str
) -> None:
    made, parameters = component(graph)
    schemes = schemes_of(made, PRECISIONS[precision], parameters)
    short = {"int8": "one", "int8_fine": "fine", "int8_blocks": "blocks"}
    names = {name: scheme.__name__.rpartition(".")[2] for name, scheme in schemes.items()}  # type: ignore[attr-defined]
    assert [short.get(names.get(each, "-"), names.get(each, "-")) for each in parameters] == expected.split()


def test_references_are_not_the_floats() -> None:
    """Were activations left as they are, the references of whole numbers would notice."""
    x_BSK = tokens()
    for scheme in ("int8", "int8_fine"):
        of = layer(scheme)
        sizes = np.abs(x_BSK).astype(np.float64) @ np.abs(restored(of))
        off = np.abs(by_floats(x_BSK, of) - of.run(x_BSK)) > REFERENCES[scheme][2] * sizes + 1e-30
        assert off.any()


def test_a_block_of_zeros_stays_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that take zero points out at the end add up numbers that are no zeros; with a scale of 1, that shows."""
    x_BSK = 1000 * np.random.default_rng(3).standard_normal((4, 8, INNER)).astype(np.float32)

    def left(scheme: str) -> float:
        return float(np.abs(Layer(scheme, weight(), session=IN_8_BITS).run(x_BSK)[..., 1]).max())

    assert max(map(left, ("int8_blocks", "uint4", "int4"))) < 1e-4
    monkeypatch.setattr("gap_export.graph.quantize.rounding._OF_NOTHING", 1.0)
    assert left("int8_blocks") > 1e-2
