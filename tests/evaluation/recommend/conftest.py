"""A recommendation among pruners of the tiny model, made once, undisturbed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gap_export.evaluation.recommend import run
from gap_export.evaluation.recommend.record import Recommendation
from gap_export.evaluation.recommend.request import PrunerRequest
from gap_export.evaluation.refer.dataset import Dataset, open_dataset
from gap_export.recipe.recipe import Recipe
from tests.recorded import Recorded

LIMIT, REQUESTS = 6, 2
RequestOf = Callable[..., PrunerRequest]


@pytest.fixture(scope="session")
def scenes() -> Dataset:
    return open_dataset("scenes:3")


@pytest.fixture(scope="session")
def request_of(tiny_options: dict[str, Any]) -> RequestOf:
    """A request about the tiny model, with changes to it and to its recipe."""

    def made(recipe: dict[str, Any] | None = None, **changes: Any) -> PrunerRequest:
        options: dict[str, Any] = {
            "pruners": ("random", "divprune"),
            "keeps": (1.0, 0.5, 0.25),
            "limit": LIMIT,
            "requests": REQUESTS,
            "threads": 1,
        }
        return PrunerRequest(
            recipe=Recipe.model_validate({**tiny_options, **(recipe or {})}), **{**options, **changes}
        )

    return made


@dataclass(frozen=True)
class Made:
    """What a whole run left, and what it told of its progress."""

    folder: Path
    record: Recommendation
    progress: Recorded


@pytest.fixture(scope="session")
def made(request_of: RequestOf, scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, progress = tmp_path_factory.mktemp("recommendations") / "undisturbed", Recorded()
    record = run.run(run.prepare(request_of(), scenes, folder), progress=progress)
    return Made(folder, record, progress)
