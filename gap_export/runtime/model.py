"""A bundle in a runtime, ready to answer.

with load("out/llava") as model:
    answer = model.ground("photo.jpg", "the red mug")
    reply = model.ask("What is on the table?", "photo.jpg")
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

from PIL import Image

from gap_export.boxes.draw import draw
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.errors import InputError
from gap_export.inputs.images import ImageSource, load_image
from gap_export.runtime.backends import open_session, runtime
from gap_export.runtime.conversation.chat import AskOptions, Chat, Images, Reply, ReplyStream
from gap_export.runtime.conversation.prompts import ChatPrompts
from gap_export.runtime.generate import check_overflow
from gap_export.runtime.grounder import Answer, Grounder
from gap_export.runtime.session import Session

PromptImage = ImageSource | tuple[ImageSource, ...]
"""What one prompt shows: an image, or a tuple of all its images in their order, where it has several."""


def load(
    bundle: Bundle | Path | str,
    *,
    backend: str = "onnxruntime",
    device: str | None = None,
    precision_hint: str | None = None,
    providers: Sequence[str] = (),
    threads: int = 0,
    box_format: str | None = None,
) -> Model:
    """Load a bundle into a runtime.

    Args:
        bundle: its folder, or what `open_bundle` gave.
        backend: name of the runtime; with device and type of activations, where it has a choice (`openvino:bf16`).
        device: what it runs on, e.g. cpu, cuda, gpu:1; by default its first.
        precision_hint: type of activations, e.g. bf16, where it has a choice.
        providers: execution providers of ONNX Runtime, e.g. `onnxruntime-ep-openvino{num_streams: 1}`, the first that has a kernel for a node first.
        threads: on the CPU; 0 lets the runtime choose.
        box_format: how boxes are written in its answers, where not as the bundle says.

    Raises:
        InputError: there is no such box format, or this model's answers cannot be read in it.
        BundleError: there is no bundle, or it is damaged.
        SessionError: there is no such backend, it refuses, or the bundle has nothing for it.
        MissingRequirementError: no GPU, or the runtime is not installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    opened = opened.written_as(box_format)
    chosen = runtime(backend, device=device, precision_hint=precision_hint, providers=providers)
    return Model(opened, open_session(opened, str(chosen), threads=threads))


class Model:
    """Answers expressions and questions about images. It holds the model in memory until it is closed; `with` closes it.

    May be called from several threads: answers share a cache, so each waits for its turn.

    Args:
        bundle: opened.
        session: of it, or the reference of its checkpoint.

    Attributes:
        bundle: as given.
        session: as given.
        grounder: what grounding needs around it.
    """

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self.bundle, self.session = bundle, session
        self.grounder = Grounder(bundle)

    @overload
    def ground(
        self,
        image: PromptImage,
        expression: str,
        *,
        keep: float | None = None,
        max_new_tokens: int | None = None,
    ) -> Answer: ...

    @overload
    def ground(
        self,
        image: PromptImage | list[PromptImage],
        expression: list[str],
        *,
        keep: float | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Answer]: ...

    def ground(
        self,
        image: PromptImage | list[PromptImage],
        expression: str | list[str],
        *,
        keep: float | None = None,
        max_new_tokens: int | None = None,
    ) -> Answer | list[Answer]:
        """Find what expressions refer to.

        Args:
            image: path, bytes of a file, image of Pillow, or uint8 array [height, width, 3]; a tuple of them, where the bundle's prompt
                has several. With a list of expressions, one image for all of them, or a list of as many.
            expression: what to find, or a list of it.
            keep: fraction of the visual tokens to keep, in bundles that let requests choose; their default when left out.
            max_new_tokens: longest answer; the longest that the bundle was built for when left out.

        Returns:
            One answer; for a list of expressions a list of answers in the same order.

        Raises:
            InputError: an image, an expression or a fraction that cannot be used, or lists that do not belong together.
            SessionError: the runtime failed, or the model is closed.
        """
        if isinstance(expression, str):
            if isinstance(image, list):
                raise InputError(
                    "stand with one expression",
                    subject=f"{len(image)} images",
                    hint="give a list of as many expressions; one prompt's images are a tuple",
                )
            (answer,) = self._pairs([image], [expression], keep, max_new_tokens)
            return answer
        if not isinstance(expression, list) or not all(isinstance(each, str) for each in expression):
            raise InputError(
                f"is of type {type(expression).__name__}",
                subject="expression",
                hint="give a text, or a list of texts",
            )
        if isinstance(image, list):
            if len(image) != len(expression):
                raise InputError(
                    "do not belong together",
                    subject=f"{len(image)} images and {len(expression)} expressions",
                    hint="give lists of one length, or one image for all expressions",
                )
            return self._pairs(image, expression, keep, max_new_tokens)
        images = self._loaded(image)
        if not expression:
            return []
        return self.grounder.answer_image(
            self.session, images, expression, keep=keep, max_new_tokens=max_new_tokens
        )

    def ask(
        self,
        question: str,
        images: Images = None,
        *,
        system: str | None = None,
        keep: float | None = None,
        focus: str | None = None,
        options: AskOptions | None = None,
        **choices: Any,
    ) -> Reply:
        """Ask a free question, in the words of the model's chat template.

        Args:
            question: of the user.
            images: that it is about: path, bytes of a file, image of Pillow, or uint8 array [height, width, 3]; a list of them; None for text alone.
            system: what the system says, in place of what the template says of itself.
            keep: fraction of the visual tokens to keep, in bundles that let requests choose; their default when left out.
            focus: text that pruners which read text go by, in place of the question.
            options: how the answer is made; greedy, and as long as the bundle's answers, when left out.
            choices: what these options have, one by one, see `AskOptions.of`: `max_new_tokens`, `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`,
                `seed`, `stop`.

        Raises:
            InputError: a question, an image or a choice that cannot be used, or a conversation that does not fit.
            SessionError: the runtime failed, or the model is closed.
        """
        chat = self.chat(images, system=system, keep=keep, focus=focus)
        return chat.ask(question, options=options, **choices)

    def stream(
        self,
        question: str,
        images: Images = None,
        *,
        system: str | None = None,
        keep: float | None = None,
        focus: str | None = None,
        options: AskOptions | None = None,
        **choices: Any,
    ) -> ReplyStream:
        """Ask a free question, and read the answer as it is made: an iterator over pieces of text, whose `reply` is the whole.

        Args:
            question: as of `ask`, and so are all others.
            images: that it is about.
            system: what the system says.
            keep: fraction of the visual tokens to keep.
            focus: text that pruners which read text go by.
            options: how the answer is made.
            choices: what these options have, one by one.

        Raises:
            InputError: a question, an image or a choice that cannot be used, or a conversation that does not fit.
            SessionError: the runtime failed, or the model is closed.
        """
        chat = self.chat(images, system=system, keep=keep, focus=focus)
        return chat.stream(question, options=options, **choices)

    def chat(
        self,
        images: Images = None,
        *,
        system: str | None = None,
        keep: float | None = None,
        focus: str | None = None,
    ) -> Chat:
        """Begin a conversation: `ask` and `stream` of it take one question after the other.

        Args:
            images: that the first question is about; questions may bring images of their own.
            system: what the system says, in place of what the template says of itself.
            keep: fraction of the visual tokens to keep, in bundles that let requests choose; their default when left out.
            focus: text that pruners which read text go by, in place of the first question.

        Raises:
            InputError: an image, a text or a fraction that cannot be used.
        """
        return Chat(self.prompts, self.session, images=images, system=system, keep=keep, focus=focus)

    @cached_property
    def prompts(self) -> ChatPrompts:
        """What conversations share; its process is started by the first question."""
        return ChatPrompts(self.bundle, self.grounder)

    def unknown_words(self, expression: str) -> tuple[str, ...]:
        """Parts of an expression that the model has no token for; it answers all the same.

        Raises:
            InputError: the expression is empty or no text.
        """
        return self.grounder.unknown_words(expression)

    def draw(self, image: ImageSource, answer: Answer | Reply, *, caption: str) -> Image.Image:
        """The image with what an answer points at and what the model saw of the image: pruned patches are faded.

        Of an answer to an expression that is its first box, and of one to a free question all of them.

        Args:
            image: that the answer is about; the prompt's last one.
            answer: to it.
            caption: below the image, say the expression or the question.

        Returns:
            RGB, at the image's own size or enlarged, above a caption.

        Raises:
            InputError: the image cannot be used.
        """
        original, manifest = load_image(image), self.bundle.manifest
        return draw(
            original,
            answer.boxes if isinstance(answer, Reply) else answer.boxes[:1],
            answer.kept_indices,
            manifest.layout.token_grid(original.size) or manifest.spec.grid,
            manifest.layout,
            visual_tokens=answer.visual_tokens,
            caption=caption,
        )

    def close(self) -> None:
        """Give back all memory; the model cannot answer any more. Closing again does nothing."""
        if "prompts" in self.__dict__:
            self.prompts.close()
        self.session.close()

    def __enter__(self) -> Self:
        self.session.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pairs(
        self,
        images: list[PromptImage],
        expressions: list[str],
        keep: float | None,
        max_new_tokens: int | None,
    ) -> list[Answer]:
        """Answers to one expression per prompt, as many at a time as the bundle takes."""
        answers: list[Answer] = []
        rows = self.grounder.max_batch
        for first in range(0, len(expressions), rows):
            run = self.grounder.ground(
                self.session,
                [each for image in images[first : first + rows] for each in self._loaded(image)],
                expressions[first : first + rows],
                keep=keep,
                max_new_tokens=max_new_tokens,
            )
            check_overflow(run.generation, self.session.backend)
            answers += run.answers
        return answers

    def _loaded(self, image: PromptImage) -> list[Image.Image]:
        """The images of one prompt.

        Raises:
            InputError: one cannot be used, or they are not as many as the prompt has.
        """
        given, wanted = image if isinstance(image, tuple) else (image,), self.grounder.images_per_prompt
        if isinstance(image, tuple) != (wanted > 1) or len(given) != wanted:
            raise InputError(
                f"shows {wanted} image{'s' if wanted > 1 else ''}, and {len(given)} {'were' if len(given) > 1 else 'was'} given",
                subject="the bundle's prompt",
                hint=f"give a tuple of {wanted}"
                if wanted > 1
                else "give the image by itself, not in a tuple",
            )
        return [load_image(each) for each in given]
