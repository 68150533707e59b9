"""Build as a whole: what a bundle is bound to, and what a build leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.checkpoint import open_checkpoint
from gap_export.errors import BundleError, CheckpointError, EngineError, GapExportError
from gap_export.families import open_family
from gap_export.graph.trace_cache import Tracer
from gap_export.pipeline.build import build
from gap_export.positions import PositionPolicy
from gap_export.recipe.recipe import Recipe
from tests.recorded import Recorded

BuildBundle = Callable[..., Bundle]

# Bundles


def test_a_bundle_says_what_it_is(tiny_bundle: BuildBundle, tiny_options: dict[str, Any]) -> None:
    bundle = tiny_bundle()
    manifest = bundle.manifest
    assert manifest.spec.grid == (6, 6)
    assert (manifest.pruning.kept, manifest.pruning.positions) == (9, PositionPolicy.GAP)
    assert (manifest.prompt.image_token_id, manifest.prompt.eos_token_ids) == (4, (2,))
    assert (manifest.layout.size, manifest.layout.fit, manifest.box.frame) == (
        36,
        "pad",
        "padded_square",
    )
    assert manifest.layout.background == (122, 117, 104)
    assert manifest.recipe.checkpoint == tiny_options["checkpoint"]
    on_disk = {str(p.relative_to(bundle.folder)) for p in bundle.folder.rglob("*") if p.is_file()}
    assert set(manifest.files) == {name for name in on_disk if not name.startswith("reports")} - {
        "manifest.json"
    }
    assert set(manifest.versions) >= {"python", "torch", "transformers", "onnx", "onnxruntime"}
    assert manifest.graphs["decoder"].spec.inputs[4].extents("maximum")[2] == manifest.capacity


def test_weights_are_linked_and_graphs_are_small(tiny_bundle: BuildBundle, tiny_checkpoint: Path) -> None:
    bundle = tiny_bundle()
    assert os.path.samefile(bundle.folder / "model.safetensors", tiny_checkpoint / "model.safetensors")
    for graph in bundle.manifest.graphs.values():
        assert (bundle.folder / graph.file).stat().st_size < 60_000


def test_stretched_images_have_boxes_of_the_image(tiny_options: dict[str, Any]) -> None:
    recipe = Recipe.model_validate({**tiny_options, "fit": "stretch"})
    assert open_family(open_checkpoint(Path(recipe.checkpoint))).box(recipe).frame == "image"


def test_a_builder_that_crashes_is_a_line_and_leaves_no_bundle(
    tiny_options: dict[str, Any], tracer: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module that it imports first ends the process: not this one."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "tensorrt_rtx.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.syspath_prepend(modules)
    recipe = Recipe.model_validate({**tiny_options, "targets": ("onnx", "tensorrt-rtx")})
    with pytest.raises(EngineError, match=r"graph vision: TensorRT-RTX's builder crashed on it \(SIGSEGV\)"):
        build(recipe, tmp_path / "out", golden=False, tracer=tracer)
    assert [path.name for path in tmp_path.iterdir()] == ["modules"]


def test_the_same_recipe_may_be_built_over_its_own_bundle(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is allowed is decided before any work; the work itself is cut short here."""

    class Reached(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Reached

    out = tmp_path / "out"
    recipe = Recipe.model_validate({**tiny_options, "pruner": "random"})
    build(recipe, out, self_contained=True, golden=False)
    assert not os.path.samefile(out / "model.safetensors", Path(recipe.checkpoint) / "model.safetensors")
    before = (out / "manifest.json").read_text()
    monkeypatch.setattr("gap_export.pipeline.build.open_model", stop)
    with pytest.raises(Reached):
        build(recipe, out)
    other = recipe.replaced(keep=0.5)
    with pytest.raises(BundleError, match="another bundle"):
        build(other, out)
    with pytest.raises(Reached):
        build(other, out, replace=True)
    whole = (out / "splice.onnx").read_bytes()
    (out / "splice.onnx").write_bytes(b"changed by somebody")
    for replace in (False, True):
        with pytest.raises(BundleError, match=r"changed since they were written: splice.onnx"):
            build(recipe, out, replace=replace)
    (out / "splice.onnx").unlink()
    with pytest.raises(BundleError, match="another bundle"):
        build(recipe, out)
    with pytest.raises(Reached):
        build(recipe, out, replace=True)
    (out / "splice.onnx").write_bytes(whole)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Reached):
        build(recipe, tmp_path / "empty")
    assert (out / "manifest.json").read_text() == before


def test_a_recipe_of_another_family_is_refused(tiny_options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the recipe says 'qwen'"):
        build(Recipe.model_validate({**tiny_options, "family": "qwen"}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["tracing vision", "placing the weights", "writing and linting splice.onnx", "writing the manifest"])  # fmt: skip
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_whatever_happens_in_a_stage_nothing_is_left(
    stage: str,
    error: type[BaseException],
    tiny_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gap_export import linter
    from gap_export.graph import trace

    monkeypatch.setenv("GAP_EXPORT_TRACE_CACHE", "off")
    monkeypatch.setattr(trace, "graph_from_component", _traced_once(trace))
    monkeypatch.setattr(linter, "lint_graph", lambda *_, **__: _Fine())

    def stop(recorded: Recorded) -> None:
        if recorded.messages[-1] == stage:
            raise error

    with pytest.raises(error):
        build(Recipe.model_validate(tiny_options), tmp_path / "out", progress=Recorded(stop))
    assert not list(tmp_path.iterdir())


class _Fine:
    def raise_for_errors(self) -> None:
        pass


_GRAPHS: dict[str, Any] = {}


def _traced_once(trace: Any) -> Callable[[Any], Any]:
    """Tracing takes seconds and is not what is tested: later calls get a copy of the first graph of that name."""
    original = trace.graph_from_component

    def graph(component: Any, *_: object, **__: object) -> Any:
        name = component.spec.name
        if name not in _GRAPHS:
            _GRAPHS[name] = original(component)
        return _GRAPHS[name].clone()

    return graph


def test_what_was_built_is_opened_before_it_takes_a_place(
    bundle_copy: Path,
    tiny_options: dict[str, Any],
    tracer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gap_export.pipeline import build as module

    original = module.manifest_of

    def contradicting(*arguments: Any) -> Any:
        return original(*arguments).model_copy(update={"capacity": 8})

    recipe = Recipe.model_validate(tiny_options)
    before = {path: path.read_bytes() for path in bundle_copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(module, "manifest_of", contradicting)
    for out in (bundle_copy, tmp_path / "new"):
        with pytest.raises(
            BundleError, match=r"makes a bundle that cannot be opened: manifest\.json"
        ) as caught:
            build(recipe, out, replace=True, golden=False, tracer=tracer)
        assert caught.value.subject == "tiny"
    assert {path: path.read_bytes() for path in bundle_copy.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(
        module, "_check_written", lambda *_: None
    )  # the control: it would have been put there
    build(recipe, tmp_path / "new", golden=False, tracer=tracer)
    with pytest.raises(BundleError, match="capacity is 8"):
        open_bundle(tmp_path / "new")


def test_errors_of_ours_print_on_one_line() -> None:
    error = GapExportError("broke", subject="a thing", hint="mend it")
    assert str(error) == "gap-export: a thing: broke (mend it)"


def test_reports_do_not_count_as_content(bundle_copy: Path) -> None:
    (bundle_copy / "reports").mkdir(exist_ok=True)
    (bundle_copy / "reports" / "other.json").write_text(json.dumps({}))
    open_bundle(bundle_copy, every_hash=True)
