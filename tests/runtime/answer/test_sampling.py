"""Choosing tokens: against the processors of transformers, against the distribution itself, and what must not matter."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pydantic import ValidationError
from transformers.generation import logits_process as theirs

from gap_export.errors import InputError
from gap_export.runtime.answer.sampling import Sampling, choose, filtered_log_probs, uniform

SEEDS = 1000
RECORDED = {(0, 0): 0.011546754286331562, (7, 3): 0.44205212947108785}
"""(seed, number) -> the number drawn with: the answers of a seed stay what they were."""


def probabilities_of_transformers(
    logits: NDArray[np.float32], sampling: Sampling, seen: list[int]
) -> NDArray[np.float64]:
    """[V] of the same chain of processors that `generate` makes, in float64."""
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    ids = torch.tensor([seen], dtype=torch.int64)
    chain: list[Any] = []
    if sampling.repetition_penalty != 1:
        chain.append(theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        chain.append(theirs.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(theirs.MinPLogitsWarper(sampling.min_p))
    for each in chain:
        scores = each(ids, scores)
    return scores.softmax(-1)[0].numpy()


def case(seed: int) -> tuple[NDArray[np.float32], Sampling, list[int]]:
    """Logits, some with ties and some with -inf, any combination of parameters, and ids seen, some beyond the vocabulary."""
    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 2, 5, 32, 257, 1000]))
    logits = rng.normal(0, rng.choice([0.1, 1, 4]), size).astype(np.float32)
    if seed % 3 == 0:
        logits = np.round(logits * 2) / np.float32(2)
    if seed % 4 == 0:
        logits[rng.random(size) < 0.3] = -np.inf
        logits[rng.integers(size)] = 1
    parameters = {
        "temperature": float(rng.uniform(0.05, 3)),
        "top_k": int(rng.integers(1, size + 3)),
        "top_p": float(rng.uniform(0.01, 1)),
        "min_p": float(rng.uniform(0, 1) ** 3),
        "repetition_penalty": float(np.exp(rng.normal(0, 0.5))),
    }
    chosen = {name: value for name, value in parameters.items() if rng.random() < 0.6}
    seen = rng.integers(0, size + 3, int(rng.integers(1, 9))).tolist()
    return logits, Sampling.of(**{"temperature": 1.0, **chosen}), seen


def test_the_distribution_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    stable = partial(torch.sort, stable=True)
    for seed in range(SEEDS):
        logits, sampling, seen = case(seed)
        found = np.exp(filtered_log_probs(logits, sampling, seen))
        assert found.sum() == pytest.approx(1)
        # Which of equally probable tokens top-p takes first is open in their sort; how many, is not.
        expected = probabilities_of_transformers(logits, sampling, seen)
        np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=0, atol=1e-6)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "sort", stable)
            expected = probabilities_of_transformers(logits, sampling, seen)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=f"case {seed}: {sampling}")
        assert ((found == 0) == (expected == 0)).all()


def test_draws_follow_the_distribution() -> None:
    logits = np.random.default_rng(3).normal(0, 1.5, 40).astype(np.float32)
    sampling = Sampling.of(temperature=1.5, top_k=30, top_p=0.97, min_p=0.01, repetition_penalty=1.2, seed=7)
    probabilities = np.exp(filtered_log_probs(logits, sampling, [1, 2, 3]))
    draws = 20_000
    counts = np.bincount(
        [choose(logits, sampling, [1, 2, 3], number) for number in range(draws)], minlength=len(logits)
    )
    kept = probabilities > 0
    assert not counts[~kept].any()
    expected = draws * probabilities[kept]
    assert expected.min() > 5
    squares = ((counts[kept] - expected) ** 2 / expected).sum()
    freedom = int(kept.sum()) - 1
    assert freedom > 10
    assert abs(squares - freedom) < 3 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_no_temperature_is_greedy(size: int) -> None:
    rng = np.random.default_rng(size)
    for _ in range(50):
        logits = np.round(rng.normal(0, 1, size), 1).astype(np.float32)
        greedy = int(logits.argmax())
        assert choose(logits, Sampling(), [0], 0) == greedy
        # The largest logit passes all filters.
        strict = Sampling.of(top_k=3, top_p=0.3, min_p=0.9, seed=11)
        assert choose(logits, strict, [0], 5) == greedy
        assert np.flatnonzero(np.exp(filtered_log_probs(logits, strict, []))).tolist() == [greedy]


def test_a_penalty_changes_the_greedy_token() -> None:
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    sampling = Sampling.of(repetition_penalty=1.5)
    assert choose(logits, sampling, [], 0) == 0
    assert choose(logits, sampling, [0, 0, -2, 4, 99], 0) == 1
    assert choose(logits, sampling, range(4), 0) == 0
    negative = np.array([-1.0, -1.1], np.float32)
    assert choose(negative, sampling, {0}, 0) == 1
    assert choose(negative, Sampling.of(repetition_penalty=0.5), {1}, 0) == 1


@pytest.mark.parametrize("penalty", [5e-324, 1e308])
def test_the_most_extreme_penalties_leave_a_distribution(penalty: float) -> None:
    logits = np.array([3.0, -3.0, 0.0, -np.inf, 1.0], np.float32)
    log_probs = filtered_log_probs(logits, Sampling.of(temperature=1.0, repetition_penalty=penalty), range(5))
    assert np.exp(log_probs).sum() == pytest.approx(1)
    assert log_probs[3] == -np.inf


def test_neutral_parameters_change_nothing() -> None:
    logits = np.random.default_rng(0).normal(0, 2, 500).astype(np.float32)
    shifted = logits.astype(np.float64) - logits.max()
    expected = shifted - np.log(np.exp(shifted).sum())
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    for name, value in neutral.items():
        given = Sampling.of(**{"temperature": 1.0, name: value})
        np.testing.assert_allclose(filtered_log_probs(logits, given, range(500)), expected, atol=1e-12)
        assert given == Sampling.of(temperature=1.0)
    for weakest in ({"top_k": 500}, {"top_k": 10**30}, {"top_p": 1 - 1e-12}, {"min_p": 1e-12}):
        given = Sampling.of(temperature=1.0, **weakest)
        np.testing.assert_allclose(filtered_log_probs(logits, given, []), expected, atol=1e-12)


def test_logits_are_left_as_they_were() -> None:
    logits = np.random.default_rng(0).normal(0, 2, 50).astype(np.float32)
    before = logits.copy()
    choose(logits, Sampling.of(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2.0), range(50), 0)
    assert (logits == before).all()


@pytest.mark.parametrize("name", sorted(Sampling.model_fields))
@pytest.mark.parametrize(
    "value", [-1, -0.5, math.nan, math.inf, -math.inf, True, "0.5", None, [0.5], "x" * 10_000, 10**400]
)
def test_bad_values_are_refused_in_one_line(name: str, value: object) -> None:
    if name == "top_k" and value == 10**400:
        assert Sampling.of(top_k=value).top_k == value
        return
    with pytest.raises(InputError) as caught:
        Sampling.of(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"input: {name} ")
    assert "is not a" in message
    assert " number" in message
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 100.001),
        ("top_p", 0),
        ("top_p", 1.001),
        ("min_p", 1.001),
        ("top_k", 2.5),
        ("top_k", 2.0),
        ("repetition_penalty", 0),
        ("seed", 2**63),
        ("seed", 0.5),
    ],
)
def test_values_beyond_a_bound_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} .* is not a"):
        Sampling.of(**{name: value})
    with pytest.raises(ValidationError):
        Sampling(**{name: value})


def test_bounds_themselves_are_taken() -> None:
    for bound in (
        {"temperature": 100},
        {"temperature": 0},
        {"top_p": 1},
        {"top_p": 5e-324},
        {"min_p": 1},
        {"seed": 2**63 - 1},
        {"repetition_penalty": 5e-324},
    ):
        sampling = Sampling.of(**{"temperature": 1, **bound})
        assert choose(np.array([0.0, 1.0, 0.5], np.float32), sampling, [1], 3) in range(3)


def test_a_name_that_is_no_parameter_is_refused() -> None:
    with pytest.raises(InputError, match=r"'topp': is not a parameter of sampling \(there are temperature,"):
        Sampling.of(topp=0.5)
    with pytest.raises(ValidationError):
        Sampling().temperature = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("logits", [[-np.inf, -np.inf], [np.inf, 0.0]])
def test_logits_without_a_distribution_are_no_answer(logits: list[float]) -> None:
    with pytest.raises(ValueError, match="no distribution"):
        choose(np.array(logits, np.float32), Sampling.of(temperature=1.0), [], 0)


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.01, 100),
    top_p=st.floats(0.001, 1),
    top_k=st.integers(0, 12),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    seed=st.integers(0, 2**63 - 1),
)
vectors = arrays(
    np.float32, st.integers(1, 12), elements=st.floats(-50, 50, width=32) | st.just(-np.inf)
).filter(lambda logits: bool(np.isfinite(logits).any()))
seen_ids = st.lists(st.integers(-2, 15), max_size=5)


@settings(max_examples=200)
@given(logits=vectors, sampling=samplings, seen=seen_ids, number=st.integers(0, 2**40))
def test_what_is_filtered_is_never_drawn(
    logits: NDArray[np.float32], sampling: Sampling, seen: list[int], number: int
) -> None:
    log_probs = filtered_log_probs(logits, sampling, seen)
    token = choose(logits, sampling, seen, number)
    assert np.isfinite(log_probs[token])
    assert np.isneginf(log_probs[np.isneginf(logits)]).all()
    assert np.exp(log_probs).sum() == pytest.approx(1)


@settings(max_examples=60)
@given(logits=vectors, sampling=samplings, seen=seen_ids, number=st.integers(0, 1000), other=vectors)
def test_a_draw_depends_on_seed_and_number_alone(
    logits: NDArray[np.float32],
    sampling: Sampling,
    seen: list[int],
    number: int,
    other: NDArray[np.float32],
) -> None:
    token = choose(logits, sampling, seen, number)
    np.random.seed(number)
    for before in range(3):
        choose(other, sampling, [], before)
    assert choose(logits, sampling, seen, number) == token
    assert choose(logits, sampling, [*reversed(seen), *seen], number) == token


def test_draws_of_neighbouring_numbers_and_seeds_differ() -> None:
    drawn = [uniform(seed, number) for seed in (0, 1, 2**63 - 1) for number in range(100)]
    assert len(set(drawn)) == 300
    assert all(0 <= each < 1 for each in drawn)
    assert {key: uniform(*key) for key in RECORDED} == RECORDED
