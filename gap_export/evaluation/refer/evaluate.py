"""Referring expression comprehension on a data set, as one call: a bundle is asked, or answers from elsewhere are scored."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gap_export import bounds, families
from gap_export.boxes.codecs import box_codec
from gap_export.bundle.folder import BUNDLE, Bundle, open_bundle
from gap_export.bundle.manifest import BoxFormat
from gap_export.errors import BundleError, InputError
from gap_export.evaluation.refer.dataset import Dataset
from gap_export.evaluation.refer.evaluator import Evaluator
from gap_export.evaluation.refer.image_source import Source
from gap_export.evaluation.refer.journal import EVALUATION, Journal, Settings, open_journal
from gap_export.evaluation.refer.predictions import read_predictions
from gap_export.evaluation.refer.protocols import Protocol, protocol_of
from gap_export.evaluation.refer.results import SCORED, EvalRun, check_pyarrow, open_run, store_results
from gap_export.evaluation.refer.run import EvalRecord, Work, answer_all, record_of, score_all, work_of
from gap_export.evaluation.refer.sizes import Fitted, fitted
from gap_export.evaluation.result_folder import SETTINGS
from gap_export.files import FolderKind, FolderLock, check_folder
from gap_export.parallel.ray import Cluster
from gap_export.progress import SILENT, Progress
from gap_export.runtime.backends import open_session, row
from gap_export.runtime.keep import check_keep

ALL = "all"
"""Name of the split where none was asked for."""

_NO_NAME = re.compile(r"[^A-Za-z0-9._-]|^\.+")
_LONGEST_NAME = 120


@dataclass(frozen=True)
class EvalOptions:
    """How a bundle is asked and its answers are scored.

    Attributes:
        protocol: `unc` or `lmms-eval`; see `protocols.py`.
        backend: runtime, or `torch`.
        keep: fraction of the visual tokens to keep, in bundles that let requests choose; their default when left out.
        limit: only so many expressions, from the first on.
        rows: most expressions per call.
        share: whether prompts about one image may share their beginning; one by one otherwise, for comparison.
        threads: of ONNX Runtime and PyTorch; 0 lets them choose.
        rescale_boxes: scale true boxes where images are of another size than their annotations.
        box_format: in which answers are read, where not as the bundle says.
    """

    protocol: str = "unc"
    backend: str = "onnxruntime"
    keep: float | None = None
    limit: int | None = None
    rows: int = 8
    share: bool = True
    threads: int = 0
    rescale_boxes: bool = False
    box_format: str | None = None

    def __post_init__(self) -> None:
        bounds.check(limit=self.limit, rows=self.rows, threads=self.threads)


@dataclass(frozen=True)
class Prepared:
    """An evaluation that can be run, or resumed.

    Attributes:
        bundle: to be asked.
        dataset: about which.
        source: of its images.
        options: how.
        protocol: of the scores.
        work: expressions by image, and what is left out.
        rescaled: images whose true boxes were scaled to their size.
        stretched: those of them whose shape is another one.
        journal: answers that are there already; its folder is that of the evaluation.
        lock: of the folder, until the evaluation has run.
    """

    bundle: Bundle
    dataset: Dataset
    source: Source
    options: EvalOptions
    protocol: Protocol
    work: Work
    rescaled: tuple[str, ...]
    stretched: tuple[str, ...]
    journal: Journal
    lock: FolderLock


def evaluate(
    bundle: Bundle | Path | str,
    dataset: Dataset,
    *,
    out: Path | str | None = None,
    protocol: str = "unc",
    backend: str = "onnxruntime",
    keep: float | None = None,
    limit: int | None = None,
    rows: int = 8,
    share: bool = True,
    threads: int = 0,
    rescale_boxes: bool = False,
    box_format: str | None = None,
    replace: bool = False,
    cluster: Cluster | None = None,
    progress: Progress = SILENT,
) -> EvalRun:
    """Ask a bundle about every expression of a data set and score its boxes. Can be interrupted; the same call resumes.

    Args:
        bundle: opened, or its folder.
        dataset: opened by `open_dataset`.
        out: folder of the evaluation; beside the bundle, in `BUNDLE.runs`, when left out.
        protocol: `unc` or `lmms-eval`.
        backend: runtime, or `torch` for the model that the bundle was built from.
        keep: fraction of the visual tokens to keep, in bundles that let requests choose; their default when left out.
        limit: only so many expressions, from the first on.
        rows: most expressions per call.
        share: whether prompts about one image may share their beginning; one by one otherwise, for comparison.
        threads: of ONNX Runtime and PyTorch; 0 lets them choose.
        rescale_boxes: scale true boxes where images are of another size than their annotations; refused otherwise.
        box_format: in which answers are read, where not as the bundle says.
        replace: throw an evaluation of other settings in that folder away.
        cluster: of Ray, whose workers are asked instead.
        progress: told of every answer.

    Returns:
        The finished evaluation, as it is stored in its folder.

    Raises:
        InputError: a data set without images, images of another size than their annotations, or an option that cannot be used.
        BundleError: the folder holds something else.
        GapExportError: the bundle could not be asked. What was answered stays.
    """
    options = EvalOptions(
        protocol=protocol,
        backend=backend,
        keep=keep,
        limit=limit,
        rows=rows,
        share=share,
        threads=threads,
        rescale_boxes=rescale_boxes,
        box_format=box_format,
    )
    folder = None if out is None else Path(out)
    prepared = prepare(bundle, dataset, options, out=folder, replace=replace)
    return run(prepared, cluster=cluster, progress=progress)


def prepare(
    bundle: Bundle | Path | str,
    dataset: Dataset,
    options: EvalOptions,
    *,
    out: Path | None = None,
    replace: bool = False,
) -> Prepared:
    """Check everything that can be checked before the long part, and open the folder.

    Args:
        bundle: opened, or its folder.
        dataset: with images.
        options: how it is asked.
        out: folder of the evaluation; beside the bundle when left out.
        replace: throw an evaluation of other settings in that folder away.

    Raises:
        GapExportError: the bundle, the data set, an option or the folder cannot be used.
    """
    check_pyarrow()
    check_output(out, EVALUATION)
    row(options.backend)
    opened = open_bundle(bundle).written_as(options.box_format)
    check_keep(opened.manifest.pruning, opened.manifest.spec, options.keep)
    protocol = protocol_of(options.protocol, opened.manifest.box)
    questions = questions_of(dataset, limit=options.limit, rescale_boxes=options.rescale_boxes)
    settings = Settings(
        manifest_sha256=opened.manifest_sha256,
        annotations=dataset.identity,
        split=dataset.split or ALL,
        backend=options.backend,
        keep=options.keep,
        share=options.share,
        ignore_exif=dataset.ignore_exif,
        box_format=opened.box_format,
    )
    folder = out or opened.runs / default_name(opened, dataset, options)
    check_output(folder, EVALUATION)
    lock = FolderLock(folder)
    with lock.kept():
        journal = open_journal(folder, settings, replace=replace)
        journal.check(questions.work.expressions, opened.manifest.spec.visual_tokens)
    return Prepared(
        opened,
        dataset,
        questions.source,
        options,
        protocol,
        questions.work,
        questions.fitted.rescaled,
        questions.fitted.stretched,
        journal,
        lock,
    )


@dataclass(frozen=True)
class Questions:
    """What a data set asks.

    Attributes:
        source: of the images.
        fitted: expressions, their true boxes those of the images.
        work: expressions by image, and what is left out.
    """

    source: Source
    fitted: Fitted
    work: Work


def questions_of(dataset: Dataset, *, limit: int | None, rescale_boxes: bool) -> Questions:
    """What is asked; images are opened for their sizes alone.

    Args:
        dataset: with images.
        limit: only so many expressions, from the first on.
        rescale_boxes: scale true boxes where images are of another size than their annotations.

    Raises:
        InputError: no images, or images of another size.
    """
    if dataset.source is None:
        raise InputError(
            "brings no images", subject=dataset.name, hint="give the folder that holds them (--images)"
        )
    expressions = fitted(dataset.expressions[:limit], dataset.source, rescale=rescale_boxes)
    return Questions(dataset.source, expressions, work_of(expressions.expressions, dataset.source))


def check_output(out: Path | None, kind: FolderKind) -> None:
    """Refuse a folder that results cannot be written to, before anything else is looked at.

    Args:
        out: None where it is not given.
        kind: `EVALUATION` or `SCORED`.

    Raises:
        BundleError: it holds something else, lies in a bundle, or cannot be written.
    """
    if out is not None:
        check_folder(out, kind, replaced=False, outside=(BUNDLE,))


def run(prepared: Prepared, *, cluster: Cluster | None = None, progress: Progress = SILENT) -> EvalRun:
    """Answer what is not answered yet, score everything, and store it.

    Args:
        prepared: by `prepare`.
        cluster: of Ray; the bundle must be there under the same path.
        progress: told of every answer.

    Raises:
        GapExportError: an image cannot be read, or the runtime or the cluster failed. What was answered stays.
    """
    with prepared.lock:
        return _run(prepared, cluster, progress)


def _run(prepared: Prepared, cluster: Cluster | None, progress: Progress) -> EvalRun:
    bundle, dataset, options = prepared.bundle, prepared.dataset, prepared.options
    make = partial(make_evaluator, bundle.folder, options)
    answer_all(make, prepared.work, prepared.source, prepared.journal, cluster=cluster, progress=progress)
    scored = score_all(
        prepared.work.expressions, prepared.journal.rows, prepared.protocol, bundle.manifest.layout
    )
    record = record_of(
        scored,
        prepared.protocol,
        split=dataset.split or ALL,
        backend=options.backend,
        work=prepared.work,
        skipped_rows=len(dataset.skipped),
        rescaled_images=len(prepared.rescaled),
        stretched_images=len(prepared.stretched),
    )
    journal = prepared.journal
    store_results(record, scored, dataset, bundle.folder, journal.folder, answers=journal.digest)
    return open_run(journal.folder, options.protocol)


def default_name(bundle: Bundle, dataset: Dataset, options: EvalOptions) -> str:
    """Of the folder that results go to where none is given: data, split, position ids, backend, and what is unusual.

    Data and splits are named by whoever made them: what is no letter, digit, point, underscore or hyphen becomes a hyphen.
    """
    data = Path(dataset.data).stem
    parts = [data, dataset.split or ALL, str(bundle.manifest.pruning.positions), options.backend]
    parts += [] if options.keep is None else [f"keep{options.keep:g}"]
    parts += [] if options.share else ["one-by-one"]
    parts += ["as-stored"] if dataset.ignore_exif else []
    parts += [] if bundle.box_format is None else [f"boxes-{bundle.box_format}"]
    return _NO_NAME.sub("-", "-".join(parts))[:_LONGEST_NAME]


def make_evaluator(folder: Path, options: EvalOptions) -> Evaluator:
    """Open a bundle to be asked, in this process or in a worker's."""
    bundle = open_bundle(folder)
    session = open_session(bundle, options.backend, threads=options.threads)
    return Evaluator(bundle, session, keep=options.keep, share=options.share, rows=options.rows)


def evaluate_predictions(
    predictions: Path | str,
    dataset: Dataset,
    family: str | None = None,
    *,
    protocol: str = "unc",
    limit: int | None = None,
    rescale_boxes: bool = False,
    box_format: str | None = None,
    out: Path | str | None = None,
) -> EvalRecord:
    """Score answers from a file, without a model.

    Args:
        predictions: JSON lines of `{id, answer}`; ids are those of the annotations.
        dataset: images are needed only where the annotations do not tell how large they are; those that are there are compared
            with the annotations.
        family: whose way to write boxes the answers have; may be left out with `box_format`.
        protocol: `unc` or `lmms-eval`.
        limit: only so many expressions, from the first on; each needs an answer.
        rescale_boxes: scale true boxes where images are of another size than their annotations; refused otherwise.
        box_format: name of the box codec that answers are written in, where it is not the family's; the frame is the family's, or without one
            the codec's own.
        out: folder to store results in; nothing is stored when left out.

    Raises:
        InputError: an unknown family, protocol or box format, a line that cannot be used, an expression without an answer.
        BundleError: something else lies in `out`.
    """
    check_pyarrow()
    check_output(None if out is None else Path(out), SCORED)
    if out is not None and os.path.lexists(Path(out) / SETTINGS):
        raise BundleError(
            "holds the evaluation of a model",
            subject=str(out),
            hint="choose another output folder: results of a model and of a file do not mix",
        )
    scoring = protocol_of(protocol, _box_of(family, box_format))
    asked = dataset.expressions[:limit]
    sized = Fitted(asked, ())
    if dataset.source is not None:
        work_of(asked, dataset.source)  # refuses a folder that holds none of the images
        sized = fitted(asked, dataset.source, rescale=rescale_boxes)
    left_out = [each.id for each in dataset.expressions[len(asked) :]]
    left_out += [identity for row in dataset.skipped for identity in row.ids]
    answers = read_predictions(Path(predictions), sized.expressions, dataset.source, not_asked=left_out)
    scored = score_all(sized.expressions, answers, scoring)
    record = record_of(
        scored,
        scoring,
        split=dataset.split or ALL,
        backend="predictions",
        skipped_rows=len(dataset.skipped),
        rescaled_images=len(sized.rescaled),
        stretched_images=len(sized.stretched),
    )
    if out is not None:
        with FolderLock(Path(out)):
            check_output(Path(out), SCORED)
            store_results(record, scored, dataset, None, Path(out))
    return record


def _box_of(family: str | None, box_format: str | None) -> BoxFormat:
    """How boxes are written in answers from a file.

    Raises:
        InputError: neither is given, or one is unknown.
    """
    if box_format is not None and not family:
        codec = box_codec(box_format)
        return BoxFormat(codec=codec.name, frame=codec.frame)
    if not family or family not in families.names():
        raise InputError(
            "is not a family" if family else "is not given, and answers alone do not tell it",
            subject=f"family {family!r}" if family else "--family",
            hint=f"say whose way to write boxes the answers have: {', '.join(families.names())}; or how they are written, with --box-format",
        )
    return families.row(family).box.written_as(box_format)
