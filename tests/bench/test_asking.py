"""`bench/asking.py`: how answers and times are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def asking(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("asking")


def margins(*values: float) -> Any:
    return np.array(values, np.float32)


def test_the_same_answer(asking: ModuleType) -> None:
    found = asking.compared([5, 6, 7], [5, 6, 7], margins(0, 0, 0, 0))
    assert (found["whole_the_same"], found["first_tokens_the_same"], found["wrong"], found["near_ties"]) == (
        True,
        3,
        0,
        0,
    )


def test_a_near_tie_is_no_fault_and_what_follows_is_read_by_force(asking: ModuleType) -> None:
    found = asking.compared([5, 8, 7], [5, 6, 9], margins(0, asking.TIE / 2, 0))
    assert (found["first_tokens_the_same"], found["near_ties"], found["wrong"]) == (1, 1, 0)
    assert not found["whole_the_same"]


def test_another_choice_is_a_fault_wherever_it_stands(asking: ModuleType) -> None:
    assert asking.compared([5, 8], [5, 6], margins(0, 2 * asking.TIE))["wrong"] == 1
    # Behind a near-tie too, and where the answer ended too early.
    assert asking.compared([8, 7], [6, 7], margins(asking.TIE / 2, 1.0))["wrong"] == 1
    assert asking.compared([5], [5, 6], margins(0, 3.0))["wrong"] == 1


def test_what_a_template_adds(asking: ModuleType) -> None:
    assert asking.added("<s>a[b]c", "<s>a[b") == "]c"
    with pytest.raises(SystemExit, match="rewrites"):
        asking.added("<s>a[B]c", "<s>a[b")


def test_ratios_are_of_the_same_round(asking: ModuleType) -> None:
    found = asking.spread([1.0, 30.0, 8.0], [1.0, 10.0, 4.0])
    assert found == {"median": 2.0, "smallest": 1.0, "largest": 3.0}


def test_the_loop_of_asking_is_without_image_and_prompt(
    asking: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SimpleNamespace(stream=lambda *_, **__: Streamed("a", vision=2.0, prefill=0.5))
    monkeypatch.setattr(asking, "timed", lambda call: (10.0, call()))
    assert asking.loop_of_ask(model, None)[0] == 7.5


def test_answers_that_differ_or_end_early_are_not_timed(asking: ModuleType) -> None:
    tokens = asking.TIMED_TOKENS
    answer = SimpleNamespace(text="a", new_tokens=tokens, timings=SimpleNamespace(decode=1.0))
    model = SimpleNamespace(
        ground=lambda *_, **__: answer,
        ask=lambda *_, **__: answer,
        stream=lambda *_, **__: Streamed("a", new_tokens=tokens),
    )
    found = asking.times(model, rounds=2)
    assert found["milliseconds_per_token"]["ground"] == pytest.approx(1e3 / (tokens - 1))
    model.stream = lambda *_, **__: Streamed("b", new_tokens=tokens)
    with pytest.raises(SystemExit, match="two answers"):
        asking.times(model, rounds=2)
    model.stream = lambda *_, **__: Streamed("a", new_tokens=2)
    with pytest.raises(SystemExit, match="2 tokens"):
        asking.times(model, rounds=2)


def test_the_grounding_prompt_is_the_template_around_the_expression(asking: ModuleType) -> None:
    template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert asking.as_grounding_prompt(template) == "[<image>\n{expression}]>"


class Streamed:
    """An answer in pieces."""

    def __init__(self, text: str, *, new_tokens: int = 2, vision: float = 0.0, prefill: float = 0.0) -> None:
        timings = SimpleNamespace(vision=vision, prefill=prefill)
        self.reply = SimpleNamespace(text=text, new_tokens=new_tokens, timings=timings)

    def __iter__(self) -> Any:
        return iter(self.reply.text)


def test_the_checkpoint_gets_the_decoders_own_template(asking: ModuleType, tmp_path: Path) -> None:
    decoder, llava = tmp_path / "decoder", tmp_path / "llava"
    for folder, texts in (
        (
            decoder,
            {
                "chat_template.jinja": "{{ messages }}",
                "tokenizer_config.json": "{}",
                "model.safetensors": "1",
            },
        ),
        (
            llava,
            {"config.json": "{}", "tokenizer_config.json": '{"bos_token": "<s>"}', "model.safetensors": "2"},
        ),
    ):
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text)
    made = asking.ensure_chat(tmp_path, decoder, llava)
    assert {path.name: path.read_text() for path in made.iterdir()} == {
        "config.json": "{}",
        "model.safetensors": "2",
        "chat_template.jinja": "{{ messages }}",
        "tokenizer_config.json": "{}",
    }
    (decoder / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match=r"chat_template\.jinja"):
        asking.ensure_chat(tmp_path, decoder, llava)
