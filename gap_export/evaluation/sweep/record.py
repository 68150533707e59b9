"""The record of a sweep: what is stored, what it says about GAP, and its tables for the screen and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from gap_export.boxes import metrics
from gap_export.positions import PositionPolicy
from gap_export.records import Record

if TYPE_CHECKING:
    from rich.table import Table

THRESHOLD = 0.5
"""An answer is a hit from this IoU on (`>=`), as in `validate`."""

_COMPARED = ("gap - shifted (95 %)", "gap beats shifted")

FULL: Literal["full"] = "full"
Positions = PositionPolicy | Literal["full"]
"""A policy, or `full`: nothing pruned, so that every policy gives the same ids."""


class Settings(Record):
    """All that the answers of a cell depend on besides the cell itself. A folder holds the cells of one such.

    Attributes:
        schema_version: of the files in the folder.
        recipe: the recipe but for what is swept (pruner, keep, positions) and what follows from it (capacity).
        checkpoint_sha256: over all files of the checkpoint that a build reads.
        text_tower_sha256: the same of the text tower's, where a strategy looks at the expression.
        backend: runtime.
        cases: scenes per cell.
        scenes_seed: which scenes.
        batch: images per call.
        threads: of ONNX Runtime.
        versions: package -> version.
    """

    schema_version: int = 1
    recipe: dict[str, Any]
    checkpoint_sha256: str
    text_tower_sha256: str | None = None
    backend: str
    cases: int
    scenes_seed: int
    batch: int
    threads: int
    versions: dict[str, str]


class Cell(Record):
    """One strategy, one count, one policy.

    Attributes:
        pruner: strategy.
        keep: fraction of visual tokens kept.
        kept: the count.
        positions: numbering policy.
    """

    pruner: str
    keep: float
    kept: int
    positions: Positions

    @property
    def name(self) -> str:
        """What its file is called."""
        return f"{self.pruner}-{self.kept}-{self.positions}"

    @property
    def label(self) -> str:
        """What it is, in words."""
        return f"{self.pruner}, keep {self.kept}, {self.positions}"


class Answers(Record):
    """What came out of one cell, scene by scene.

    Attributes:
        texts: as generated.
        ious: with the true box; 0 without a box.
        without_box: answers that hold no box, or one beside the image.
        cut_off: answers that did not end by themselves.
    """

    texts: tuple[str, ...]
    ious: tuple[float, ...]
    without_box: int
    cut_off: int

    @property
    def hits(self) -> list[bool]:
        """Which scenes were hit."""
        return [overlap >= THRESHOLD for overlap in self.ious]


class Row(Cell):
    """One cell, measured.

    Attributes:
        visual_tokens: before pruning.
        accuracy: accuracy@0.5 of the exported graphs.
        standard_error: of the accuracy.
        low: lower end of its 95% interval (Wilson's).
        high: upper end.
        mean_iou: with the true boxes.
        without_box: see `Answers`.
        cut_off: see `Answers`.
        cases: how many scenes.
    """

    visual_tokens: int
    accuracy: float
    standard_error: float
    low: float
    high: float
    mean_iou: float
    without_box: int
    cut_off: int
    cases: int


class Skipped(Cell):
    """A cell that cannot be, and why."""

    reason: str


class Comparison(Record):
    """GAP against renumbered ids: same strategy, same tokens, same scenes.

    Attributes:
        pruner: strategy.
        keep: fraction of visual tokens kept.
        kept: the count.
        difference: accuracy of GAP minus accuracy of shifted.
        low: lower end of the 95% interval of the paired difference.
        high: upper end.
        gained: scenes that only GAP hits.
        lost: scenes that only shifted hits.
        beats: whether the whole interval lies above 0.
    """

    pruner: str
    keep: float
    kept: int
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    beats: bool


class SweepRecord(Record):
    """One sweep. It holds nothing that differs between two runs of the same command on the same machine.

    Attributes:
        model: name of the recipe.
        visual_tokens: before pruning.
        full: accuracy with nothing pruned.
        rows: measured cells; the first is the unpruned one.
        gap_against_shifted: where both were measured.
        gap_does_not_beat_shifted: those of them whose interval does not lie above 0.
        skipped: cells that cannot be.
        settings: what all cells have in common.
    """

    model: str
    visual_tokens: int
    full: float
    rows: tuple[Row, ...]
    gap_against_shifted: tuple[Comparison, ...]
    gap_does_not_beat_shifted: tuple[Comparison, ...]
    skipped: tuple[Skipped, ...]
    settings: Settings


def record_from_answers(
    model: str,
    visual_tokens: int,
    measured: Sequence[tuple[Cell, Answers]],
    skipped: Sequence[Skipped],
    settings: Settings,
) -> SweepRecord:
    """Put a record together.

    Args:
        model: name of the recipe.
        visual_tokens: before pruning.
        measured: cells and their answers in the order of the table, the unpruned one first.
        skipped: cells that cannot be.
        settings: of the sweep.
    """
    rows = tuple(_row(cell, answers, visual_tokens) for cell, answers in measured)
    gap, shifted = (
        {(cell.pruner, cell.kept): (cell, answers) for cell, answers in measured if cell.positions == policy}
        for policy in (PositionPolicy.GAP, PositionPolicy.SHIFTED)
    )
    comparisons = tuple(_comparison(*gap[key], shifted[key][1]) for key in gap if key in shifted)
    return SweepRecord(
        model=model,
        visual_tokens=visual_tokens,
        full=rows[0].accuracy,
        rows=rows,
        gap_against_shifted=comparisons,
        gap_does_not_beat_shifted=tuple(each for each in comparisons if not each.beats),
        skipped=tuple(skipped),
        settings=settings,
    )


def tables(record: SweepRecord) -> list[Table]:
    """Accuracy of every cell, one line per strategy and count; then what was skipped, where anything was."""
    from rich.table import Table

    policies = list(dict.fromkeys(row.positions for row in record.rows[1:]))
    compared = {(each.pruner, each.kept): each for each in record.gap_against_shifted}
    found = {(row.pruner, row.kept, row.positions): row for row in record.rows}
    lines = list(dict.fromkeys((row.pruner, row.kept) for row in record.rows[1:]))
    cells = Table("pruner", "keep", *policies, *(_COMPARED if compared else ()))
    cells.title = (
        f"accuracy@0.5 of {record.model} in {record.settings.backend}, {record.settings.cases} held-out scenes; "
        f"unpruned: {record.full:.3f}"
    )
    for pruner, kept in lines:
        measured = [found.get((pruner, kept, policy)) for policy in policies]
        cells.add_row(
            pruner,
            f"{kept} of {record.visual_tokens}",
            *("-" if row is None else f"{row.accuracy:.3f}" for row in measured),
            *(_compared(compared.get((pruner, kept))) if compared else ()),
        )
    if not record.skipped:
        return [cells]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for each in record.skipped:
        key = (each.pruner, f"{each.kept} of {record.visual_tokens}", each.reason)
        reasons.setdefault(key, []).append(each.positions)
    skipped = Table("skipped", "keep", "positions", "why")
    for (pruner, count, reason), positions in reasons.items():
        skipped.add_row(pruner, count, ", ".join(positions), reason)
    return [cells, skipped]


def verdict(record: SweepRecord) -> str:
    """Whether GAP beats renumbered ids, and where it does not."""
    compared, missed = len(record.gap_against_shifted), record.gap_does_not_beat_shifted
    if not compared:
        return "gap and shifted were not both measured anywhere"
    won = (
        f"gap beats shifted in {compared - len(missed)} of {compared} cells "
        "(95 % interval of the paired difference above 0)"
    )
    if not missed:
        return won
    places = (
        f"{each.pruner} at {each.kept} of {record.visual_tokens} ({each.difference:+.3f}, {each.low:+.3f} to {each.high:+.3f})"
        for each in missed
    )
    return f"{won}; not in: {', '.join(places)}"


def page(record: SweepRecord, plot: str | None) -> str:
    """The record as Markdown.

    Args:
        record: of a sweep.
        plot: file name of the plot, beside the page.
    """
    from io import StringIO

    from rich import box
    from rich.console import Console

    text = StringIO()
    console = Console(file=text, width=1000)
    console.print(f"# Sweep of {record.model}\n\n{verdict(record)}", highlight=False)
    if plot:
        console.print(f"\n![accuracy against the number of visual tokens]({plot})", markup=False)
    for table in tables(record):
        title, table.title, table.box = table.title, None, box.MARKDOWN
        console.print(*([f"\n{title}"] if title else []), table, sep="\n")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _row(cell: Cell, answers: Answers, visual_tokens: int) -> Row:
    accuracy = metrics.accuracy(answers.ious, comparator=">=", threshold=THRESHOLD)
    low, high = accuracy.interval()
    return Row(
        **cell.model_dump(),
        visual_tokens=visual_tokens,
        accuracy=accuracy.value,
        standard_error=accuracy.standard_error,
        low=low,
        high=high,
        mean_iou=metrics.mean_iou(answers.ious).value,
        without_box=answers.without_box,
        cut_off=answers.cut_off,
        cases=accuracy.count,
    )


def _comparison(cell: Cell, gap: Answers, shifted: Answers) -> Comparison:
    paired = metrics.paired_difference(gap.hits, shifted.hits)
    return Comparison(
        pruner=cell.pruner,
        keep=cell.keep,
        kept=cell.kept,
        difference=paired.value,
        low=paired.low,
        high=paired.high,
        gained=paired.gained,
        lost=paired.lost,
        beats=paired.low > 0,
    )


def _compared(each: Comparison | None) -> tuple[str, str]:
    if each is None:
        return "-", "-"
    return f"{each.difference:+.3f} ({each.low:+.3f} to {each.high:+.3f})", "yes" if each.beats else "no"
