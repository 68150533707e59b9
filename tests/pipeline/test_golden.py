"""The golden request, made: a scene that tells right ids from wrong ones, put into a bundle without touching anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gap_export.boxes.metrics import HIT_IOU
from gap_export.boxes.scenes import DEV_SEED, HELD_OUT_SEED, TRAIN_SEED, cases
from gap_export.bundle.folder import BUNDLE, Bundle, open_bundle
from gap_export.bundle.golden import MAX_PERTURBED_IOU, GoldenRequest, overlap
from gap_export.errors import BundleError, CheckpointError, InputError, MissingRequirementError
from gap_export.files import check_folder
from gap_export.pipeline import golden as module
from gap_export.pipeline.build import build, manifest_of
from gap_export.pipeline.golden import SEED, add_golden, in_words, make_golden
from gap_export.pipeline.opened import TOKENIZER, open_model
from gap_export.plan import plan_for
from gap_export.recipe.recipe import Recipe

BuildBundle = Callable[..., Bundle]


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., GoldenRequest]:
    """`made(keep=..., pruner=...)`: of the bundled model. Nothing is traced: PyTorch answers, and a manifest says how it is asked."""

    def make(**changes: Any) -> GoldenRequest:
        model = open_model(Recipe.load("shapes", **{"keep": 0.25, **changes}))
        model.tokenizer.save(str(tmp_path / TOKENIZER))
        manifest = manifest_of(model, plan_for(model.recipe, model.spec, None), {}, {}, tmp_path)
        golden, image = make_golden(Bundle(tmp_path, manifest), model.checkpoint.folder)
        assert image.size == golden.size == (96, 96)
        return golden

    return make


def hits(golden: GoldenRequest) -> bool:
    """Whether the right box is that of the scene."""
    meant = (case.box for case in cases(module.SCENES, SEED) if case.expression == golden.expression)
    return max(overlap(golden.right.box, box) for box in meant) >= HIT_IOU


def test_boxes_decide_for_the_bundled_model(made: Callable[..., GoldenRequest]) -> None:
    golden = made()
    assert golden.decided_by == "boxes"
    assert golden.wrong_ids == "renumbered"
    assert hits(golden)
    assert overlap(golden.right.box, golden.wrong.box) < MAX_PERTURBED_IOU
    assert golden.logits == ()
    assert made() == golden, "another one each time"
    assert "boxes that overlap by" in in_words(golden)
    rounded = made(precision="int4")
    assert rounded.decided_by == "boxes"
    assert hits(rounded)


@pytest.mark.parametrize(
    "changes",
    [{"pruner": "fastv"}, {"positions": "shifted"}, {"pruner": "none", "keep": 1.0}],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_ids_that_count_the_slots_anyway_are_reversed(
    changes: dict[str, Any], made: Callable[..., GoldenRequest]
) -> None:
    golden = made(**changes)
    assert (golden.decided_by, golden.wrong_ids) == ("boxes", "reversed")
    assert golden.positions == changes.get("positions", "gap")
    assert golden.is_baseline == ("positions" in changes)
    assert ("of a baseline" in in_words(golden)) == golden.is_baseline


def test_a_decoder_that_renumbers_inside_would_be_noticed(made: Callable[..., GoldenRequest]) -> None:
    """Where tokens are dropped in the decoder, the scene tells its answer from the one with ids renumbered there."""
    asked: list[Any] = []
    original = module._request

    def request(found: Any, manifest: Any) -> GoldenRequest:
        asked.append(found)
        return original(found, manifest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_request", request)
        made(pruner="fastv")
    (found,) = asked
    assert found.inside is not None
    assert overlap(found.box, found.inside.answers[0].box) < MAX_PERTURBED_IOU


def test_logits_decide_for_weights_that_know_nothing(golden_bundle: Bundle) -> None:
    golden = golden_bundle.golden
    assert golden is not None
    assert golden.decided_by == "logits"
    assert 1 <= len(golden.logits) <= 64
    right, wrong = (np.array([getattr(each, name) for each in golden.logits]) for name in ("right", "wrong"))
    assert np.linalg.norm(right - wrong) > 0.1
    assert "logits" in in_words(golden)


def test_no_split_has_its_scenes() -> None:
    assert SEED not in (HELD_OUT_SEED, DEV_SEED, TRAIN_SEED)


# What a build does


def built(options: dict[str, Any], out: Path, tracer: Any, **changes: Any) -> Any:
    return build(Recipe.model_validate(options), out, tracer=tracer, **changes)


def test_a_build_stores_one(tiny_options: dict[str, Any], tmp_path: Path, tracer: Any) -> None:
    result = built(tiny_options, tmp_path / "out", tracer)
    bundle = open_bundle(tmp_path / "out", every_hash=True)
    assert bundle.golden is not None
    assert result.bundle.manifest == bundle.manifest
    assert result.golden == in_words(bundle.golden)


def test_a_build_says_why_there_is_none(
    tiny_options: dict[str, Any], tmp_path: Path, tracer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def said(**changes: Any) -> str:
        result = built(tiny_options, out, tracer, **changes)
        assert open_bundle(out).golden is None
        assert not list(out.glob("golden.*"))
        sentence: str = result.golden
        assert sentence.endswith(f"gap-export golden {out}")
        assert "\n" not in sentence
        return sentence

    assert "as asked" in said(golden=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "available_memory", lambda: 10**6)
        assert "of 1.0 MB is free, and PyTorch takes about 300." in said()

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel for this\nat all")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_answers", fails)
        assert "could not be asked in PyTorch: no kernel for this)" in said()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_answers", lambda *_: iter(()))
        assert "none of the scenes: fits into a prompt of this bundle" in said()


# What the command does


@pytest.fixture
def bare(bundle_copy: Path) -> Path:
    """Folder of a bundle without a golden request."""
    shutil.rmtree(bundle_copy / "reports", ignore_errors=True)
    return bundle_copy


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_it_is_added_and_nothing_else_changes(bare: Path) -> None:
    before, manifest = state(bare), json.loads((bare / "manifest.json").read_text())
    bundle = add_golden(bare)
    assert bundle.golden == open_bundle(bare, every_hash=True).golden is not None
    after, told = state(bare), json.loads((bare / "manifest.json").read_text())
    assert {name for name in after if after[name] != before.get(name)} == {
        "manifest.json",
        "golden.json",
        "golden.png",
    }
    assert {key for key in told if told[key] != manifest[key]} == {"files"}
    assert set(told["files"]) - set(manifest["files"]) == {"golden.json", "golden.png"}
    with pytest.raises(BundleError, match="has a golden request already"):
        add_golden(bare)
    assert state(bare) == after
    again = add_golden(bare, replace=True)
    assert again.golden == bundle.golden
    assert state(bare)["vision.onnx"] == before["vision.onnx"]


def test_a_damaged_one_is_made_anew(golden_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden_bundle.folder, tmp_path / "bundle"))
    whole = (folder / "golden.json").read_bytes()
    (folder / "golden.json").write_bytes(whole.replace(b'"keep": 0.25', b'"keep": 0.26'))
    with pytest.raises(BundleError, match="does not have the hash"):
        add_golden(folder, replace=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    from gap_export.bundle.hashes import record_of

    manifest["files"]["golden.json"] = record_of(folder / "golden.json").model_dump()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"keep is 0.26"):
        add_golden(folder)
    assert add_golden(folder, replace=True).golden == golden_bundle.golden


@pytest.mark.parametrize("when", ["first file", "second file", "manifest", "before"])
@pytest.mark.parametrize("replace_it", [False, True])
def test_at_whatever_instant_it_ends_the_bundle_opens(
    when: str,
    replace_it: bool,
    golden_bundle: Bundle,
    bare: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden = golden_bundle.golden
    assert golden is not None
    folder = Path(shutil.copytree(golden_bundle.folder, tmp_path / "it")) if replace_it else bare
    other = golden.model_copy(update={"expression": "a cat"})
    image = module.Image.open(golden_bundle.folder / "golden.png").convert("RGB").rotate(90)
    monkeypatch.setattr(module, "make_golden", lambda *_, **__: (other, image))

    def stops(count: int, original: Callable[..., Any]) -> Callable[..., Any]:
        calls = iter(range(100))

        def call(*arguments: Any) -> Any:
            if next(calls) == count:
                raise KeyboardInterrupt
            return original(*arguments)

        return call

    with monkeypatch.context() as patch:
        if when == "first file":
            patch.setattr(module, "write_atomically", stops(0, module.write_atomically))
        elif when == "second file":
            patch.setattr(GoldenRequest, "write", stops(0, GoldenRequest.write))
        else:
            count = (1 if replace_it else 0) if when == "manifest" else 0
            patch.setattr(module, "write_manifest", stops(count, module.write_manifest))
        with pytest.raises(KeyboardInterrupt):
            add_golden(folder, replace=replace_it)
    left = open_bundle(folder, every_hash=True)
    assert (left.golden is None) == (not replace_it or when != "before")
    assert check_folder(folder, BUNDLE), "what is left is in the way of a rebuild"
    assert add_golden(folder, replace=replace_it).golden == other
    assert not list(folder.parent.glob(".*.lock"))


def test_a_bundle_that_changes_meanwhile_is_left_alone(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.make_golden

    def slow(*arguments: Any, **named: Any) -> Any:
        made = original(*arguments, **named)
        content = json.loads((bare / "manifest.json").read_text())
        content["versions"]["python"] = "4"
        (bare / "manifest.json").write_text(json.dumps(content))
        return made

    monkeypatch.setattr(module, "make_golden", slow)
    with pytest.raises(BundleError, match="was changed meanwhile"):
        add_golden(bare)
    assert not list(bare.glob("golden.*"))


def test_what_it_needs_is_named(
    bare: Path, tmp_path: Path, checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        add_golden(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not a folder"):
        add_golden(bare, checkpoint=tmp_path / "nowhere")
    (checkpoint_copy / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        add_golden(bare, checkpoint=checkpoint_copy)
    monkeypatch.setattr(module, "available_memory", lambda: 10**6)
    with pytest.raises(MissingRequirementError, match="PyTorch takes about"):
        add_golden(bare)
    assert not list(bare.glob("golden.*"))


# Which scene


def answered(margin: float, *, apart: bool = True, hits: bool = True, gap: float = 1.0) -> Any:
    """What is looked at of a scene that was answered."""
    finite = SimpleNamespace(generation=SimpleNamespace(finite=True))
    return SimpleNamespace(
        lie_apart=apart, hits=hits, is_steady=margin > 0.1, margin=margin, gap=gap, right=finite
    )


def test_the_first_scene_that_tells_is_taken_and_no_further_one_is_answered() -> None:
    tie, misses, first, clearer = answered(0.0), answered(9, hits=False), answered(1), answered(2)
    later = iter((tie, misses, first, clearer))
    assert module._chosen(later, several=False) is first
    assert list(later) == [clearer]
    assert module._chosen(iter((tie, misses, first, clearer)), several=True) is clearer
    assert module._chosen(iter((tie, misses)), several=False) is misses
    assert module._chosen(iter((tie, answered(1, apart=False, gap=0.5))), several=False).gap == 0.5
    for answers in ([], [answered(1, apart=False, gap=0.0)]):
        with pytest.raises(InputError):
            module._chosen(iter(answers), several=False)
