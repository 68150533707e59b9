"""`gap-export ask`: a free question about images, or a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export import bounds
from gap_export.cli.app import console
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
from gap_export.cli.replies import Replies, streams_by_itself
from gap_export.errors import InputError

if TYPE_CHECKING:
    from gap_export.bundle.folder import Bundle


def ask(
    bundle: BundleArgument,
    question: Annotated[
        str | None,
        typer.Argument(
            help="What to ask; without it, questions are read line by line from the terminal or standard input.",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image that the question is about; repeat it for several, in their order."),
    ] = None,
    no_image: Annotated[bool, typer.Option("--no-image", help="Ask without an image: text alone.")] = False,
    system: Annotated[
        str | None,
        typer.Option(help="System prompt, in place of what the chat template has by itself."),
    ] = None,
    focus: Annotated[
        str | None,
        typer.Option(
            help="Text that pruners which read text choose visual tokens by; the question by default."
        ),
    ] = None,
    keep: KeepOption = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            **number(bounds.TOKENS),
            help="Maximum length of an answer, in tokens; by default the bundle's own.",
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            **number(bounds.TEMPERATURE),
            help="Tokens are drawn at this temperature; 0 takes the likeliest one, always.",
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            **number(bounds.FRACTION),
            help="Draw from the likeliest tokens that have this probability together.",
        ),
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(
            **number(bounds.VOCABULARY), help="Draw from this many of the likeliest tokens; 0 for all."
        ),
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(
            **number(bounds.SHARE),
            help="Draw from tokens that have this share of the likeliest one's probability.",
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            **number(bounds.PENALTY), help="Above 1, tokens that were there before become less likely."
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(**number(bounds.SEED), help="Seed of the draws.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends an answer and is not shown; repeat it for several."),
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(help="Write the last image with the kept patches and every box in the answer."),
    ] = None,
    box_format: BoxFormatOption = None,
    backend: AnyBackendOption = "onnxruntime",
    device: DeviceOption = None,
    precision_hint: PrecisionHintOption = None,
    provider: ProviderOption = None,
    threads: ThreadsOption = 0,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print the answer while it is made; by default on a terminal, without --json.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask anything about images, in the chat template that the model was trained with.

    Without a question it is a conversation, with a question a line: /image PATH brings an image along with the next one, /focus WORDS has
    visual tokens chosen by these words from the next one on, /new begins a new conversation about the images of --image, /quit ends it, and a
    question that begins with / is written with //. On a terminal an empty line or Ctrl-D ends it too, and Ctrl-C ends an answer.
    """
    from gap_export.boxes.image_file import check_drawing, save_drawing
    from gap_export.bundle.folder import open_bundle
    from gap_export.cli.dialogue import Dialogue
    from gap_export.inputs.chat.conversation import check_text
    from gap_export.inputs.images import load_image
    from gap_export.runtime.conversation.chat import AskOptions
    from gap_export.runtime.model import load

    paths = image or []
    _check_together(question, paths, no_image=no_image, draw=draw, stream=stream, as_json=as_json)
    if question is not None:
        check_text(question, "the question")
    if system is not None:
        check_text(system, "the system prompt")
    options = AskOptions.of(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        max_new_tokens=max_new_tokens,
    )
    if draw is not None:
        check_drawing(draw, images=paths, bundle=bundle)
    images = tuple(load_image(path) for path in paths)
    ran = runtime_of(backend, device, precision_hint, provider, bundle)
    opened = open_bundle(bundle)
    _check_image_given(opened, no_image or bool(images))
    replies = Replies(
        as_json=as_json, streamed=streams_by_itself(as_json) if stream is None else stream, backend=ran
    )
    with load(opened, backend=ran, threads=threads, box_format=box_format) as model:
        if question is None:
            Dialogue(model, replies, options, images, system=system, keep=keep, focus=focus).hold()
            return
        answer = model.stream(question, images, system=system, keep=keep, focus=focus, options=options)
        last = images[-1] if images else None
        reply = replies.show(answer, None if last is None else last.size)
        if draw is not None and last is not None:
            save_drawing(model.draw(last, reply, caption=question), draw)
            if not as_json:
                console.say(f"drawn to {draw}")


def _check_together(
    question: str | None,
    images: list[Path],
    *,
    no_image: bool,
    draw: Path | None,
    stream: bool | None,
    as_json: bool,
) -> None:
    """Refuse options that contradict each other.

    Raises:
        InputError: the first that do.
    """
    if images and no_image:
        raise InputError("stands beside --image", subject="--no-image", hint="leave one of them out")
    if stream and as_json:
        raise InputError(
            "stands beside --stream, and a record is printed when the answer is complete",
            subject="--json",
            hint="leave one of them out",
        )
    if draw is not None and not images:
        raise InputError("has no image to draw on", subject=f"--draw {draw}", hint="give --image")
    if draw is not None and question is None:
        raise InputError(
            "belongs to one question, and none is given", subject=f"--draw {draw}", hint="give the question"
        )


def _check_image_given(bundle: Bundle, said: bool) -> None:
    """Refuse a bundle that answers no free questions, and a question that leaves open whether it is about an image.

    Raises:
        InputError: one or the other.
    """
    from gap_export.runtime.conversation.prompts import chat_format

    chat_format(bundle)
    if not said:
        raise InputError(
            "is not given", subject="an image", hint="give --image, or --no-image for text alone"
        )
