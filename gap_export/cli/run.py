"""`gap-export run`: what an expression refers to in an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gap_export import bounds
from gap_export.cli.app import console, out, print_json
from gap_export.cli.numbers import number
from gap_export.cli.options import (
    AnyBackendOption,
    BoxFormatOption,
    BundleArgument,
    DeviceOption,
    JsonOption,
    KeepOption,
    PrecisionHintOption,
    ProviderOption,
    ThreadsOption,
    runtime_of,
)


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
    device: DeviceOption = None,
    precision_hint: PrecisionHintOption = None,
    provider: ProviderOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(**number(bounds.TOKENS), help="Maximum length of an answer, in tokens.")
    ] = None,
    box_format: BoxFormatOption = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find what an expression refers to in an image (the last one, of several)."""
    from gap_export.boxes.image_file import check_drawing, save_drawing
    from gap_export.inputs.images import load_image
    from gap_export.runtime.model import load

    if draw is not None:
        check_drawing(draw, images=image, bundle=bundle)
    images = [load_image(path) for path in image]
    ran = runtime_of(backend, device, precision_hint, provider, bundle)
    with load(bundle, backend=ran, threads=threads, box_format=box_format) as model:
        unknown = model.unknown_words(refer)
        prompt = images[0] if len(images) == 1 else tuple(images)
        answer = model.ground(prompt, refer, keep=keep, max_new_tokens=max_new_tokens)
    last = images[-1]
    if draw is not None:
        save_drawing(model.draw(last, answer, caption=refer), draw)
    box = None if answer.box is None else [round(float(edge), 2) for edge in answer.box]
    if as_json:
        print_json(
            {
                "box": box,
                "answer": answer.text,
                "finish_reason": answer.finish_reason,
                "visual_tokens": answer.visual_tokens,
                "kept": len(answer.kept_indices),
                "kept_indices": answer.kept_indices.tolist(),
                "image_size": list(last.size),
                "unknown_words": list(unknown),
                "backend": ran,
            }
        )
        return
    if answer.finish_reason == "length":
        console.say(("the answer was cut off", "yellow"), f" after {answer.new_tokens} tokens")
    if unknown:
        console.say(("the model has no word for", "yellow"), f" {', '.join(unknown)}")
    size = f"{last.width} x {last.height}"
    shown = f"no box on the image ({size})" if box is None else f"box {box} in pixels of {size}"
    out.say(shown)
    out.say(f"  answer {answer.text}, keep {len(answer.kept_indices)} of {answer.visual_tokens}")
    if draw is not None:
        out.say(f"  drawn to {draw}")
