"""Validation on a text: a bundle's decoder against PyTorch, with no image.

    Bundle, text -> TextReport

A model of one's own is held against its checkpoint with any prose at hand, in one long call and then token by token: scales that are shared by
all tokens of a call are wrong in the first alone. What is measured and what is required stands in `text_parity.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gap_export import bounds
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.environment import BUILD_PACKAGES, check_build_extra, versions
from gap_export.errors import BundleError, InputError, MissingRequirementError
from gap_export.evaluation.bundle_reports import TEXT_PARITY, check_reports_can_be_written
from gap_export.evaluation.text_parity import CONTROL, TextReport, judge, measure
from gap_export.files import kinds, read_text
from gap_export.inputs.prompt import encode_prose
from gap_export.inputs.tokenizer import load_tokenizer
from gap_export.pipeline.build import RANDOM
from gap_export.positions import Ids
from gap_export.precision import hinted_gates
from gap_export.progress import SILENT, Progress
from gap_export.runtime.backends import Runtime, row, runtime

if TYPE_CHECKING:
    from gap_export.evaluation.scoring import BundleScorer, Scorer

DEFAULT_TOKENS, STEPS = 512, 256
"""Tokens of the first call where nothing else is said, and of those that follow one by one."""
_BACKENDS = ("onnxruntime", "openvino")
"""Those whose decoder can be had with the logits of every token."""


def validate_text(
    bundle: Bundle | Path | str,
    text: Path | str,
    *,
    tokens: int = DEFAULT_TOKENS,
    backend: str = "onnxruntime",
    checkpoint: Path | None = None,
    threads: int = 0,
    progress: Progress = SILENT,
) -> TextReport:
    """Bundle and text to a report, which is also stored among the reports of the bundle.

    The bundle's own decoder graph is run with the choice of one row taken out: the text's first tokens in one call, and 256 more one by
    one. A decoder that drops tokens reads all of them one by one.

    Args:
        bundle: opened, or its folder; every file is verified.
        text: a file in UTF-8, prose in a language that the model knows.
        tokens: of the first call. Where the bundle's cache, or what the model was trained for, ends before the text does, it is fewer: at
            least half of what is left, or 256, are read one by one.
        backend: what runs the bundle, `onnxruntime` or `openvino` with a device or a type of activations (`openvino:bf16`), which reads the
            first call; see `runtime/backends.py`.
        checkpoint: where the weights lie; by default where the bundle was built from.
        threads: on the CPU; 0 lets the runtime choose.
        progress: told of every stage and every token.

    Returns:
        What was measured. Gates that are not met are in it; its `raise_for_gates` raises for them.

    Raises:
        InputError: the text is too short, or cannot be read.
        GapExportError: something could not be run.
    """
    check_build_extra("validating a bundle")
    from gap_export.evaluation.scoring import ReferenceScorer
    from gap_export.runtime.ort_graph import check_kernels
    from gap_export.runtime.torch.reference import open_model_of

    bounds.check(tokens=tokens, threads=threads)
    chosen = runtime(backend)
    bundle = open_bundle(bundle, every_hash=True)
    check_reports_can_be_written(bundle, TEXT_PARITY)
    _check_backend(bundle, chosen)
    if chosen.device == "cpu" and not chosen.providers:
        check_kernels(bundle)
    manifest = bundle.manifest
    # Gates that somebody chose hold whatever runs the bundle.
    thresholds = manifest.gates if manifest.recipe.gates else hinted_gates(manifest.gates, chosen.hint)
    if manifest.checkpoint == RANDOM and checkpoint is None:
        raise BundleError(
            "holds random weights, which predict nothing",
            subject=str(bundle.folder),
            hint="to compare it with PyTorch all the same, pass the folder of its weights: --checkpoint FOLDER",
        )
    content = read_text(Path(text), kinds.TEXT)
    ids_T, prefilled = _tokens_of(bundle, content, str(text), tokens)
    few = ids_T[: max(prefilled, STEPS)]  # the first of all ids is 0, and half of it is right
    progress.stage("reading with PyTorch", total=2 * len(ids_T) + len(few))
    model = open_model_of(bundle, checkpoint=checkpoint)
    reference = _read(
        ReferenceScorer(model, position_rows=manifest.spec.position_rows), ids_T, prefilled, progress
    )
    del model
    progress.stage(f"reading with {chosen}")
    with _open_scorer(bundle, chosen, threads) as scorer:
        mine = _read(scorer, ids_T, prefilled, progress)
        progress.stage(f"negative control: {CONTROL}")
        scorer.renumber = lambda ids: ids // 2
        wrong = _read(scorer, few, prefilled, progress)
    gates, measured = [], []
    for name, part in _parts(len(ids_T), prefilled).items():
        found = measure(mine[part], reference[part], _next(ids_T, part))
        measured.append(found)
        gates += judge(name, found, thresholds)
    part = slice(0, len(few))
    missed = judge(CONTROL, measure(wrong, reference[part], _next(ids_T, part)), thresholds)
    caught = not all(gate.passed for gate in missed)
    report = TextReport(
        ok=caught and all(gate.passed for gate in gates),
        manifest_sha256=bundle.manifest_sha256,
        bundle=manifest.name,
        backend=str(chosen),
        precision=manifest.precision,
        source=Path(text).name,
        source_sha256=hashlib.sha256(content.encode()).hexdigest(),
        prefill=measured[0] if prefilled else None,
        steps=measured[-1],
        gates=gates,
        control_caught=caught,
        versions=versions(BUILD_PACKAGES),
    )
    report.write(bundle.reports / TEXT_PARITY)
    return report


def _check_backend(bundle: Bundle, chosen: Runtime) -> None:
    if chosen.backend not in _BACKENDS:
        raise InputError(
            f"cannot be measured on a text: only {' and '.join(_BACKENDS)} give the logits of every token",
            subject=f"--backend {chosen}",
            hint="leave out --backend, or choose one of them",
        )
    if chosen.backend != "onnxruntime" and bundle.manifest.pruning.stages:
        raise InputError(
            f"reads no text of its own: {bundle.manifest.pruning.pruner} drops tokens between layers, so a text is read token by token, "
            "which ONNX Runtime does",
            subject=f"--backend {chosen}",
            hint="leave out --backend",
        )


def _open_scorer(bundle: Bundle, chosen: Runtime, threads: int) -> BundleScorer:
    from gap_export.evaluation.scoring import BundleScorer

    if chosen.backend == "onnxruntime":
        return BundleScorer(bundle, threads=threads, device=chosen.device, providers=chosen.providers)
    try:
        from gap_export.evaluation.openvino_scoring import OpenVINOScorer
    except ImportError as error:
        raise MissingRequirementError(
            f"is needed for backend {chosen} and not installed",
            subject=error.name or str(error),
            hint=f"pip install '{row(chosen.backend).requirement}'",
        ) from error
    return OpenVINOScorer(bundle, chosen, threads=threads)


def _tokens_of(bundle: Bundle, content: str, subject: str, tokens: int) -> tuple[Ids, int]:
    """(ids of the text [T], how many of them are read in one call)."""
    if "\0" in content:
        raise InputError("holds null bytes, as UTF-16 does", subject=subject, hint=kinds.TEXT.hint)
    manifest = bundle.manifest
    ids = encode_prose(
        load_tokenizer(bundle.tokenizer_path), content, manifest.spec.vocabulary, subject=subject
    )
    layout, staged = manifest.cache_layout, bool(manifest.pruning.stages)
    longest = min([manifest.spec.max_positions, *(layout.capacities if layout.static else ())])
    prefilled = 0 if staged else min(tokens, longest - min(STEPS, longest // 2))
    wanted = prefilled + min(STEPS, longest - prefilled)
    if len(ids) < wanted:
        raise InputError(
            f"has {len(ids)} tokens, and {wanted} are read",
            subject=subject,
            hint="give a longer text, or fewer --tokens",
        )
    return np.array(ids[:wanted], np.int64), prefilled


def _read(scorer: Scorer, ids_T: Ids, prefilled: int, progress: Progress) -> NDArray[np.float32]:
    scorer.start(len(ids_T))
    rows = []
    for part in _calls(prefilled, len(ids_T)):
        rows.append(scorer.read(ids_T[part], part.start))
        progress.advance(part.stop - part.start)
    return np.concatenate(rows)


def _calls(prefilled: int, tokens: int) -> Iterator[slice]:
    """The tokens of every call: the first `prefilled` together, all others one by one."""
    if prefilled:
        yield slice(0, prefilled)
    yield from (slice(place, place + 1) for place in range(prefilled, tokens))


def _parts(tokens: int, prefilled: int) -> dict[str, slice]:
    parts = {"prefill": slice(0, prefilled)} if prefilled else {}
    return parts | {"steps": slice(prefilled, tokens)}


def _next(ids_T: Ids, part: slice) -> Ids:
    return ids_T[part.start + 1 : part.stop + 1]
