"""What a template takes is found out by asking it: fakes for what templates may do, and the process that renders real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gap_export.errors import CheckpointError, InputError
from gap_export.inputs.chat.conversation import Content, Turn, messages_of
from gap_export.inputs.chat.format import ChatFormat, TemplateForm, read_form, with_image_text
from gap_export.inputs.chat.renderer import Renderer

IMAGE = "<image>"
Write = Callable[[Any], str]


class Fake:
    """Writes a message's content as it is told."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        assert add_generation_prompt
        return f"<|user|>{self._write(messages[0]['content'])}<|assistant|>"


def refuse(*_: object) -> str:
    raise InputError("takes no lists", subject="the chat template", hint="give texts")


def parts(content: list[dict[str, str]], image: str = IMAGE) -> str:
    return "".join(part["text"] if part["type"] == "text" else image for part in content)


def text_alone(content: object) -> str:
    return content if isinstance(content, str) else refuse()


def without_images(content: list[dict[str, str]]) -> str:
    return "".join(part["text"] for part in content if part["type"] == "text")


def first_text(content: list[dict[str, str]]) -> str:
    """Of templates that take the last part for the text; a text is a sequence of characters to them."""
    return content[-1]["text"] if isinstance(content[-1], dict) else refuse()


FORMS: dict[str, tuple[Write, TemplateForm]] = {
    "images and texts": (parts, TemplateForm("parts", writes_images=True)),
    "texts of lists": (without_images, TemplateForm("parts_without_images", writes_images=False)),
    "the last part": (first_text, TemplateForm("parts_without_images", writes_images=False)),
    "texts": (text_alone, TemplateForm("text", writes_images=False)),
    "lists as Python writes them": (str, TemplateForm("text", writes_images=False)),
    "lists as JSON": (
        lambda content: content if isinstance(content, str) else str(content).replace("'", '"'),
        TemplateForm("text", writes_images=False),
    ),
    "nothing of lists": (
        lambda content: content if isinstance(content, str) else "",
        TemplateForm("text", writes_images=False),
    ),
    "lists twice": (
        lambda content: content if isinstance(content, str) else parts(content) * 2,
        TemplateForm("text", writes_images=False),
    ),
    "a placeholder of its own besides": (
        lambda content: f"{IMAGE} shows an image. {parts(content)}",
        TemplateForm("parts", writes_images=True),
    ),
    "another placeholder": (
        lambda content: parts(content, "<picture>"),
        TemplateForm("parts_without_images", writes_images=False),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_a_template_takes(name: str) -> None:
    write, form = FORMS[name]
    assert read_form(Fake(write), IMAGE, source="chat_template.jinja") == form


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (refuse, "cannot be used: takes no lists"),
        (lambda content: "hello", "cannot be used: it writes nothing of what the user says"),
        (lambda content: parts(content, IMAGE * 2), f"writes {IMAGE} 4 times for two images"),
        (lambda content: parts(content[1:]), f"writes {IMAGE} 1 times for two images"),
        (lambda content: text_alone(content) * 2, "cannot be used: takes no lists"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(write: Write, message: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        read_form(Fake(write), IMAGE, source="chat_template.jinja")
    assert str(refused.value).startswith(f"checkpoint: chat_template.jinja: {message}")
    assert "\n" not in str(refused.value)


PARTS = (
    "{% for m in messages %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
TEXTS = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content | trim }}{% endfor %}"
EITHER = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[-1].text }}{% endif %}{% endfor %}"
JOINED = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].content is not string %}{{ raise_exception('only texts') }}{% endif %}" + TEXTS


@pytest.mark.parametrize(
    ("template", "content"),
    [
        (PARTS, "parts"),
        (PARTS.replace("<image>", ""), "parts_without_images"),
        (TEXTS, "text"),
        (EITHER, "parts_without_images"),
        (JOINED, "text"),
        (NO_SYSTEM, "text"),
    ],
)
def test_real_templates_are_asked_in_their_process(template: str, content: Content) -> None:
    with Renderer(template, {"bos_token": "<s>"}) as renderer:
        form = read_form(renderer, IMAGE, source="chat_template.jinja")
        assert form == TemplateForm(content, writes_images=content == "parts")
        question = messages_of([Turn("user", "what?", 2)], form.content, f"{IMAGE}\n")
        assert renderer.render(question).count(IMAGE) == 2
        assert renderer.render(question).endswith("what?")


def test_a_template_that_does_not_end_is_no_reason_to_wait() -> None:
    from gap_export.inputs.chat.limits import Limits

    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with (
        Renderer(endless, limits=Limits(seconds=0.1)) as renderer,
        pytest.raises(CheckpointError, match=r"cannot be used: .*0\.1"),
    ):
        read_form(renderer, IMAGE, source="chat_template.jinja")


@pytest.mark.parametrize(
    ("text", "image_text", "expected"),
    [
        ("a<image>b<image>", "<image>", "a<image>b<image>"),
        ("a<image>b<image>", "<v><image></v>", "a<v><image></v>b<v><image></v>"),
        ("a<v><image></v>b", "<v><image></v>", "a<v><image></v>b"),
        ("ab", "<v><image></v>", "ab"),
    ],
)
def test_what_surrounds_an_image_is_written_once(text: str, image_text: str, expected: str) -> None:
    assert with_image_text(text, "<image>", image_text) == expected


def test_a_format_is_stored_as_it_is() -> None:
    chat = ChatFormat(
        source="the template",
        content="text",
        image_token="<image>",
        image_text="<v><image></v>",
        variables={"bos_token": "<s>"},
        begins_twice=True,
    )
    assert ChatFormat.model_validate_json(chat.model_dump_json()) == chat
    assert chat.separator == "\n"
