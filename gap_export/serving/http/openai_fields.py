"""What `POST /v1/chat/completions` takes: OpenAI's schema, of which what is not implemented is taken at the value that changes nothing.

A field that is ignored is a wrong answer: so every field of the schema stands here with what it may be, and any other is refused by its name.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from gap_export.inputs.chat.conversation import Turn
from gap_export.runtime.conversation.chat import AskOptions
from gap_export.serving.http.errors import HttpError
from gap_export.serving.http.fields import Body, Image, ImageUrl, KeepField, TokensField

_LONGEST_STOP = 16
_NAMES = 64
"""Characters of names and keys that are taken and not used."""
MOST_MESSAGES = 256
MOST_PARTS = 64


def _false(value: bool) -> bool:
    if value:
        raise ValueError("must be false")
    return value


def _true(value: bool) -> bool:
    if not value:
        raise ValueError("must be true")
    return value


Off = Annotated[bool, AfterValidator(_false), WithJsonSchema({"const": False, "type": "boolean"})] | None
On = Annotated[bool, AfterValidator(_true), WithJsonSchema({"const": True, "type": "boolean"})] | None
One = Annotated[int, Field(ge=1, le=1)] | None
Nothing = Annotated[float, Field(ge=0, le=0)] | None
NoLogprobs = Annotated[int, Field(ge=0, le=0)] | None
Empty = Annotated[list[Any], Field(max_length=0)] | None
NoEntries = Annotated[dict[str, Any], Field(max_length=0)] | None
Name = Annotated[str, Field(max_length=1024)] | None


class TextPart(Body):
    """A text in a message."""

    type: Literal["text"]
    text: str


class ImagePart(Body):
    """An image in a message of the user."""

    type: Literal["image_url"]
    image_url: Image


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_PART_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            "required": ["type", "text"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "image_url"},
                "image_url": {
                    "type": "object",
                    "properties": {"url": {"type": "string"}, "detail": {"enum": ["auto", None]}},
                    "required": ["url"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "image_url"],
            "additionalProperties": False,
        },
    ]
}
Content = Annotated[
    list[Part],
    Field(max_length=MOST_PARTS, fail_fast=True),
    BeforeValidator(_parts),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA, "maxItems": MOST_PARTS}]}
    ),
]


class Message(Body):
    """One message. What answers of other servers have besides is taken where it is empty, so that they can be sent back.

    Attributes:
        role: who speaks; a developer is the system.
        content: a text, or texts and images, which are put in front of them.
        name: of who speaks: no chat template reads it.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    name: None = None
    refusal: None = None
    audio: None = None
    annotations: Empty = None
    tool_calls: Empty = None
    function_call: None = None

    @property
    def text(self) -> str:
        """Its texts, a line break between two."""
        return "\n".join(part.text for part in self.content or () if isinstance(part, TextPart))


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool | None = None
    include_obfuscation: Off = None


class TextFormat(Body):
    """The one format of answers."""

    type: Literal["text"]


class GapOptions(Body):
    """What only this server has.

    Attributes:
        keep: fraction of the visual tokens to keep, in bundles built with a range.
        receipt: whether the answer says what it was computed from.
        evidence: whether it has the indices of the visual tokens that were kept.
    """

    keep: KeepField | None = None
    receipt: bool | None = None
    evidence: bool | None = None


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=_LONGEST_STOP, fail_fast=True),
    BeforeValidator(_stops),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": _LONGEST_STOP},
            ]
        }
    ),
]


class ChatRequest(Body):
    """A conversation that is to be answered."""

    model: Annotated[str, Field(max_length=1024)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokensField | None = None
    max_completion_tokens: TokensField | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Stop | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    gap: GapOptions | None = None
    # Taken, and nothing depends on them:
    user: Name = None
    safety_identifier: Name = None
    prompt_cache_key: Name = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=_NAMES)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    service_tier: Literal["auto", "default"] | None = None
    # Known, and not implemented: at the value that changes nothing.
    n: One = None
    logprobs: Off = None
    top_logprobs: NoLogprobs = None
    logit_bias: NoEntries = None
    frequency_penalty: Nothing = None
    presence_penalty: Nothing = None
    response_format: TextFormat | None = None
    tools: Empty = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: On = None
    functions: Empty = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    store: Off = None
    moderation: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    web_search_options: None = None

    @property
    def longest(self) -> int | None:
        """Most tokens of the answer; None for the bundle's own.

        Raises:
            HttpError: two that differ.
        """
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise HttpError(
                400,
                f"max_tokens: is {self.max_tokens}, and max_completion_tokens is {self.max_completion_tokens}; give one of them",
                param="max_tokens",
            )
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def options(self) -> AskOptions:
        """How the answer is to be made.

        Raises:
            HttpError: two fields that differ.
            InputError: a value that is out of range.
        """
        names = ("temperature", "top_p", "seed", "top_k", "min_p", "repetition_penalty")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return AskOptions.of(**chosen, stop=tuple(self.stop or ()), max_new_tokens=self.longest)


NOT_IMPLEMENTED = frozenset(
    name
    for name in ChatRequest.model_fields
    if name
    not in {
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "top_k",
        "min_p",
        "repetition_penalty",
        "gap",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "metadata",
    }
)
"""Fields that are taken at one value alone."""

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


def conversation_of(asked: ChatRequest) -> tuple[tuple[Turn, ...], list[tuple[ImageUrl, str]]]:
    """What was said, and all images with the fields that they stand in.

    Args:
        asked: checked.

    Raises:
        HttpError: an image that is not the user's, or a message that cannot be read in its order.
    """
    turns: list[Turn] = []
    images: list[tuple[ImageUrl, str]] = []
    for number, message in enumerate(asked.messages):
        own = [
            (part.image_url, f"messages[{number}].content[{place}].image_url")
            for place, part in enumerate(message.content or ())
            if isinstance(part, ImagePart)
        ]
        if own and message.role != "user":
            raise HttpError(400, f"{own[0][1]}: images are the user's alone", param=own[0][1])
        _check_order(message, number)
        images += own
        turns.append(Turn(_ROLES[message.role], message.text, len(own)))
    return tuple(turns), images


def _check_order(message: Message, number: int) -> None:
    """Refuse a message whose images lie in several places: prompts have one for them, and the order would be another one without a word.

    Raises:
        HttpError: its images stand neither all before nor all behind its texts.
    """
    changes = 0
    for place, (before, part) in enumerate(pairwise(message.content or ()), start=1):
        changes += type(before) is not type(part)
        if changes > 1:
            name = f"messages[{number}].content[{place}]"
            raise HttpError(
                400,
                f"{name}: images and texts alternate; put the images of a message before its texts, which are read as one",
                param=name,
            )
