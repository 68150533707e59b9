"""The golden request as a file from outside: read where it is sound, and refused in one line where it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.bundle.golden import (
    MOST_LOGITS,
    WRONG_IDS,
    GoldenRequest,
    golden_image,
    in_reverse,
    overlap,
    renumbered,
    telling_logits,
)
from gap_export.bundle.hashes import record_of
from gap_export.errors import BundleError
from gap_export.positions import Placement, PositionPolicy, place

Edit = Callable[[dict[str, Any]], Any]


def resealed(folder: Path) -> Path:
    """The bundle, its manifest listing what lies there."""
    content = json.loads((folder / "manifest.json").read_text())
    content["files"] = {
        name: record_of(folder / name).model_dump() for name in content["files"] if (folder / name).is_file()
    }
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def golden_copy(golden_bundle: Bundle, tmp_path: Path) -> Path:
    """Folder of a bundle with a golden request, to be damaged."""
    return Path(shutil.copytree(golden_bundle.folder, tmp_path / "bundle"))


@pytest.fixture
def edited(golden_copy: Path) -> Callable[[Edit], Bundle]:
    """`edited(edit)`: the bundle with its golden request changed, and every hash right."""

    def apply(edit: Edit) -> Bundle:
        path = golden_copy / "golden.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        return open_bundle(resealed(golden_copy))

    return apply


def test_a_bundle_gives_its_golden_request(golden_bundle: Bundle, tiny_bundle: Callable[..., Bundle]) -> None:
    golden = open_bundle(golden_bundle.folder, every_hash=True).golden
    assert golden is not None
    assert (golden.positions, golden.wrong_ids, golden.is_baseline) == (
        PositionPolicy.GAP,
        "renumbered",
        False,
    )
    image = golden_image(golden_bundle.folder, golden)
    assert (image.size, image.mode) == (golden.size, "RGB")
    assert GoldenRequest.model_validate_json(golden.text()) == golden
    assert tiny_bundle().golden is None


BOX = {"token_ids": [1], "box": [10.0, 10.0, 40.0, 40.0]}
FAULTS: tuple[tuple[str, Edit, str], ...] = (
    ("field", lambda g: g.update(more=1), "more 1: is not a field here"),
    ("missing", lambda g: g.pop("right"), "right: is missing"),
    ("quotes", lambda g: g.update(keep="0.25"), "keep '0.25'"),
    ("expression", lambda g: g.update(expression="x" * 2000), "expression is 'xxx"),
    ("lines", lambda g: g.update(expression="the\x1b[31m mug"), "expression is 'the\\x1b[31m mug'"),
    ("empty", lambda g: g.update(expression=""), "expression"),
    ("image", lambda g: g.update(image="../x.png"), "image '../x.png'"),
    ("size", lambda g: g.update(size=[0, 96]), "size is (0, 96)"),
    ("large", lambda g: g.update(size=[10**9, 96]), "sides are from 1 to 4096"),
    ("positions", lambda g: g.update(positions="shifted"), "positions are shifted, and the bundle numbers gap"),
    ("policy", lambda g: g.update(positions="other"), "positions 'other'"),
    ("keep", lambda g: g.update(keep=0.5), "keep is 0.5, and the bundle keeps 0.25 to 0.25"),
    ("token", lambda g: g["right"].update(token_ids=[64]), "right.token_ids has 64, of a vocabulary of 64"),
    ("negative", lambda g: g["wrong"].update(token_ids=[-1]), "wrong.token_ids.0"),
    ("long", lambda g: g["right"].update(token_ids=[1] * 6), "right.token_ids are 6, and answers have at most 5"),
    ("box", lambda g: g["right"].update(box=[0.0, 0.0, 97.0, 5.0]), "of an image of 96x96 pixels"),
    ("thin box", lambda g: g["wrong"].update(box=[5.0, 0.0, 5.0, 5.0]), "wrong.box is (5.0, 0.0, 5.0, 5.0)"),
    ("no number", lambda g: g["right"].update(box=[0.0, 0.0, 1e999, 5.0]), "right.box.2"),
    ("boxes", lambda g: g.update(decided_by="boxes"), "logits are given, and boxes decide"),
    ("no box", lambda g: g.update(decided_by="boxes", logits=[]), "right.box and wrong.box overlap by 0.000"),
    ("one box", lambda g: g.update(decided_by="boxes", logits=[], right=BOX, wrong=BOX), "overlap by 1.000"),
    ("no logits", lambda g: g.update(logits=[]), "logits are of 0 tokens, and are of 1 to 64"),
    ("logits", lambda g: g["logits"].reverse(), "are of ascending ones of 64"),
    ("many", lambda g: g.update(logits=g["logits"] * 70), "and are of 1 to 64"),
    ("huge", lambda g: g["logits"][0].update(right=1e300), "logits are beyond a million"),
    ("alike", lambda g: [each.update(wrong=each["right"]) for each in g["logits"]], "are the same with right"),
    ("tolerance", lambda g: g.update(tolerance=1.0), "tolerance 1.0"),
)  # fmt: skip


@pytest.mark.parametrize(("edit", "words"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_what_is_wrong_is_named(edit: Edit, words: str, edited: Callable[[Edit], Bundle]) -> None:
    bundle = edited(edit)
    with pytest.raises(BundleError) as caught:
        bundle.golden  # noqa: B018
    assert words in caught.value.message
    assert caught.value.subject.endswith("golden.json")
    assert "gap-export golden" in caught.value.hint
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"keep": 1, "keep": 2}',
        b"[" * 5000,
        b'{"size": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_golden_request(content: bytes, golden_copy: Path) -> None:
    (golden_copy / "golden.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"golden\.json: cannot be read") as caught:
        open_bundle(resealed(golden_copy)).golden  # noqa: B018
    assert str(caught.value).isprintable()


def test_files_that_are_too_large_or_none(golden_copy: Path) -> None:
    with (golden_copy / "golden.json").open("ab") as file:
        file.truncate(2**23)
    with pytest.raises(BundleError, match="a golden request has at most"):
        open_bundle(resealed(golden_copy)).golden  # noqa: B018
    (golden_copy / "golden.json").unlink()
    (golden_copy / "golden.json").mkdir()
    with pytest.raises(BundleError, match="listed in the manifest but missing"):
        open_bundle(golden_copy)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b"no image"), "is not an image in a known format"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "cannot be decoded"),
        (lambda path: Image.new("RGB", (96, 95)).save(path), "is 96x95 pixels, and golden.json says 96x96"),
        (lambda path: Image.new("1", (40000, 10)).save(path), "40000x10 pixels"),
    ],
)
def test_its_image(damage: Callable[[Path], Any], words: str, golden_copy: Path) -> None:
    damage(golden_copy / "golden.png")
    bundle = open_bundle(resealed(golden_copy))
    assert bundle.golden is not None
    with pytest.raises(BundleError) as caught:
        golden_image(bundle.folder, bundle.golden)
    assert words in caught.value.message
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["golden.json", "golden.png"])
def test_one_without_the_other(name: str, golden_copy: Path) -> None:
    content = json.loads((golden_copy / "manifest.json").read_text())
    del content["files"][name]
    (golden_copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=rf"is listed without {name}"):
        open_bundle(golden_copy)


# Right and wrong


def placement(kept: list[int]) -> Placement:
    return place(
        np.array([kept]),
        text_before=np.array([2]),
        text_after=np.array([3]),
        visual_tokens=9,
        policy=PositionPolicy.GAP,
    )


def test_wrong_ids_are_wrong_and_leave_the_slots_alone() -> None:
    right = placement([1, 4, 8])
    assert renumbered(right).position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert renumbered(right).next_position == right.next_slot == 8
    assert in_reverse(right).position_ids.tolist() == [[13, 12, 11, 10, 6, 3, 1, 0]]
    for wrong in WRONG_IDS.values():
        made = wrong(right)
        assert not np.array_equal(made.position_ids, right.position_ids)
        assert made.position_ids.dtype == np.int64
        assert (made.next_slot, made.write_index) == (right.next_slot, right.write_index)


def test_renumbered_ids_are_those_of_the_shifted_policy() -> None:
    shifted = place(
        np.array([[1, 4, 8]]),
        text_before=np.array([2]),
        text_after=np.array([3]),
        visual_tokens=9,
        policy=PositionPolicy.SHIFTED,
    )
    made = renumbered(placement([1, 4, 8]))
    assert np.array_equal(made.position_ids, shifted.position_ids)
    assert made.next_position == shifted.next_position


def test_the_logits_that_differ_most_are_kept(golden_bundle: Bundle) -> None:
    rng = np.random.default_rng(0)
    right, wrong = rng.normal(size=(2, 500)).astype(np.float32)
    kept = telling_logits(right, wrong)
    tokens = [each.token for each in kept]
    assert tokens == sorted(tokens)
    assert len(tokens) == MOST_LOGITS
    others = np.delete(np.abs(right - wrong), tokens)
    assert min(abs(each.right - each.wrong) for each in kept) > others.max() - 1e-4
    assert telling_logits(right, right) == ()
    golden = golden_bundle.golden
    assert golden is not None
    stored = golden.model_copy(update={"logits": kept})
    assert stored.distance(right) < 1e-4
    assert stored.distance(wrong) == pytest.approx(1, abs=1e-4)


def test_a_missing_box_overlaps_with_nothing() -> None:
    assert overlap(None, (0.0, 0.0, 1.0, 1.0)) == overlap(None, None) == 0
    assert overlap((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)) == 1
