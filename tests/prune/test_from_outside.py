"""A pruner registered by a module outside the package is built, run, held against its twin, listed and recognised like the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from gap_export import prune
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.bundle.manifest import Pruning
from gap_export.cli import app
from gap_export.errors import RecipeError
from gap_export.positions import PAD
from gap_export.runtime.ort import OnnxRuntimeSession
from tests.prune import largest_norm


@pytest.fixture
def registered() -> Iterator[prune.Pruner]:
    """The row from outside, which is gone after the test."""
    prune.register(largest_norm.ROW)
    yield largest_norm.ROW
    del prune.PRUNERS[largest_norm.ROW.name]


@pytest.mark.parametrize(
    "options", [{"keep": 0.34}, {"keep": "0.1:0.34:1.0"}, {"keep": "adaptive", "keep_bound": 0.6}], ids=str
)
def test_its_bundle_chooses_as_its_twin(
    options: dict[str, Any],
    registered: prune.Pruner,
    tiny_bundle: Callable[..., Bundle],
    tiny_reference: Callable[[Pruning], Any],
    pixels: NDArray[np.float32],
) -> None:
    """The twin goes by transformers' tower in float64; K built in, K an input, and K found in the image."""
    bundle = open_bundle(tiny_bundle(pruner=registered.name, **options).folder)
    pruning = bundle.manifest.pruning
    assert pruning.pruner == registered.name
    with OnnxRuntimeSession(bundle, threads=1) as session:
        for count in (5, 30) if pruning.count_is_given else (None,):
            visual = session.encode({"pixel_values": pixels}, keep_count=count)
            expected = tiny_reference(pruning).encode({"pixel_values": pixels}, keep_count=count)
            assert expected.margins.min() > 1e-6
            width = expected.kept_indices.shape[1]
            assert np.array_equal(visual.kept_indices[:, :width], expected.kept_indices)
            assert (visual.kept_indices[:, width:] == PAD).all()
            if pruning.keep_mode == "adaptive":
                assert visual.kept_counts.tolist() == expected.kept_counts.tolist()
                assert len(set(visual.kept_counts.tolist())) > 1


def test_a_bundle_of_it_runs_where_nobody_registers_it(
    tiny_bundle: Callable[..., Bundle], pixels: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(prune.PRUNERS, "largest_norm", largest_norm.ROW)
        folder = tiny_bundle(pruner="largest_norm", keep=0.34).folder
    assert "largest_norm" not in prune.names()
    with OnnxRuntimeSession(open_bundle(folder, every_hash=True), threads=1) as session:
        assert session.encode({"pixel_values": pixels}).kept_indices.shape == (4, 12)


def test_it_is_listed_and_meant_like_the_others(registered: prune.Pruner) -> None:
    rows = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)["pruners"]
    assert rows[-1]["name"] == registered.name
    assert registered.summary in " ".join(CliRunner().invoke(app, ["models"]).stdout.split())
    with pytest.raises(RecipeError, match="did you mean 'largest_norm'"):
        prune.load("largest_nrom")
    with pytest.raises(RecipeError) as caught:
        prune.check_adaptive(prune.row("divprune"))
    assert registered.name in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "is in the table already"),
        ({"name": "divprune"}, "is in the table already"),
    ],
)
def test_a_second_row_of_a_name_is_refused(
    changes: dict[str, Any], words: str, registered: prune.Pruner
) -> None:
    before = prune.names()
    with pytest.raises(ValueError, match=words):
        prune.register(replace(registered, **changes))
    assert prune.names() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "largest-norm"}, "is an identifier"),
        ({"name": ""}, "is an identifier"),
        ({"merges": True, "merged": 1}, "one must be a patch"),
        ({"merged": 1, "min_tokens": 2}, "does not merge"),
        ({"min_tokens": 0}, "one must be a patch"),
        ({"in_decoder": True}, "where no rule finds the count"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(largest_norm.ROW, **changes)


def test_a_module_that_cannot_choose_is_refused() -> None:
    for lacking, module in (("select", "tests.unpruned"), ("select_adaptive", "gap_export.prune.divprune")):
        row = replace(largest_norm.ROW, module=module)
        with pytest.raises(ValueError, match=f"{module}.*has no function '{lacking}'"):
            row.load()
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        replace(largest_norm.ROW, module="nowhere.at_all").load()
