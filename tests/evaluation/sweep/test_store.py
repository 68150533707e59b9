"""The folder of a sweep: what is kept, what is refused, and that nothing of somebody else's is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gap_export.errors import BundleError
from gap_export.evaluation.sweep.record import Answers, Settings, SweepPoint
from gap_export.evaluation.sweep.store import Store, open_store
from gap_export.positions import PositionPolicy

SETTINGS = Settings(
    recipe={"name": "tiny", "seed": 0}, checkpoint_sha256="abc", backend="onnxruntime", limit=2, scenes_seed=1, batch=4, threads=1,
    versions={"torch": "2"},
)  # fmt: skip
POINT = SweepPoint(pruner="random", keep=0.25, kept=9, positions=PositionPolicy.GAP)
OTHER = POINT.model_copy(update={"positions": PositionPolicy.SHIFTED})
ANSWERS = Answers(texts=("[0.1, 0.2]", ""), ious=(0.123456789012345, 0.0), without_box=1, cut_off=0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "sweep", SETTINGS, replace=False)


def test_points_come_back_as_they_were(store: Store) -> None:
    assert POINT not in store
    store.save(POINT, ANSWERS)
    assert POINT in store
    assert OTHER not in store
    again = open_store(store.folder, SETTINGS, replace=False)
    assert again.answers(POINT) == ANSWERS
    with pytest.raises(BundleError, match="is missing"):
        again.answers(OTHER)


def test_what_a_killed_run_was_writing_is_not_a_point(store: Store) -> None:
    (store.folder / "points").mkdir()
    (store.folder / "points" / ".random-9-gap.json.writing").write_text('{"texts": [')
    assert POINT not in open_store(store.folder, SETTINGS, replace=False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-10],
        lambda text: "",
        lambda text: text.replace('"cut_off"', '"off"'),
        lambda text: text.replace("0.123456789012345,", ""),
    ],
)
def test_a_damaged_point_is_not_taken_for_an_unfinished_one(
    damage: Callable[[str], str], store: Store
) -> None:
    store.save(POINT, ANSWERS)
    (file,) = (store.folder / "points").iterdir()
    file.write_text(damage(file.read_text()))
    with pytest.raises(BundleError, match="damaged") as caught:
        assert POINT in store
    assert "delete it" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"limit": 500}, "limit 2 there, 500 here"),
        ({"checkpoint_sha256": "def"}, "checkpoint sha256 abc there, def here"),
        ({"versions": {"torch": "3"}}, "versions torch 2 there, 3 here"),
        ({"versions": {"torch": "2", "onnx": "1"}}, "versions onnx None there, 1 here"),
        ({"recipe": {"name": "tiny", "seed": 7}}, "recipe seed 0 there, 7 here"),
    ],
)
def test_a_sweep_of_other_settings_is_replaced_only_on_demand(
    changes: dict[str, object], words: str, store: Store
) -> None:
    store.save(POINT, ANSWERS)
    other = SETTINGS.model_copy(update=changes)
    with pytest.raises(BundleError, match=words) as caught:
        open_store(store.folder, other, replace=False)
    assert "--replace" in caught.value.hint
    assert POINT in open_store(store.folder, SETTINGS, replace=True), "same settings: nothing to replace"
    assert POINT not in open_store(store.folder, other, replace=True)
    assert sorted(path.name for path in store.folder.iterdir()) == ["files.json", "settings.json"]
    assert [path.name for path in store.folder.parent.iterdir()] == ["sweep"]


def test_settings_of_another_version_are_other_settings(store: Store) -> None:
    path = store.folder / "settings.json"
    store.results.write(path.name, json.dumps({**json.loads(path.read_text()), "of_another_version": 1}))
    with pytest.raises(BundleError, match="damaged or was written by another version"):
        open_store(store.folder, SETTINGS, replace=False)
    open_store(store.folder, SETTINGS, replace=True)
    open_store(store.folder, SETTINGS, replace=False)


@pytest.mark.parametrize("replace", [False, True])
def test_settings_that_do_not_say_so_make_no_sweep(replace: bool, store: Store) -> None:
    (store.folder / "settings.json").write_text("{}")
    (store.folder / "files.json").unlink()
    with pytest.raises(BundleError, match="holds no sweep"):
        open_store(store.folder, SETTINGS, replace=replace)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("name", ["settings.json", "points/random-9-gap.json", "sweep.md"])
def test_what_somebody_changed_is_not_replaced(name: str, replace: bool, store: Store) -> None:
    store.save(POINT, ANSWERS)
    store.results.write("sweep.md", "# Sweep")
    with (store.folder / name).open("a") as file:
        file.write(" ")
    with pytest.raises(BundleError, match=f"changed since they were written: {name}"):
        open_store(store.folder, SETTINGS, replace=replace)
    with pytest.raises(BundleError, match="was changed since it was written"):
        store.results.write(name, "new")
    (store.folder / name).unlink()
    if name != "settings.json":
        open_store(store.folder, SETTINGS, replace=replace)
        return
    with pytest.raises(BundleError, match=r"its settings.json is missing"):
        open_store(store.folder, SETTINGS, replace=False)
    assert POINT not in open_store(store.folder, SETTINGS, replace=True)


def test_a_sweep_of_an_older_version_goes_on(store: Store) -> None:
    """It listed nothing; the names decide, and from now on there is a listing."""
    store.save(POINT, ANSWERS)
    (store.folder / "files.json").unlink()
    again = open_store(store.folder, SETTINGS, replace=False)
    assert POINT in again
    again.save(OTHER, ANSWERS)
    open_store(store.folder, SETTINGS, replace=False)
    assert len(list((store.folder / "points").iterdir())) == 2
    (store.folder / "points" / "random-9-gap.json").write_text("mine")
    with pytest.raises(BundleError, match="changed since"):
        open_store(store.folder, SETTINGS, replace=False)


def test_a_damaged_listing_is_named(store: Store) -> None:
    (store.folder / "files.json").write_text('{"kind": "sweep"')
    for replace in (False, True):
        with pytest.raises(BundleError, match=r"files.json: is damaged") as caught:
            open_store(store.folder, SETTINGS, replace=replace)
        assert "delete this file" in caught.value.hint


@pytest.mark.parametrize("replace", [False, True])
def test_what_is_no_sweep_is_never_touched(replace: bool, tmp_path: Path, bundle_copy: Path) -> None:
    (tmp_path / "a file").write_text("x")
    with pytest.raises(BundleError, match="is a file"):
        open_store(tmp_path / "a file", SETTINGS, replace=replace)
    before = sorted(bundle_copy.rglob("*"))
    with pytest.raises(BundleError, match="holds no sweep"):
        open_store(bundle_copy, SETTINGS, replace=replace)
    assert sorted(bundle_copy.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    open_store(tmp_path / "empty", SETTINGS, replace=replace)
