"""`/v1/chat/completions`: the answers of `model.ask` to OpenAI's own client; every field of its schema has an effect, or is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from PIL import Image

from gap_export.errors import InputError
from gap_export.inputs.chat.conversation import Turn
from gap_export.inputs.chat.renderer import Renderer
from gap_export.runtime.model import Model
from gap_export.serving.http.openai_fields import ChatRequest, Message, conversation_of
from tests.serving.http.serving_http import Running

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def messages(scene: tuple[Image.Image, str], scene_url: str) -> list[dict[str, Any]]:
    """A question about an image; its text comes first, as clients often have it."""
    parts = [
        {"type": "text", "text": f"where is {scene[1]}?"},
        {"type": "image_url", "image_url": {"url": scene_url, "detail": "auto"}},
    ]
    return [{"role": "user", "content": parts}]


def parts(*kinds: str, url: str = "data:") -> dict[str, Any]:
    """A message of the user."""
    made = {
        "image": {"type": "image_url", "image_url": {"url": url}},
        "text": {"type": "text", "text": "where is it?"},
    }
    return {"role": "user", "content": [made[kind] for kind in kinds]}


def refused(server: Running, **body: Any) -> tuple[int, str, str | None]:
    answer = server.http.post(PATH, json=body)
    error = answer.json()["error"]
    assert error["message"].isprintable()
    return answer.status_code, error["message"], error["param"]


def events_of(text: str) -> list[Any]:
    """What server-sent events hold; the last one is the end."""
    assert text.endswith("data: [DONE]\n\n")
    blocks = text.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
    assert all(block.startswith("data: {") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_the_official_client_gets_the_answers_of_the_python_api(
    running: Running, shapes_alone: Model, scene: tuple[Image.Image, str], messages: Any
) -> None:
    openai = pytest.importorskip("openai")
    image, expression = scene
    reply = shapes_alone.ask(f"where is {expression}?", image, keep=0.5)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["shapes", "grounder"]
        assert client.models.retrieve("shapes").id == "shapes"
        asked = {"model": "shapes", "messages": messages, "extra_body": {"gap": {"keep": 0.5}}}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == reply.text == shapes_alone.ground(
            image, expression, keep=0.5
        ).text  # fmt: skip
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage.completion_tokens == len(reply.ids)
        assert whole.usage.prompt_tokens_details.visual_tokens == 72
        assert [tuple(box["pixels"]) for box in whole.gap["boxes"]] == list(reply.boxes)
        assert whole.gap["keep"] == {"requested": 0.5, "used": 0.5, "tokens": 72, "of": 144}
        chunks = list(
            client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == reply.text
        assert len([piece for piece in pieces if piece]) > 2
        assert chunks[-1].usage == whole.usage
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-4o", messages=messages)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="n: is not implemented"):
            client.chat.completions.create(model="shapes", messages=messages, n=2)
        answered = whole.choices[0].message.model_dump()
        again = client.chat.completions.create(
            model="grounder",
            messages=[*messages, answered, {"role": "user", "content": "where is the red circle?"}],
        )
        assert again.choices[0].message.content


def test_images_stand_in_front_of_the_texts_of_their_message() -> None:
    for kinds in ((), ("text", "text"), ("image", "text", "text"), ("text", "text", "image", "image")):
        turns, images = conversation_of(ChatRequest(model="m", messages=[Message(**parts(*kinds))]))
        texts = kinds.count("text")
        assert turns == (Turn("user", "\n".join(["where is it?"] * texts), kinds.count("image")),)
        assert [field for _, field in images] == [
            f"messages[0].content[{place}].image_url" for place, kind in enumerate(kinds) if kind == "image"
        ]


def test_a_stream_has_the_form_of_server_sent_events(running: Running, messages: Any) -> None:
    answer = running.http.post(PATH, json={"model": "shapes", "messages": messages, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert all("usage" not in event for event in events)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert events[-1]["gap"]["boxes"]
    usage = {"include_usage": True}
    answer = running.http.post(
        PATH, json={"model": "shapes", "messages": messages, "stream": True, "stream_options": usage}
    )
    *before, last = events_of(answer.text)
    assert all(event["usage"] is None for event in before)
    assert (last["choices"], last["usage"]["total_tokens"] > 0) == ([], True)


def test_a_stream_that_cannot_begin_has_a_status(running: Running, messages: Any) -> None:
    broken = [
        {
            "role": "user",
            "content": [
                messages[0]["content"][0],
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            ],
        }
    ]
    status, _, param = refused(running, model="shapes", messages=broken, stream=True)
    assert (status, param) == (422, "messages[0].content[1].image_url")


def test_text_alone_and_system_prompts(running: Running, shapes_alone: Model) -> None:
    for role in ("system", "developer"):
        body = {
            "model": "shapes",
            "messages": [
                {"role": role, "content": "Answer with a box."},
                {"role": "user", "content": "where is the red circle?"},
            ],
        }
        answer = running.http.post(PATH, json=body).json()
        reply = shapes_alone.ask("where is the red circle?", system="Answer with a box.")
        assert answer["choices"][0]["message"]["content"] == reply.text
        assert answer["gap"]["image"] is None
        assert answer["gap"]["keep"]["used"] is None


def test_sampling_is_that_of_the_python_api(
    running: Running, shapes_alone: Model, scene: tuple[Image.Image, str], messages: Any
) -> None:
    choices = {
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "seed": 7,
    }
    body = {"model": "shapes", "messages": messages, **choices}
    answer = running.http.post(PATH, json={**body, "max_tokens": 6, "max_completion_tokens": 6}).json()
    reply = shapes_alone.ask(f"where is {scene[1]}?", scene[0], max_new_tokens=6, **choices)
    assert answer["choices"][0]["message"]["content"] == reply.text
    stopped = running.http.post(PATH, json={"model": "shapes", "messages": messages, "stop": [","]}).json()
    assert "," not in stopped["choices"][0]["message"]["content"]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    short = running.http.post(PATH, json={"model": "shapes", "messages": messages, "max_tokens": 2}).json()
    assert short["choices"][0]["finish_reason"] == "length"


NEUTRAL: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, None], [2, 0, True, "1"]),
    "logprobs": ([False, None], [True, 0]),
    "top_logprobs": ([0, None], [1]),
    "logit_bias": ([{}, None], [{"5": 1}]),
    "frequency_penalty": ([0, 0.0, None], [0.5, -1]),
    "presence_penalty": ([0, None], [1]),
    "response_format": ([{"type": "text"}, None], [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}]),
    "tools": ([[], None], [[{"type": "function", "function": {"name": "f"}}]]),
    "tool_choice": (["none", "auto", None], ["required", {"type": "function"}]),
    "parallel_tool_calls": ([True, None], [False]),
    "functions": ([[], None], [[{"name": "f"}]]),
    "function_call": (["none", None], [{"name": "f"}]),
    "modalities": ([["text"], None], [["text", "audio"], []]),
    "audio": ([None], [{"voice": "alloy"}]),
    "prediction": ([None], [{"type": "content", "content": "a"}]),
    "reasoning_effort": (["none", None], ["high"]),
    "verbosity": (["medium", None], ["low"]),
    "store": ([False, None], [True]),
    "moderation": ([None], [{}]),
    "prompt_cache_options": ([None], [{}]),
    "prompt_cache_retention": (["in_memory", None], ["24h"]),
    "web_search_options": ([None], [{}]),
    "service_tier": (["auto", "default", None], ["flex", "priority"]),
    "user": (["me", None], [3]),
    "safety_identifier": (["me", None], [[]]),
    "prompt_cache_key": (["me", None], [{}]),
    "metadata": ([{"a": "b"}, {}, None], [{"a": 1}, [1]]),
    "stream": ([False, None], ["true"]),
    "temperature": ([0, 0.5, None], [-1, "hot", 1000]),
    "top_p": ([1, 0.5, None], [0, 2]),
    "top_k": ([0, 5, None], [-1, 2.5]),
    "min_p": ([0, None], [2]),
    "repetition_penalty": ([1, None], [0]),
    "seed": ([0, 7, None], [-1, 2**70]),
    "stop": ([["x"], "x", [], None], [["x"] * 101, "", [3]]),
    "max_tokens": ([5, None], [0, 10_000]),
    "max_completion_tokens": ([5, None], [-1, "5"]),
    "gap": ([{}, {"keep": 0.5}, None], [{"keep": 0}, {"kept": 1}, 3]),
}  # fmt: skip
"""Field -> values that are taken, values that are refused."""


def test_every_field_of_the_schema_is_in_the_table() -> None:
    from typing import get_type_hints

    params = pytest.importorskip("openai.types.chat.completion_create_params")
    theirs = set(get_type_hints(params.CompletionCreateParamsNonStreaming))
    assert theirs <= set(ChatRequest.model_fields)
    assert set(ChatRequest.model_fields) - {"model", "messages", "stream_options"} == set(NEUTRAL)


def test_all_neutral_values_change_nothing(running: Running) -> None:
    """In two requests: every field at its first value, and at its last."""
    body = {"model": "shapes", "messages": [{"role": "user", "content": "where is the red circle?"}]}
    plain = running.http.post(PATH, json=body).json()["choices"]
    neutral = {
        name: taken
        for name, (taken, _) in NEUTRAL.items()
        if name not in ("stop", "max_tokens", "max_completion_tokens")
    }
    for place in (0, -1):
        answer = running.http.post(
            PATH, json={**body, **{name: taken[place] for name, taken in neutral.items()}}
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == plain


@pytest.mark.parametrize("name", NEUTRAL)
def test_values_that_would_change_something_are_refused_by_name(name: str) -> None:
    """Without a server: bodies are checked before anything is asked."""
    from gap_export.errors import GapExportError
    from gap_export.serving.http.errors import HttpError
    from gap_export.serving.http.fields import checked
    from gap_export.serving.http.openai_fields import NOT_IMPLEMENTED

    def check(value: Any) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "?"}], name: value}
        asked = checked(ChatRequest, body, not_implemented=NOT_IMPLEMENTED)
        _ = asked.options
        if (asked.longest or 0) > 1000:
            raise HttpError(400, name)  # the bundle's own limit

    taken, not_taken = NEUTRAL[name]
    for value in taken:
        check(value)
    for value in not_taken:
        with pytest.raises((HttpError, GapExportError)) as caught:
            check(value)
        assert name in str(caught.value) or name in getattr(caught.value, "subject", ""), value
        if isinstance(caught.value, HttpError):
            assert caught.value.status == 400


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"best_of": 1, "echo": False}, "best_of, echo: is not a field here"),
        ({"model": None}, "model: is missing"),
        ({"messages": []}, "messages: must have at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: must be"),
        ({"messages": [{"role": "user"}]}, "the question: is empty"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "turn 2"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "ends with a turn of the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]: must be of type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text: is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:", "detail": "low"}}]}]}, "messages[0].content[0].image_url.detail"),
        ({"messages": [{"role": "user", "content": "a", "name": "me"}]}, "messages[0].name: must be null"),
        ({"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, {"role": "user", "content": "a"}]}, "images are the user's alone"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "contains a NUL character"),
        ({"messages": [parts("image", "text", "image")]}, "messages[0].content[2]: images and texts alternate"),
        ({"messages": [parts("text", "image", "image", "text")]}, "messages[0].content[3]: images and texts alternate"),
        ({"messages": [parts("text"), {"role": "assistant", "content": "b"}, parts("text", "image", "text", "image")]}, "messages[2].content[2]: images and texts alternate"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens is 6"),
        ({"stream_options": {"include_usage": True}}, "stream_options: belongs to stream: true"),
        ({"stream": True, "stream_options": {"chunk": 1}}, "stream_options.chunk: is not a field here"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_is_wrong_is_named(changes: dict[str, Any], named: str, running: Running) -> None:
    body = {"model": "shapes", "messages": [{"role": "user", "content": "?"}], **changes}
    status, message, _ = refused(
        running, **{name: value for name, value in body.items() if value is not None}
    )
    assert (status, named in message) == (400, True), message


@pytest.mark.parametrize(
    ("template", "said", "own"),
    [
        ("{{ raise_exception('of the template alone') }}", "refuses the conversation (change", "the template alone"),
        ("a\n{% of the template alone %}", "is not valid Jinja in line 2 (correct", "tag 'of'"),
        ("{{ 'of the template alone' | shell }}", "is not valid Jinja in line 1 (correct", "shell"),
        ("{{ {}['of the template alone'].b }}", "needs what it is not given in line 1 (give", "the template alone"),
        ("{{ 1 // 0 }}", "failed in line 1 (give", "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_what_a_template_says_is_for_the_operator_alone(
    template: str, said: str, own: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Renderer(template) as renderer:
        with pytest.raises(InputError, match=f"{re.escape(said.partition(' (')[0])}: .*{own}"):
            renderer.render([{"role": "user", "content": "?"}])
        prompts = running.service.engine._answering.prompts
        assert prompts is not None
        monkeypatch.setattr(prompts.tokens, "_renderer", renderer)
        status, message, _ = refused(running, model="shapes", messages=[{"role": "user", "content": "?"}])
    assert status == 400
    assert message.startswith(f"chat template: {said}")
    assert own not in message
