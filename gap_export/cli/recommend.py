"""`gap-export recommend`: the smallest keep ratio of a bundle within the accuracy tolerance, or the fastest pruner and keep ratio of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export import bounds
from gap_export.cli.app import console, list_skipped, out, print_json, warn_of_missing
from gap_export.cli.numbers import number
from gap_export.cli.options import (
    BackendOption,
    DataOption,
    DeviceOption,
    ExpressionLimitOption,
    IgnoreExifOption,
    ImagesOption,
    JsonOption,
    PrecisionHintOption,
    ProtocolOption,
    ProviderOption,
    RescaleBoxesOption,
    SkipBadRowsOption,
    SplitOption,
    ThreadsOption,
    runtime_of,
)
from gap_export.cli.progress import progress_shown

if TYPE_CHECKING:
    from gap_export.evaluation.recommend.record import LeftOut, Recommendation
    from gap_export.evaluation.recommend.request import Place
    from gap_export.evaluation.recommend.run import Prepared
    from gap_export.evaluation.refer.results import EvalRun


def recommend(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle folder, built with a range; or none, with --pruners.")
    ] = None,
    data: DataOption = "scenes:7",
    max_accuracy_drop: Annotated[
        float,
        typer.Option(
            **number(bounds.SHARE),
            help="Accuracy tolerance: the whole 95 % interval of the loss must lie within it.",
        ),
    ] = 0.02,
    keep: Annotated[
        str,
        typer.Option(
            help="Fractions to try, separated by commas; losses are relative to the largest, or to the unpruned model (--pruners)."
        ),
    ] = "1.0,0.5,0.35,0.25,0.15,0.1",
    pruners: Annotated[
        str | None,
        typer.Option(
            help="Try pruners as well, separated by commas; all is every one of `gap-export models`. Needs --model and -o."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="With --pruners: recipe name, recipe file, checkpoint folder or hub id."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="With --pruners: folder of the results; finished points in it are kept."
        ),
    ] = None,
    split: SplitOption = None,
    images: ImagesOption = None,
    rescale_boxes: RescaleBoxesOption = False,
    ignore_exif: IgnoreExifOption = False,
    skip_bad_rows: SkipBadRowsOption = False,
    protocol: ProtocolOption = "unc",
    limit: ExpressionLimitOption = None,
    requests: Annotated[
        int, typer.Option(**number(bounds.REQUESTS), help="Requests measured per fraction.")
    ] = 30,
    backend: BackendOption = "onnxruntime",
    device: DeviceOption = None,
    precision_hint: PrecisionHintOption = None,
    provider: ProviderOption = None,
    threads: ThreadsOption = 0,
    plot: Annotated[
        bool | None,
        typer.Option(
            help="With --pruners: draw recommend.png (needs matplotlib).", show_default="plot, with --pruners"
        ),
    ] = None,
    replace: Annotated[
        bool,
        typer.Option(
            help="Discard evaluations of the bundle with other settings; with --pruners, the whole recommendation with other settings in the output folder."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """The smallest keep ratio within the accuracy tolerance, and its speedup; with --pruners, the fastest pruner and keep ratio. Exit 1 when there is none."""
    _check_form(bundle, pruners, model, output, plot)
    from gap_export.evaluation.recommend.show import tables, verdict
    from gap_export.evaluation.refer.dataset import open_dataset

    dataset = open_dataset(
        data, split=split, images=images, ignore_exif=ignore_exif, skip_bad_rows=skip_bad_rows
    )
    list_skipped(dataset)
    keeps = bounds.several(keep, bounds.FRACTION, "--keep")
    runtime = runtime_of(backend, device, precision_hint, provider, bundle)
    if bundle is not None:
        from gap_export.evaluation.recommend.bundle import recommend as recommended
        from gap_export.evaluation.refer.run import work_of

        if dataset.source is not None:
            warn_of_missing(work_of(dataset.expressions[:limit], dataset.source))
        with progress_shown() as progress:
            result = recommended(
                bundle,
                dataset,
                keeps=keeps,
                max_accuracy_drop=max_accuracy_drop,
                protocol=protocol,
                limit=limit,
                requests=requests,
                backend=runtime,
                threads=threads,
                rescale_boxes=rescale_boxes,
                replace=replace,
                progress=progress,
            )
    else:
        assert pruners is not None
        assert model is not None
        assert output is not None
        from gap_export.environment import check_build_extra

        check_build_extra("gap-export recommend --pruners")
        from gap_export.evaluation.recommend.request import PrunerRequest
        from gap_export.evaluation.recommend.run import prepare
        from gap_export.evaluation.sweep.request import pruners_from
        from gap_export.recipe.recipe import load_recipe

        request = PrunerRequest(
            recipe=load_recipe(model),
            pruners=pruners_from(pruners),
            keeps=tuple(keeps),
            backend=runtime,
            protocol=protocol,
            limit=limit,
            requests=requests,
            threads=threads,
            rescale_boxes=rescale_boxes,
        )
        plot = plot is not False
        prepared = prepare(request, dataset, output, replace=replace, plot=plot)
        warn_of_missing(prepared.work)
        result = _run(prepared, max_accuracy_drop, plot)
    if as_json:
        print_json(result.model_dump())
    else:
        for table in tables(result):
            out.print(table)
        if result.of_pruners or result.choice is None:
            out.say(verdict(result))
        _say_where(bundle, output)
    raise typer.Exit(0 if result.choice is not None else 1)


def _check_form(
    bundle: Path | None, pruners: str | None, model: str | None, output: Path | None, plot: bool | None
) -> None:
    """Refuse options of one form in the other: a bundle by itself, or pruners with a model and a folder.

    Raises:
        InputError: names the first that is missing or has no place.
    """
    from gap_export.errors import InputError

    two_forms = "gap-export recommend BUNDLE, or gap-export recommend --pruners all --model NAME -o FOLDER"
    if bundle is None and pruners is None:
        given = "--model" if model is not None else "-o" if output is not None else None
        fault = "give one of them" if given is None else f"give one of them: {given} alone is neither"
        raise InputError(fault, subject="a bundle, or --pruners", hint=two_forms)
    options = {"--pruners": pruners, "--model": model, "--output": output}
    for name, value in options.items():
        if bundle is not None and value is not None:
            raise InputError(
                f"has no place beside the bundle {bundle}", subject=f"{name} {value}", hint=two_forms
            )
        if bundle is None and value is None:
            raise InputError("is needed with --pruners", subject=name, hint=two_forms)
    if bundle is not None and plot is not None:
        raise InputError(
            f"has no place beside the bundle {bundle}",
            subject="--plot" if plot else "--no-plot",
            hint=two_forms,
        )


def _run(prepared: Prepared, max_accuracy_drop: float, plot: bool) -> Recommendation:
    """Finish what is not finished, and say how far it is."""
    from gap_export.evaluation.recommend.run import run

    places = prepared.points
    done = sum(place in prepared.store for place in places)
    if done:
        console.say(f"{done} of {len(places)} points are finished already")
    with progress_shown() as progress:

        def finished(place: Place, answered: EvalRun, speedup: float) -> None:
            if not console.is_terminal:  # no bar is shown there
                accuracy = 100 * answered.record.accuracy
                console.say(
                    f"{place.label}: {accuracy:.2f} %, {speedup:.2f} times as fast; {progress.time_left()}"
                )

        def failed(left_out: LeftOut) -> None:
            console.say((f"{left_out.pruner} is left out", "yellow"), f": {left_out.reason}")

        return run(
            prepared,
            max_accuracy_drop=max_accuracy_drop,
            plot=plot,
            progress=progress,
            finished=finished,
            failed=failed,
        )


def _say_where(bundle: Path | None, output: Path | None) -> None:
    """Where all of it is stored; or, of a bundle, what its precision costs besides."""
    if bundle is None:
        out.say(f"  stored in {output}")
        return
    from gap_export.bundle.folder import open_bundle
    from gap_export.evaluation.text_parity import loss_of

    opened = open_bundle(bundle)
    if opened.manifest.precision != "fp32":
        out.say(f"losses are those of pruning; {opened.manifest.precision} itself: {loss_of(opened)}")
