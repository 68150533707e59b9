"""Data sets: scenes, which a worker draws again, and folders, whatever else lies in them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.boxes import scenes
from gap_export.errors import InputError
from gap_export.evaluation.refer.annotations import Expression
from gap_export.evaluation.refer.dataset import SCENES, open_dataset


def test_scenes_are_drawn_where_they_are_asked_for() -> None:
    dataset = open_dataset("scenes:2")
    sent = pickle.dumps(dataset.source)
    assert len(sent) < 1000, "no images travel"
    source = pickle.loads(sent)
    for expression in (dataset.expressions[0], dataset.expressions[-1]):
        index = int(expression.image[-5:])
        drawn = scenes.make_scene(scenes.HELD_OUT_SEED, index).pixels
        assert np.array_equal(np.asarray(source.open(expression.image)), drawn)
        assert source.size(expression.image) == (drawn.shape[1], drawn.shape[0])
        assert source.has(expression.image)


@pytest.mark.parametrize(
    "name", ["shapes-1-00000", "shapes-730041-0", f"shapes-730041-{SCENES:05d}", "", "0"]
)
def test_there_are_no_others(name: str) -> None:
    source = open_dataset("scenes").source
    assert source is not None
    assert not source.has(name)
    with pytest.raises(InputError, match="is no scene"):
        source.open(name)


def test_a_folder_with_more_than_files_in_it(few: list[Expression], writer: Any, tmp_path: Path) -> None:
    folder = writer("refer", few, tmp_path)
    identity = open_dataset(folder).identity
    (folder / "old.json").mkdir()
    (folder / ".#open.json").symlink_to("nowhere")
    assert open_dataset(folder).identity == identity
