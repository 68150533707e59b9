"""The harmless files, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.folder import Bundle
from gap_export.graph.trace_folder import user_folder
from tests.hostile.campaign import Campaign
from tests.hostile.child import import_everything
from tests.hostile.world import Materials, World


@pytest.fixture(scope="session")
def world(
    tiny_checkpoint: Path,
    tiny_text_tower: Path,
    tiny_options: dict[str, Any],
    tiny_bundle: Callable[..., Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    """Files of every kind that is read."""
    import_everything()
    folder = tmp_path_factory.mktemp("hostile")
    materials = Materials(
        tiny_checkpoint,
        tiny_text_tower,
        tiny_options,
        tiny_bundle().folder,
        tiny_bundle(pruner="divprune", keep="0.1:0.3:1.0").folder,
    )
    traces = user_folder()
    assert traces is not None
    return World(folder / "world", materials, traces.path)


@pytest.fixture(scope="session")
def campaign(world: World, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Runs inputs."""
    return Campaign(world, tmp_path_factory.mktemp("inputs"))
