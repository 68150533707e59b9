"""How a checkpoint is spoken to, as a bundle stores it beside its template, and how that is found out: by asking the template.

Templates say nowhere what they take. So two texts and two images are given to each in both forms, and what it writes of them tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import Field

from gap_export.errors import CheckpointError, InputError
from gap_export.inputs.chat.conversation import Content, Turn, messages_of
from gap_export.inputs.chat.renderer import TookTooMuch
from gap_export.records import Record, Text

_PROBE = "gap7probe"
"""A text that no template holds."""


class Renders(Protocol):
    """Whatever renders a template; see `renderer.Renderer`."""

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        ...


class ChatFormat(Record):
    """How a conversation becomes text and token ids, besides the template itself.

    Attributes:
        source: where the template is from, in words.
        content: what the template takes as the content of a turn.
        image_token: the placeholder that stands for an image's tokens, as text.
        image_text: what a prompt has in the place of an image: the placeholder, and what the model was trained to see around it.
        separator: between images and text, where the template itself writes nothing for images.
        variables: special tokens that the template may write, by their names there (`bos_token`).
        begins_twice: whether the tokenizer adds its start token to a text that begins with it.
    """

    source: Text
    content: Content
    image_token: Text
    image_text: Text
    separator: str = "\n"
    variables: dict[str, str] = Field(default_factory=dict)
    begins_twice: bool = False


@dataclass(frozen=True)
class TemplateForm:
    """What a template takes.

    Attributes:
        content: of a turn.
        writes_images: whether it writes a placeholder for every image.
    """

    content: Content
    writes_images: bool


def read_form(renderer: Renders, image_token: str, *, source: str) -> TemplateForm:
    """What a template takes, found by asking it.

    Args:
        renderer: of the template.
        image_token: the placeholder that stands for an image's tokens, as text.
        source: where the template is from, for messages.

    Raises:
        CheckpointError: it writes a user's text in neither form, or does not end, or another number of placeholders than there are images.
    """
    two = _written(renderer, "parts", images=2)
    if two.text is None:
        text = two if two.took_too_much else _written(renderer, "text", images=0)
        if text.text is None:
            raise CheckpointError(
                f"cannot be used: {text.fault or two.fault or 'it writes nothing of what the user says'}",
                subject=source,
                hint="compare it with the template as published, or remove it: the family's own frame is used then",
            )
        return TemplateForm("text", writes_images=False)
    none = _written(renderer, "parts", images=0)
    written = two.text.count(image_token) - (none.text or "").count(image_token)
    if written not in (0, 2):
        raise CheckpointError(
            f"writes {image_token} {written} times for two images",
            subject=source,
            hint="compare it with the template as published",
        )
    return TemplateForm("parts" if written else "parts_without_images", writes_images=bool(written))


@dataclass(frozen=True)
class _Written:
    """What a template made of a question; no text where that is not in it as it should be."""

    text: str | None
    fault: str | None = None
    took_too_much: bool = False


def _written(renderer: Renders, content: Content, *, images: int) -> _Written:
    try:
        text = renderer.render(messages_of([Turn("user", _PROBE, images)], content))
    except InputError as error:
        return _Written(None, error.message, isinstance(error, TookTooMuch))
    # A list that a template takes for a text is written as Python writes it.
    is_list = content == "parts" and ("'type'" in text or '"type"' in text)
    return _Written(None if is_list or text.count(_PROBE) != 1 else text)


def with_image_text(text: str, image_token: str, image_text: str) -> str:
    """A rendered text in which every image has around it what the model was trained to see.

    Templates write the placeholder alone, where the processor beside them adds what surrounds it, or the whole.

    Args:
        text: as rendered.
        image_token: the placeholder.
        image_text: the placeholder and what surrounds it.
    """
    return text if image_text in text else text.replace(image_token, image_text)
