"""A bundle in a runtime, ready to answer.

with load("out/llava") as model:
    answer = model.ground("photo.jpg", "the red mug")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self, overload

from PIL import Image

from gap_export.boxes.draw import draw
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.errors import InputError
from gap_export.inputs.images import ImageSource, load_image
from gap_export.runtime.backends import open_session, runtime
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
) -> Model:
    """Load a bundle into a runtime.

    Args:
        bundle: its folder, or what `open_bundle` gave.
        backend: name of the runtime; with device and type of activations, where it has a choice (`openvino:bf16`).
        device: what it runs on, e.g. cpu, cuda, gpu:1; by default its first.
        precision_hint: type of activations, e.g. bf16, where it has a choice.
        providers: execution providers of ONNX Runtime, e.g. `onnxruntime-ep-openvino{num_streams: 1}`, the first that has a kernel for a node first.
        threads: on the CPU; 0 lets the runtime choose.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        SessionError: there is no such backend, it refuses, or the bundle has nothing for it.
        MissingRequirementError: no GPU, or the runtime is not installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    chosen = runtime(backend, device=device, precision_hint=precision_hint, providers=providers)
    return Model(opened, open_session(opened, str(chosen), threads=threads))


class Model:
    """Answers expressions about images. It holds the model in memory until it is closed; `with` closes it.

    May be called from several threads: answers share a cache, so each waits for its turn.

    Args:
        bundle: opened.
        session: of it, or the reference of its checkpoint.

    Attributes:
        bundle: as given.
        session: as given.
    """

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self.bundle, self.session = bundle, session
        self._grounder = Grounder(bundle)

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
        return self._grounder.answer_image(
            self.session, images, expression, keep=keep, max_new_tokens=max_new_tokens
        )

    def unknown_words(self, expression: str) -> tuple[str, ...]:
        """Parts of an expression that the model has no token for; it answers all the same.

        Raises:
            InputError: the expression is empty or no text.
        """
        return self._grounder.unknown_words(expression)

    def draw(self, image: ImageSource, answer: Answer, *, caption: str) -> Image.Image:
        """The image with the first box of an answer and what the model saw of the image: pruned patches are faded.

        Args:
            image: that the answer is about; the prompt's last one.
            answer: to it.
            caption: below the image, say the expression.

        Returns:
            RGB, at the image's own size or enlarged, above a caption.

        Raises:
            InputError: the image cannot be used.
        """
        original, manifest = load_image(image), self.bundle.manifest
        return draw(
            original,
            answer.box,
            answer.kept_indices,
            manifest.layout.token_grid(original.size) or manifest.spec.grid,
            manifest.layout,
            visual_tokens=answer.visual_tokens,
            caption=caption,
        )

    def close(self) -> None:
        """Give back all memory; the model cannot answer any more. Closing again does nothing."""
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
        rows = self._grounder.max_batch
        for first in range(0, len(expressions), rows):
            run = self._grounder.ground(
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
        given, wanted = image if isinstance(image, tuple) else (image,), self._grounder.images_per_prompt
        if isinstance(image, tuple) != (wanted > 1) or len(given) != wanted:
            raise InputError(
                f"shows {wanted} image{'s' if wanted > 1 else ''}, and {len(given)} {'were' if len(given) > 1 else 'was'} given",
                subject="the bundle's prompt",
                hint=f"give a tuple of {wanted}"
                if wanted > 1
                else "give the image by itself, not in a tuple",
            )
        return [load_image(each) for each in given]
