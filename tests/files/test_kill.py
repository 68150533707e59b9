"""Some instants of two commands at which they are killed; all of all commands are in `tests/long/test_kill_events.py`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gap_export.files import folder as folders
from gap_export.recipe.recipe import Recipe
from tests.interrupted import Interrupted, cases, stored_results
from tests.killing import kill_at


@pytest.fixture(scope="module")
def interrupted(
    tiny_options: dict[str, Any], tracer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Interrupted]:
    folder = tmp_path_factory.mktemp("interrupted")
    with stored_results(Recipe.model_validate(tiny_options), folder, tracer) as made:
        yield made


@pytest.mark.parametrize("name", ["calibrate", "eval --replace"])
def test_killed_now_and_then(name: str, interrupted: Interrupted) -> None:
    case = cases(interrupted)[name]
    for number in range(0, len(interrupted.events_of(case)), 10):
        assert (wrong := interrupted.round(case, kill_at(number))) is None, wrong


def test_the_loss_is_found_where_folders_are_not_exchanged_in_one_step(
    interrupted: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a folder that is removed before the other takes its place is gone when the command is killed in between."""

    def removed_first(one: Path, other: Path) -> bool:
        shutil.rmtree(other)
        os.rename(one, other)
        return True

    monkeypatch.setattr(folders, "_exchanged", removed_first)
    case = cases(interrupted)["eval --replace"]
    events = interrupted.events_of(case)
    between = 1 + next(place for place, event in enumerate(events) if event.startswith("exchange"))
    found = interrupted.round(case, kill_at(between + 2))
    assert found is not None
    assert "lost" in found
