"""The order of the stages, and nothing else. Read this first.

    build:                       Checkpoint -> Family -> Component -> Graph -> lint -> Engine -> Bundle
    validate (validation.py):    Bundle -> Session -> ParityReport

Each stage is one function of its own room; no room calls the next.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gap_export import __version__, prune
from gap_export.bundle.folder import MANIFEST, Bundle, open_bundle, write_manifest
from gap_export.bundle.manifest import Engine, Graph, Manifest
from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.checkpoint.hub import resolve
from gap_export.checkpoint.random_weights import random_checkpoint
from gap_export.environment import BUILD_PACKAGES, versions
from gap_export.errors import BundleError, CheckpointError, RecipeError
from gap_export.families import PARTS, Family, family_of
from gap_export.files import atomic_folder, record_of
from gap_export.inputs.layouts import Layout, NativeResolutionLayout
from gap_export.inputs.prompt import PromptTemplate, check_text_tokenizer, encode_prompts, load_tokenizer
from gap_export.pipeline.preflight import check_room, linkable, needs_of
from gap_export.plan import Plan, plan_for
from gap_export.precision import precision
from gap_export.recipe.ranges import RANGES, read_ranges
from gap_export.recipe.recipe import Recipe, Target

if TYPE_CHECKING:
    import onnx_ir as ir
    from tokenizers import Tokenizer

    from gap_export.bundle.spec import Component

Progress = Callable[[str], None]
"""Called with a few words whenever a stage begins."""

RANDOM = "random"
"""Stands for the checkpoint of a bundle with random weights."""

_TOKENIZER, _TEXT_TOKENIZER = "tokenizer.json", "text_tokenizer.json"


@dataclass(frozen=True)
class BuildResult:
    """A finished build.

    Attributes:
        bundle: opened.
        written_bytes: what the build added to the disk; linked weights cost nothing.
    """

    bundle: Bundle
    written_bytes: int


def build(
    recipe: Recipe,
    out: Path,
    *,
    replace: bool = False,
    self_contained: bool = False,
    tracer: Callable[[Component], ir.Model] | None = None,
    progress: Progress = lambda words: None,
) -> BuildResult:
    """Checkpoint to bundle.

    Args:
        recipe: what to build.
        out: the bundle folder; appears when it is complete, or not at all.
        replace: replace another bundle that is already there.
        self_contained: copy the weights instead of linking them.
        tracer: `graph.trace.graph_from_component` by default; a `TracedOnce` where several bundles are built.
        progress: told when a stage begins.

    Raises:
        GapExportError: a stage failed; `out` is as it was before.
    """
    _check_foreign_folder(out, recipe, replace)
    progress("reading the checkpoint")
    random = recipe.weights == "random"
    folder = (
        random_checkpoint(recipe.checkpoint, progress) if random else resolve(recipe.checkpoint, progress)
    )
    checkpoint = open_checkpoint(folder, name=recipe.checkpoint)
    family_name, family = family_of(checkpoint)
    if recipe.family not in (None, family_name):
        raise CheckpointError(
            f"is of family {family_name!r}, the recipe says {recipe.family!r}",
            subject=str(checkpoint.folder),
            hint="use a recipe of the checkpoint's family",
        )
    checkpoint = _with_parts(checkpoint, family, recipe)
    preprocessing = family.preprocessing(checkpoint, recipe)
    _check_max_pixels(preprocessing, recipe)
    facts, tokenizer = family.facts(checkpoint, recipe), family.tokenizer(checkpoint)
    text_tower = None
    if prune.strategy(recipe.pruner).needs_text and recipe.text_tower:
        part = open_checkpoint(resolve(recipe.text_tower), name=recipe.text_tower)
        checkpoint, text_tower = checkpoint.with_part("text_tower", part), family.text_tower(checkpoint, part)
        check_text_tokenizer(load_tokenizer(part.folder / _TOKENIZER), text_tower)
    plan = plan_for(recipe, facts, text_tower)
    ranges = None if recipe.ranges is None else read_ranges(Path(recipe.ranges))
    check_room(
        needs_of(
            checkpoint,
            recipe,
            facts,
            linkable=linkable(checkpoint, out),
            self_contained=self_contained,
        ),
        out,
        recipe,
    )
    prompt, box = family.prompt(checkpoint, recipe), family.box(recipe)
    prompt = prompt.model_copy(update={"images": recipe.images})
    _check_prompt(tokenizer, prompt, plan, recipe)

    from gap_export import linter
    from gap_export.graph import cost, passes, quantize, quantized_weights, trace, weights

    with atomic_folder(out) as folder:
        components = family.components(checkpoint, facts, plan)
        models = []
        for component in components:
            progress(f"tracing {component.spec.name}")
            models.append((tracer or trace.graph_from_component)(component))
        progress("placing the weights")
        row = precision(recipe.precision)
        store = weights.WeightStore(checkpoint, row.activations, folder, self_contained)
        half = row.activations.name == "fp16"
        quantized = quantized_weights.QuantizedStore(checkpoint, folder, half=half)
        parameters = [weights.parameters_of(model) for model in models]
        schemes = [
            quantize.schemes_of(component, recipe.precision, names)
            for component, names in zip(components, parameters, strict=True)
        ]
        if ranges is not None:
            ranges.require([name for low in schemes for name in low], family_name)
            ranges.write(folder / RANGES)
        store.prepare(
            [
                component.weight_key(name)
                for component, names, low in zip(components, parameters, schemes, strict=True)
                for name in names
                if name not in low
            ]
        )
        quantized.prepare(
            {
                component.weight_key(name): scheme
                for component, low in zip(components, schemes, strict=True)
                for name, scheme in low.items()
            }
        )
        graphs: dict[str, Graph] = {}
        for component, model, low in zip(components, models, schemes, strict=True):
            name = component.spec.name
            progress(f"writing and linting {name}.onnx")
            weights.attach_weights(model, store, component.weight_key, stand_ins=low)
            passes.simplify(model)
            keys = {name: component.weight_key(name) for name in low}
            quantize.quantize(model, low, keys, quantized, {} if ranges is None else ranges.largest)
            graph = Graph(
                file=f"{name}.onnx",
                spec=component.spec,
                operators=passes.operators(model),
                flops=cost.flops_of(model),
                weight_bytes=cost.weight_bytes_of(model),
            )
            passes.write_graph(model, component.spec, folder / graph.file)
            profile = "decoder" if name == "prefill" or name == "decode" else name
            linter.lint_graph(
                folder / graph.file, profile=profile, strict=True, policy=plan.pruning.positions
            ).require()
            graphs[name] = graph
        tokenizer.save(str(folder / _TOKENIZER))
        if text_tower is not None:
            shutil.copyfile(checkpoint.parts["text_tower"].folder / _TOKENIZER, folder / _TEXT_TOKENIZER)
        engines = {
            target: _build_engines(target, graphs, folder, recipe, progress)
            for target in recipe.targets
            if target != "onnx"
        }
        progress("writing the manifest")
        manifest = Manifest(
            gap_export=__version__,
            name=recipe.name,
            family=family_name,
            checkpoint=RANDOM if random else recipe.checkpoint,
            precision=recipe.precision,
            spec=facts,
            pruning=plan.pruning,
            capacity=plan.capacity,
            max_new_tokens=recipe.max_new_tokens,
            layout=preprocessing,
            prompt=prompt,
            box=box,
            text_tower=text_tower,
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
        write_manifest(folder, manifest)
        written = (
            store.written_bytes
            + quantized.written_bytes
            + sum(
                path.stat().st_size
                for path in folder.rglob("*")
                if path.suffix != ".safetensors" and path.is_file()
            )
        )
    return BuildResult(bundle=open_bundle(out), written_bytes=written)


def _build_engines(
    target: Target, graphs: dict[str, Graph], folder: Path, recipe: Recipe, progress: Progress
) -> dict[str, Engine]:
    from gap_export.engine import build as engine_room

    if target == "onnx":
        return {}
    engines: dict[str, Engine] = {}
    for name, graph in graphs.items():
        progress(f"building the {target} engine of {name}")
        engines[name] = engine_room.engine_from_graph(
            folder / graph.file,
            graph.spec,
            target=target,
            compute_capabilities=recipe.devices,
            folder=folder,
            progress=partial(_report_phase, progress, f"{target} engine of {name}"),
        )
    return engines


def _report_phase(progress: Progress, subject: str, phase: str, done: int, total: int) -> None:
    progress(f"{subject}: {phase} {done}/{total}")


def _check_foreign_folder(out: Path, recipe: Recipe, replace: bool) -> None:
    """Never overwrite what this build did not make."""
    if not out.exists():
        return
    if not out.is_dir():
        raise BundleError("is a file", subject=str(out), hint="choose another output folder")
    if not any(out.iterdir()) or (replace and (out / MANIFEST).is_file()):
        return
    if not (out / MANIFEST).is_file():
        raise BundleError(
            "is not empty and holds no bundle", subject=str(out), hint="choose another output folder"
        )
    try:
        same = open_bundle(out).manifest.recipe == recipe
    except BundleError:
        same = False
    if not same:
        raise BundleError(
            "already holds another bundle",
            subject=str(out),
            hint="choose another output folder, or pass --replace",
        )


def _with_parts(checkpoint: Checkpoint, family: Family, recipe: Recipe) -> Checkpoint:
    """The checkpoint with everything that it needs beside it."""
    known = family.parts(checkpoint)
    for name in PARTS:
        if getattr(recipe, name) is not None and name not in {part.name for part in known}:
            raise RecipeError(
                "has no place in this model",
                subject=f"--{name.replace('_', '-')} {getattr(recipe, name)}",
                hint="leave it out: the checkpoint is complete",
            )
    for needed in known:
        given = getattr(recipe, needed.name)
        if given is None and not needed.required:
            continue
        if given is None:
            raise CheckpointError(
                f"has no {needed.holds}",
                subject=str(checkpoint.folder),
                hint=f"add --{needed.name.replace('_', '-')} {needed.published}, or the folder it lies in",
            )
        checkpoint = checkpoint.with_part(needed.name, open_checkpoint(resolve(given), name=given))
    return family.joined(checkpoint)


def _check_max_pixels(preprocessing: Layout, recipe: Recipe) -> None:
    """Refuse a bound that this model's preprocessing has no use for."""
    if recipe.max_pixels is not None and not isinstance(preprocessing, NativeResolutionLayout):
        raise RecipeError(
            "is for models that take images at their own size and shape, and this one does not",
            subject=f"max_pixels {recipe.max_pixels}",
            hint="leave it out",
        )


def _check_prompt(tokenizer: Tokenizer, prompt: PromptTemplate, plan: Plan, recipe: Recipe) -> None:
    """Tokenize one prompt, so that a template or tokenizer that cannot work is refused before the long part."""
    prompts = encode_prompts(
        tokenizer,
        prompt,
        ["object"],
        kept=plan.pruning.max_tokens,
        capacity=plan.capacity,
        max_new_tokens=recipe.max_new_tokens,
    )
    if plan.pruning.stages and not prompts.text_after[0]:
        raise RecipeError(
            "goes by what text after the image attends to, and this prompt ends with the image",
            subject=f"pruner {plan.pruning.pruner}",
            hint="put text after the image into the prompt, or use a pruner that works before the decoder",
        )
