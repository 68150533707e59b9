"""Requests that choose their position ids: offered where the operator allows it, and then what a bundle built so would answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest
from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.positions import PositionPolicy
from gap_export.serving.engine import Engine
from gap_export.serving.http.app import create_app
from gap_export.serving.http.settings import HttpSettings
from gap_export.serving.numbering import offered, placed_by
from gap_export.serving.service import Service
from gap_export.serving.work import Expression, Result, Work
from tests.serving.http.serving_http import data_url, noise

GAP, SHIFTED = PositionPolicy.GAP, PositionPolicy.SHIFTED
EXPRESSION = "the red circle"


def answer(
    engine: Engine, image: Image.Image, policy: PositionPolicy | None, *expressions: str
) -> list[Result]:
    perturb = placed_by(engine.bundle.manifest, policy)
    work = Work(tuple(map(Expression, expressions)), lambda: [image], 1, trace=True, perturb=perturb)
    found = engine.submit(work).result(60)
    assert all(isinstance(each, Result) for each in found), found
    return [each for each in found if isinstance(each, Result)]


@pytest.mark.slow
def test_renumbered_answers_are_those_of_a_bundle_that_renumbers(
    tiny_bundle: Callable[..., Bundle], open_engine: Callable[..., Engine]
) -> None:
    """Of two expressions, which share what they have in common, and beside one that keeps its ids."""
    engine = open_engine(tiny_bundle())
    baseline = open_engine(tiny_bundle(positions="shifted"))
    image, asked = noise(48, 40), (EXPRESSION, "a cat")
    mine, theirs = (
        answer(each, image, policy, *asked) for each, policy in ((engine, SHIFTED), (baseline, None))
    )
    assert [each.ids for each in mine] == [each.ids for each in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert one.trace is not None
        assert other.trace is not None
        assert one.trace.position_ids.tolist() == other.trace.position_ids.tolist()
        assert one.trace.position_ids.max() == one.trace.position_ids.size - 1, "without gaps"
    own, same = (answer(engine, image, policy, EXPRESSION)[0] for policy in (None, GAP))
    assert own.ids == same.ids
    assert own.trace is not None
    assert own.trace.position_ids.max() > own.trace.position_ids.size - 1


@pytest.mark.slow
def test_where_it_is_offered(tiny_bundle: Callable[..., Bundle]) -> None:
    pruned, baseline = tiny_bundle().manifest, tiny_bundle(positions="shifted").manifest
    inside = pruned.model_copy(update={"pruning": pruned.pruning.model_copy(update={"stages": (1,)})})
    assert offered(pruned, allow_baselines=True) == (GAP, SHIFTED)
    assert offered(pruned, allow_baselines=False) == (GAP,)
    assert offered(baseline, allow_baselines=True) == (SHIFTED,)
    assert offered(inside, allow_baselines=True) == (GAP,), "ids there follow from every stage"


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [True, False])
def test_over_http(
    tiny_bundle: Callable[..., Bundle], open_engine: Callable[..., Engine], allowed: bool
) -> None:
    engine = open_engine(tiny_bundle())
    app = create_app(Service(engine, "tiny"), HttpSettings(allow_baselines=allowed))
    body = {"image": data_url(noise(48, 40)), "expression": EXPRESSION}

    async def asked(**changes: object) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post("/v1/ground", json={**body, **changes})

    own, gap, shifted, permuted, receipt = (
        asyncio.run(asked(**changes))
        for changes in (
            {},
            {"positions": "gap"},
            {"positions": "shifted"},
            {"positions": "permuted"},
            {"positions": "shifted", "receipt": True},
        )
    )
    assert own.json()["results"][0]["positions"] == gap.json()["results"][0]["positions"] == "gap"
    assert permuted.status_code == receipt.status_code == 400
    assert permuted.json()["error"]["param"] == "positions"
    if allowed:
        assert shifted.json()["results"][0]["positions"] == "shifted"
    else:
        assert shifted.status_code == 400
        assert "must be gap here" in shifted.json()["error"]["message"]
