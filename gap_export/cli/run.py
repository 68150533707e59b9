"""`gap-export run`: what an expression refers to in an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gap_export.cli.app import console, out, plain, print_json
from gap_export.cli.options import AnyBackendOption, BundleArgument, JsonOption, KeepOption, ThreadsOption


def run(
    bundle: BundleArgument,
    image: Annotated[
        list[Path],
        typer.Option(help="An image; repeat it where the bundle's prompt has several, in their order."),
    ],
    refer: Annotated[str, typer.Option(help="The referring expression: what to find.")],
    draw: Annotated[
        Path | None, typer.Option(help="Write the image with the box and the kept patches.")
    ] = None,
    keep: KeepOption = None,
    backend: AnyBackendOption = "onnxruntime",
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find what an expression refers to in an image (the last one, of several)."""
    from gap_export.bundle.folder import open_bundle
    from gap_export.inputs.images import load_image
    from gap_export.runtime.backends import open_session
    from gap_export.runtime.generate import check_overflow
    from gap_export.runtime.grounder import Grounder

    opened = open_bundle(bundle)
    manifest = opened.manifest
    images = [load_image(path) for path in image]
    last = images[-1]
    grounder = Grounder(opened)
    unknown = grounder.unknown_words(refer)
    with open_session(opened, backend, threads=threads) as session:
        grounded = grounder.ground(session, images, [refer], keep=keep, max_new_tokens=max_new_tokens)
    check_overflow(grounded.generation, session.backend)
    answer = grounded.answers[0]
    if draw is not None:
        _draw(draw, last, answer, manifest, refer, grounded.batch)
    box = None if answer.box is None else [round(float(edge), 2) for edge in answer.box]
    if as_json:
        print_json(
            {
                "box": box,
                "answer": answer.text,
                "ended": grounded.generation.ended[0],
                "kept": len(answer.kept_indices),
                "kept_indices": [int(index) for index in answer.kept_indices],
                "image_size": list(last.size),
                "unknown_words": list(unknown),
                "backend": session.backend,
            }
        )
        return
    if not grounded.generation.ended[0]:
        console.print(f"[yellow]the answer was cut off[/] after {len(grounded.generation.tokens[0])} tokens")
    if unknown:
        console.print(f"[yellow]the model has no word for[/] {', '.join(unknown)}", highlight=False)
    size = f"{last.width} x {last.height}"
    shown = f"no box on the image ({size})" if box is None else f"box {box} in pixels of {size}"
    out.print(f"{plain(shown)}", highlight=False)
    out.print(f"  answer {plain(answer.text)}, keep {len(answer.kept_indices)} of {int(grounded.batch.visual_tokens[-1])}", highlight=False)  # fmt: skip
    if draw is not None:
        out.print(f"  drawn to {draw}", highlight=False)


def _draw(target: Path, last: Any, answer: Any, manifest: Any, expression: str, images: Any) -> None:
    from gap_export.boxes.draw import draw
    from gap_export.errors import InputError

    image = draw(
        last,
        answer.box,
        answer.kept_indices,
        manifest.spec.grid if images.grids is None else tuple(images.grids[-1].tolist()),
        manifest.layout,
        visual_tokens=int(images.visual_tokens[-1]),
        caption=expression,
    )
    try:
        image.save(target)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot be written: {error}",
            subject=str(target),
            hint="use a .png or .jpg path in a folder that exists",
        ) from error
