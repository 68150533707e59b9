"""The folder of a recommendation among pruners: what is ours in it, evaluations included, and that nothing of somebody else's is touched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gap_export.errors import BundleError
from gap_export.evaluation.recommend.request import Place
from gap_export.evaluation.recommend.store import Settings, Store, open_store
from gap_export.evaluation.refer import journal
from gap_export.evaluation.refer.journal import open_journal

SETTINGS = Settings(
    recipe={"name": "tiny", "seed": 0}, checkpoint_sha256="abc", annotations="scenes", split=None, ignore_exif=False, rescale_boxes=False, limit=2, protocol="unc",
    backend="onnxruntime", threads=1, requests=2, processor="a CPU", versions={"torch": "2"},
)  # fmt: skip
OTHER = SETTINGS.model_copy(update={"requests": 3})
PLACE = Place("dart", 0.25)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With an evaluation that was begun."""
    made = open_store(tmp_path / "out", SETTINGS, replace=False)
    settings = journal.Settings(
        manifest_sha256="m", annotations="scenes", split="all", backend="onnxruntime", keep=0.25, share=True
    )
    open_journal(made.evaluation(PLACE), settings)
    (made.evaluation(PLACE) / "answers.jsonl").write_text("")
    return made


def test_other_settings_are_replaced_only_on_demand(store: Store) -> None:
    with pytest.raises(BundleError, match="requests 2 there, 3 here") as caught:
        open_store(store.folder, OTHER, replace=False)
    assert "--replace" in caught.value.hint
    open_store(store.folder, SETTINGS, replace=False)
    open_store(store.folder, OTHER, replace=True)
    assert sorted(path.name for path in store.folder.iterdir()) == ["files.json", "settings.json"]


def test_what_killed_processes_left_of_an_evaluation_is_replaced(store: Store) -> None:
    """Its lock, and the hidden folder in which it was made."""
    evaluations = store.folder / "evaluations"
    (evaluations / ".dart-keep0.1.lock").write_text("process 1 on here since now\n")
    owner = f"{'0' * 16}-{'1' * 16}-{'2' * 16}-12-34-{'3' * 16}"
    building = evaluations / f".dart-keep0.1.{owner}.building" / "fresh"
    building.mkdir(parents=True)
    (building / "settings.json").write_text("{}")
    open_store(store.folder, OTHER, replace=True)
    assert not evaluations.exists()


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "points/notes.txt",
        "evaluations/notes.txt",
        "evaluations/.notes",
        "evaluations/mine/notes.txt",
        "evaluations/dart-keep0.25/notes.txt",
        "evaluations/dart-keep0.25/unc-eval.json",
    ],
)
def test_what_is_of_others_is_not_replaced(name: str, store: Store) -> None:
    path = store.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("work of a year")
    with pytest.raises(BundleError, match=f"holds what no command wrote beside its recommendation: {name}"):
        open_store(store.folder, OTHER, replace=True)
    assert path.read_text() == "work of a year"


@pytest.mark.parametrize("name", ["settings.json", "evaluations/dart-keep0.25/settings.json"])
@pytest.mark.parametrize("replace", [False, True])
def test_what_somebody_changed_is_not_replaced(name: str, replace: bool, store: Store) -> None:
    with (store.folder / name).open("a") as file:
        file.write(" ")
    with pytest.raises(BundleError, match=f"changed since they were written: {name}"):
        open_store(store.folder, OTHER, replace=replace)


def test_links_are_not_followed_to_be_replaced(store: Store, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "notes.txt").write_text("work of a year")
    shutil.rmtree(store.evaluation(PLACE))
    os.symlink(elsewhere, store.evaluation(PLACE))
    with pytest.raises(BundleError, match=r"no command wrote .*evaluations/dart-keep0\.25"):
        open_store(store.folder, OTHER, replace=True)
    assert (elsewhere / "notes.txt").exists()


def test_a_point_that_is_missing_is_not_finished(store: Store) -> None:
    assert PLACE not in store
    with pytest.raises(BundleError, match="is missing"):
        store.finished(PLACE)


def test_a_point_that_is_damaged_is_not_taken_for_finished(store: Store) -> None:
    point = store.folder / "points" / f"{PLACE.name}.json"
    point.parent.mkdir()
    point.write_text("{}\n")
    with pytest.raises(BundleError, match=PLACE.name):
        assert PLACE in store


def test_folders_of_other_kinds_are_told(store: Store, tmp_path: Path) -> None:
    """An evaluation is no recommendation, and a recommendation no evaluation."""
    with pytest.raises(BundleError, match="holds no recommendation"):
        open_store(store.evaluation(PLACE), SETTINGS, replace=True)
    settings = journal.Settings.read(store.evaluation(PLACE) / "settings.json", hint="")
    with pytest.raises(BundleError, match="holds no evaluation"):
        open_journal(store.folder, settings, replace=True)
