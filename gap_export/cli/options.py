"""Options and arguments that several commands share: one name, one meaning, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gap_export import bounds
from gap_export.cli.app import console
from gap_export.cli.numbers import number
from gap_export.errors import SessionError
from gap_export.runtime.backends import names, runtime

AUTO = "auto"
"""The fastest runtime that was measured."""

BundleArgument = Annotated[Path, typer.Argument(help="Bundle folder made by `gap-export build`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the record alone, as one line of JSON.")]
BackendOption = Annotated[
    str,
    typer.Option(
        metavar=f"[{'|'.join([*names(exported=True), AUTO])}]",
        help="Runtime that runs the bundle; auto is the fastest that `bench` measured.",
    ),
]
AnyBackendOption = Annotated[
    str,
    typer.Option(
        metavar=f"[{'|'.join([*names(), AUTO])}]",
        help="Runtime that runs the bundle; torch runs its checkpoint, auto is the fastest that `bench` measured.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="What the runtime runs on: cpu, cuda, cuda:1, gpu, npu; by default its first."),
]
ProviderOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[{KEY: VALUE}]",
        help="Execution provider of ONNX Runtime, by its name or a plug-in's package; repeat it for several, the first that has a kernel first.",
    ),
]
PrecisionHintOption = Annotated[
    str | None,
    typer.Option(help="Type of activations, where the runtime has a choice: f32, bf16, f16 (openvino)."),
]
BoxFormatOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How boxes are written in answers, see `gap-export models`; by default as the bundle or its family has it.",
    ),
]
KeepOption = Annotated[
    float | None,
    typer.Option(
        **number(bounds.FRACTION),
        help="Fraction of visual tokens to keep, in bundles built with a range; by default the bundle's own.",
    ),
]
LimitOption = Annotated[int, typer.Option(**number(bounds.COUNT), help="Number of held-out scenes.")]
RayOption = Annotated[bool, typer.Option("--ray", help="Dispatch the work to the workers of a Ray cluster.")]
RayAddressOption = Annotated[
    str | None,
    typer.Option(help="With --ray: address of a running cluster; by default one is started on this machine."),
]
ThreadsOption = Annotated[
    int, typer.Option(**number(bounds.THREADS), help="Threads of the runtime; 0 lets it choose.")
]
ExpressionLimitOption = Annotated[
    int | None, typer.Option("--limit", **number(bounds.COUNT), help="Use only the first N expressions.")
]
DataOption = Annotated[
    str,
    typer.Option(
        help="Annotations: a file or folder; or scenes, scenes:7 (with seven expressions each).",
    ),
]
SplitOption = Annotated[
    str | None, typer.Option(help="For example val or testA, where the data set has several.")
]
ImagesOption = Annotated[Path | None, typer.Option(help="Folder of the images.")]
RescaleBoxesOption = Annotated[
    bool,
    typer.Option(
        "--rescale-boxes", help="Scale true boxes to images whose size is not that of their annotations."
    ),
]
IgnoreExifOption = Annotated[
    bool,
    typer.Option(
        "--ignore-exif", help="Take images as they are stored, without the turn that their EXIF data ask for."
    ),
]
SkipBadRowsOption = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out annotations that cannot be used; list them.")
]
ProtocolOption = Annotated[str, typer.Option(help="unc or lmms-eval: how answers are scored.")]
ReplaceOption = Annotated[
    bool, typer.Option(help="Discard an evaluation with other settings in the output folder.")
]

# Where they are left out: the recipe's where a bundle is compared with PyTorch, otherwise those of NVIDIA's grounding checks.
AccuracyDropOption = Annotated[
    float | None,
    typer.Option(
        **number(bounds.SHARE), help="Largest loss of accuracy; the recipe's against PyTorch, else 0.05."
    ),
]
AgreementOption = Annotated[
    float | None,
    typer.Option(
        **number(bounds.SHARE),
        help="Smallest fraction of expressions whose two boxes have an IoU of at least 0.5; 0.95 by default.",
    ),
]
BoxIouOption = Annotated[
    float | None,
    typer.Option(
        **number(bounds.SHARE),
        help="Smallest mean IoU of the two boxes; the recipe's against PyTorch, else 0.90.",
    ),
]


def runtime_of(
    backend: str,
    device: str | None,
    precision_hint: str | None,
    provider: list[str] | None,
    bundle: Path | None = None,
) -> str:
    """What runs the bundle, as one text.

    Args:
        backend: as given; `auto` for the fastest that was measured, which is said.
        device: as given.
        precision_hint: as given.
        provider: as given.
        bundle: that `auto` is about; None where there is none yet.

    Raises:
        SessionError: the options do not go together.
        GapExportError: the bundle, or what was measured of it, cannot be read.
    """
    if backend != AUTO:
        return str(runtime(backend, device=device, precision_hint=precision_hint, providers=provider or ()))
    if device or precision_hint or provider or bundle is None:
        raise SessionError(
            "chooses device, type of activations and provider too"
            if bundle is not None
            else "needs a bundle that was measured",
            subject="--backend auto",
            hint="leave out --device, --precision-hint and --provider"
            if bundle is not None
            else "name a backend",
        )
    from gap_export.evaluation.latency.fastest import fastest_backend

    chosen = fastest_backend(bundle)
    console.say(f"backend {chosen.backend}: {chosen.reason}")
    return chosen.backend
