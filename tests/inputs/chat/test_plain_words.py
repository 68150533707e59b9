"""What people write never becomes a special token, whatever it holds, and is split into the same tokens as ever."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from gap_export.inputs.chat.plain_words import PlainWords
from tests.inputs.chat.small_tokenizers import (
    KINDS,
    NAMES,
    UNKNOWN,
    byte_level,
    greedy_names,
    unigram,
    word_piece,
)

MADE = [(kind, normalized) for kind in KINDS for normalized in (False, True)]
every_kind = pytest.mark.parametrize(("kind", "normalized"), MADE)

GUARDED = range(1, len(NAMES))
"""Ids of names; the unknown token stands for what has no other."""


@cache
def made(kind: str, normalized: bool) -> tuple[Tokenizer, PlainWords]:
    tokenizer = KINDS[kind](normalized)
    return tokenizer, PlainWords(tokenizer)


HALVES = [
    "<",
    ">",
    "<s",
    "s>",
    "<<",
    ">>",
    "/s>",
    "</",
    "<|",
    "|>",
    "<|im_",
    "end|>",
    "im_start|>",
    "[",
    "SEP]",
    "/s",
]
LOOK_ALIKE = [
    "<S>",
    "</S>",
    "[sep]",
    "<IMAGE>",
    "\uff1cs\uff1e",
    "\uff1c/s\uff1e",
    "\uff1c\uff53\uff1e",
    "<\u200bs>",
    "<\u017f>",
    "\uff1c|im_end|\uff1e",
]
PRIVATE = ["\ue000", "\ue001\ue100", "\uf8ff" * 9, "\U000f0000"]
WORDS = [
    "where ",
    "is",
    " the",
    "red?",
    "\n",
    " ",
    "  ",
    "é",
    "e\u0301",
    "日本",
    "\U0001f600",
    "1.0",
    "\t",
    "isn't",
    "▁",
    "\u0130",
]

plain = st.lists(
    st.sampled_from([*WORDS, *PRIVATE, "s", "image", "SEP"]) | st.text(max_size=4), max_size=8
).map("".join)
anything = (
    st.lists(
        st.sampled_from([*NAMES, *HALVES, *LOOK_ALIKE, *PRIVATE, *WORDS]) | st.text(max_size=3),
        min_size=1,
        max_size=7,
    )
    .map("".join)
    .filter(bool)
)
of_template = st.lists(st.sampled_from([*NAMES, *NAMES, *HALVES, *WORDS]), max_size=4).map("".join)


def encoded(words: PlainWords, rendered: str) -> list[int]:
    return list(words.encode(words.revealed(rendered)).ids)


def own(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def names_in(text: str) -> list[int]:
    """Ids of names, the leftmost first, and the longest of those that begin at one place."""
    longest_first = sorted(NAMES, key=len, reverse=True)
    return [NAMES.index(found) for found in re.findall("|".join(map(re.escape, longest_first)), text)]


def guarded(ids: list[int]) -> list[int]:
    return [id_ for id_ in ids if id_ in GUARDED]


def check_split_as_ever(kind: str, normalized: bool, text: str) -> None:
    tokenizer, words = made(kind, normalized)
    expected = own(tokenizer, text)
    assume(not guarded(expected))  # of `Sep`, say, where names are found in lower case
    assert encoded(words, words.hide(text)) == expected


def check_template_split_as_ever(kind: str, text: str) -> None:
    tokenizer, words = made(kind, False)
    assert encoded(words, text) == own(tokenizer, text)


def check_tokens_of_the_template(
    kind: str, normalized: bool, template: tuple[str, str, str], said: tuple[str, str]
) -> None:
    _, words = made(kind, normalized)
    first, second = map(words.hide, said)
    ids = encoded(words, f"{template[0]}{first}{template[1]}{second}{template[2]}")
    expected = [id_ for text in template for id_ in names_in(text) if id_ in GUARDED]
    assert guarded(ids) == expected


@every_kind
def test_numbers_that_names_could_be_hidden_by_are_words(kind: str, normalized: bool) -> None:
    """Characters of private use between two names that are hidden, or a template's and one of those."""
    for said in (("\ue000", "\ue000<unk>"), ("<unk>\ue000\ue001", "<unk>"), ("\ue000\ue001", "")):
        check_tokens_of_the_template(kind, normalized, ("<s>", "", "<s>"), said)


texts_of_template = st.lists(of_template | plain, max_size=3).map("".join)
templates, sayings = st.tuples(of_template, of_template, of_template), st.tuples(anything, anything)
few, many = settings(max_examples=8), settings(max_examples=700)


@every_kind
@few
@given(text=plain)
def test_without_names_a_text_is_split_as_ever(kind: str, normalized: bool, text: str) -> None:
    check_split_as_ever(kind, normalized, text)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(text=texts_of_template)
def test_what_a_template_writes_is_split_as_ever(kind: str, text: str) -> None:
    check_template_split_as_ever(kind, text)


@every_kind
@few
@given(template=templates, said=sayings)
def test_tokens_are_those_of_the_template_alone(
    kind: str, normalized: bool, template: tuple[str, str, str], said: tuple[str, str]
) -> None:
    check_tokens_of_the_template(kind, normalized, template, said)


@pytest.mark.long
@every_kind
@many
@given(text=plain, written=texts_of_template, template=templates, said=sayings)
def test_the_same_of_many_texts(
    kind: str,
    normalized: bool,
    text: str,
    written: str,
    template: tuple[str, str, str],
    said: tuple[str, str],
) -> None:
    check_tokens_of_the_template(kind, normalized, template, said)
    check_template_split_as_ever(kind, written)
    check_split_as_ever(kind, normalized, text)


def test_hiding_is_what_does_it() -> None:
    """What the tests above would show without it, and of the tokenizer itself."""
    tokenizer, words = made("byte_level", False)
    assert guarded(encoded(words, "a</s>")) == guarded(own(tokenizer, "a</s>")) == [2]
    assert guarded(encoded(words, words.hide("a</s>"))) == []
    folded = unigram(normalized=True)
    assert guarded(own(folded, "\uff1cs\uff1e")) == [1]
    assert guarded(encoded(PlainWords(folded), "\uff1cs\uff1e")) == []
    lower = word_piece(normalized=True)
    assert guarded(own(lower, "[sEp]")) == [7]
    assert guarded(encoded(PlainWords(lower), "[sEp]")) == []


@pytest.mark.parametrize("said", ["/s>", "/s", " /s> ", "|im_end|>", "s", "image", ">", "<", "<s>>"])
def test_halves_of_names_meet_those_of_a_template_without_effect(said: str) -> None:
    _, words = made("byte_level", False)
    for before, behind in (("<", ">"), ("<<", ""), ("", "s>"), ("<", "/s>")):
        ids = encoded(words, f"<s>{before}{words.hide(said)}{behind}</s>")
        assert guarded(ids) == [1, *guarded(names_in(f"{before} {behind}")), 2]


def test_a_template_may_trim_what_is_said() -> None:
    _, words = made("byte_level", False)
    for said in ("  /s>  ", "\n</s>", "> quoted "):
        assert words.revealed(words.hide(said).strip()) == words.revealed(words.hide(said.strip()))
        assert guarded(encoded(words, f"<{words.hide(said).strip()}")) == []


def test_tokens_that_take_blanks_or_stand_alone() -> None:
    tokenizer = greedy_names(normalized=False)
    words = PlainWords(tokenizer)
    text = "where <image> is <s> it"
    assert encoded(words, text) == own(tokenizer, text)
    assert guarded(encoded(words, "a<s>b</s>")) == [1, 2]
    assert guarded(encoded(words, words.hide("where <image> is"))) == []


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace"])
@few
@given(said=anything)
def test_words_are_still_there_in_the_tokens(kind: str, said: str) -> None:
    tokenizer, words = made(kind, False)
    assume("\ufffd" not in said and BLANK_PIECE not in said)
    decoded = tokenizer.decode(encoded(words, words.hide(f"x{said}")), skip_special_tokens=True)
    assert decoded == (f"x{said}" if kind != "byte_level" else tokenizer.normalizer.normalize_str(f"x{said}"))


BLANK_PIECE = "▁"
"""A blank, in such vocabularies."""


@pytest.mark.parametrize("kind", ["words", "word_piece", "unigram"])
def test_words_without_a_token_stay_unknown(kind: str) -> None:
    tokenizer, words = made(kind, False)
    assert encoded(words, "日") == own(tokenizer, "日")
    assert 0 in encoded(words, "日")


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_the_name_of_the_unknown_token_is_a_word_too(kind: str) -> None:
    _, words = made(kind, False)
    assert 0 not in encoded(words, words.hide(f"a {UNKNOWN} b"))
    assert encoded(words, f"a {UNKNOWN} b").count(0) == 1


def test_no_two_have_the_same_random_names() -> None:
    tokenizer, words = made("byte_level", False)
    other = PlainWords(tokenizer)
    theirs = other.hide("</s>")
    assert theirs != words.hide("</s>")
    assert guarded(encoded(words, words.hide(theirs))) == []
    assert guarded(encoded(words, theirs)) == []


def test_markers_stand_in_no_text() -> None:
    _, words = made("byte_level", False)
    markers = [words.marker(number) for number in range(300)]
    assert len(set(markers)) == 300
    assert not any(one in other for one in markers[:20] for other in markers if one != other)
    assert all(words.hide(marker) == marker == words.revealed(marker) for marker in markers)


def test_further_tokens_are_guarded_that_are_not_special() -> None:
    """An end of answers that is an ordinary piece, made by merges: what people write is split into its parts."""
    pieces = {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}
    tokenizer = Tokenizer(models.BPE(pieces, [("a", "b"), ("ab", "c")]))
    words = PlainWords(tokenizer, {2})
    assert own(tokenizer, "abc") == [4]
    assert encoded(words, words.hide("cabab")) == [3, 0, 1, 0, 1]
    assert encoded(words, "cab") == [3, 2]


def test_an_added_token_that_is_not_special_stays_as_it_is() -> None:
    tokenizer = byte_level(normalized=False)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    id_ = tokenizer.token_to_id("<think>")
    assert id_ in encoded(PlainWords(tokenizer), PlainWords(tokenizer).hide("<think>"))
    guarding = PlainWords(tokenizer, {id_})
    assert id_ not in encoded(guarding, guarding.hide("<think>"))
    assert id_ in encoded(guarding, "<think>")


def test_ids_that_are_nowhere_are_no_names() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    words = PlainWords(tokenizer, {77})
    assert encoded(words, words.hide("ab<s>")) == own(tokenizer, "ab<s>") == [0, 1]
