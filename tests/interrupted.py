"""The commands that write, run with stored results in the place of tracing and answering: all that is left is what they do to files.

A `Case` is a command in a folder: what lies there before, the command line, and what must hold at every instant and at the end.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from PIL import Image

import gap_export
from gap_export import cli
from gap_export.bundle.folder import open_bundle
from gap_export.evaluation import parity, validate
from gap_export.evaluation.recommend import run as recommend
from gap_export.evaluation.recommend.record import Recommendation
from gap_export.evaluation.refer import evaluate
from gap_export.evaluation.refer.evaluator import Answered
from gap_export.evaluation.refer.journal import Settings, read_journal
from gap_export.evaluation.refer.results import open_run, read_provenance
from gap_export.evaluation.report import write
from gap_export.evaluation.sweep import run as sweep
from gap_export.evaluation.sweep.record import Answers, SweepRecord
from gap_export.pipeline import graphs
from gap_export.recipe.ranges import Ranges, read_ranges
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.torch import reference
from tests.killing import Act, Ended, forked, nothing

FOREIGN = {
    "notes.txt": "work of a year",
    ".out.building-notes/thesis.tex": "work of three years",
    ".out.json.writing": "work of a day",
}
"""What lies beside the output and is somebody's."""
PAGE = '<html><meta name="generator" content="gap-export">page</html>'
KEPT, VISUAL = 9, 36


@dataclass(frozen=True)
class Case:
    """A command in a folder.

    Attributes:
        line: the command line; `{root}` stands for the folder, `{inputs}` for a folder beside it.
        before: makes what lies there.
        whole: holds at every instant: nothing is lost, and nothing is half there.
        done: holds at the end.
        left: names that lie there at the end, besides `FOREIGN`.
    """

    line: str
    left: tuple[str, ...]
    done: Callable[[Path], object]
    before: Callable[[Path], object] = lambda _: None
    whole: Callable[[Path], object] = lambda _: None


@dataclass(frozen=True)
class Found:
    """What a round of interruptions found.

    Attributes:
        events: that the command causes when nothing interrupts it.
        lost: what went wrong, a line each.
    """

    events: tuple[str, ...]
    lost: list[str] = field(default_factory=list)


class Interrupted:
    """Runs cases in folders of their own.

    Args:
        folder: to work in.
        inputs: that commands read.
    """

    def __init__(self, folder: Path, inputs: Path) -> None:
        self._folder, self._inputs = folder, inputs
        self._known: dict[tuple[Case, str], str | None] = {}

    def events_of(self, case: Case) -> tuple[str, ...]:
        """What happens when nothing interrupts it; it must be right then."""
        self._once_in_this_process(case)
        root = self._fresh(case)
        ended = self._run(case, root)
        assert ended.code == 0, ended.said
        assert not (wrong := self._wrong(case, root)), wrong
        return ended.events

    def round(self, case: Case, act: Act) -> str | None:
        """Interrupt a command, look, run it again, look: what is wrong, or None."""
        root = self._fresh(case)
        ended = self._run(case, root, act)
        if "Traceback" in ended.said:
            return f"traceback: {ended.said}"
        if ended.code == 0:
            return self._wrong(case, root)
        state = case, state_of(root)  # what follows depends on nothing else
        if state not in self._known:
            self._known[state] = self._go_on(case, root, ended)
        return self._known[state]

    def _go_on(self, case: Case, root: Path, ended: Ended) -> str | None:
        try:
            case.whole(root)
        except Exception as error:
            return f"lost after exit code {ended.code}: {error!r} {tree(root)}"
        again = self._run(case, root)
        if again.code != 0:
            return f"does not go on ({ended.said!r}): {again.said} {tree(root)}"
        return self._wrong(case, root)

    def finished(self, name: str, case: Case) -> Path:
        """What a case leaves in the end, under a name among the inputs; made on first use."""
        target = self._inputs / name
        if not target.exists():
            there = Interrupted(self._folder / name, self._inputs)
            there.events_of(case)
            shutil.copytree(self._folder / name / "root" / "out", target)
        return target

    def _wrong(self, case: Case, root: Path) -> str | None:
        if sorted(path.name for path in root.iterdir()) != sorted({*_tops(FOREIGN), *case.left}):
            return f"left behind: {tree(root)}"
        hidden = [name for name in tree(root) if "/." in name and not name.startswith(".")]
        if hidden:
            return f"left behind: {hidden}"
        for name, content in FOREIGN.items():
            if (root / name).read_text() != content:
                return f"changed: {name}"
        try:
            case.done(root)
        except Exception as error:
            return f"not right in the end: {error!r}"
        return None

    def _once_in_this_process(self, case: Case) -> None:
        """Import all that it imports, so that children need not."""
        root = self._fresh(case)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["gap-export", *self._arguments(case, root)])
            with pytest.raises(SystemExit):
                cli.main()
        gc.collect()
        gc.freeze()  # children share these pages as long as nothing looks at them

    def _arguments(self, case: Case, root: Path) -> list[str]:
        return [each.format(root=root, inputs=self._inputs) for each in case.line.split()]

    def _fresh(self, case: Case) -> Path:
        root = self._folder / "root"
        shutil.rmtree(root, ignore_errors=True)
        for name, content in FOREIGN.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)
        case.before(root)
        return root

    def _run(self, case: Case, root: Path, act: Act = nothing) -> Ended:
        def command() -> None:
            gc.disable()
            sys.argv = ["gap-export", *self._arguments(case, root)]
            cli.main()

        return forked(command, root, self._folder / "log", act)


_THROWN_AWAY = re.compile(r"\.(sweeping|baseline)/")


def state_of(folder: Path) -> str:
    """A hash of everything in a folder, whichever process left it, and however far it was with bundles that are thrown away."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=_without_owner):
        if _THROWN_AWAY.search(str(path)):
            continue
        found.update(repr((_without_owner(path), path.is_dir())).encode())
        if path.is_file():
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _without_owner(path: Path) -> str:
    return re.sub(r"-[0-9]+-[0-9]+-[0-9a-f]{16}\.", "-.", str(path))


def tree(folder: Path) -> list[str]:
    """Everything in a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def _tops(names: Sequence[str] | dict[str, str]) -> set[str]:
    return {name.partition("/")[0] for name in names}


@contextmanager
def stored_results(recipe: Recipe, folder: Path, tracer: Any) -> Iterator[Interrupted]:
    """Commands with stored results in the place of work, and inputs for them: `tiny.yaml`, `bundle`, `questions.jsonl` with images."""
    inputs = folder / "inputs"
    (inputs / "images").mkdir(parents=True)
    (inputs / "tiny.yaml").write_text(recipe.model_dump_json(exclude_none=True))
    for image in range(3):
        Image.new("RGB", (40, 30), (80 * image, 0, 0)).save(inputs / "images" / f"{image}.png")
    rows = [
        {"img_path": f"{image}.png", "expression": text, "bbox": [1, 2, 20, 25], "width": 40, "height": 30}
        for image in range(3)
        for text in ("cat", "dog")
    ]
    (inputs / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from gap_export.pipeline.build import build

    build(recipe, inputs / "bundle", golden=False, tracer=tracer)
    with pytest.MonkeyPatch.context() as patch:
        _replace_work(patch, tracer)
        yield Interrupted(folder, inputs)


def _replace_work(patch: pytest.MonkeyPatch, tracer: Any) -> None:
    trace = graphs.trace_graphs
    known: dict[str, list[tuple[Any, bytes]]] = {}

    def stored(model: Any, plan: Any, **_: Any) -> Any:
        key = repr(plan)
        if key not in known:
            known[key] = [
                (each, ir.to_proto(each.model).SerializeToString())
                for each in trace(model, plan, tracer=tracer)
            ]
        return [
            replace(each, model=ir.from_proto(onnx.ModelProto.FromString(content)))
            for each, content in known[key]
        ]

    patch.setattr(graphs, "trace_graphs", stored)
    patch.setattr(graphs.passes, "simplify", lambda _: None)
    patch.setattr(
        graphs.linter, "lint_graph", lambda *_, **__: type("", (), {"raise_for_errors": lambda _: None})()
    )
    patch.setattr(evaluate, "make_evaluator", lambda *_: _Table())
    patch.setattr(sweep, "open_session", lambda *_, **__: nullcontext())
    patch.setattr(
        sweep, "answers_of", lambda *_: Answers(texts=("", ""), ious=(0.5, 1.0), without_box=0, cut_off=0)
    )
    patch.setattr(sweep.runner, "run_cases", lambda *_, **__: [])
    patch.setattr(sweep.plotting, "png", lambda _: b"plot")
    patch.setattr(sweep, "figure", lambda _: None)
    patch.setattr(recommend, "open_session", lambda *_, **__: nullcontext())
    patch.setattr(recommend, "candidate", lambda name, *_, **__: name)
    patch.setattr(
        recommend,
        "first_token_ms",
        lambda names, **_: {name: 1.0 + (name == "none, keep 1") for name in names},
    )
    patch.setattr(recommend, "figure", lambda _: None)
    patch.setattr(write, "page", lambda *_, **__: PAGE)
    patch.setattr(gap_export, "calibrate", lambda *_, **__: RANGES, raising=False)
    patch.setattr(reference, "open_torch", lambda *_, **__: nullcontext())
    patch.setattr(validate.runner, "accuracy_of", lambda *_: 0.5)
    patch.setattr(validate.parity, "measure", lambda *_, **__: MEASURED)
    patch.setattr(validate, "_run_controls", lambda *_: ([], []))
    patch.setattr(validate, "_mean_kept", lambda _: 9.0)
    patch.setattr(validate, "open_session", lambda *_, **__: nullcontext())
    patch.setattr(
        validate.validate,
        "__kwdefaults__",
        {**validate.validate.__kwdefaults__, "opened": validate.open_session},
    )


class _Table:
    """Answers everything alike."""

    def answer_image(self, _: Image.Image, texts: Sequence[str]) -> list[Answered]:
        return [Answered("[0, 0, 1, 1]", None, 4, tuple(range(KEPT)), 0.5) for _ in texts]


RANGES = Ranges(
    gap_export="0", bundle="tiny", family="llava", checkpoint="x", samples=1, source="scenes", largest={"a": 1.0}
)  # fmt: skip
MEASURED = parity.Measurement(
    cases=2, kept_sets_equal=1.0, position_ids_equal=1.0, max_logit_difference=0.0, max_relative_logit_difference=0.0, min_logit_cosine=1.0, max_norm_deviation=0.0,
    token_agreement=1.0, first_diverging_token=None, mean_box_iou=1.0, identical_boxes=1.0, reference_accuracy=0.5, accuracy=0.5,
)  # fmt: skip


# The cases


def whole_bundle(root: Path) -> None:
    """A bundle is there, and of every byte as its manifest says; and what was put among its reports."""
    open_bundle(root / "out", every_hash=True)
    assert (root / "out" / "reports" / "mine.txt").read_text() == "kept"


def bundle_or_nothing(root: Path) -> None:
    """No bundle, or a whole one."""
    if (root / "out").exists() and (root / "out" / "manifest.json").exists():
        open_bundle(root / "out", every_hash=True)


def evaluated(root: Path, answers: int = 6) -> None:
    """All results are there, and the journal can be read."""
    run = open_run(root / "out")
    assert len(run.ids) == answers
    assert len((root / "out" / "answers.jsonl").read_text().splitlines()) == answers


def answers_of_one_evaluation(root: Path) -> None:
    """Whatever the settings are, what lies beside them is of them: the old ones keep 6 answers and results."""
    settings = Settings.read(root / "out" / "settings.json", hint="")
    journal = root / "out" / "answers.jsonl"
    if settings.ignore_exif:
        assert len(journal.read_text().splitlines()) == 6
        assert open_run(root / "out").record.expressions == 6
        assert read_provenance(root / "out").ignore_exif
    elif journal.exists():
        assert read_journal(root / "out", settings) is not None, "answers are sealed with the settings"


def swept(root: Path) -> None:
    record = SweepRecord.read(root / "out" / "sweep.json", hint="")
    assert len(record.rows) == 2
    assert (root / "out" / "sweep.png").read_bytes() == b"plot"
    assert "sweep.png" in (root / "out" / "sweep.md").read_text()


def recommended(root: Path) -> None:
    record = Recommendation.read(root / "out" / "recommend.json", hint="")
    assert [point.label for point in record.points] == ["none, keep 1", "random, keep 0.5"]
    assert (root / "out" / "recommend.png").read_bytes() == b"plot"
    for name in ("none-keep1.0", "random-keep0.5"):
        evaluation = root / "out" / "evaluations" / name
        assert len(open_run(evaluation).ids) == 6
        assert len((evaluation / "answers.jsonl").read_text().splitlines()) == 6


def page_or_other(root: Path) -> None:
    assert (root / "out.html").read_text() in (PAGE, PAGE + "old")


def cases(interrupted: Interrupted) -> dict[str, Case]:
    """Name -> case; old states are made here, by the commands themselves."""
    inputs = interrupted._inputs

    def copied(name: str, *parts: str) -> Callable[[Path], None]:
        def before(root: Path) -> None:
            target = root.joinpath(*parts)
            shutil.copytree(inputs / name, target)
            if (target / "manifest.json").exists():
                (target / "reports").mkdir(exist_ok=True)
                (target / "reports" / "mine.txt").write_text("kept")

        return before

    def empty(root: Path) -> None:
        (root / "out").mkdir()

    def an_old_page(root: Path) -> None:
        interrupted.finished("eval", made["eval"])
        (root / "out.html").write_text(PAGE + "old")

    build = "build --model {inputs}/tiny.yaml -o {root}/out --keep 0.5 --no-golden"
    score = (
        "eval {inputs}/bundle --data {inputs}/questions.jsonl --images {inputs}/images --json -o {root}/out"
    )
    points = "sweep --model {inputs}/tiny.yaml --pruners random --keep 0.5 --positions gap --limit 2 --workers 1 -o {root}/out"
    made: dict[str, Case] = {}
    made["build"] = Case(build, ("out",), bundle_or_nothing, whole=bundle_or_nothing)
    made["build into an empty folder"] = Case(
        build, ("out",), bundle_or_nothing, before=empty, whole=bundle_or_nothing
    )
    made["build --replace"] = Case(
        f"{build} --replace", ("out",), whole_bundle, before=copied("bundle", "out"), whole=whole_bundle
    )
    made["eval"] = Case(score, ("out",), evaluated)
    made["eval into an empty folder"] = Case(score, ("out",), evaluated, before=empty)
    made["sweep"] = Case(points, ("out",), swept)
    other = replace(made["eval"], line=f"{score} --ignore-exif")
    made["eval --replace"] = Case(
        f"{score} --replace",
        ("out",),
        evaluated,
        before=lambda root: shutil.copytree(interrupted.finished("other eval", other), root / "out"),
        whole=answers_of_one_evaluation,
    )
    made["sweep --replace"] = Case(
        f"{points} --replace --batch 3",
        ("out",),
        swept,
        before=lambda root: shutil.copytree(interrupted.finished("sweep", made["sweep"]), root / "out"),
    )
    tried = (
        "recommend --model {inputs}/tiny.yaml --pruners random --keep 0.5 --data {inputs}/questions.jsonl --images {inputs}/images"
        " --requests 1 -o {root}/out"
    )
    made["recommend"] = Case(tried, ("out",), recommended)
    made["recommend --replace"] = Case(
        f"{tried} --replace --ignore-exif",
        ("out",),
        recommended,
        before=lambda root: shutil.copytree(
            interrupted.finished("recommend", made["recommend"]), root / "out"
        ),
    )
    made["calibrate"] = Case(
        "calibrate {inputs}/bundle -o {root}/out.json --limit 1",
        ("out.json",),
        lambda root: read_ranges(root / "out.json"),
        before=lambda root: RANGES.write(root / "out.json"),
        whole=lambda root: read_ranges(root / "out.json"),
    )
    made["report"] = Case(
        "report {inputs}/eval {inputs}/eval --no-pruners -o {root}/out.html",
        ("out.html",),
        lambda root: page_or_other(root),
        before=an_old_page,
        whole=page_or_other,
    )
    made["validate"] = Case(
        "validate {root}/out --limit 2",
        ("out",),
        lambda root: parity.ParityReport.read(root / "out" / "reports" / "parity.json", hint=""),
        before=copied("bundle", "out"),
        whole=whole_bundle,
    )
    return made
