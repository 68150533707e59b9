"""One HTML file that can be sent to somebody: no script, nothing fetched, every image inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from gap_export import __version__
from gap_export.errors import GapExportError, MissingRequirementError
from gap_export.evaluation.plotting import svg
from gap_export.evaluation.refer.compare import Comparison, compare
from gap_export.evaluation.refer.image_source import Source
from gap_export.evaluation.report import plots
from gap_export.evaluation.report.cases import Album, ShownImage, random_cases, worst_cases
from gap_export.evaluation.report.runs import Answer, Evaluated, ReportedRuns, provenance_facts
from gap_export.precision import Thresholds

MOST_MAPS = 3
"""Images that pruners are shown on."""


@dataclass(frozen=True)
class Row:
    """One line of the headline table."""

    run: Evaluated
    against: Comparison | None


@dataclass(frozen=True)
class PrunersShown:
    """What every pruner would keep.

    Attributes:
        images: that they were asked about.
        expressions: one per image, for those that look at it.
        choices: `choices.Choices` of each.
        lacks: why there are none.
    """

    images: Sequence[ShownImage]
    expressions: Sequence[str]
    choices: Sequence[Any]
    lacks: str = ""


AskPruners = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[Any]]
"""Images and expressions -> `choices.Choices`; raises `GapExportError` where the model cannot be opened."""


def check_packages() -> None:
    """Refuse before long work where a page could not be drawn.

    Raises:
        MissingRequirementError: a package is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MissingRequirementError(
            "is needed for a page", subject=error.name or "a package", hint="pip install 'gap-export[report]'"
        ) from error


def page(
    reported: ReportedRuns,
    thresholds: Thresholds,
    source: Source | None,
    *,
    title: str,
    worst: int = 12,
    drawn: int = 12,
    pruners: AskPruners | str,
) -> str:
    """The page.

    Args:
        reported: what it is about.
        thresholds: that the subject must meet against the reference run.
        source: of images; where one is not at hand, its place says so.
        title: of the page.
        worst: how many of the worst expressions to show.
        drawn: how many drawn at random.
        pruners: asks every pruner, or says why that cannot be done.

    Raises:
        InputError: runs over different expressions.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    album = Album(source)
    rows = [
        Row(
            run,
            None
            if run is reported.reference
            else compare(reported.reference.run, run.run, thresholds, worst=worst),
        )
        for run in reported.runs
    ]
    verdict = rows[reported.chosen].against
    cases = {
        "worst": worst_cases(reported, album, () if verdict is None else verdict.worst, worst),
        "random": random_cases(reported, album, drawn),
    }
    latency, latency_caption = plots.latency_figure(reported)
    environment = Environment(
        loader=PackageLoader("gap_export.evaluation.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=title,
        version=__version__,
        reported=reported,
        rows=rows,
        verdict=verdict,
        accuracy_plot=svg(plots.accuracy_figure(reported)),
        latency_plot=svg(latency),
        latency_caption=latency_caption,
        cases=cases,
        pruners=_pruners(reported, album, pruners),
        images=album.images,
        provenance=[(run.name, provenance_facts(run)) for run in reported.runs],
    )


def _pruners(reported: ReportedRuns, album: Album, ask: AskPruners | str) -> PrunersShown:
    if isinstance(ask, str):
        return PrunersShown((), (), (), ask)
    shown: list[Answer] = []
    images: list[Image.Image] = []
    for identity in reported.reference.run.ids:
        answer = reported.subject.answers[identity]
        image = album.original(answer.image)
        if image is not None and answer.image not in [each.image for each in shown]:
            shown.append(answer)
            images.append(image)
        if len(shown) == MOST_MAPS:
            break
    if not images:
        return PrunersShown((), (), (), "no image is at hand")
    expressions = [answer.expression for answer in shown]
    try:
        found = ask(images, expressions)
    except GapExportError as error:
        return PrunersShown((), (), (), str(error))
    return PrunersShown([album.shown(answer) for answer in shown], expressions, found)
