"""What a build is refused for before the long part: an output folder that is taken, a prompt that does not work, too little disk or
memory.

Disk and memory are told from the headers of the checkpoint's files alone.
Weights of the wanted element type are linked and cost nothing; others are written anew. Tracing holds graphs, not weights. Calibrating holds a layer of
the decoder, what it computes of a text, and square matrices as wide as what it reads. An engine holds the weights again, and building it holds them in memory.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from gap_export.bundle.folder import BUNDLE, open_bundle
from gap_export.bundle.manifest import ModelSpec
from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.safetensors import WeightLocation
from gap_export.errors import BundleError, MissingRequirementError, RecipeError
from gap_export.files import check_folder, readable_size
from gap_export.inputs.prompt import SLOT, encode_prompts, template_fault
from gap_export.pipeline.opened import OpenedModel
from gap_export.plan import Plan
from gap_export.precision import precision
from gap_export.recipe.calibration import MOST_TOKENS
from gap_export.recipe.recipe import Recipe

# Measured by bench/export.py: 0.59 GB with 32 layers, most of it torch and transformers themselves.
_IMPORTS, _PER_LAYER = 450 * 10**6, 5 * 10**6


@dataclass(frozen=True)
class Needs:
    """Of one build, in bytes.

    Attributes:
        disk: newly written.
        memory: at the peak.
        converted: of `disk`, weights that are converted or computed.
    """

    disk: int
    memory: int
    converted: int


def check_output(out: Path, recipe: Recipe, replace: bool) -> None:
    """Never overwrite what this build did not make.

    Args:
        out: the bundle folder, which need not exist.
        recipe: to be built.
        replace: whether another bundle may be replaced.

    Raises:
        BundleError: the folder holds something else.
    """
    if not check_folder(out, BUNDLE, outside=(BUNDLE,)) or replace:
        return
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


def check_prompt(model: OpenedModel, plan: Plan) -> None:
    """Tokenize one prompt, so that a template or tokenizer that cannot work is refused before the long part.

    Raises:
        GapExportError: the prompt does not fit the model, the plan or the pruner.
    """
    fault = template_fault(model.tokenizer, model.prompt, model.spec.vocabulary)
    if fault is not None:
        raise RecipeError(
            f"{fault}: {model.prompt.grounding!r}",
            subject="prompt",
            hint=f"write {SLOT} once into it, and {model.family.placeholder} once for every image; the tokenizer is the checkpoint's own",
        )
    prompts = encode_prompts(
        model.tokenizer,
        model.prompt,
        ["object"],
        vocabulary=model.spec.vocabulary,
        kept=plan.pruning.max_tokens,
        capacity=plan.capacity,
        max_new_tokens=model.recipe.max_new_tokens,
    )
    if plan.pruning.stages and not prompts.text_after[0]:
        raise RecipeError(
            "goes by what text after the image attends to, and this prompt ends with the image",
            subject=f"pruner {plan.pruning.pruner}",
            hint="put text after the image into the prompt, or use a pruner that works before the decoder",
        )


def check_machine(model: OpenedModel, out: Path, *, self_contained: bool) -> None:
    """Refuse a build that the machine has not the disk or the memory for.

    Args:
        model: to be built.
        out: the bundle folder, which need not exist.
        self_contained: whether weights are copied that could be linked.

    Raises:
        MissingRequirementError: with what is needed, what there is, and what to do.
    """
    needs = needs_of(
        model.checkpoint,
        model.recipe,
        model.spec,
        linkable=linkable(model.checkpoint, out),
        self_contained=self_contained,
    )
    check_needs(needs, out, model.recipe)


def needs_of(
    checkpoint: Checkpoint, recipe: Recipe, facts: ModelSpec, *, linkable: bool, self_contained: bool
) -> Needs:
    """An estimate, rather too high than too low: weights that no graph uses are counted.

    Args:
        checkpoint: with its companions.
        recipe: of the build.
        facts: sizes of the model.
        linkable: whether the output lies on a file system into which the checkpoint's files can be linked.
        self_contained: whether they are copied anyway.
    """
    row = precision(recipe.precision)
    activations = row.activations
    converted, whole, files = 0, 0, set[Path]()
    for weight in checkpoint.weights.values():
        elements = 1
        for extent in weight.shape:
            elements *= extent
        if row.quantizes and len(weight.shape) == 2 and weight.shape[0] != facts.vocabulary:
            converted += round(elements * row.bytes_per_weight)
            continue
        whole += elements * activations.bytes
        if isinstance(weight, WeightLocation) and weight.dtype == activations.safetensors:
            files.add(weight.file)
        else:
            converted += elements * activations.bytes
    copied = sum(file.stat().st_size for file in files) if self_contained or not linkable else 0
    engines = sum(target != "onnx" for target in recipe.targets)
    calibrated = 0 if recipe.calibration is None else _calibration_bytes(checkpoint, facts)
    return Needs(
        disk=converted + copied + engines * whole,
        memory=_IMPORTS + _PER_LAYER * facts.layers + max(calibrated, whole if engines else 0),
        converted=converted,
    )


def _calibration_bytes(checkpoint: Checkpoint, facts: ModelSpec) -> int:
    """One layer in float32, four of the widest activations that it reads, and four square matrices of float64 as wide as those."""
    shapes = [
        weight.shape
        for weight in checkpoint.weights.values()
        if len(weight.shape) == 2 and weight.shape[0] != facts.vocabulary
    ]
    elements = sum(columns * inner for columns, inner in shapes)
    widest = max((inner for _, inner in shapes), default=0)
    return 4 * elements // facts.layers + 4 * 4 * MOST_TOKENS * widest + 4 * 8 * widest**2


def check_needs(needs: Needs, out: Path, recipe: Recipe) -> None:
    """Refuse a build that the machine has not the disk or the memory for.

    Args:
        needs: of the build.
        out: the bundle folder, which need not exist.
        recipe: for advice.

    Raises:
        MissingRequirementError: with what is needed, what there is, and what to do.
    """
    free = shutil.disk_usage(existing_parent(out)).free
    if needs.disk > free:
        advice = ["choose an --output on another disk"]
        if needs.converted:
            advice.append("or the --precision that the checkpoint is stored in, whose weights are linked")
        if len(recipe.targets) > 1:
            advice.append("or fewer --target")
        raise MissingRequirementError(
            f"has {readable_size(free)} free, and the build writes about {readable_size(needs.disk)}",
            subject=str(out),
            hint=", ".join(advice),
        )
    memory = available_memory()
    if memory is not None and needs.memory > memory:
        raise MissingRequirementError(
            f"of {readable_size(memory)} is free, and the build takes about {readable_size(needs.memory)} at its peak",
            subject="memory",
            hint="close other programs, build engines (--target) on a larger machine, or set GAP_EXPORT_ANY_MEMORY=1 to try anyway",
        )


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def linkable(checkpoint: Checkpoint, out: Path) -> bool:
    """Whether every weight file lies on the file system that the bundle will lie on."""
    device = existing_parent(out).stat().st_dev
    return all(weight.file.stat().st_dev == device for weight in checkpoint.weights.values())


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a process may still take: of the machine, or of the control group it runs in; None where that is not known."""
    if os.environ.get("GAP_EXPORT_ANY_MEMORY") == "1":
        return None
    found = []
    listing = proc / "meminfo"
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file():
        text = limit.read_text().strip()
        if text != "max":
            found.append(int(text) - int(used.read_text()))
    return min(found, default=None)
