"""The order of the stages, and nothing else. Read this first.

    build:     Checkpoint -> Family -> Component -> Graph -> lint -> Engine -> Bundle
    validate:  Bundle -> Session -> ParityReport

Each stage is one function of its own room; no room calls the next.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gap_export import __version__, parity, prune
from gap_export.artifact import atomic_folder, record_of, scratch_folder, write_atomically
from gap_export.bundle import (
    MANIFEST,
    AnyPreprocessing,
    Bundle,
    Engine,
    Graph,
    Manifest,
    Native,
    PromptTemplate,
    Pruning,
    open_bundle,
    write_manifest,
)
from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.errors import BundleError, CheckpointError, RecipeError
from gap_export.families import PARTS, Family, family_of
from gap_export.grounding import scenes
from gap_export.hub import resolve
from gap_export.machine import BUILD_PACKAGES, versions
from gap_export.plan import Plan, plan_for
from gap_export.positions import PositionPolicy
from gap_export.preflight import linkable, needs_of, require_room
from gap_export.random_weights import random_checkpoint
from gap_export.recipe import Recipe, Target
from gap_export.runtime.ground import Backend, Grounded, Grounder, open_session
from gap_export.runtime.prompt import check_text_tokenizer, encode_prompts, load_tokenizer

if TYPE_CHECKING:
    import onnx_ir as ir
    from tokenizers import Tokenizer

    from gap_export.graph.trace import TracedOnce
    from gap_export.runtime.session import Session
    from gap_export.spec import Component

Progress = Callable[[str], None]
"""Called with a few words whenever a stage begins."""

CONTROL_CASES = 48
"""Cases each negative control is run on, rounded down to whole batches."""

_COMPANIONS: dict[str, dict[str, Any]] = {
    "full": {"pruner": "none", "keep": 1.0, "prune_layers": ()},
    "shifted": {"positions": PositionPolicy.SHIFTED},
    "permuted": {"positions": PositionPolicy.PERMUTED},
    "gap": {"positions": PositionPolicy.GAP},
}
RANDOM = "random"
"""Stands for the checkpoint of a bundle with random weights."""

_TOKENIZER, _TEXT_TOKENIZER = "tokenizer.json", "text_tokenizer.json"


@dataclass(frozen=True)
class Built:
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
) -> Built:
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
    _refuse_foreign_folder(out, recipe, replace)
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
    _refuse_max_pixels(preprocessing, recipe)
    facts, tokenizer = family.facts(checkpoint, recipe), family.tokenizer(checkpoint)
    text_tower = None
    if prune.strategy(recipe.pruner).needs_text and recipe.text_tower:
        part = open_checkpoint(resolve(recipe.text_tower), name=recipe.text_tower)
        checkpoint, text_tower = checkpoint.with_part("text_tower", part), family.text_tower(checkpoint, part)
        check_text_tokenizer(load_tokenizer(part.folder / _TOKENIZER), text_tower)
    plan = plan_for(recipe, facts, text_tower)
    require_room(
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

    from gap_export.graph import lint, passes, trace, weights

    with atomic_folder(out) as folder:
        components = family.components(checkpoint, facts, plan)
        models = []
        for component in components:
            progress(f"tracing {component.spec.name}")
            models.append((tracer or trace.graph_from_component)(component))
        progress("placing the weights")
        store = weights.WeightStore(checkpoint, recipe.precision, folder, self_contained)
        store.prepare(
            [
                component.weight_key(name)
                for component, model in zip(components, models, strict=True)
                for name in weights.parameters_of(model)
            ]
        )
        graphs: dict[str, Graph] = {}
        for component, model in zip(components, models, strict=True):
            name = component.spec.name
            progress(f"writing and linting {name}.onnx")
            weights.attach_weights(model, store, component.weight_key)
            passes.simplify(model)
            graph = Graph(file=f"{name}.onnx", spec=component.spec, operators=passes.operators(model))
            passes.write_graph(model, component.spec, folder / graph.file)
            profile = "decoder" if name == "prefill" or name == "decode" else name
            lint.lint_graph(folder / graph.file, profile=profile, own=True, policy=plan.positions).require()
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
            model=facts,
            pruning=Pruning(
                pruner=recipe.pruner,
                keep=plan.keep,
                kept=plan.kept,
                counting=plan.counting,
                fewest=plan.fewest,
                most=plan.most,
                positions=recipe.positions,
                seed=recipe.seed,
                merged=prune.strategy(recipe.pruner).merged,
                merged_id=recipe.merged_id,
                stages=plan.stages,
                shares=plan.shares,
            ),
            capacity=plan.capacity,
            max_new_tokens=recipe.max_new_tokens,
            preprocessing=preprocessing,
            prompt=prompt,
            box=box,
            text_tower=text_tower,
            graphs=graphs,
            engines=engines,
            gates=recipe.demands.model_dump(),
            files={
                str(path.relative_to(folder)): record_of(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file() and path.name != MANIFEST
            },
            versions=versions(BUILD_PACKAGES),
            recipe=recipe.model_dump(mode="json"),
        )
        write_manifest(folder, manifest)
        written = store.written_bytes + sum(
            path.stat().st_size
            for path in folder.rglob("*")
            if path.suffix != ".safetensors" and path.is_file()
        )
    return Built(bundle=open_bundle(out), written_bytes=written)


def open_torch(bundle: Bundle, *, checkpoint: Path | None = None, text_tower: Path | None = None) -> Session:
    """The PyTorch model that a bundle was built from, with its pruning.

    Args:
        bundle: opened.
        checkpoint: where the weights lie; by default where the bundle was built from.
        text_tower: the same for the text tower, where there is one.

    Raises:
        CheckpointError: the weights are not there any more, or cannot be loaded.
    """
    from gap_export.runtime.torch_reference import TextReference
    from gap_export.runtime.torch_staged import open_reference

    manifest, reads = bundle.manifest, None
    if manifest.text_tower is not None:
        folder = text_tower or resolve(manifest.text_tower.checkpoint)
        reads = TextReference(folder, manifest.text_tower)
    return open_reference(
        manifest.family,
        checkpoint or resolve(manifest.checkpoint),
        manifest.pruning,
        parts=_part_folders(Recipe.model_validate(manifest.recipe)),
        text_tower=reads,
    )


def validate(
    folder: Path,
    *,
    cases: int,
    keep: float | None = None,
    backend: Backend = "onnxruntime",
    checkpoint: Path | None = None,
    text_tower: Path | None = None,
    batch: int = 16,
    threads: int = 0,
    progress: Progress = lambda words: None,
    tick: parity.Tick = lambda count: None,
) -> parity.ParityReport:
    """Bundle to parity report, which is also stored in the bundle.

    The bundle is compared with PyTorch on held-out scenes; then it and companions that differ in one thing each (nothing
    pruned, ids shifted, ids permuted) are scored; then placements that are wrong on purpose must be noticed.

    Args:
        folder: the bundle.
        cases: how many scenes.
        keep: fraction of visual tokens to keep, in bundles that let requests choose; their default when left out.
        backend: runtime to put it through.
        checkpoint: where the weights lie; by default where the bundle was built from.
        text_tower: the same for the text tower, where there is one.
        batch: rows per call, at most what the bundle was built for.
        threads: of ONNX Runtime; 0 lets it choose.
        progress: told when a stage begins.
        tick: told how many answers were finished since the last call; `validation_work` says how many there will be.

    Raises:
        GapExportError: something could not be run. Gates that are not met are in the report.
    """
    from gap_export.graph.trace import TracedOnce

    bundle = open_bundle(folder, every_hash=True)
    manifest = bundle.manifest
    pruning, visual_tokens = manifest.pruning, manifest.model.visual_tokens
    recipe = Recipe.model_validate(manifest.recipe)
    if manifest.checkpoint == RANDOM and checkpoint is None:
        raise BundleError(
            "holds random weights, which ground nothing",
            subject=str(folder),
            hint="measure it with `gap-export bench`; to compare it with PyTorch all the same, pass the folder of its weights: "
            "--checkpoint FOLDER",
        )
    source = checkpoint or resolve(manifest.checkpoint)
    if manifest.text_tower is not None:
        recipe = recipe.replaced(text_tower=str(text_tower or resolve(manifest.text_tower.checkpoint)))
    batch = min(batch, recipe.max_batch)
    questions = list(scenes.cases(cases))
    grounder = Grounder(bundle)
    session = open_session(bundle, backend, threads=threads)

    progress("answering with PyTorch")
    answer = partial(parity.run_cases, batch=batch, tick=tick)
    reference = answer(
        grounder,
        open_torch(bundle, checkpoint=source, text_tower=text_tower),
        questions,
        keep=keep,
        keep_logits=True,
    )
    progress(f"answering with {backend}")
    runs = answer(grounder, session, questions, keep=keep, keep_logits=True)
    measured = parity.measure(runs, reference, questions, manifest)
    gates = parity.judge(measured, recipe.demands)

    few_batches = max(1, CONTROL_CASES // batch)  # whole ones, to be compared with those of the reference
    few = questions[: few_batches * batch]
    caught, inapplicable = [], []
    for name, adjust in parity.controls(staged=bool(pruning.stages)).items():
        if not parity.applies(adjust, runs[0]):
            inapplicable.append(name)
            continue
        progress(f"negative control: {name}")
        wrong = answer(grounder, session, few, keep=keep, adjust=adjust, keep_logits=True)
        seen = parity.measure(wrong, reference[:few_batches], few, manifest)
        caught.append(parity.check_control(name, seen, recipe.demands))

    if pruning.counting == "chosen":  # companions differ in one thing, and the count is not it
        recipe = recipe.replaced(keep=pruning.keep if keep is None else keep)
    accuracy, tracer = {str(pruning.positions): measured.accuracy}, TracedOnce()
    for name, changes in _COMPANIONS.items():
        if name not in accuracy:
            changed = recipe.replaced(checkpoint=str(source), **changes)
            with _companion(bundle, changed, backend, tracer, progress) as companion:
                progress(f"answering with {name}")
                other = open_session(companion, backend, threads=threads)
                answers = answer(Grounder(companion), other, questions)
                accuracy[name] = parity.accuracy_of(answers, questions)

    report = parity.ParityReport(
        ok=all(gate.passed for gate in gates) and all(control.caught for control in caught),
        bundle=manifest.name,
        backend=backend,
        precision=manifest.precision,
        measurement=measured,
        gates=gates,
        controls=caught,
        inapplicable_controls=inapplicable,
        grounding=parity.Grounding(
            **accuracy,
            cases=cases,
            kept=_mean_kept(runs),
            visual_tokens=visual_tokens,
        ),
        versions=versions(BUILD_PACKAGES),
    )
    write_atomically(bundle.reports / "parity.json", report.model_dump_json(indent=2) + "\n")
    return report


def _mean_kept(runs: list[Grounded]) -> float:
    """Visual tokens that are left of a picture, on average; the count itself where all keep the same."""
    counts = np.concatenate([parity.counts_of(run.generation.every_kept_indices[-1]) for run in runs])
    return round(float(counts.mean()), 2)


def validation_work(cases: int, *, staged: bool = False) -> int:
    """About how many answers `validate` makes."""
    controls = len(parity.controls(staged=staged))
    return cases * (2 + len(_COMPANIONS) - 1) + min(cases, CONTROL_CASES) * controls


@contextmanager
def _companion(
    bundle: Bundle, recipe: Recipe, backend: Backend, tracer: TracedOnce, progress: Progress
) -> Iterator[Bundle]:
    """A bundle like the given one but for one thing, in a scratch folder beside it (so that weights can be linked)."""
    targets: tuple[Target, ...] = ("onnx",) if backend == "onnxruntime" else (backend,)
    # A capacity that is just enough for the pruned prompt is too small for the whole one.
    recipe = recipe.model_copy(update={"capacity": None})
    with scratch_folder(beside=bundle.folder, purpose="companion") as scratch:
        built = build(recipe.replaced(targets=targets), scratch / "bundle", tracer=tracer, progress=progress)
        yield built.bundle


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
            compute_capabilities=recipe.compute_capabilities,
            folder=folder,
            progress=partial(_report_phase, progress, f"{target} engine of {name}"),
        )
    return engines


def _report_phase(progress: Progress, subject: str, phase: str, done: int, total: int) -> None:
    progress(f"{subject}: {phase} {done}/{total}")


def _refuse_foreign_folder(out: Path, recipe: Recipe, replace: bool) -> None:
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
        same = open_bundle(out).manifest.recipe == recipe.model_dump(mode="json")
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


def _part_folders(recipe: Recipe) -> dict[str, Path]:
    """Where the checkpoints beside the main one lie."""
    named = {name: getattr(recipe, name) for name in PARTS}
    return {name: resolve(given) for name, given in named.items() if given is not None}


def _refuse_max_pixels(preprocessing: AnyPreprocessing, recipe: Recipe) -> None:
    """Refuse a bound that this model's preprocessing has no use for."""
    if recipe.max_pixels is not None and not isinstance(preprocessing, Native):
        raise RecipeError(
            "is for models that take pictures at their own size and shape, and this one does not",
            subject=f"max_pixels {recipe.max_pixels}",
            hint="leave it out",
        )


def _check_prompt(tokenizer: Tokenizer, prompt: PromptTemplate, plan: Plan, recipe: Recipe) -> None:
    """Tokenize one prompt, so that a template or tokenizer that cannot work is refused before the long part."""
    prompts = encode_prompts(
        tokenizer,
        prompt,
        ["object"],
        kept=plan.most,
        capacity=plan.capacity,
        max_new_tokens=recipe.max_new_tokens,
    )
    if plan.stages and not prompts.text_after[0]:
        raise RecipeError(
            "goes by what text after the image attends to, and this prompt ends with the image",
            subject=f"pruner {plan.pruner}",
            hint="put text after the image into the prompt, or use a pruner that works before the decoder",
        )
