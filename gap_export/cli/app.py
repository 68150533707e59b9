"""The application that commands belong to, the two streams they write to, and what several of them share."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from gap_export.evaluation.refer.dataset import Dataset
    from gap_export.parallel.ray import Cluster

app = typer.Typer(
    name="gap-export",
    help="Export pruned multimodal LLMs to ONNX and TensorRT with their position ids intact.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Without emoji: `scenes:x` is a name, and no cross.
console = Console(stderr=True, emoji=False)
"""Messages go to standard error; standard output carries results."""
out = Console(width=None if sys.stdout.isatty() else 140, emoji=False)


def plain(text: str) -> str:
    """Square brackets in paths and node names are not markup, and half a character (a lone surrogate) is written as an escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("[", r"\[")


def print_json(record: dict[str, Any]) -> None:
    """The record alone, as one line."""
    print(json.dumps(record, allow_nan=False))


def list_skipped(dataset: Dataset) -> None:
    """Say which rows of annotations were left out, and why each."""
    if dataset.skipped:
        console.print(f"[yellow]{len(dataset.skipped)} rows were skipped[/]:", highlight=False)
    for row in dataset.skipped:
        console.print(f"  {plain(row.where)}: {plain(row.why)}", highlight=False, soft_wrap=True)


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
