"""The application that commands belong to, the two streams they write to, and what several of them share."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

from gap_export.terminal import Terminal

if TYPE_CHECKING:
    from gap_export.evaluation.refer.dataset import Dataset
    from gap_export.evaluation.refer.run import Work
    from gap_export.parallel.ray import Cluster

app = typer.Typer(
    name="gap-export",
    help="Export pruned multimodal LLMs to ONNX and TensorRT with their position ids intact.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

console = Terminal(stderr=True)
"""Messages go to standard error; standard output carries results."""
out = Terminal(width=None if sys.stdout is not None and sys.stdout.isatty() else 140)

_SHOWN = 5
"""Names of images that are not there."""


def print_json(record: dict[str, Any]) -> None:
    """The record alone, as one line."""
    out.write_line(json.dumps(record, allow_nan=False))


def list_skipped(dataset: Dataset) -> None:
    """Say which rows of annotations were left out, and why each."""
    if dataset.skipped:
        console.say((f"{len(dataset.skipped)} rows were skipped", "yellow"), ":")
    for row in dataset.skipped:
        console.say(f"  {row.where}: {row.why}")


def warn_of_missing(work: Work) -> None:
    """Say which images are not there, and how many expressions are left out with them."""
    if not work.missing:
        return
    named = ", ".join(work.missing[:_SHOWN]) + (" ..." if len(work.missing) > _SHOWN else "")
    console.say(
        (f"{len(work.missing)} images are not there", "yellow"),
        f", so {len(work.not_asked)} expressions are neither asked nor scored: {named}",
    )


def cluster_of(ray: bool, workers: int, ray_address: str | None) -> Cluster | None:
    """Where `--ray` says that work is done; None for this machine without Ray.

    Raises:
        InputError: an address without `--ray`.
    """
    from gap_export.errors import InputError
    from gap_export.parallel.ray import Cluster

    if ray_address is not None and not ray:
        raise InputError("is of a Ray cluster", subject=f"--ray-address {ray_address}", hint="add --ray")
    return Cluster(workers, ray_address) if ray else None
