"""A small model with random weights that can be talked to: every token that it reads shows in what it says next."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.graph.trace_cache import Tracer
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.model import Model, load

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content[0].text + ' ' }}"
    "{% elif m.role == 'user' %}{{ 'USER : ' }}{% for part in m.content %}"
    "{% if part.type == 'image' %}{{ '<image> ' }}{% else %}{{ part.text + ' ' }}{% endif %}{% endfor %}"
    "{% else %}{{ 'ASSISTANT : ' + m.content[0].text + ' ' }}{% endif %}"
    "{% endfor %}{{ 'ASSISTANT :' }}"
)
LONGEST, MAX_TEXT = 8, 100

Pixels = NDArray[np.uint8]
OpenModel = Callable[..., Model]


def _with_template(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def chat_bundle(
    tiny_checkpoint: Path,
    deep_checkpoint: Path,
    tiny_options: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    tracer: Tracer,
) -> Callable[..., Bundle]:
    """`chat_bundle(deep=False, **recipe)`: a bundle that keeps a quarter and has a chat template, built on first use."""
    from gap_export.pipeline.build import build

    folder = tmp_path_factory.mktemp("chats")
    checkpoints = [
        _with_template(checkpoint, folder / f"checkpoint-{checkpoint.name}")
        for checkpoint in (tiny_checkpoint, deep_checkpoint)
    ]
    built: dict[str, Bundle] = {}

    def bundle(*, deep: bool = False, **changes: Any) -> Bundle:
        name = f"{deep} " + " ".join(f"{key}={changes[key]}" for key in sorted(changes))
        if name not in built:
            own = {"checkpoint": str(checkpoints[deep]), "keep": 0.25}
            longest = {"max_text": MAX_TEXT, "max_new_tokens": LONGEST}
            recipe = Recipe.model_validate({**tiny_options, **own, **longest, **changes})
            built[name] = build(recipe, folder / str(len(built)), golden=False, tracer=tracer).bundle
        return built[name]

    return bundle


@pytest.fixture(scope="session")
def open_model(chat_bundle: Callable[..., Bundle]) -> Iterator[OpenModel]:
    """`open_model(backend="onnxruntime", **as of chat_bundle)`: a model that stays open; tests leave it as it was."""
    models: dict[str, Model] = {}

    def opened(backend: str = "onnxruntime", **changes: Any) -> Model:
        name = f"{backend} {changes}"
        if name not in models:
            models[name] = load(chat_bundle(**changes), backend=backend, threads=1)
        return models[name]

    yield opened
    for model in models.values():
        model.close()


@pytest.fixture(scope="session")
def images() -> list[Pixels]:
    """Eight of them."""
    rng = np.random.default_rng(4)
    return [rng.integers(0, 256, (36, 36, 3), dtype=np.uint8) for _ in range(8)]
