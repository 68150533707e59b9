"""Chat templates are rendered as transformers renders them: those of published checkpoints, in their form, and unusual legal ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from gap_export.errors import InputError
from gap_export.inputs.chat.renderer import Renderer

FOLDER = Path(__file__).parent / "templates"

WRITTEN_AFTER = {
    "llava_1_5": ("llava-hf/llava-1.5-7b-hf", "parts"),
    "llava_next_mistral": ("llava-hf/llava-v1.6-mistral-7b-hf", "parts"),
    "llava_next_chatml": ("llava-hf/llava-v1.6-34b-hf", "parts"),
    "llava_onevision": ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "parts"),
    "llama_3": ("meta-llama/Meta-Llama-3-8B-Instruct, llava-hf/llama3-llava-next-8b-hf", "text"),
    "qwen2_vl": ("Qwen/Qwen2-VL-7B-Instruct", "parts"),
    "qwen2_5_vl": ("Qwen/Qwen2.5-VL-7B-Instruct", "parts"),
    "qwen3_vl": ("Qwen/Qwen3-VL-8B-Instruct", "parts"),
    "internvl3": ("OpenGVLab/InternVL3-8B-hf", "parts"),
    "vicuna": ("lmsys/vicuna-7b-v1.5, which Shikra is trained from", "text"),
    "minigpt_v2": ("meta-llama/Llama-2-7b-chat-hf, which MiniGPT-v2 is trained from", "text"),
}
"""Template in `templates` -> the published checkpoint whose template it is written after, and what contents it takes."""

VARIABLES: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "image_token": "<image>",
}


class Turn(NamedTuple):
    """One turn of a conversation, its images before its text."""

    role: str
    text: str
    images: int = 0


ONE = [Turn("user", "Where is the mug?", 1)]
CONVERSATIONS: dict[str, list[Turn]] = {
    "one turn": ONE,
    "no image": [Turn("user", "  What is a mug?\n")],
    "two images": [Turn("user", "What differs?", 2)],
    "system": [Turn("system", "Answer briefly. ❤"), *ONE],
    "answered": [*ONE, Turn("assistant", "On the table.")],
    "three turns": [
        *ONE,
        Turn("assistant", " On the table. "),
        Turn("user", "And the cat?"),
        Turn("assistant", "<think>\nhm\n</think>\n\nNo."),
        Turn("user", "Look here.", 1),
    ],
    "three turns, system": [
        Turn("system", "Be kind."),
        *ONE,
        Turn("assistant", "Ja."),
        Turn("user", "Und?", 2),
        Turn("assistant", ""),
        Turn("user", "…"),
    ],
    "unicode": [
        Turn("user", "Où est 猫 🐈\u200d⬛, e\u0301, \u2028 & <b>'\"\\?", 1),
        Turn("assistant", "здесь\ttab"),
        Turn("user", "شكرا"),
    ],
    "template language": [Turn("user", "{{ 7 * 7 }} {% raw %} {# no #}")],
    "two users": [*ONE, Turn("user", "Well?")],
    "empty": [],
}


def messages_of(turns: list[Turn], content: str) -> list[dict[str, Any]]:
    if content == "text":
        return [{"role": turn.role, "content": "<image>\n" * turn.images + turn.text} for turn in turns]
    return [
        {
            "role": turn.role,
            "content": [*[{"type": "image"}] * turn.images, {"type": "text", "text": turn.text}],
        }
        for turn in turns
    ]


def by_transformers(template: str, messages: list[dict[str, Any]], prompt: bool, **variables: Any) -> str:
    texts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=prompt, **variables
    )
    return str(texts[0])


def check_equal(template: str, conversations: list[list[dict[str, Any]]], **variables: Any) -> list[str]:
    """What it makes of each, without and with a generation prompt; refusals as the words of the template."""
    found = []
    with Renderer(template, variables) as renderer:
        for messages in conversations:
            for prompt in (False, True):
                refusal = ""
                try:
                    expected = by_transformers(template, messages, prompt, **variables)
                except TemplateError as error:
                    refusal = str(error)
                if not refusal:
                    assert renderer.render(messages, add_generation_prompt=prompt) == expected
                    found.append(expected)
                    continue
                with pytest.raises(InputError) as refused:
                    renderer.render(messages, add_generation_prompt=prompt)
                assert refusal in refused.value.message
                found.append(refused.value.message)
    return found


def test_every_template_says_what_it_is_written_after() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(WRITTEN_AFTER)


@pytest.mark.parametrize("name", WRITTEN_AFTER)
def test_published_templates(name: str) -> None:
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    content = WRITTEN_AFTER[name][1]
    conversations = [messages_of(turns, content) for turns in CONVERSATIONS.values()]
    texts = check_equal(template, conversations, **VARIABLES)
    assert sum("Where is the mug?" in text for text in texts) >= 8
    assert not any("49" in text for text in texts)
    with Renderer(template, VARIABLES) as renderer:
        both = [(conversations[0], False), (conversations[3], True)]
        assert renderer.render_all(both) == [texts[0], texts[7]]


def test_what_a_published_template_makes() -> None:
    template = (FOLDER / "qwen2_vl.jinja").read_text(encoding="utf-8")
    with Renderer(template) as renderer:
        assert renderer.render(messages_of(ONE, "parts")) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>Where is the mug?<|im_end|>\n<|im_start|>assistant\n"
        )


def test_contents_as_text_where_a_template_takes_both() -> None:
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl3"):
        template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        check_equal(template, [messages_of(CONVERSATIONS["three turns, system"], "text")], add_vision_id=True)


UNUSUAL = {
    "whitespace control": "  {%- for m in messages +%}\n  {{- m.content -}}  \n   {% if loop.last %}\n\n  end\n  {% endif %}\n{# note #}\n{%+ if true %} x {% endif -%}\n\n tail\n\n",
    "tojson": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ {'b': 1, 'a': ['<é>', none, true, 1.5]} | tojson(sort_keys=true, separators=(',', ':')) }}|{{ 'é' | tojson(ensure_ascii=true) }}|{{ dict(b=1) | tojson }}|{{ dict.fromkeys(['a', 'b'], 0) | tojson }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}{{ loop.index }}{{ m.content }}{% else %}none{% endfor %}",
    "namespace counters": "{% set ns = namespace(user=0, self=1, text='') %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.user = ns.user + 1 %}{% set ns.text = ns.text ~ ns.user ~ m.content %}{% endif %}{% endfor %}{{ ns.text }}{{ ns.self }}",
    "macros and calls": "{% macro wrap(role, end='!') %}<{{ role }}>{{ caller() }}</{{ role }}>{{ end }}{{ varargs }}{% endmacro %}{% for m in messages %}{% call wrap(m.role, '?', 3) %}{{ m.content }}{% endcall %}{% endfor %}",
    "date": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}no{% endif %}",
    "refusal": "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('Role ' ~ m.role ~ ' is not known') }}{% endif %}{{ m.content }}{% endfor %}",
    "nested loops": "{% for m in messages recursive %}{% for word in m.content.split() %}{{ loop.index }}/{{ loop.length }}{{ word | capitalize }}{% if not loop.last %}, {% endif %}{% endfor %};{% endfor %}{% for a, b in {'x': 1, 'y': 2}.items() %}{{ a }}{{ b }}{{ loop.cycle('odd', 'even') }}{% endfor %}",
    "generation inside a loop": "{% set kept = 'outer' %}{% for m in messages %}{% if m.role == 'assistant' %}\n  {% generation %}\n  {% set kept = m.content %}{{ kept }}{% for c in 'ab' %}{{ loop.index }}{{ c }}{% endfor %}\n  {% endgeneration %}\n{{ kept }}{% endif %}{% endfor %}",
    "what is none": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{% if not tools %}no tools{% endif %}{{ add_generation_prompt is boolean }}{{ bos_token is defined }}{{ missing is defined }}{{ missing }}{{ none }}{{ (missing or 'default') }}{{ missing | default('d') }}",
    "earlier thoughts": "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' %}{% set thought = '' %}{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}{% elif '</think>' in content %}{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}{% if loop.last %}<think>{{ thought }}</think>{% endif %}{% endif %}{{ m.role }}:{{ content }}\n{% endfor %}",
    "slices, filters and tests": "{{ messages[1:] | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[-1]['content'] | e }}{{ '%s=%05.1f' | format('x', 2) }}{{ 'a{}b{n}'.format(1, n=2) }}{{ messages | groupby('role') | length }}{{ [3, 1, 2] | sort | first }}{{ range(3) | list }}{{ '' | length }}{{ 7 // 2 }}{{ 'x' in 'xyz' }}{{ 1 if messages else 0 }}",
    "blocks and set blocks": "{% set text %}{% filter upper %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfilter %}{% endset %}{% block body %}{{ text is string }}{% endblock %}{{ text | trim }}{% with a = 1 %}{{ a }}{% endwith %}{% raw %}{{ raw }}{% endraw %}",
    "carriage returns": "a\r\nb\rc\n{{ '\\r\\n' }}{{ messages | length }}\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_templates(name: str) -> None:
    conversations = [messages_of(turns, "text") for turns in CONVERSATIONS.values() if turns]
    check_equal(UNUSUAL[name], conversations, bos_token="<s>")


def test_variables_of_every_kind() -> None:
    template = (
        "{{ count + 1 }}{{ names | join('+') }}{{ nothing is none }}{{ yes }}{{ table.key }}{{ image_token }}"
    )
    given: dict[str, Any] = {
        "count": 2,
        "names": ["a", "é"],
        "nothing": None,
        "yes": True,
        "table": {"key": 1.5},
    }
    check_equal(template, [messages_of(ONE, "text")], image_token="<image>", **given)


def test_tools_may_be_given() -> None:
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": "find", "description": "Où <b>?"}}
    ]
    template = (FOLDER / "qwen2_5_vl.jinja").read_text(encoding="utf-8")
    expected, _ = render_jinja_template([messages_of(ONE, "parts")], tools=tools, chat_template=template)
    with Renderer(template, {"tools": tools}) as renderer:
        assert renderer.render(messages_of(ONE, "parts"), add_generation_prompt=False) == expected[0]
