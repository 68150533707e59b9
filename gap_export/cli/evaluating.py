"""`gap-export eval`: referring expression comprehension on a data set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export.cli.app import cluster_of, console, out, print_json
from gap_export.cli.options import (
    AnyBackendOption,
    JsonOption,
    KeepOption,
    RayAddressOption,
    RayOption,
    ThreadsOption,
)
from gap_export.cli.progress import progress_shown

if TYPE_CHECKING:
    from gap_export.evaluation.refer.answering import Evaluator
    from gap_export.evaluation.refer.dataset import Dataset
    from gap_export.evaluation.refer.provenance import Provenance
    from gap_export.evaluation.refer.run import EvalRecord, Scored, Work
    from gap_export.parallel.ray import Cluster

RESULTS, RECORD = "results.parquet", "eval.json"
_SHOWN = 5


def evaluate(
    data: Annotated[
        str,
        typer.Option(
            help="Annotations: a file or folder; or scenes, scenes:7 (with seven expressions each)."
        ),
    ],
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder; none with --predictions.")] = None,
    split: Annotated[
        str | None, typer.Option(help="For example val or testA, where the data set has several.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    protocol: Annotated[str, typer.Option(help="unc or lmms-eval: how answers are scored.")] = "unc",
    backend: AnyBackendOption = "onnxruntime",
    keep: KeepOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N expressions.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Maximum number of expressions per call.")] = 8,
    one_by_one: Annotated[
        bool, typer.Option(help="Run every prompt separately and in full; for comparison.")
    ] = False,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Score answers from a file (JSON lines of id, answer) instead of a model's."),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            help="With --predictions: family whose box format the answers have; see `gap-export models`."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the results; in the bundle by default.")
    ] = None,
    replace: Annotated[
        bool, typer.Option(help="Discard an evaluation with other settings in the output folder.")
    ] = False,
    ray: RayOption = False,
    workers: Annotated[int, typer.Option(min=1, help="With --ray: workers of the cluster.")] = 2,
    ray_address: RayAddressOption = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Referring expression comprehension on a data set. Can be interrupted; rerun the same command to resume."""
    from gap_export.errors import InputError
    from gap_export.evaluation.refer import tables
    from gap_export.evaluation.refer.dataset import open_dataset
    from gap_export.evaluation.refer.provenance import provenance_of

    if (bundle is None) == (predictions is None):
        raise InputError(
            "give one of them",
            subject="a bundle, or --predictions",
            hint="gap-export eval BUNDLE --data ..., or gap-export eval --predictions FILE --family llava --data ...",
        )
    tables.check_pyarrow()
    dataset = open_dataset(data, split=split, images=images)
    if predictions is not None:
        record, scored = _of_predictions(predictions, family, dataset, split, protocol, limit)
        folder = output
    else:
        assert bundle is not None
        cluster = cluster_of(ray, workers, ray_address)
        options = EvalOptions(
            split or "all", protocol, backend, keep, limit, rows, not one_by_one, threads, cluster
        )
        record, scored, folder = evaluate_bundle(bundle, dataset, options, output, replace)
    if folder is not None:
        store(record, scored, provenance_of(bundle, data, split, images), folder)
    if as_json:
        print_json(record.model_dump())
    else:
        _print(record, dataset, folder)


def store(record: EvalRecord, scored: list[Scored], provenance: Provenance, folder: Path) -> None:
    """Write results, where they are from, and the record, which comes last: where it is, all is."""
    from gap_export.evaluation.refer import tables
    from gap_export.evaluation.refer.provenance import write_provenance

    folder.mkdir(parents=True, exist_ok=True)
    write_provenance(provenance, folder)
    tables.write_results(scored, folder / f"{record.protocol}-{RESULTS}")
    record.write(folder / f"{record.protocol}-{RECORD}")


def _of_predictions(
    predictions: Path,
    family: str | None,
    dataset: Dataset,
    split: str | None,
    protocol: str,
    limit: int | None,
) -> tuple[EvalRecord, list[Scored]]:
    from gap_export import families
    from gap_export.errors import InputError
    from gap_export.evaluation.refer import tables
    from gap_export.evaluation.refer.protocols import protocol_of
    from gap_export.evaluation.refer.run import record_of, score_all

    if family not in families.names():
        raise InputError(
            "is not a known family",
            subject=f"--family {family}",
            hint=f"name the family whose box format the answers have: {', '.join(families.names())}",
        )
    scoring = protocol_of(protocol, families.row(family).box)
    expressions = dataset.expressions[:limit]
    answers = tables.read_predictions(predictions, expressions, dataset.source)
    scored = score_all(expressions, answers, scoring)
    return record_of(scored, scoring, split=split or "all", backend="predictions"), scored


@dataclass(frozen=True)
class EvalOptions:
    """How a bundle is to answer: the command's options of the same names."""

    split: str
    protocol: str
    backend: str
    keep: float | None
    limit: int | None
    rows: int
    share: bool
    threads: int
    cluster: Cluster | None = None

    def name(self, data: str) -> str:
        """Of the folder that results go to by default."""
        parts = [Path(data.split(" ")[0]).stem.replace(":", "-"), self.split, self.backend]
        parts += [] if self.keep is None else [f"keep{self.keep:g}"]
        parts += [] if self.share else ["one-by-one"]
        return "-".join(parts)


def evaluate_bundle(
    folder: Path, dataset: Dataset, options: EvalOptions, output: Path | None, replace: bool
) -> tuple[EvalRecord, list[Scored], Path]:
    """Answer what is not answered yet, and score.

    Args:
        folder: the bundle.
        dataset: opened.
        options: how the bundle is to answer.
        output: folder of the results; in the bundle by default.
        replace: throw an evaluation of other settings away.

    Returns:
        (record, scores, folder of the results).
    """
    from gap_export.bundle.folder import MANIFEST, open_bundle
    from gap_export.errors import InputError
    from gap_export.evaluation.refer.journal import Settings, open_journal
    from gap_export.evaluation.refer.protocols import protocol_of
    from gap_export.evaluation.refer.run import answer_all, record_of, score_all, work_of
    from gap_export.files import record_of as file_record
    from gap_export.runtime.backends import row

    row(options.backend)  # before anything is written
    opened = open_bundle(folder)
    scoring = protocol_of(options.protocol, opened.manifest.box)
    if dataset.source is None:
        raise InputError(
            "brings no images", subject=dataset.name, hint="give the folder that holds them (--images)"
        )
    work = work_of(dataset.expressions, dataset.source, limit=options.limit)
    _warn_of_missing(work)
    settings = Settings(
        bundle=file_record(folder / MANIFEST).sha256,
        annotations=dataset.identity,
        split=options.split,
        backend=options.backend,
        keep=options.keep,
        share=options.share,
    )
    target = output or opened.reports / "eval" / options.name(dataset.name)
    journal = open_journal(target, settings, replace=replace)
    with progress_shown() as progress:
        make = partial(make_evaluator, folder, options)
        answer_all(make, work, dataset.source, journal, cluster=options.cluster, progress=progress)
    scored = score_all(work.expressions, journal.rows, scoring, opened.manifest.layout)
    record = record_of(scored, scoring, split=options.split, backend=options.backend, work=work)
    return record, scored, target


def make_evaluator(folder: Path, options: EvalOptions) -> Evaluator:
    """Open a bundle to be asked, in this process or in a worker's."""
    from gap_export.bundle.folder import open_bundle
    from gap_export.evaluation.refer.answering import Evaluator
    from gap_export.runtime.backends import open_session

    bundle = open_bundle(folder)
    session = open_session(bundle, options.backend, threads=options.threads)
    return Evaluator(bundle, session, keep=options.keep, share=options.share, rows=options.rows)


def _warn_of_missing(work: Work) -> None:
    if not work.missing:
        return
    named = ", ".join(work.missing[:_SHOWN]) + (" ..." if len(work.missing) > _SHOWN else "")
    console.print(
        f"[yellow]{len(work.missing)} images are not there[/], so {len(work.not_asked)} expressions are neither asked nor "
        f"scored: {named}",
        highlight=False,
        soft_wrap=True,
    )


def _print(record: EvalRecord, dataset: Dataset, folder: Path | None) -> None:
    from rich.table import Table

    table = Table(title=f"{dataset.name}, {record.split}: {record.words}")
    for name in (
        "accuracy",
        "95 % interval",
        "mean IoU",
        "expressions",
        "images",
        "without a box",
        "not scored",
        "backend",
    ):
        table.add_column(name)
    table.add_row(
        f"{100 * record.accuracy:.2f}",
        f"{100 * record.low:.2f} to {100 * record.high:.2f}",
        f"{record.mean_iou:.4f}",
        str(record.expressions),
        str(record.images),
        str(record.unparsable),
        str(record.not_scored),
        record.backend,
    )
    out.print(table)
    if folder is not None:
        out.print(f"  results in {folder}", highlight=False, soft_wrap=True)
