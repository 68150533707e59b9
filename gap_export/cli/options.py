"""Options and arguments that several commands share: one name, one meaning, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gap_export.runtime.backends import names

BundleArgument = Annotated[Path, typer.Argument(help="Bundle folder made by `gap-export build`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the record alone, as one line of JSON.")]
BackendOption = Annotated[
    str, typer.Option(metavar=f"[{'|'.join(names(exported=True))}]", help="Runtime that runs the bundle.")
]
AnyBackendOption = Annotated[
    str,
    typer.Option(
        metavar=f"[{'|'.join(names())}]", help="Runtime that runs the bundle; torch runs its checkpoint."
    ),
]
KeepOption = Annotated[
    float | None,
    typer.Option(
        help="Fraction of visual tokens to keep, in bundles built with a range; by default the bundle's own."
    ),
]
LimitOption = Annotated[int, typer.Option(min=1, help="Number of held-out scenes.")]
RayOption = Annotated[bool, typer.Option("--ray", help="Dispatch the work to the workers of a Ray cluster.")]
RayAddressOption = Annotated[
    str | None,
    typer.Option(help="With --ray: address of a running cluster; by default one is started on this machine."),
]
ThreadsOption = Annotated[int, typer.Option(min=0, help="ONNX Runtime threads; 0 lets it choose.")]
