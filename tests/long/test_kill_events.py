"""Every command that writes, killed before every event of the file system and given every kind of error at it: nothing is lost, and the
same command finishes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gap_export.recipe.recipe import Recipe
from tests.interrupted import Case, Interrupted, cases, stored_results
from tests.killing import FAULTS, fail_at, kill_at

pytestmark = pytest.mark.long

NAMES = (
    "build",
    "build into an empty folder",
    "build --replace",
    "eval",
    "eval into an empty folder",
    "eval --replace",
    "sweep",
    "sweep --replace",
    "recommend",
    "recommend --replace",
    "calibrate",
    "report",
    "validate",
)


@pytest.fixture(scope="module")
def interrupted(
    tiny_options: dict[str, Any], tracer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Interrupted]:
    folder = tmp_path_factory.mktemp("interrupted")
    with stored_results(Recipe.model_validate(tiny_options), folder, tracer) as made:
        yield made


@pytest.fixture(scope="module")
def every_case(interrupted: Interrupted) -> dict[str, Case]:
    made = cases(interrupted)
    assert made.keys() == set(NAMES)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_every_event(
    name: str, interrupted: Interrupted, every_case: dict[str, Case], capsys: pytest.CaptureFixture[str]
) -> None:
    case = every_case[name]
    events = interrupted.events_of(case)
    lost = {
        f"before event {number} ({events[number]})": wrong
        for number in range(len(events))
        if (wrong := interrupted.round(case, kill_at(number))) is not None
    }
    with capsys.disabled():
        print(f"\n{name}: killed at each of {len(events)} events, {len(lost)} lost something")
    assert not lost, "\n".join(f"{where}: {what}" for where, what in lost.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_event(
    name: str,
    fault: str,
    interrupted: Interrupted,
    every_case: dict[str, Case],
    capsys: pytest.CaptureFixture[str],
) -> None:
    case, (code, for_good) = every_case[name], FAULTS[fault]
    events = interrupted.events_of(case)
    lost = {
        f"{fault} at event {number} ({events[number]})": wrong
        for number in range(0, len(events), 1 if len(events) < 100 else 4)
        if (wrong := interrupted.round(case, fail_at(number, code, for_good=for_good))) is not None
    }
    with capsys.disabled():
        print(f"\n{name}: {fault} at each of {len(events)} events, {len(lost)} lost something")
    assert not lost, "\n".join(f"{where}: {what}" for where, what in lost.items())
