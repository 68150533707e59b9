"""One model, many threads: each answer has the session for itself, from the image to the last token."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.errors import SessionError
from gap_export.runtime.grounder import Answer
from gap_export.runtime.model import Model, load

BuildBundle = Callable[..., Bundle]
Pixels = NDArray[np.uint8]

THREADS, ROUNDS = 8, 3
WORDS = ["the red mug", "a cat", "the small blue circle", "the green square on the left"]


@pytest.fixture
def images() -> list[Pixels]:
    """Of every thread."""
    rng = np.random.default_rng(4)
    return [rng.integers(0, 256, (36, 36, 3), dtype=np.uint8) for _ in range(THREADS)]


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads take turns in Python often."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def answers(model: Model, image: Pixels, number: int) -> list[tuple[str, list[int]]]:
    """One expression by itself, and several that share the image."""
    found: list[Answer] = [model.ground(image, WORDS[number % 4]), *model.ground(image, WORDS)]
    return [(each.text, each.kept_indices.tolist()) for each in found]


def of_all(model: Model, images: list[Pixels]) -> list[list[tuple[str, list[int]]]]:
    """From as many threads as there are images, all at once."""
    together = threading.Barrier(THREADS)

    def work(number: int) -> list[tuple[str, list[int]]]:
        together.wait()
        return [each for _ in range(ROUNDS) for each in answers(model, images[number], number)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(THREADS)))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_eight_threads_get_the_answers_of_one(
    backend: str, tiny_bundle: BuildBundle, images: list[Pixels]
) -> None:
    with load(tiny_bundle(), backend=backend, threads=1) as model:
        alone = [answers(model, image, number) * ROUNDS for number, image in enumerate(images)]
        assert len({str(each) for each in alone}) == THREADS, "answers that are all alike prove nothing"
        assert of_all(model, images) == alone


@pytest.mark.usefixtures("impatient")
def test_without_turns_they_get_others(tiny_bundle: BuildBundle, images: list[Pixels]) -> None:
    """What the test above would show if answers did not wait for each other."""
    with load(tiny_bundle(), threads=1) as model:
        alone = [answers(model, image, number) * ROUNDS for number, image in enumerate(images)]
        model.session.turn = nullcontext  # type: ignore[method-assign]
        try:
            assert of_all(model, images) != alone
        except Exception as error:  # caches of another length
            assert not isinstance(error, AssertionError)  # noqa: PT017


def test_a_model_is_not_closed_under_an_answer(tiny_bundle: BuildBundle, images: list[Pixels]) -> None:
    model = load(tiny_bundle(), threads=1)
    closing = threading.Thread(target=model.close)
    with model.session.turn():
        closing.start()
        closing.join(0.05)
        assert closing.is_alive()
        assert model.ground(images[0], "a cat").visual_tokens == 36
    closing.join()
    with pytest.raises(SessionError, match="is closed"):
        model.ground(images[0], "a cat")
