"""Records of measurements that were damaged or made up: refused with the field, or taken for exactly what they say."""

from __future__ import annotations

import collections
import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gap_export.errors import BundleError, InputError
from gap_export.evaluation import gates
from gap_export.evaluation.bundle_reports import UNREADABLE, read_report, state_of
from gap_export.evaluation.parity import Control, Grounding, Measurement, ParityReport
from gap_export.evaluation.recommend.record import LeftOut, Point, Recommendation
from gap_export.evaluation.sweep.record import Answers, Settings, SweepPoint
from gap_export.evaluation.sweep.store import Store, open_store
from gap_export.positions import PositionPolicy
from gap_export.records import Record

VALUES: list[Any] = [
    None,
    True,
    -1,
    2,
    2**70,
    0.37,
    -0.5,
    1.5,
    1e300,
    "",
    "another",
    "1",
    "[/red]",
    [],
    [1],
    {},
    {"a": 1},
]

RECOMMENDATION = Recommendation(
    manifest_sha256="m",
    protocol="unc",
    max_accuracy_drop=0.02,
    expressions=400,
    points=(
        Point(keep=1.0, mean_kept=36.0, accuracy=0.9, difference=0.0, low=0.0, high=0.0, inside=True, ttft_ms=9.0, speedup=1.0),
        Point(keep=0.5, mean_kept=18.0, accuracy=0.89, difference=-0.01, low=-0.015, high=0.0, inside=True, ttft_ms=5.0, speedup=1.8),
        Point(keep=0.1, mean_kept=4.0, accuracy=0.7, difference=-0.2, low=-0.3, high=-0.1, inside=False, ttft_ms=3.0, speedup=3.0),
    ),
    chosen=0.5,
)  # fmt: skip
OF_PRUNERS = Recommendation(
    manifest_sha256="m",
    protocol="unc",
    max_accuracy_drop=0.02,
    expressions=400,
    points=(
        Point(pruner="none", front=True, manifest_sha256="m", keep=1.0, mean_kept=36.0, accuracy=0.9, difference=0.0, low=0.0, high=0.0, inside=True, ttft_ms=9.0, speedup=1.0),
        Point(pruner="dart", front=True, manifest_sha256="n", keep=0.5, mean_kept=18.0, accuracy=0.89, difference=-0.01, low=-0.015, high=0.0, inside=True, ttft_ms=5.0, speedup=1.8),
        Point(pruner="fastv", front=False, manifest_sha256="o", keep=0.5, mean_kept=18.0, accuracy=0.7, difference=-0.2, low=-0.3, high=-0.1, inside=False, ttft_ms=6.0, speedup=1.5),
    ),
    chosen=0.5,
    chosen_pruner="dart",
    left_out=(LeftOut(pruner="trim", keeps=(0.5,), reason="has no text tower"),),
)  # fmt: skip
PARITY = ParityReport(
    ok=True,
    manifest_sha256="m",
    bundle="tiny",
    backend="onnxruntime",
    precision="fp32",
    measurement=Measurement(
        cases=8, kept_sets_equal=1.0, position_ids_equal=1.0, max_logit_difference=1e-5, max_relative_logit_difference=1e-6, min_logit_cosine=1.0, max_norm_deviation=1e-6,
        token_agreement=1.0, first_diverging_token=None, mean_box_iou=1.0, identical_boxes=1.0, reference_accuracy=0.5, accuracy=0.5,
    ),
    gates=[gates.at_most("max_logit_difference", 1e-5, 1e-3), gates.at_least("token_agreement", 1.0, 0.99)],
    controls=[Control(name="ids shifted", caught=True, by=("token_agreement",))],
    inapplicable_controls=[],
    grounding=Grounding(full=0.9, shifted=0.4, permuted=0.1, gap=0.8, cases=8, kept=9.0, visual_tokens=36),
    versions={"onnx": "1"},
)  # fmt: skip
ANSWERS = Answers(texts=("[0.1, 0.2]", ""), ious=(0.75, 0.0), without_box=1, cut_off=0)
SETTINGS = Settings(
    recipe={"name": "tiny"}, checkpoint_sha256="abc", backend="onnxruntime", limit=2, scenes_seed=1, batch=4, threads=1, versions={"torch": "2"}
)  # fmt: skip
POINT = SweepPoint(pruner="random", keep=0.25, kept=9, positions=PositionPolicy.GAP)


def changes(value: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place of nested containers, and the whole with every other value there, and without it."""
    for place in _places(value):
        for other in VALUES:
            yield place, _changed(value, place, other)
        yield place, _changed(value, place, _changed)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from _places(child, (*path, key))


def _changed(value: Any, place: tuple[Any, ...], to: Any) -> Any:
    value = copy.deepcopy(value)
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    if to is _changed:
        del parent[place[-1]]
    else:
        parent[place[-1]] = to
    return value


def _holds(record: Any, given: Any) -> bool:
    """Whether a record says all that it was given, of the same kinds: `true` is no 1, and 1 is a float."""
    if isinstance(given, dict):
        return isinstance(record, dict) and all(
            name in record and _holds(record[name], given[name]) for name in given
        )
    if isinstance(given, list):
        return isinstance(record, list) and len(record) == len(given) and all(map(_holds, record, given))
    return isinstance(record, bool) == isinstance(given, bool) and record == given


@pytest.mark.parametrize(
    "record",
    [RECOMMENDATION, OF_PRUNERS, PARITY, ANSWERS, SETTINGS],
    ids=lambda record: type(record).__name__,
)
def test_every_value_of_every_record(record: Record) -> None:
    counts: collections.Counter[str] = collections.Counter()
    assert type(record).parse(record.model_dump_json().encode(), subject="x", hint="") == record
    for place, new in changes(json.loads(record.model_dump_json())):
        try:
            read = type(record).parse(json.dumps(new).encode(), subject="file.json", hint="run it again")
        except InputError as error:
            refused = error
        else:
            counts["read"] += 1
            assert _holds(json.loads(read.model_dump_json()), new), place
            continue
        counts["refused"] += 1
        assert str(refused).startswith("input: file.json")
        assert "\n" not in str(refused)
        names = [part for part in place if isinstance(part, str)]
        # (Lists as a whole are held against what sums them up.)
        assert any(
            name in refused.message for name in [*names, "chosen", "points", "ok is", "is not", "ious"]
        ), (place, refused.message)
    print(type(record).__name__, dict(counts))
    assert counts["refused"] > 20


def test_without_the_guard_a_contradiction_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    for record, field, value in ((RECOMMENDATION, "chosen", 0.1), (PARITY, "ok", False)):
        content = json.dumps({**json.loads(record.model_dump_json()), field: value}).encode()
        with pytest.raises(InputError, match=field):
            type(record).parse(content, subject="x", hint="")
        unguarded = type("Unguarded", (Record,), {"__annotations__": dict.fromkeys(json.loads(content), Any)})
        assert getattr(unguarded.parse(content, subject="x", hint=""), field) == value


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(tmp_path / "sweep", SETTINGS, replace=False)
    store.save(POINT, ANSWERS)
    return store


def _path(store: Store) -> Path:
    return store.folder / "points" / f"{POINT.name}.json"


def test_points_are_not_changed_by_hand(store: Store) -> None:
    content, count = _path(store).read_bytes(), 0
    for old, new in (
        (b"0.75", b"0.25"),
        (b"0.75", b"0.750"),
        (b'"cut_off":0', b'"cut_off":1'),
        (b"0.1", b"0.3"),
        (b"{", b" {"),
        (b"}", b"}\n"),
    ):
        assert old in content
        _path(store).write_bytes(content.replace(old, new, 1))
        with pytest.raises(BundleError, match="digest"):
            assert POINT in store
        count += 1
    for cut in range(0, len(content) - 1, 7):
        _path(store).write_bytes(content[:cut])
        with pytest.raises(BundleError, match="has no digest"):
            assert POINT in store
        count += 1
    print("points", count, "refused")


@pytest.mark.parametrize(
    "other", [{"pruner": "spatial"}, {"kept": 10}, {"positions": PositionPolicy.SHIFTED}], ids=str
)
def test_answers_of_one_point_are_not_those_of_another(other: dict[str, Any], store: Store) -> None:
    point = POINT.model_copy(update=other)
    _path(store).rename(store.folder / "points" / f"{point.name}.json")
    with pytest.raises(BundleError, match="digest"):
        assert point in store


def test_answers_of_other_settings_are_not_mixed_in(store: Store, tmp_path: Path) -> None:
    other = open_store(tmp_path / "other", SETTINGS.model_copy(update={"scenes_seed": 7}), replace=False)
    (other.folder / "points").mkdir()
    _path(store).rename(_path(other))
    with pytest.raises(BundleError, match="digest"):
        assert POINT in other


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (ANSWERS.model_copy(update={"without_box": 2}), "without_box is 2, and 1 of ious are 0"),
        (ANSWERS.model_copy(update={"ious": (0.5,), "texts": ("",)}), "holds answers to 1 scenes"),
        (ANSWERS.model_copy(update={"texts": ("",)}), "texts are 1, ious 2"),
        (ANSWERS.model_copy(update={"ious": (1.5, 0.0)}), "ious.0 1.5"),
        (ANSWERS.model_copy(update={"cut_off": 3}), "cut_off is 3"),
    ],
    ids=range(5),
)
def test_points_that_contradict_themselves(answers: Answers, said: str, store: Store) -> None:
    store.save(POINT, answers)
    with pytest.raises(BundleError, match=said):
        assert POINT in store


MAKES: dict[str, Callable[[Path], None]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "nothing in it": Path.touch,
    "brackets": lambda path: path.write_text("[" * 100_000) and None,
    "Latin-1": lambda path: path.write_bytes(b'{"manifest_sha256": "\xe9"}') and None,
}


@pytest.mark.parametrize("what", MAKES)
def test_what_is_no_file(what: str, store: Store, tmp_path: Path) -> None:
    _path(store).unlink()
    MAKES[what](_path(store))
    with pytest.raises(BundleError) as refused:
        assert POINT in store
    assert str(_path(store)) in refused.value.subject

    class Stands:  # for a bundle
        reports, manifest_sha256 = tmp_path / "reports", "m"

    bundle: Any = Stands
    bundle.reports.mkdir()
    MAKES[what](bundle.reports / "recommend.json")
    assert state_of(bundle, "recommend.json") == UNREADABLE
    with pytest.raises(InputError, match=r"recommend\.json") as unread:
        read_report(bundle, "recommend.json", Recommendation, command="recommend")
    assert unread.value.hint
