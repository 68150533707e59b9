"""Result files that were damaged, changed by hand, or made up: refused in one line with the file and the field, or harmless.

A folder of an evaluation is written by the code that writes all of them, with answers that are stored here; then every value of every
file in it is changed. Whoever makes a folder up also computes its hashes anew, so every change is tried with the hashes of before, and
with those of the changed files.
"""

from __future__ import annotations

import collections
import copy
import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from gap_export import families
from gap_export.errors import BundleError, GapExportError, InputError
from gap_export.evaluation import digests
from gap_export.evaluation.digests import sha256_of_bytes
from gap_export.evaluation.refer import results
from gap_export.evaluation.refer.compare import compare, thresholds_on
from gap_export.evaluation.refer.dataset import Dataset, open_dataset
from gap_export.evaluation.refer.journal import ANSWERS, AnswerRow, Settings, open_journal
from gap_export.evaluation.refer.protocols import protocol_of
from gap_export.evaluation.refer.results import PROVENANCE, open_run, store_results
from gap_export.evaluation.refer.run import record_of, score_all
from gap_export.evaluation.report.cases import worst_cases
from gap_export.evaluation.report.page import Album
from gap_export.evaluation.report.runs import open_runs, provenance_facts

SETTINGS = Settings(
    manifest_sha256="b",
    annotations="a",
    split="all",
    backend="torch",
    keep=None,
    share=True,
    ignore_exif=False,
)
BOXES = ["[0.00, 0.00, 0.50, 0.50]", "nothing", "[0.00, 0.00, 1.00, 1.00]", "[0.10, 0.00, 0.50, 0.50]"]
VALUES: list[Any] = [
    None, True, -1, 2**40, 2**70, 0.37, -0.5, 1.5, 1e300, "", "another", "1", "[/red]", "../x", [], [1, 2], {}, {"a": 1},
]  # fmt: skip
TABLE, RECORD = "unc-results.parquet", "unc-eval.json"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("data") / "rec.jsonl"
    row = {"img_path": "a.jpg", "expression": "mug", "bbox": [0, 0, 5, 5], "width": 10, "height": 10}
    path.write_text("\n".join(json.dumps({**row, "img_path": f"{n % 3}.jpg"}) for n in range(8)))
    return open_dataset(path)


def evaluation(folder: Path, dataset: Dataset, *, model: bool = True) -> Path:
    """A finished evaluation of stored answers."""
    rows = [
        AnswerRow(
            id=each.id,
            image=each.image,
            width=10,
            height=10,
            answer=BOXES[number % 4],
            tokens=3,
            kept_indices=(number, number + 1),
            seconds=0.5 + number,
        )
        for number, each in enumerate(dataset.expressions)
    ]
    digest = None
    if model:
        journal = open_journal(folder, SETTINGS)
        journal.add(rows[:5])
        journal.add(rows[5:])
        digest = journal.digest
    protocol = protocol_of("unc", families.row("llava").box)
    scored = score_all(dataset.expressions, rows, protocol)
    record = record_of(scored, protocol, split="all", backend="torch" if model else "predictions")
    store_results(record, scored, dataset, None, folder, answers=digest)
    return folder


@pytest.fixture(scope="module")
def whole(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluation(tmp_path_factory.mktemp("results") / "run", dataset)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def read(folder: Path) -> None:
    """All that `compare` and `report` do with a folder, and no more than that: no model is asked."""
    run = open_run(folder)
    thresholds = thresholds_on(run, run)
    assert compare(run, run, thresholds).difference == 0
    reported = open_runs([folder, folder], "unc")
    provenance_facts(reported.subject)
    assert reported.subject.median_seconds >= 0
    worst_cases(reported, Album(None), compare(run, run, thresholds).worst, 3)


def rehash(folder: Path) -> None:
    """What somebody does who knows of the hashes."""
    path = folder / PROVENANCE
    provenance = json.loads(path.read_bytes())
    for name, file in (("results", TABLE), ("record", RECORD)):
        provenance["hashes"]["unc"][name] = sha256_of_bytes((folder / file).read_bytes())
    path.write_text(json.dumps(provenance))


class Outcomes:
    """How changed folders ended."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def of(self, folder: Path, file: str, *fields: str) -> str:
        """Read a folder; a refusal names one of its files, and the changed field, or says that the file was changed."""
        try:
            read(folder)
        except InputError as error:
            refused = error
        else:
            self.counts["read"] += 1
            return "read"
        self.counts["refused"] += 1
        assert "\n" not in str(refused)
        assert refused.hint
        assert str(folder) in refused.subject
        if file in refused.subject and fields:
            said = refused.message
            assert any(field in said for field in fields) or "was changed since" in said, said
        return "refused"


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested containers stand, containers too."""
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from places_in(child, (*path, key))


def changed(value: Any, place: tuple[Any, ...], to: Any) -> Any:
    """A copy with another value in one place; without that place where `to` is this function."""
    if not place:
        return None if to is changed else to
    value = copy.deepcopy(value)
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    if to is changed:
        del parent[place[-1]]
    else:
        parent[place[-1]] = to
    return value


HARMLESS = {
    RECORD: {"description", "missing_images", "not_scored", "skipped_rows", "boxes_are_read", "rescaled_images", "stretched_images", "refused", "box_format"},
    PROVENANCE: {"bundle", "data", "split", "images", "ignore_exif", "box_format", "skipped", "processor", "versions", "hashes"},
    "settings.json": set[str](),
}  # fmt: skip
"""Fields that say what nothing else in the folder says: another value of the right type is read, where hashes allow it."""


def test_the_whole_folder_is_read(folder: Path) -> None:
    read(folder)


@pytest.mark.parametrize("some", [4, pytest.param(None, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("file", "knows"), [(RECORD, False), (RECORD, True), (PROVENANCE, False), ("settings.json", False)]
)
def test_every_value_of_every_record(file: str, knows: bool, some: int | None, folder: Path) -> None:
    """Every value is replaced by some others, drawn by a fixed seed, or (long) by all of them."""
    path, outcomes, draw, values = folder / file, Outcomes(), random.Random(0), [*VALUES, changed]
    content = path.read_text()
    before = json.loads(content)
    kept = {name: (folder / name).read_bytes() for name in (PROVENANCE, file)}
    for place in places_in(before):
        for value in draw.sample(values, some or len(values)):
            new = changed(before, place, value)
            if new == before and json.dumps(new) == json.dumps(before):
                continue
            path.write_text(json.dumps(new))
            if knows and file == RECORD:
                rehash(folder)
            ended = outcomes.of(folder, file, *(str(part) for part in place if isinstance(part, str)))
            if ended == "read":
                assert place, "the whole file is another"
                as_by_default = file == "settings.json" and (place, value) == (("ignore_exif",), changed)
                assert as_by_default or place[0] in HARMLESS[file], (place, value)
                assert knows or file != RECORD, "its hash was not looked at"
            for name, old in kept.items():
                (folder / name).write_bytes(old)
    print(file, "knows" if knows else "", dict(outcomes.counts))
    assert outcomes.counts["refused"] > 20


BAD_VALUES: dict[str, list[Any]] = {
    "id": [None, ""],
    "image": [None, "", "another.jpg"],
    "expression": [None, ""],
    "answer": [None, "another"],
    "truth": [
        None,
        [0.0, 0.0, 0.0, 5.0],
        [5.0, 5.0, 0.0, 0.0],
        [float("nan")] * 4,
        [0.0, 0.0, float("inf"), 5.0],
    ],
    "box": [
        None,
        [5.0, 5.0, 0.0, 0.0],
        [float("nan")] * 4,
        [0.0, 0.0, float("inf"), 5.0],
        [0.0, 0.0, 0.0, None],
    ],
    "iou": [None, -0.1, 1.1, float("nan"), float("inf"), 0.6],
    "hit": [None, False],
    "no_box_because": ["because"],
    "tokens": [None, -1, 4],
    "kept_indices": [None, [-1], [None], [], [7, 8]],
    "seconds": [None, -1.0, float("nan"), float("inf"), 7.5],
}
"""Values that the first row cannot have: its answer is a hit with the box of the truth."""
OTHER_TYPES = [
    pyarrow.int64(), pyarrow.string(), pyarrow.float32(), pyarrow.bool_(), pyarrow.binary(), pyarrow.list_(pyarrow.float64()),
    pyarrow.null(), pyarrow.timestamp("us"),
]  # fmt: skip


def tables_that_cannot_be(table: Any) -> Iterator[tuple[str, str, Any]]:
    """Of a table: column, what is wrong with it, and the changed table."""
    columns = {name: table[name].to_pylist() for name in table.column_names}
    for place, name in enumerate(table.column_names):
        yield name, "dropped", table.drop_columns([name])
        yield name, "twice", table.append_column(name, table[name])
        for kind in OTHER_TYPES:
            if kind != table.schema.field(name).type:
                other = pyarrow.nulls(len(table), kind)
                yield name, f"as {kind}", table.set_column(place, name, other)
        for value in BAD_VALUES[name]:
            for row in (0, 4):
                values = [*columns[name][:row], value, *columns[name][row + 1 :]]
                array = pyarrow.array(values, table.schema.field(name).type)
                yield name, f"{value} in row {row + 1}", table.set_column(place, name, array)
        if table.schema.field(name).type in (pyarrow.string(), pyarrow.float64()):
            turned = pyarrow.array(columns[name][::-1], table.schema.field(name).type)
            if turned != table[name].combine_chunks():
                yield name, "turned round", table.set_column(place, name, turned)
    yield "id", "a row more", pyarrow.concat_tables([table, table.slice(0, 1)])
    yield "expressions", "a row less", table.slice(1)
    yield "rows", "no rows", table.slice(0, 0)
    yield "columns", "no columns", table.select([])


@pytest.mark.parametrize("knows", [False, True], ids=["hashes of before", "hashes computed anew"])
def test_every_column_of_the_table(knows: bool, folder: Path) -> None:
    path, outcomes, kept = folder / TABLE, Outcomes(), (folder / PROVENANCE).read_bytes()
    for name, what, table in tables_that_cannot_be(parquet.read_table(path)):
        parquet.write_table(table, path)
        if knows:
            rehash(folder)
        ended = outcomes.of(
            folder,
            TABLE,
            name,
            "expressions",
            "images",
            "column",
            "rows",
            "mean",
            "hit",
            "low",
            "accuracy",
            "box",
        )
        harmless = knows and name in ("expression", "truth", "iou") and "turned" in what
        assert ended == ("read" if harmless else "refused"), (name, what)
        (folder / PROVENANCE).write_bytes(kept)
    print("table", "knows" if knows else "", dict(outcomes.counts))
    assert outcomes.counts["refused"] > 150


def test_answers_are_not_changed_by_hand(folder: Path, tmp_path: Path) -> None:
    """Every line of the journal: changed, moved, taken out, put in again; when results are read, and when an evaluation goes on."""
    path = folder / ANSWERS
    lines = path.read_bytes().splitlines(keepends=True)
    outcomes = Outcomes()
    variants: list[tuple[int, list[bytes]]] = []
    for number, line in enumerate(lines):
        before, after = lines[:number], lines[number + 1 :]
        for old, new in (
            (b'"tokens":3', b'"tokens":4'),
            (b'"seconds":', b'"seconds":1'),
            (b"0.", b"1."),
            (b".jpg", b".png"),
            (b'"digest":"', b'"digest":"0'),
            (b"{", b"{ "),
            (b'"}', b'"} '),
            (b'"digest"', b'"digits"'),
        ):
            if old in line:
                variants.append((number, [*before, line.replace(old, new, 1), *after]))
        variants += [(number, [*before, b"\n", line, *after]), (number, [*before, line, line, *after])]
        if after:
            variants += [(number, [*before, *after]), (number, [*before, after[0], line, *after[1:]])]
    for number, variant in variants:
        path.write_bytes(b"".join(variant))
        assert outcomes.of(folder, ANSWERS) == "refused", variant[number]
        with pytest.raises(BundleError) as refused:
            open_journal(folder, SETTINGS)
        assert refused.value.subject in (f"{path}, line {number + 1}", f"{path}, line {number + 2}")
        assert "--replace" in refused.value.hint
    print("journal", dict(outcomes.counts))
    assert outcomes.counts["refused"] > 60


def test_without_the_digest_a_changed_answer_is_believed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / ANSWERS
    lines = path.read_bytes().replace(b'"tokens":3', b'"tokens":4', 1)
    path.write_bytes(lines)
    with pytest.raises(BundleError, match="was changed, or what stood before"):
        open_journal(folder, SETTINGS)
    monkeypatch.setattr(digests, "_digest", lambda before, content: "0" * 16)
    path.write_bytes(b"\n".join(line[:-18] + b"0" * 16 + b'"}' for line in lines.splitlines()) + b"\n")
    assert open_journal(folder, SETTINGS).rows[0].tokens == 4


def test_the_end_of_the_journal_belongs_to_the_results(folder: Path) -> None:
    """A journal may be longer than it was when results were written, and not shorter."""
    path = folder / ANSWERS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    assert len(open_journal(folder, SETTINGS).rows) == len(lines) - 1, "it can be gone on with"
    with pytest.raises(InputError, match="no line has their digest"):
        read(folder)
    path.write_bytes(b"".join(lines))
    journal = open_journal(folder, SETTINGS)
    journal.add([journal.rows[0].model_copy(update={"id": "another"})])
    read(folder)
    path.unlink()
    read(folder)


def test_a_journal_of_before_digests_says_what_to_do(folder: Path) -> None:
    row = AnswerRow(id="a", image="a.jpg", width=1, height=1, answer="", tokens=0, seconds=0.0)
    (folder / ANSWERS).write_text(row.model_dump_json() + "\n")
    with pytest.raises(BundleError, match="line 1: has no digest") as refused:
        open_journal(folder, SETTINGS)
    assert "--replace" in refused.value.hint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": "other.jpg"}, "has image other.jpg, which is 0.jpg in the annotations"),
        ({"width": 11}, "has width and height 11x10, which are 10x10"),
        ({"kept_indices": (3, 900)}, "has kept_indices up to 900, and the model has 20 visual tokens"),
    ],
)
def test_answers_to_something_else_are_not_gone_on_with(
    change: dict[str, Any], said: str, dataset: Dataset, tmp_path: Path
) -> None:
    """Whoever computes digests anew may say anything, but not of these images and this model."""
    first = dataset.expressions[0]
    fields = {
        "id": first.id,
        "image": first.image,
        "width": 10,
        "height": 10,
        "answer": "",
        "tokens": 0,
        "seconds": 0.0,
    }
    journal = open_journal(tmp_path / "run", SETTINGS)
    journal.add([AnswerRow.model_validate({**fields, "kept_indices": (19,)})])
    journal.check(dataset.expressions, 20)
    journal.add([AnswerRow.model_validate({**fields, "id": dataset.expressions[3].id, **change})])
    with pytest.raises(BundleError, match=said) as refused:
        journal.check(dataset.expressions, 20)
    assert refused.value.subject.endswith(f"{ANSWERS}, line 2")


class Anything:
    """Stands for a row, whatever its fields are."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def model_dump_json(self) -> str:
        return json.dumps(self._fields, separators=(",", ":"))


def is_right(field: str, value: Any) -> bool:
    """Whether a field of an answer may have a value."""
    if field in ("answer", "refused"):
        return isinstance(value, str) or (value is None and field == "refused")
    if field in ("id", "image"):
        return isinstance(value, str) and value != ""
    if field == "kept_indices":
        return value in ([], [1, 2])
    number = isinstance(value, float | int) if field == "seconds" else isinstance(value, int)
    return (
        number
        and not isinstance(value, bool)
        and 0 <= value <= {"seconds": 1e300, "tokens": 2**53}.get(field, 10**6)
    )


@pytest.mark.parametrize("field", AnswerRow.model_fields)
def test_every_value_of_an_answer(field: str, tmp_path: Path) -> None:
    """Digests are right, values are not."""
    row = AnswerRow(
        id="a",
        image="a.jpg",
        width=1,
        height=1,
        answer="",
        refused=None,
        tokens=0,
        kept_indices=(1,),
        seconds=0.0,
    )
    path = open_journal(tmp_path, SETTINGS).folder / ANSWERS
    for value in VALUES:
        line, _ = digests.sealed(Anything({**row.model_dump(), field: value}), digests.first_digest(SETTINGS))  # type: ignore[arg-type]
        path.write_text(line + "\n")
        if is_right(field, value):
            assert len(open_journal(tmp_path, SETTINGS).rows) == 1
        else:
            with pytest.raises(BundleError, match=f"line 1: cannot be read: {field}"):
                open_journal(tmp_path, SETTINGS)


FILES = (TABLE, RECORD, PROVENANCE, "settings.json", ANSWERS)


def _device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("devices cannot be made here")


MAKES: dict[str, Callable[[Path], None]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a device": _device,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "nothing in it": Path.touch,
    "zeros": lambda path: path.write_bytes(bytes(300)) and None,
    "null": lambda path: path.write_text("null") and None,
    "brackets": lambda path: path.write_text("[" * 100_000) and None,
    "a number without end": lambda path: path.write_text('{"protocol": ' + "9" * 10**6) and None,
    "Latin-1": lambda path: path.write_bytes(b'{"protocol": "\xe9"}') and None,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", MAKES)
def test_what_is_no_file_of_results(what: str, name: str, folder: Path) -> None:
    (folder / name).unlink()
    MAKES[what](folder / name)
    if name == ANSWERS:
        whole_lines = what in (
            "nothing in it",
            "zeros",
            "null",
            "brackets",
            "a number without end",
            "Latin-1",
        )
        if whole_lines:  # the end of a line that was never finished is no line
            with pytest.raises(InputError, match="no line has their digest"):
                read(folder)
            return
    with pytest.raises(GapExportError) as refused:
        read(folder)
    assert isinstance(refused.value, InputError)
    assert str(folder) in refused.value.subject
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", FILES)
def test_files_cut_short(name: str, folder: Path) -> None:
    content, draw, outcomes = (folder / name).read_bytes(), random.Random(0), Outcomes()
    for cut in sorted(draw.sample(range(len(content)), 25)):
        (folder / name).write_bytes(content[:cut])
        outcomes.of(folder, name)
    assert outcomes.counts == {"refused": 25} or (
        name != ANSWERS and outcomes.counts["read"] <= 1
    )  # its last line feed


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_missing(name: str, folder: Path) -> None:
    (folder / name).unlink()
    if name == ANSWERS:
        read(folder)  # results are whole without it
    else:
        with pytest.raises(InputError):
            read(folder)


@pytest.mark.parametrize("protocol", ["../../x", "", "/etc/passwd", "unc/../unc", "UNC", "unc\0"])
def test_protocols_are_names(protocol: str, folder: Path) -> None:
    with pytest.raises(InputError, match="is not a protocol"):
        open_run(folder, protocol)


def test_results_of_another_protocol(folder: Path) -> None:
    """Copied under its name, and with hashes of its own."""
    for end in ("results.parquet", "eval.json"):
        shutil.copy(folder / f"unc-{end}", folder / f"lmms-eval-{end}")
    path = folder / PROVENANCE
    provenance = json.loads(path.read_text())
    provenance["hashes"]["lmms-eval"] = provenance["hashes"]["unc"]
    path.write_text(json.dumps(provenance))
    with pytest.raises(InputError, match="protocol is unc, not lmms-eval"):
        open_run(folder, "lmms-eval")


def test_results_of_a_file_have_no_journal(dataset: Dataset, folder: Path, tmp_path: Path) -> None:
    scored = evaluation(tmp_path / "scored", dataset, model=False)
    read(scored)
    (scored / "settings.json").write_text(SETTINGS.model_dump_json())
    with pytest.raises(InputError, match=r"settings\.json: is of a model"):
        read(scored)


def test_results_under_a_second_protocol_keep_the_first(dataset: Dataset, folder: Path) -> None:
    """As long as they are of the same data; those of other data are not vouched for."""
    journal = open_journal(folder, SETTINGS)
    protocol = protocol_of("lmms-eval", families.row("llava").box)
    scored = score_all(dataset.expressions, journal.rows, protocol)
    record = record_of(scored, protocol, split="all", backend="torch")
    store_results(record, scored, dataset, None, folder, answers=journal.digest)
    assert open_run(folder).record.protocol == "unc"
    assert open_run(folder, "lmms-eval").record.protocol == "lmms-eval"
    store_results(record, scored, replace(dataset, data="elsewhere"), None, folder, answers=journal.digest)
    assert open_run(folder, "lmms-eval").record.protocol == "lmms-eval"
    with pytest.raises(InputError, match="hashes holds none of the results under unc"):
        open_run(folder)


@pytest.mark.parametrize(
    ("guard", "file", "change"),
    [
        ("check_record", RECORD, ("accuracy", 0.45)),
        ("check_answers", "settings.json", ("backend", "onnxruntime")),
    ],
)
def test_without_the_guard_a_contradiction_is_believed(
    guard: str, file: str, change: tuple[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), change[0]: change[1]}))
    rehash(folder)
    with pytest.raises(InputError, match=change[0]):
        read(folder)
    monkeypatch.setattr(results, guard, lambda *_: None)
    read(folder)
