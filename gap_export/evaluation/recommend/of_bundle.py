"""The recommendation that lies among the reports of a bundle."""

from __future__ import annotations

from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError
from gap_export.evaluation.bundle_reports import RECOMMENDATION, read_report
from gap_export.evaluation.recommend.record import Recommendation


def read_recommendation(bundle: Bundle) -> Recommendation | None:
    """What `recommend` left beside this build of a bundle; None where there is nothing, or it is of another build.

    Args:
        bundle: opened.

    Raises:
        InputError: it cannot be read, or is of several pruners, whose points are not shares of this bundle.
    """
    command = f"recommend {bundle.folder}"
    record = read_report(bundle, RECOMMENDATION, Recommendation, command=command)
    if record is not None and record.of_pruners:
        raise InputError(
            "is of several pruners, and not of the keep ratios of this bundle",
            subject=str(bundle.reports / RECOMMENDATION),
            hint=f"move it away, and run gap-export {command}",
        )
    return record
