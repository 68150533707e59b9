"""Checkpoint to bundle: the order of the stages, and nothing else. Read this first.

    check_output -> open_model -> plan_for, check_machine, check_prompt -> trace_graphs -> write_graphs -> build_engines -> manifest -> golden_of_build

Each stage is one function of its own; no stage calls the next.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gap_export import __version__
from gap_export.bundle.check.files import CHAT_TEMPLATE
from gap_export.bundle.folder import MANIFEST, REPORTS, Bundle, open_bundle, write_manifest
from gap_export.bundle.hashes import record_of
from gap_export.bundle.manifest import Engine, EngineTarget, Graph, Manifest
from gap_export.engine.isolated import Builder
from gap_export.environment import BUILD_PACKAGES, check_build_extra, versions
from gap_export.errors import BundleError
from gap_export.files import FolderLock, atomic_folder
from gap_export.pipeline.golden import golden_of_build, without_golden
from gap_export.pipeline.opened import TOKENIZER, OpenedModel, open_model
from gap_export.pipeline.preflight import check_machine, check_output, check_prompt
from gap_export.plan import Plan, plan_for
from gap_export.progress import SILENT, Prefixed, Progress
from gap_export.recipe.recipe import Recipe

if TYPE_CHECKING:
    from gap_export.graph.trace_cache import Tracer

RANDOM = "random"
"""Stands for the checkpoint of a bundle with random weights."""

_TEXT_TOKENIZER = "text_tokenizer.json"


@dataclass(frozen=True)
class BuildResult:
    """A finished build.

    Attributes:
        bundle: opened.
        written_bytes: what the build added to the disk; linked weights cost nothing.
        cached: names of the graphs that were traced before, and were taken from the trace cache.
        notes: what the user should know of how the checkpoint was read, a sentence each.
        assumptions: what was found in a second place because it was missing in the first, a sentence each.
        prompts: where grounding prompt and chat template are from, a sentence each.
        golden: what became of the golden request, a sentence.
    """

    bundle: Bundle
    written_bytes: int
    cached: tuple[str, ...]
    notes: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    golden: str = ""


def build_bundle(
    recipe: Recipe,
    out: Path | str,
    *,
    replace: bool = False,
    self_contained: bool = False,
    golden: bool = True,
    progress: Progress = SILENT,
) -> Bundle:
    """Checkpoint to bundle.

    Args:
        recipe: what to build.
        out: the bundle folder; appears when it is complete, or not at all.
        replace: replace another bundle that is already there.
        self_contained: copy the weights instead of linking them.
        golden: store a golden request, which servers need, where PyTorch fits into the memory that is free.
        progress: told of every stage.

    Raises:
        GapExportError: a stage failed, or what it needs is not installed; `out` is as it was before.
    """
    return build(
        recipe, Path(out), replace=replace, self_contained=self_contained, golden=golden, progress=progress
    ).bundle


def build(
    recipe: Recipe,
    out: Path,
    *,
    replace: bool = False,
    self_contained: bool = False,
    golden: bool = True,
    tracer: Tracer | None = None,
    progress: Progress = SILENT,
) -> BuildResult:
    """Checkpoint to bundle.

    Args:
        recipe: what to build.
        out: the bundle folder; appears when it is complete, or not at all.
        replace: replace another bundle that is already there; its reports stay.
        self_contained: copy the weights instead of linking them.
        golden: store a golden request, where PyTorch fits into the memory that is free.
        tracer: of the components; where several bundles are built, one for all of them. By default one with the user's cache.
        progress: told when a stage begins.

    Raises:
        GapExportError: a stage failed; `out` is as it was before.
    """
    check_build_extra("building a bundle")
    check_output(out, recipe, replace)
    model = open_model(recipe, progress=progress)
    plan = plan_for(recipe, model.spec, model.text_tower)
    check_machine(model, out, self_contained=self_contained)
    check_prompt(model, plan)

    from gap_export.pipeline.graphs import trace_graphs, write_graphs  # torch is not needed to come so far

    with (
        FolderLock(out),
        atomic_folder(out, kept=(REPORTS,), check=lambda: check_output(out, recipe, replace)) as folder,
    ):
        traced = trace_graphs(model, plan, tracer=tracer, progress=progress)
        written = write_graphs(traced, model, plan, folder, self_contained=self_contained, progress=progress)
        _write_tokenizers(model, folder)
        if model.chat is not None:
            (folder / CHAT_TEMPLATE).write_text(model.chat_template, encoding="utf-8", newline="")
        engines = build_engines(written.graphs, recipe, folder, progress)
        progress.stage("writing the manifest")
        manifest = manifest_of(model, plan, written.graphs, engines, folder)
        write_manifest(folder, manifest)
        _check_written(folder, recipe)
        said = without_golden(out, "as asked")
        if golden:
            manifest, said = golden_of_build(Bundle(folder, manifest), model.checkpoint, out, progress)
        written_bytes = written.weight_bytes + _bytes_besides_weights(folder)
    cached = tuple(graph.name for graph in traced if graph.cached)
    return BuildResult(
        Bundle(out, manifest),
        written_bytes,
        cached,
        notes=model.notes,
        assumptions=model.assumptions,
        prompts=model.prompts,
        golden=said,
    )


def build_engines(
    graphs: dict[str, Graph], recipe: Recipe, folder: Path, progress: Progress
) -> dict[EngineTarget, dict[str, Engine]]:
    """An engine of every graph for every target that has engines.

    Args:
        graphs: that lie in the folder.
        recipe: names targets and devices.
        folder: of the bundle.
        progress: told of every engine, and how far it is.

    Raises:
        EngineError: the builder refuses a graph.
        MissingRequirementError: the builder is not installed, or no space on the disk.
    """
    engines: dict[EngineTarget, dict[str, Engine]] = {}
    with Builder() as builder:
        for target in recipe.targets:
            if target == "onnx":
                continue
            engines[target] = {}
            for name, graph in graphs.items():
                progress.stage(f"building the {target} engine of {name}")
                engines[target][name] = builder.engine_from_graph(
                    folder / graph.file,
                    graph.spec,
                    target=target,
                    compute_capabilities=recipe.devices,
                    folder=folder,
                    progress=Prefixed(progress, f"{target} engine of {name}"),
                )
    return engines


def manifest_of(
    model: OpenedModel,
    plan: Plan,
    graphs: dict[str, Graph],
    engines: dict[EngineTarget, dict[str, Engine]],
    folder: Path,
) -> Manifest:
    """What a bundle says about itself.

    Args:
        model: that was built.
        plan: of its graphs.
        graphs: by name.
        engines: by target and graph.
        folder: whose files are hashed.
    """
    recipe = model.recipe
    return Manifest(
        gap_export=__version__,
        name=recipe.name,
        family=model.family.row.name,
        checkpoint=RANDOM if recipe.weights == "random" else recipe.checkpoint,
        precision=recipe.precision,
        spec=model.spec,
        pruning=plan.pruning,
        capacity=plan.capacity,
        max_new_tokens=recipe.max_new_tokens,
        layout=model.layout,
        prompt=model.prompt,
        chat=model.chat,
        box=model.box,
        text_tower=model.text_tower,
        graphs=graphs,
        engines=engines,
        gates=recipe.thresholds,
        files={
            str(path.relative_to(folder)): record_of(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        },
        versions=versions(BUILD_PACKAGES),
        recipe=recipe,
    )


def _check_written(folder: Path, recipe: Recipe) -> None:
    """Open what was written, as everybody will, before it takes the place of another.

    Raises:
        BundleError: it cannot be opened.
    """
    try:
        open_bundle(folder)
    except BundleError as error:
        raise BundleError(
            f"makes a bundle that cannot be opened: {Path(error.subject).name} {error.message}",
            subject=recipe.name,
            hint="change what the message names; where nothing of it is yours, please report this",
        ) from error


def _write_tokenizers(model: OpenedModel, folder: Path) -> None:
    model.tokenizer.save(str(folder / TOKENIZER))
    if model.text_tower is not None and model.text_tower.kind == "clip":
        text_tower = model.checkpoint.companions["text_tower"]
        shutil.copyfile(text_tower.folder / TOKENIZER, folder / _TEXT_TOKENIZER)


def _bytes_besides_weights(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return sum(file.stat().st_size for file in files)
