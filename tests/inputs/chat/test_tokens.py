"""Conversations become token ids: answers stay the ids that they were, the rest is what template and tokenizer make of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gap_export.errors import InputError
from gap_export.families import frames
from gap_export.inputs.chat.conversation import Content, Turn, messages_of
from gap_export.inputs.chat.format import ChatFormat
from gap_export.inputs.chat.renderer import Renderer
from gap_export.inputs.chat.tokens import IMAGE, ChatTokens, Prompt, Said
from tests.inputs.chat.small_tokenizers import KINDS, NAMES, with_start

TEMPLATES = Path(__file__).parent / "templates"
IMAGE_ID, END = NAMES.index("<image>"), NAMES.index("</s>")

THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' + m.content.split('</think>')[-1].lstrip() + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}"
)
TRIMMING = "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + '] ' + m.content | trim + eos_token }}{% endfor %}[assistant]"
SPOKEN: dict[str, tuple[str, Content]] = {
    "llava": (frames.LLAVA.template, "parts"),
    "mistral": (frames.LLAVA_NEXT_MISTRAL.template, "parts"),
    "chatml": (frames.LLAVA_ONEVISION.template, "parts"),
    "minigpt": (frames.MINIGPT_V2.template.replace("<ImageHere>", "<image>"), "parts"),
    "llava_1_5": ((TEMPLATES / "llava_1_5.jinja").read_text(), "parts"),
    "vicuna": ((TEMPLATES / "vicuna.jinja").read_text(), "text"),
    "llama_3": ((TEMPLATES / "llama_3.jinja").read_text(), "text"),
    "trimming": (TRIMMING, "text"),
    "thinking": (THINKING, "text"),
}
"""Template, and what it takes."""


@pytest.fixture(scope="module", autouse=True)
def renderers() -> Iterator[None]:
    yield
    for name in SPOKEN:
        renderer_of(name).close()
    renderer_of.cache_clear()


@cache
def renderer_of(name: str) -> Renderer:
    return Renderer(SPOKEN[name][0], {"bos_token": "<s>", "eos_token": "</s>"})


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return with_start(KINDS[kind](False))


class Talk:
    """A conversation, answered as a test says."""

    def __init__(
        self,
        name: str,
        kind: str = "byte_level",
        *,
        renderer: Any = None,
        vocabulary: int = 10_000,
        **changes: Any,
    ) -> None:
        self.tokenizer = tokenizer_of(kind)
        self.renderer = renderer or renderer_of(name)
        chat = {"source": name, "content": SPOKEN[name][1], "image_token": "<image>", "image_text": "<image>"}
        self.chat = ChatFormat.model_validate({**chat, **changes})
        self.tokens = ChatTokens(
            self.tokenizer,
            self.chat,
            self.renderer,
            image_token_id=IMAGE_ID,
            end_token_ids=(END,),
            vocabulary=vocabulary,
        )
        self.turns: list[Turn] = []
        self.said: list[Said] = []
        self.prompt = Prompt((), None)  # type: ignore[arg-type]

    def ask(self, text: str, images: int = 0) -> tuple[int, ...]:
        self.turns.append(Turn("user", text, images))
        self.prompt = self.tokens.prompt(self.turns, self.said)
        return self.prompt.ids

    def answer(self, text: str, ids: Sequence[int] | None = None) -> tuple[int, ...]:
        """Say it in these ids, or in letters, which no tokenizer would."""
        spoken = tuple(self.letters(text) if ids is None else ids)
        self.turns.append(Turn("assistant", text))
        self.said.append(Said(self.prompt.last, text, spoken))
        return (*self.prompt.ids, *spoken)

    def letters(self, text: str) -> list[int]:
        return [id_ for letter in text for id_ in self.own(letter)]

    def own(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def rendered(self) -> str:
        image_text = f"{self.chat.image_text}{self.chat.separator}"
        text: str = self.renderer.render(messages_of(self.turns, self.chat.content, image_text))
        return text

    def own_ids(self) -> list[int]:
        """What the tokenizer makes of the whole text, one start token in front."""
        ids = self.own(self.rendered())
        start = [] if ids[:1] == [NAMES.index("<s>")] else [NAMES.index("<s>")]
        return [IMAGE if id_ == IMAGE_ID else id_ for id_ in (*start, *ids)]


AS_THEY_ARE = [name for name in SPOKEN if name not in ("trimming", "thinking", "llama_3")]
"""Templates that write answers as they are, and what stands before them as before an answer that is to come."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPOKEN)
def test_a_first_question_is_what_tokenizer_and_template_make_of_it(name: str, kind: str) -> None:
    talk = Talk(name, kind)
    ids = talk.ask("where is the mug?", 1)
    assert list(ids) == talk.own_ids()
    assert talk.prompt.last.ids == ids
    assert ids.count(IMAGE) == 1


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace", "words"])
@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_answers_stay_the_ids_that_they_were(name: str, kind: str) -> None:
    talk = Talk(name, kind)
    talk.ask("where is the mug?", 1)
    for question, answer in (("and the cat?", "on the left"), ("is it red?", "no, it is not"), ("why?", "")):
        before = talk.answer(answer)
        ids = talk.ask(question)
        assert ids[: len(before)] == before
        assert ids == (*before, *talk.prompt.last.ids)
        assert talk.prompt.last.ids


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace", "words", "word_piece"])
@pytest.mark.parametrize("name", ["llava", "mistral", "chatml", "vicuna", "llama_3", "thinking", "trimming"])
def test_answers_said_as_a_tokenizer_would_leave_what_it_makes_of_the_whole(name: str, kind: str) -> None:
    """Nothing is lost or added between an answer and what follows it."""
    talk = Talk(name, kind)
    talk.ask("where is the mug?", 1)
    for answer, question in (("on the left", "what is it?"), ("the red mug", "is it red?")):
        before = list(talk.prompt.ids)
        talk.turns += [Turn("assistant", answer), Turn("user", question)]
        whole = talk.own_ids()
        assert whole[: len(before)] == before
        del talk.turns[-2:]
        # As many of them as a model would have said.
        follows = talk.own(f"{answer}</s>")[:-1]
        start = len(before)
        said = next(whole[start : start + n] for n in range(1, 40) if is_said(talk, whole[start:], n, answer))
        assert len(said) <= len(follows) + 2
        talk.answer(answer, said)
        assert list(talk.ask(question)) == whole


def is_said(talk: Talk, ids: Sequence[int], count: int, answer: str) -> bool:
    return str(talk.tokenizer.decode(list(ids[:count]))).strip() == answer


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace"])
def test_a_blank_before_later_answers_is_not_read(kind: str) -> None:
    """LLaVA-1.5's template has `ASSISTANT: ` before an answer that was given, and `ASSISTANT:` before one that is to come."""
    talk = Talk("llava_1_5", kind)
    first = talk.ask("where?")
    assert talk.rendered().endswith("ASSISTANT:")
    talk.answer("left", talk.own("left"))
    ids = talk.ask("why?")
    assert "ASSISTANT: left USER: why? ASSISTANT:" in talk.rendered()
    assert ids[: len(first)] == first
    assert ids[len(first) :] == (*talk.own("left"), *talk.prompt.last.ids)
    assert talk.tokenizer.decode(list(talk.prompt.last.ids)).strip() == "USER: why? ASSISTANT:"


def test_answers_that_a_template_strips_are_read_as_it_writes_them() -> None:
    talk = Talk("trimming")
    talk.ask("one?")
    talk.answer("as it is")
    second = talk.ask("two?")
    talk.answer(" blank ")
    third = talk.ask("three?")
    assert third[: len(second)] == second, "what was said before stays"
    assert third[len(second) :] == tuple(talk.own(" blank</s>[user] three?</s>[assistant]"))
    kept = talk.answer("as it is, too")
    fourth = talk.ask("four?")
    assert fourth[: len(kept)] == kept


def test_what_a_model_thought_is_left_out_from_there_on() -> None:
    talk = Talk("thinking")
    talk.ask("one?")
    plain = talk.answer("no thought")
    second = talk.ask("two?")
    assert second[: len(plain)] == plain
    talk.answer("<think>\nhm, left\n</think>\n\nleft")
    third = talk.ask("three?")
    assert third[: len(second)] == second
    follows = "left<|im_end|>\n<|im_start|>user\nthree?<|im_end|>\n<|im_start|>assistant\n"
    assert third[len(second) :] == tuple(talk.own(follows))
    kept = talk.answer("no thought")
    assert talk.ask("four?")[: len(kept)] == kept


@pytest.mark.parametrize(
    "answer",
    [
        "where is it?",
        "USER: where is it? ASSISTANT:",
        "ASSISTANT:",
        " ",
        "\n",
        "s",
        "</s>USER: a",
        "<image>",
        "\ue000\uf8ff",
        "",
    ],
)
@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_an_answer_may_say_what_user_and_template_said(name: str, answer: str) -> None:
    if name == "vicuna" and answer != answer.strip():
        pytest.skip("its template strips answers")
    talk = Talk(name)
    talk.ask("where is it?", 1)
    harmless = names_of(talk.prompt.ids)
    spoken = [id_ for id_ in talk.letters(answer) if id_ >= len(NAMES)]
    talk.answer(answer, spoken)
    before = talk.ask("where is it?")
    assert before[: len(talk.said[0].before.ids) + len(spoken)] == (*talk.said[0].before.ids, *spoken)
    other = Talk(name)
    other.ask("where is it?", 1)
    other.answer("nothing of it")
    assert names_of(before) == names_of(other.ask("where is it?"))
    assert before.count(IMAGE) == 1
    assert harmless == names_of(talk.said[0].before.ids)


def names_of(ids: Sequence[int]) -> list[int]:
    return [id_ for id_ in ids if id_ < len(NAMES) and id_ != IMAGE]


@pytest.mark.parametrize("name", ["trimming", "thinking"])
def test_names_of_tokens_stay_words_where_an_answer_is_read_anew(name: str) -> None:
    talk = Talk(name)
    talk.ask("one?")
    talk.answer("<think></think> it ends with </s> and <image> ", talk.own("it"))
    spelled = talk.ask("two?")
    other = Talk(name)
    other.ask("one?")
    other.answer("x")
    assert names_of(spelled) == names_of(other.ask("two?"))
    assert "</s> and <image>" in talk.tokenizer.decode(list(spelled))


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
@pytest.mark.parametrize(("name", "starts"), [("trimming", 1), ("vicuna", 1), ("llava", 1), ("mistral", 1)])
def test_two_start_tokens_are_never_read(name: str, starts: int, kind: str) -> None:
    talk = Talk(name, kind)
    for _ in range(3):
        ids = talk.ask("where?")
        assert ids.count(1) == starts
        assert ids[0] == 1
        talk.answer("there")


def test_but_where_a_model_was_trained_with_two() -> None:
    talk = Talk("minigpt", begins_twice=True)
    ids = talk.ask("where?", 1)
    assert ids[:2] == (1, 1)
    assert ids.count(1) == 2
    talk.answer("there")
    ids = talk.ask("and that?")
    assert ids[:2] == (1, 1)
    assert ids.count(1) == 3, "of the frame: one for every question, and the tokenizer's"
    assert Talk("minigpt").ask("where?")[:2] != (1, 1)


def test_a_tokenizer_that_adds_nothing_adds_nothing() -> None:
    plain = KINDS["byte_level"](False)
    talk = Talk("chatml")
    talk.tokens = ChatTokens(
        plain, talk.chat, talk.renderer, image_token_id=IMAGE_ID, end_token_ids=(), vocabulary=10_000
    )
    assert talk.ask("where?")[0] == NAMES.index("<|im_start|>")


@pytest.mark.parametrize("name", ["llava", "vicuna"])
def test_images_are_counted_and_words_are_none(name: str) -> None:
    talk = Talk(name)
    assert talk.ask("which <image> is <image> it?", 2).count(IMAGE) == 2
    talk.answer("the first")
    ids = talk.ask("and here?", 1)
    assert ids.count(IMAGE) == 3
    assert talk.prompt.last.ids.count(IMAGE) == 1
    assert IMAGE_ID not in ids


def test_images_have_around_them_what_the_model_was_trained_with() -> None:
    talk = Talk("llava", image_text="[SEP]<image>[SEP]")
    ids = talk.ask("what?", 2)
    sep = NAMES.index("[SEP]")
    places = [place for place, id_ in enumerate(ids) if id_ == IMAGE]
    assert [(ids[place - 1], ids[place + 1]) for place in places] == [(sep, sep)] * 2
    text = Talk("vicuna", image_text="[SEP]<image>[SEP]", separator=" ")
    text.ask("what?", 1)
    assert "[SEP]<image>[SEP] what?" in text.rendered()


def test_a_template_that_writes_another_number_of_images_is_refused() -> None:
    with Renderer(SPOKEN["llava"][0].replace(r"<image>\n", r"<image><image>\n")) as renderer:
        talk = Talk("llava", renderer=renderer)
        with pytest.raises(InputError, match=r"llava: writes 4 times <image> for 2 images"):
            talk.ask("what?", 2)


def test_a_token_without_an_embedding_is_refused_by_its_name() -> None:
    talk = Talk("thinking", "words")
    talk.ask("is it red")
    known = max(talk.prompt.ids)
    with pytest.raises(InputError, match=rf"the token {known} .* embedding of {known} tokens") as refused:
        Talk("thinking", "words", vocabulary=known).ask("is it red")
    assert "\n" not in str(refused.value)


def test_the_placeholder_needs_no_embedding() -> None:
    """Some have an id behind all others."""
    tokenizer = KINDS["byte_level"](False)
    tokenizer.add_special_tokens(["<|image|>"])
    id_ = tokenizer.token_to_id("<|image|>")
    chat = ChatFormat(source="x", content="text", image_token="<|image|>", image_text="<|image|>")
    tokens = ChatTokens(
        tokenizer, chat, renderer_of("thinking"), image_token_id=id_, end_token_ids=(), vocabulary=id_
    )
    assert tokens.prompt([Turn("user", "a", 1)], []).ids.count(IMAGE) == 1


def test_a_placeholder_that_was_generated_is_a_word() -> None:
    talk = Talk("llava")
    talk.ask("what?", 1)
    talk.answer("", [IMAGE_ID, IMAGE_ID])
    ids = talk.ask("and?", 1)
    assert (ids.count(IMAGE), ids.count(IMAGE_ID)) == (2, 2)


def test_text_of_the_models_own_is_split_as_it_stands() -> None:
    talk = Talk("llava", "llama")
    whole = talk.own("on the left")
    first = talk.own("on the")
    assert (*first, *talk.tokens.continued("on the", " left")) == tuple(whole)
    assert talk.tokens.continued("on the", "") == ()
    assert END not in talk.tokens.continued("on", " the </s>")


def test_a_conversation_that_cannot_be_answered_is_refused() -> None:
    talk = Talk("llava")
    for turns in ([], [Turn("assistant", "a")], [Turn("user", " ")]):
        with pytest.raises(InputError):
            talk.tokens.prompt(turns, [])


texts = st.lists(
    st.sampled_from([*NAMES, "USER:", "ASSISTANT:", "[INST]", " ", "\n", "s>", "<", "mug", "</think>"])
    | st.text(max_size=3),
    max_size=5,
).map(lambda parts: "".join(parts).replace("\0", ""))
questions = texts.map(lambda text: f"{text}?")
turns = st.lists(st.tuples(questions, st.integers(0, 2), texts), min_size=1, max_size=3)


def check_conversation_of(name: str, talked: Sequence[tuple[str, int, str]]) -> None:
    """Whatever is said: answers keep their ids where the template leaves them, and special tokens are the template's."""
    talk, harmless = Talk(name), Talk(name)
    before: tuple[int, ...] = ()
    for question, images, answer in talked:
        ids, plain = talk.ask(question, images), harmless.ask("a?", images)
        assert names_of(ids) == names_of(plain)
        assert ids.count(IMAGE) == plain.count(IMAGE)
        if name in AS_THEY_ARE and name != "vicuna":
            assert ids == (*before, *talk.prompt.last.ids)
        before = talk.answer(answer, [id_ for id_ in talk.letters(answer) if id_ >= len(NAMES)])
        harmless.answer("b")


@pytest.mark.parametrize("name", SPOKEN)
@settings(max_examples=5)
@given(talked=turns)
def test_whatever_is_said(name: str, talked: list[tuple[str, int, str]]) -> None:
    check_conversation_of(name, talked)


@pytest.mark.long
@pytest.mark.parametrize("name", SPOKEN)
@settings(max_examples=500)
@given(talked=turns)
def test_whatever_is_said_in_many_conversations(name: str, talked: list[tuple[str, int, str]]) -> None:
    check_conversation_of(name, talked)
