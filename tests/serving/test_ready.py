"""Ready means right: a session is let in when it answers as PyTorch does, and never when it renumbers, or reads other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.bundle.golden import overlap, renumbered
from gap_export.bundle.hashes import record_of
from gap_export.errors import BundleError, GateError
from gap_export.pipeline.golden import add_golden
from gap_export.positions import Placement
from gap_export.runtime.model import Model, load
from gap_export.serving import ready
from gap_export.serving.engine import Engine
from gap_export.serving.limits import EngineLimits
from gap_export.serving.ready import ReadyReport, check_ready
from tests.test_architecture import BLOCKER, python

BuildBundle = Callable[..., Bundle]
Edit = Callable[[Any], Any]


@contextmanager
def served(
    bundle: Bundle | Path, *, rows: int = 4, wrong: Callable[[Model], Any] | None = None
) -> Iterator[Engine]:
    """An engine over the bundle, whose session was made wrong."""
    with load(bundle, threads=1) as model:
        if wrong is not None:
            wrong(model)
        engine = Engine(model, EngineLimits(rows=rows))
        try:
            yield engine
        finally:
            engine.close()


def report(bundle: Bundle | Path, *, allow_baselines: bool = False, **options: Any) -> ReadyReport:
    with served(bundle, **options) as engine:
        return check_ready(engine.bundle, engine, allow_baselines=allow_baselines)


def never_ready(bundle: Bundle | Path, **options: Any) -> GateError:
    with pytest.raises(GateError) as caught:
        report(bundle, **options)
    assert str(caught.value).isprintable()
    assert "not ready" in caught.value.message
    return caught.value


def rewritten(folder: Path, edit: Edit = lambda content: None) -> Path:
    """The manifest of a bundle edited, with the hashes of what lies there."""
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    content["files"] = {name: record_of(folder / name).model_dump() for name in content["files"]}
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def replaced(target: Path, source: Path) -> None:
    """Put a copy of a file into the place of another, which may be linked."""
    target.unlink()
    shutil.copyfile(source, target)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Bundle], Path]:
    """`copied(bundle)`: its folder, to be changed."""
    return lambda bundle: Path(
        shutil.copytree(bundle.folder, tmp_path / f"copy-{len(list(tmp_path.iterdir()))}")
    )


@pytest.fixture
def without_lint(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the golden request says by itself."""
    monkeypatch.setattr(ready, "_lint", lambda _: ((), "left out"))


# Right


@pytest.mark.parametrize("rows", [1, 4])
def test_a_right_session_is_ready(rows: int, shapes_bundle: Bundle, golden_bundle: Bundle) -> None:
    boxes = report(shapes_bundle, rows=rows)
    assert (boxes.decided_by, boxes.tokens_equal, len(boxes.linted)) == ("boxes", True, 4)
    assert boxes.right > 0.99 > 0.5 > boxes.perturbed
    assert "golden request: IoU 1.000, tokens equal, with wrong ids 0." in str(boxes)
    assert boxes.rows == rows
    assert ("the same in 4 rows at once" in str(boxes)) == (rows == 4)
    logits = report(golden_bundle, rows=rows)
    assert (logits.decided_by, logits.tokens_equal) == ("logits", True)
    assert logits.right < 1e-3
    assert logits.perturbed == pytest.approx(1, abs=1e-3)


def test_a_session_that_rounds_is_held_to_boxes_alone(
    shapes_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(shapes_bundle) as engine:
        monkeypatch.setattr(type(engine), "backend", "openvino:bf16")
        assert check_ready(engine.bundle, engine).tokens_equal is None


def test_boxes_are_compared_as_the_bundle_has_them_whatever_answers_are_read_as(
    shapes_bundle: Bundle,
) -> None:
    assert report(shapes_bundle.written_as("bbox_1000")).right > 0.99


@pytest.mark.long
def test_decoders_that_drop_tokens(deep_bundle: BuildBundle, copied: Callable[[Bundle], Path]) -> None:
    folder = copied(deep_bundle(pruner="fastv"))
    golden = add_golden(folder).golden
    assert golden is not None
    assert golden.wrong_ids == "reversed"
    assert report(folder).tokens_equal


def test_it_needs_no_onnx(golden_bundle: Bundle) -> None:
    code = f"""{BLOCKER}
import sys
import gap_export as gap
from gap_export.serving.engine import Engine
from gap_export.serving.limits import EngineLimits
from gap_export.serving.ready import check_ready
with gap.load(sys.argv[1], threads=1) as model:
    engine = Engine(model, EngineLimits(rows=2))
    print(check_ready(model.bundle, engine))
    engine.close()
"""
    done = python(code, str(golden_bundle.folder))
    assert done.returncode == 0, done.stderr
    assert "not linted: onnx_ir is needed for lint and not installed" in done.stdout


# Refused before anything is asked


def test_a_bundle_without_a_golden_request(tiny_bundle: BuildBundle) -> None:
    with pytest.raises(BundleError, match="has no golden request") as caught:
        report(tiny_bundle())
    assert caught.value.hint == f"add one: gap-export golden {tiny_bundle().folder}"


def test_baselines_are_allowed_by_name(tiny_bundle: BuildBundle, copied: Callable[[Bundle], Path]) -> None:
    folder = copied(tiny_bundle(positions="shifted"))
    with pytest.raises(BundleError, match="is a baseline: its position ids are shifted") as caught:
        report(folder)
    assert "--allow-baselines" in caught.value.hint
    assert add_golden(folder).golden is not None
    assert report(folder, allow_baselines=True).tokens_equal


@pytest.mark.parametrize(
    "name", ["model.safetensors", "splice.onnx", "tokenizer.json", "golden.png", "golden.json"]
)
def test_files_that_were_changed(name: str, golden_bundle: Bundle, copied: Callable[[Bundle], Path]) -> None:
    folder = copied(golden_bundle)
    with served(folder) as engine:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).unlink()
        (folder / name).write_bytes(bytes(content))
        with pytest.raises(BundleError) as caught:
            check_ready(engine.bundle, engine)
    assert caught.value.subject.endswith(name)


def test_a_manifest_that_was_changed_since(golden_bundle: Bundle, copied: Callable[[Bundle], Path]) -> None:
    folder = copied(golden_bundle)
    with served(folder) as engine:
        rewritten(folder, lambda content: content["versions"].update(python="4"))
        with pytest.raises(BundleError, match="is another one than was loaded"):
            check_ready(engine.bundle, engine)


# A bundle that renumbers


def test_a_bundle_that_was_built_to_renumber_cannot_say_otherwise(
    tiny_bundle: BuildBundle, copied: Callable[[Bundle], Path]
) -> None:
    """Its splice graph has another input less, so that the manifest contradicts itself before anything is loaded."""
    folder = copied(tiny_bundle(positions="shifted"))

    def relabel(content: Any) -> None:
        content["pruning"]["positions"] = content["recipe"]["positions"] = "gap"

    with pytest.raises(BundleError, match="contradicts itself"):
        open_bundle(rewritten(folder, relabel))


def renumbering(folder: Path, *, all_of_it: bool) -> Path:
    """The bundle with a splice graph of the same inputs and outputs whose ids count the slots, every hash right.

    Args:
        folder: of a right bundle, which is changed.
        all_of_it: whether the answer's first id counts the slots too.
    """
    path = folder / "splice.onnx"
    model = onnx.load(str(path), load_external_data=False)
    wrong = ["position_ids", *(["next_position"] if all_of_it else [])]
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}_of_gap" if name in wrong else name for name in names]
    constants = {"one": np.array(1, np.int64), "last": np.array(1, np.int64)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    added = [
        helper.make_node("Sub", ["position_ids_of_gap"] * 2, ["zeros"]),
        helper.make_node("Add", ["zeros", "one"], ["ones"]),
        helper.make_node("CumSum", ["ones", "last"], ["position_ids"], exclusive=1),
    ]
    if all_of_it:
        added.append(helper.make_node("Identity", ["next_slot"], ["next_position"]))
    model.graph.node.extend(added)
    path.unlink()
    path.write_bytes(model.SerializeToString())
    return rewritten(folder)


@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_bundle_whose_graphs_renumber(
    all_of_it: bool, golden_bundle: Bundle, shapes_bundle: Bundle, copied: Callable[[Bundle], Path]
) -> None:
    """Its manifest says gap, lint sees ids that depend on what was kept, and still it gives itself away."""
    for bundle in (golden_bundle, shapes_bundle):
        folder = renumbering(copied(bundle), all_of_it=all_of_it)
        assert open_bundle(folder, every_hash=True).manifest.pruning.positions == "gap"
        assert never_ready(folder)


def splices(change: Callable[[Placement], Placement]) -> Callable[[Model], Any]:
    """A session whose splice graph places prompts so."""

    def wrong(model: Model) -> None:
        splice = model.session.splice

        def changed(*arguments: Any) -> Any:
            spliced = splice(*arguments)
            return replace(spliced, placement=change(spliced.placement))

        model.session.splice = changed  # type: ignore[method-assign]

    return wrong


def ids_alone(placement: Placement) -> Placement:
    """Ids of the prompt are renumbered, and decoding continues where it should."""
    return replace(renumbered(placement), next_position=placement.next_position)


def one_id(placement: Placement) -> Placement:
    """One id of the prompt is wrong by one."""
    ids = placement.position_ids.copy()
    ids[..., 4] += 1
    return replace(placement, position_ids=ids)


@pytest.mark.usefixtures("without_lint")
@pytest.mark.parametrize("change", [renumbered, ids_alone])
def test_a_session_that_renumbers(change: Any, shapes_bundle: Bundle, golden_bundle: Bundle) -> None:
    for bundle in (shapes_bundle, golden_bundle):
        never_ready(bundle, wrong=splices(change))


@pytest.mark.usefixtures("without_lint")
def test_a_session_that_renumbers_says_what_is_wrong(shapes_bundle: Bundle, golden_bundle: Bundle) -> None:
    assert (
        "another box than PyTorch: their IoU is 0.0"
        in never_ready(shapes_bundle, wrong=splices(ids_alone)).message
    )
    assert (
        "other logits than PyTorch: their distance is 1.0"
        in never_ready(golden_bundle, wrong=splices(ids_alone)).message
    )


@pytest.mark.usefixtures("without_lint")
def test_one_wrong_id_that_changes_no_box_is_noticed_by_the_arithmetic(shapes_bundle: Bundle) -> None:
    error = never_ready(shapes_bundle, wrong=splices(one_id))
    assert (
        "position ids are other ones than follow from the tokens that were kept" in error.message
        or "tokens" in error.message
    )


def ignores_ids(model: Model) -> None:
    """A session that numbers prompt and answer by itself, rightly for the golden request: what is fed does not matter."""
    session: Any = model.session
    prefill, step, seen = session.prefill_row, session.step, {}

    def prefilled(row: int, embeds: Any, placement: Placement) -> Any:
        seen.setdefault("first", placement)
        return prefill(row, embeds, replace(placement, position_ids=seen["first"].position_ids))

    def stepped(ids: Any, placement: Placement) -> Any:
        ahead = seen["first"].next_position - seen["first"].next_slot
        return step(ids, replace(placement, position_ids=(placement.write_index + ahead)[:, None]))

    session.prefill_row, session.step = prefilled, stepped


@pytest.mark.usefixtures("without_lint")
def test_a_session_that_does_not_read_ids(shapes_bundle: Bundle, golden_bundle: Bundle) -> None:
    assert (
        "the same box with wrong position ids (IoU 1.000"
        in never_ready(shapes_bundle, wrong=ignores_ids).message
    )
    assert (
        "the same logits with wrong position ids (distance 0.0"
        in never_ready(golden_bundle, wrong=ignores_ids).message
    )


# Wrong only where requests share a cache


def spoils_steps(session: Any) -> None:
    """In a step of several rows, those behind the first have others' logits."""
    step = session.step

    def stepped(ids: Any, placement: Placement) -> Any:
        logits_BV = step(ids, placement)
        return np.concatenate([logits_BV[:1], -logits_BV[1:]])

    session.step = stepped


def spoils_prompts(session: Any) -> None:
    """Prompts that are read into rows behind the first are renumbered."""
    prefill = session.prefill_row
    session.prefill_row = lambda row, embeds, placement: prefill(
        row, embeds, renumbered(placement) if row else placement
    )


def spoils_copies(session: Any) -> None:
    """Rows behind the first cannot be copied to."""
    copy = session.copy_row
    session.copy_row = lambda source, target: None if target else copy(source, target)


@pytest.mark.usefixtures("without_lint")
@pytest.mark.parametrize("rows", [2, 3, 8])
@pytest.mark.parametrize("spoils", [spoils_steps, spoils_prompts, spoils_copies])
def test_a_session_that_is_right_in_its_first_row_alone(
    spoils: Callable[[Any], None], rows: int, shapes_bundle: Bundle
) -> None:
    def wrong(model: Model) -> None:
        spoils(model.session)

    said = never_ready(shapes_bundle, rows=rows, wrong=wrong).message
    assert f"its golden request in one of {min(rows, 4)} rows with other tokens" in said or "box" in said
    assert report(shapes_bundle, rows=1, wrong=wrong if spoils is spoils_steps else None).rows == 1


@pytest.mark.usefixtures("without_lint")
def test_a_queue_of_one_is_enough_to_ask_in_several_rows(shapes_bundle: Bundle) -> None:
    with load(shapes_bundle, threads=1) as model, Engine(model, EngineLimits(rows=4, queue=1)) as engine:
        assert check_ready(engine.bundle, engine).rows == 4


# Another bundle than was built


def test_a_graph_of_another_bundle(
    golden_bundle: Bundle, tiny_bundle: BuildBundle, copied: Callable[[Bundle], Path]
) -> None:
    """Its inputs and outputs are the same, lint has nothing to say, and it keeps other tokens."""
    folder = copied(golden_bundle)
    replaced(folder / "vision.onnx", tiny_bundle(pruner="divprune").folder / "vision.onnx")
    assert "than PyTorch" in never_ready(rewritten(folder)).message


def test_other_weights(golden_bundle: Bundle, copied: Callable[[Bundle], Path]) -> None:
    folder = copied(golden_bundle)
    content = (folder / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    (name,) = (name for name in json.loads(content[8 : 8 + header_bytes]) if name.endswith("lm_head.weight"))
    first, last = (
        8 + header_bytes + end for end in json.loads(content[8 : 8 + header_bytes])[name]["data_offsets"]
    )
    negative = (-np.frombuffer(content[first:last], np.float32)).tobytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(content[:first] + negative + content[last:])
    never_ready(rewritten(folder))


def golden_edited(folder: Path, edit: Edit) -> Path:
    content = json.loads((folder / "golden.json").read_text())
    edit(content)
    (folder / "golden.json").write_text(json.dumps(content))
    return rewritten(folder)


def test_a_wrong_golden_box(shapes_bundle: Bundle, copied: Callable[[Bundle], Path]) -> None:
    golden = shapes_bundle.golden
    assert golden is not None
    assert golden.right.box is not None
    x1, y1, x2, y2 = golden.right.box
    wrong = [x1, y1, x2, y1 + (y2 - y1) * 0.8]
    assert 0.5 < overlap(golden.right.box, tuple(wrong)) < 0.9  # type: ignore[arg-type]
    folder = golden_edited(copied(shapes_bundle), lambda content: content["right"].update(box=wrong))
    assert open_bundle(folder, every_hash=True).golden is not None, "nothing else tells"
    assert "another box than PyTorch: their IoU is 0.8" in never_ready(folder).message


def test_a_wrong_golden_token(golden_bundle: Bundle, copied: Callable[[Bundle], Path]) -> None:
    folder = golden_edited(
        copied(golden_bundle),
        lambda content: content["right"].update(token_ids=content["right"]["token_ids"][:-1]),
    )
    assert "with other tokens than PyTorch" in never_ready(folder).message


def test_wrong_golden_logits(golden_bundle: Bundle, copied: Callable[[Bundle], Path]) -> None:
    def exchange(content: Any) -> None:
        for each in content["logits"]:
            each["right"], each["wrong"] = each["wrong"], each["right"]

    assert "other logits than PyTorch" in never_ready(golden_edited(copied(golden_bundle), exchange)).message
