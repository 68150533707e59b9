"""Chat templates that mean harm, and values that stand where a template is looked for: a template is a program that comes with a checkpoint."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from tests.hostile import texts
from tests.hostile.judge import REFUSED
from tests.hostile.texts import Damage

_COUNT = "{% for a in range(99999) %}"
_NEXT = "{% endfor %}"

_PROGRAMS = {
    "three loops within each other": f"{_COUNT}{_COUNT}{_COUNT}{_NEXT}{_NEXT}{_NEXT}",
    "a power that takes for ever": "{{ 9 ** 9 ** 9 ** 9 }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a text that doubles": "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a text of terabytes": "{{ 'x' * 10 ** 12 }}",
    "a width of a billion": "{{ '%1000000000d' % 1 }}",
    "a format of a billion": "{{ '{:1000000000}'.format(1) }}",
    "100 MB in pieces": f"{_COUNT}{{{{ 'x' * 1000 }}}}{_NEXT}",
    "a list of a list of a list": "{% set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "an indent of a billion": "{{ messages | tojson(indent=1000000000) }}",
    "an hour of 10 MB": "{{ strftime_now('%A' * 10000000) }}",
    "words without end": "{{ lipsum(n=100000) }}",
    "a file that it includes": "{% include '/etc/passwd' %}",
    "a file that it extends": "{% extends '/etc/passwd' %}",
    "a file that it imports": "{% import '/etc/passwd' as x %}{{ x }}",
    "classes of Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals by a filter": "{{ (cycler | attr('__init__') | attr('__globals__')) }}",
    "globals by a format": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "an opened file": "{{ open('/etc/passwd').read() }}",
    "its own context": "{{ self._TemplateReference__context }}",
    "a message more": "{{ messages.append(messages[0]) }}",
    "an error with colours": r"{{ raise_exception('\x1b[31m[/red]\u202e' ~ messages) }}",
    "an error of 10 MB": "{{ raise_exception('x' * 10000000) }}",
    "what is not there": "{{ nothing.at.all }}",
    "a filter that is not there": "{{ messages | nothing }}",
    "a null character": r"{{ '\0' }}{{ messages[0].content }}",
    "half a character": r"{{ '\ud800' }}",
    "a thousand images": "{{ '<image>' * 1000 }}{{ messages[0].content }}",
    "no images": "{% for part in messages[-1].content %}{{ part.text }}{% endfor %}",
    "the text twice": "{{ messages[-1].content[-1].text }} {{ messages[-1].content[-1].text }}",
    "special tokens alone": "{{ '</s><s><pad><unk>' * 10 }}",
    "nothing": "{# a remark #}",
    "blanks": " \n\t ",
    "an open tag": "{% for message in messages %}",
    "an open brace": "{{",
    "an end without a beginning": "{% endfor %}",
    "10,000 brackets": "{{ " + "(" * 10_000 + ")" * 10_000 + " }}",
    "10,000 blocks": "{% if true %}" * 10_000 + "{% endif %}" * 10_000,
    "a remark of 900,000 characters": "{# " + "x" * 900_000 + " #}{{ messages[-1].content[-1].text }}",
    "a remark of 3 MB": "{# " + "x" * 3_000_000 + " #}{{ messages[-1].content[-1].text }}",
}
"""Name -> template."""


def template_damaged(content: bytes, rng: random.Random, _: int) -> Iterator[Damage]:
    """Damage to a template, and other templates; nearly any text is one."""
    for name, program in _PROGRAMS.items():
        yield name, program.encode("utf-8", "surrogatepass"), ""
    for name in ("three loops within each other", "a file that it includes", "an error with colours"):
        yield f"{name}, behind the template", content + _PROGRAMS[name].encode(), ""
    yield from texts.text_damaged(content)


def listed_damaged(content: bytes, rng: random.Random, amount: int) -> Iterator[Damage]:
    """The same where a manifest lists the file as it was: all of it is refused, whatever it says."""
    for name, damaged, _ in template_damaged(content, rng, amount):
        yield name, damaged, REFUSED if damaged != content else ""


_VALUES = {
    "of a number": 7,
    "of a list of numbers": [1, 2],
    "of an empty list": [],
    "of an empty object": {},
    "of an empty text": "",
    "of templates by name": [{"name": "default", "template": "{{ messages[-1].content }}"}],
    "of templates without a default": [{"name": "[/red]\x1b", "template": "x"}],
    "of a template by a number": [{"name": 1, "template": "x"}],
    "of a template that is a list": [{"name": "default", "template": ["x"]}],
    "of a template without text": [{"name": "default"}],
    "of two defaults": [{"name": "default", "template": "x"}] * 2,
    "of names alone": {"default": None},
    "of a text of 2 MB": "x" * 2_000_000,
    "of half a character": "\ud800",
    "of a null character": "\0",
    "with colours": "\x1b[31m[/red]{{ messages[-1].content }}",
    "in a list in a list": [[[["x"]]]],
    **{
        f"of {name}": _PROGRAMS[name]
        for name in ("three loops within each other", "an opened file", "an error of 10 MB", "blanks")
    },
}
"""What may stand at `chat_template` in a tokenizer's configuration."""
_TOKENS = (
    7,
    ["<s>"],
    {},
    {"content": 7},
    {"content": "x" * 100_000},
    "",
    "\ud800",
    "\x1b[31m",
    "<image>",
    "{{ 1 }}",
)
"""What may stand in the place of a special token."""


def tokenizer_config_damaged(content: bytes, rng: random.Random, amount: int) -> Iterator[Damage]:
    """Damage to a tokenizer's configuration that has a chat template."""
    value = json.loads(content)
    for name, template in _VALUES.items():
        yield f"a chat template {name}", _dumped({**value, "chat_template": template}), ""
    for number, token in enumerate(_TOKENS):
        for key in ("bos_token", "eos_token", "odd_token"):
            yield f"{key} number {number}", _dumped({**value, key: token}), ""
    yield from texts.text_damaged(content)
    yield from texts.raw_json_damaged(content)
    yield from texts.json_damaged(content, rng, amount)


def _dumped(value: object) -> bytes:
    return json.dumps(value).encode()
