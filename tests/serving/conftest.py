"""Bundles that are served, and engines over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gap_export.bundle.folder import Bundle
from gap_export.graph.trace_cache import Tracer
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.model import Model, load
from gap_export.serving.engine import Engine
from gap_export.serving.limits import EngineLimits

if TYPE_CHECKING:
    from tests.families.answers import Tiny

RANGE = "0.1:0.25:1.0"

OpenEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory: pytest.TempPathFactory, tracer: Tracer) -> Bundle:
    """The bundled model that finds shapes; requests choose their share of the visual tokens. Not to be changed."""
    from gap_export.pipeline.build import build

    recipe = Recipe.load("shapes", keep=RANGE)
    return build(recipe, tmp_path_factory.mktemp("shapes") / "bundle", tracer=tracer).bundle


@pytest.fixture(scope="session")
def shapes_alone(shapes_bundle: Bundle) -> Iterator[Model]:
    """The same, which answers one question after the other."""
    with load(shapes_bundle, threads=1) as model:
        yield model


@pytest.fixture
def open_engine() -> Iterator[OpenEngine]:
    """`open_engine(bundle, backend="onnxruntime", session=None, rows=..., **of Engine)`: an engine that is closed at the end; `engine.model` is its model."""
    with ExitStack() as stack:

        def opened(
            bundle: Bundle,
            backend: str = "onnxruntime",
            session: Any = None,
            *,
            rows: int = 4,
            queue: int = 400,
            image_threads: int = 2,
            **options: Any,
        ) -> Engine:
            model = load(bundle, backend=backend, threads=1) if session is None else Model(bundle, session)
            limits = EngineLimits(rows=rows, queue=queue, image_threads=image_threads)
            stack.enter_context(model)
            engine = stack.enter_context(Engine(model, limits, **options))
            engine.model = model  # type: ignore[attr-defined]
            return engine

        yield opened


@pytest.fixture(scope="session")
def qwen(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, tracer: Tracer) -> Tiny:
    """Qwen2-VL: images of any size, three rows of position ids. Its checkpoint, and bundles of it."""
    from tests.families.answers import Tiny
    from tests.families.conftest import save_checkpoint
    from tests.families.tiny_families import FAMILIES

    folder = tmp_path_factory.mktemp("qwen")
    family = FAMILIES["qwen2_vl"]
    checkpoint = save_checkpoint(folder / "checkpoint", family, tiny_checkpoint / "tokenizer.json")
    return Tiny(family, checkpoint, folder, tracer)
