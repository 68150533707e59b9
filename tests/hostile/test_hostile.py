"""Hostile inputs of every command: a seeded sample of them, and thousands in the long run.

GAP_EXPORT_HOSTILE runs those alone whose name holds a text, of all that there are: `GAP_EXPORT_HOSTILE='run --image' make test-long`. The table of all of them is printed at the end.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gap_export.cli import app
from tests.hostile.calls import CALLS, call
from tests.hostile.campaign import Campaign, Result
from tests.hostile.cases import cases
from tests.hostile.choice import chosen, sample
from tests.hostile.commands import parameters_of
from tests.hostile.world import World

SEED = 20260613
LONG_SHARE = 0.55
AT_LEAST, MINUTES = 5000, 60
IN_SAMPLE = 60


def told(result: Result) -> None:
    """Every fault at once: a long run may be stopped."""
    if result.faults:
        print(f"{result.case.id!a}: {'; '.join(result.faults)}", flush=True)


def test_a_sample_of_hostile_inputs(world: World, tmp_path: Path) -> None:
    quick = Campaign(world, tmp_path, compares=False)
    outcomes = quick.run(sample(world, parameters_of(app), seed=SEED, count=IN_SAMPLE), told)
    print(outcomes.table())
    assert not outcomes.wrong


@pytest.mark.long
@pytest.mark.parametrize("name", [each.name for each in CALLS])
def test_harmless_calls_are_accepted(name: str, campaign: Campaign) -> None:
    assert campaign.twin(call(name)).code in (0, 1)


@pytest.mark.long
def test_hostile_inputs(world: World, campaign: Campaign, capsys: pytest.CaptureFixture[str]) -> None:
    only = os.environ.get("GAP_EXPORT_HOSTILE", "")
    share = float(os.environ.get("GAP_EXPORT_HOSTILE_SHARE", 1.0 if only else LONG_SHARE))
    every = cases(world, parameters_of(app), seed=SEED)
    with capsys.disabled():
        outcomes = campaign.run(
            (case for case in every if only in case.id and chosen(case, SEED, share)), told
        )
        print(f"\n{outcomes.table()}\n{outcomes.as_json()}")
    assert not outcomes.wrong
    if not only and share >= LONG_SHARE:
        assert outcomes.inputs >= AT_LEAST
        assert outcomes.seconds < 60 * MINUTES
