"""Answers that are drawn: the same again with the same seed, alone and beside others, in every runtime."""

from __future__ import annotations

import numpy as np
import pytest

from gap_export.errors import InputError
from gap_export.runtime.answer.sampling import Sampling, choose
from gap_export.runtime.conversation.chat import AskOptions
from tests.runtime.conversation.conftest import LONGEST, OpenModel, Pixels
from tests.runtime.conversation.talking import QUESTIONS, facts, ids_of, talk

DRAWN = {"temperature": 1.0, "top_p": 0.95, "seed": 5}


@pytest.mark.parametrize(
    "choices",
    [{}, {"temperature": 0.0}, {"temperature": 0.0, "seed": 9, "top_k": 3}, {"top_k": 1, "temperature": 7.0}],
)
def test_without_temperature_or_choice_the_likeliest_token_is_taken(
    choices: dict[str, float], open_model: OpenModel, images: list[Pixels]
) -> None:
    model = open_model()
    assert talk(model.chat(), images[0], **choices) == talk(model.chat(), images[0])


def test_greedy_answers_are_those_that_boxes_are_asked_with(
    open_model: OpenModel, images: list[Pixels]
) -> None:
    """The loop of `ground`, given the same prompt, makes the same tokens."""
    model = open_model()
    grounded = model.ground(images[0], "the red mug")
    asked = model.ask("where is the red mug ?", images[0], max_new_tokens=LONGEST)
    assert grounded.finish_reason == asked.finish_reason == "length"
    assert model.prompts.tokenizer.decode(asked.ids, skip_special_tokens=False) == grounded.text or (
        grounded.text == asked.text
    )
    assert grounded.kept_indices.tolist() == asked.kept_indices.tolist()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_a_seed_gives_one_text(backend: str, open_model: OpenModel, images: list[Pixels]) -> None:
    """Whatever else is asked in between; runtimes have the same logits, up to their rounding."""
    model = open_model(backend)
    expected = talk(open_model().chat(), images[0], **DRAWN)
    assert talk(model.chat(), images[0], **DRAWN) == expected
    chats = [model.chat(), model.chat()]
    for number, question in enumerate(QUESTIONS):
        image = None if number else images[0]
        assert facts(chats[0].ask(question, images=image, **DRAWN)) == expected[number]
        chats[1].ask(question, images=images[1], temperature=2.0, seed=number)
        model.ground(images[2], "a cat")


def test_other_seeds_give_other_texts(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model()
    texts = {
        model.ask(QUESTIONS[0], images[0], temperature=3.0, seed=seed, max_new_tokens=16).ids
        for seed in range(6)
    }
    assert len(texts) > 4


def test_tokens_of_prompt_and_answer_were_seen(open_model: OpenModel, images: list[Pixels]) -> None:
    """Derived from the logits of every token: a penalty counts what was said before, in all turns."""
    model = open_model()
    options = AskOptions.of(repetition_penalty=1.7)
    chat = model.chat(images[0])
    step, logits = model.session.step, []
    model.session.step = lambda *given: logits.append(step(*given).copy()) or logits[-1]  # type: ignore[func-returns-value,method-assign]
    try:
        first = chat.ask(QUESTIONS[0], options=options)
    finally:
        del model.session.step
    seen = {1, *ids_of(model, f"USER : <image> {QUESTIONS[0]} ASSISTANT :"), first.ids[0]}
    for number, each in enumerate(logits, 1):
        token = choose(each[0], Sampling.of(repetition_penalty=1.7), seen, number)
        assert token == first.ids[number]
        seen.add(token)
    assert first.ids != model.ask(QUESTIONS[0], images[0]).ids
    assert np.isfinite(logits).all()


def test_choices_are_given_as_a_whole_or_one_by_one(open_model: OpenModel, images: list[Pixels]) -> None:
    model = open_model()
    options = AskOptions.of(**DRAWN, stop="never", max_new_tokens=3)
    told = facts(model.ask(QUESTIONS[0], images[0], options=options))
    assert facts(model.ask(QUESTIONS[0], images[0], **DRAWN, max_new_tokens=3)) == told
    assert facts(model.stream(QUESTIONS[0], images[0], options=options).reply) == told
    with pytest.raises(InputError, match="top_p: stands beside options"):
        model.ask(QUESTIONS[0], images[0], options=options, top_p=0.5)
    with pytest.raises(InputError, match="temprature: is not known"):
        model.ask(QUESTIONS[0], images[0], temprature=1.0)


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"max_new_tokens": True}, {"max_new_tokens": 2.0}, {"stop": [""]}, {"stop": 3},
     {"seed": -1}, {"seed": "x"}, {"temperature": float("nan")}, {"top_p": 0}, {"min_p": 2}],
)  # fmt: skip
def test_choices_out_of_range_are_refused_by_their_names(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError) as refused:
        AskOptions.of(**wrong)  # type: ignore[arg-type]
    assert next(iter(wrong)).split("_")[0] in str(refused.value)
    assert "\n" not in str(refused.value)
