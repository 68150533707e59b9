"""The language of chat templates: Jinja in its sandbox, set up as transformers sets it up for `apply_chat_template`.

A template cannot change what it is given, reach what belongs to Python, or read another template. What the sandbox does not limit
is time and memory; `child` does that, and is the only one to import this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class RaisedByTemplate(TemplateError):
    """A template called `raise_exception`; the message is its own."""


class TooLong(Exception):
    """A text has more characters than it may."""


def compiled(source: str) -> Template:
    """A chat template, read.

    Args:
        source: in Jinja.

    Raises:
        TemplateSyntaxError: it is not in that language.
        Exception: Python refuses what Jinja makes of it: nested too deeply, say.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment.from_string(source)


def rendered(
    template: Template,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    characters: int,
) -> str:
    """The text that a template makes of a conversation.

    Args:
        template: from `compiled`.
        messages: of the conversation, as the template wants them.
        add_generation_prompt: whether the text ends with what an answer begins with.
        variables: what else the template is given, by name: special tokens, for instance.
        characters: the longest text.

    Raises:
        TooLong: it would be longer.
        Exception: whatever the template brings about.
    """
    given = {
        "tools": None,
        "documents": None,
        **variables,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
    }
    return "".join(_bounded(template.generate(given), characters))


def _bounded(pieces: Iterator[str], characters: int) -> Iterator[str]:
    for piece in pieces:
        characters -= len(piece)
        if characters < 0:
            raise TooLong
        yield piece


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what a model is trained on; here it is rendered as it stands.

    Its body has a scope of its own, as the body of a macro has.
    """

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag and its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_stands"), [], [], body, lineno=line)

    def _as_it_stands(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` in a template: makes one, and is not the class, whose attributes lead further."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """A dictionary of these keys."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` in a template: without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that there can be an attribute `self`
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def _raise_exception(message: Any) -> NoReturn:
    raise RaisedByTemplate(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
