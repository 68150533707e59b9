"""Showing text while it is generated: against the whole decode, for tokenizers of all kinds and ids in any order."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models

import gap_export
from gap_export.errors import CheckpointError, InputError
from gap_export.runtime.answer.decoder_stages import Stages
from gap_export.runtime.answer.text_stream import TextStream, check_stop

REPLACEMENT = "\ufffd"
BLANK = "\u2581"
SAMPLE = "né 😀 日本\u0301 . a ' s"
STOPS = [".", "né", "  ", "😀", "a ", REPLACEMENT, " ' ", "ababac", "ab", "abc", "</s>", "日本\u0301"]


def byte_characters() -> list[str]:
    """What byte-level tokenizers write for every byte: itself where it can be printed, and further characters for the others."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]


def with_special(tokenizer: Tokenizer) -> Tokenizer:
    """A special token, and an added one that is none."""
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["<box é>"])
    return tokenizer


def byte_level(decoder: Any = None) -> Tokenizer:
    """All bytes, and tokens of random ones and of parts of a text, cut anywhere."""
    rng, characters = random.Random(0), byte_characters()
    text = (SAMPLE * 3).encode()
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(rng.choices(range(256), k=rng.randint(2, 4))) for _ in range(40)]
    tokens += [text[at : at + rng.randint(2, 6)] for at in rng.choices(range(len(text)), k=120)]
    tokens += [b"\x82\xac\xe2", b"\xe2", b"\xf0\x9f", b"\x98\x80", b"\xef\xbf\xbd", b"ab", b"abac"]
    names = dict.fromkeys("".join(characters[byte] for byte in token) for token in tokens)
    tokenizer = Tokenizer(models.BPE({"": 0, **{name: id_ for id_, name in enumerate(names, 1)}}, []))
    tokenizer.decoder = decoders.ByteLevel() if decoder is None else decoder
    return with_special(tokenizer)


def sentencepiece(*stages: Any, unigram: bool = False) -> Tokenizer:
    """Bytes as `<0x41>`, and words with a blank written as `▁`."""
    words = [BLANK, BLANK * 2, f"{BLANK}a", "a", "b", "c", "né", f"{BLANK}日本", "\u0301", "😀", ".", "'"]
    words += ["<0x4>", "<0xg1>", "ab", f"{BLANK}ab", REPLACEMENT, "s"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    model = (
        models.Unigram([(name, -1.0) for name in names], 0, True)
        if unigram
        else models.BPE({name: id_ for id_, name in enumerate(names)}, [], byte_fallback=True)
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(list(stages))
    return with_special(tokenizer)


def words(decoder: Any, *, unknown: str = "[UNK]") -> Tokenizer:
    """Words and the parts that follow them."""
    names = [
        unknown,
        *"abc.,!?'",
        "né",
        "##é",
        "##.",
        "do",
        "not",
        "n't",
        "##n't",
        "'s",
        "##s",
        "日本",
        "[",
        "]",
    ]
    names += ["##ab", "ab", "a</w>", "b</w>", "<pad>", "|", " ", "12", "##3", ""]
    tokenizer = Tokenizer(models.WordLevel({name: id_ for id_, name in enumerate(names)}, unk_token=unknown))
    if decoder is not None:
        tokenizer.decoder = decoder
    return with_special(tokenizer)


def asset(name: str) -> Tokenizer:
    folder = Path(gap_export.__file__).parent / "checkpoint" / "assets" / name
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


to_blank = decoders.Replace(BLANK, " ")
fallback, fuse = decoders.ByteFallback(), decoders.Fuse()

CUT: dict[str, Tokenizer] = {
    "byte-level": byte_level(),
    "byte-level, stripped": byte_level(decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])),
    "llama": sentencepiece(to_blank, fallback, fuse, decoders.Strip(" ", 1, 0)),
    "gemma": sentencepiece(to_blank, fallback, fuse),
    "three blanks": sentencepiece(to_blank, fallback, fuse, decoders.Strip(" ", 3, 0)),
    "metaspace": sentencepiece(decoders.Metaspace()),
    "metaspace, never": sentencepiece(decoders.Metaspace(prepend_scheme="never"), unigram=True),
    "metaspace, bytes": sentencepiece(fallback, decoders.Metaspace(), unigram=True),
    "pattern": sentencepiece(decoders.Replace(Regex(f"{BLANK}+"), " ")),
    "word piece": words(decoders.WordPiece(prefix="##", cleanup=True)),
    "word piece, not cleaned": words(decoders.WordPiece(prefix="##", cleanup=False)),
    "words": words(None),
    "word piece, joined": words(
        decoders.Sequence(
            [
                decoders.WordPiece(cleanup=True),
                fuse,
                *(decoders.Replace(*pair) for pair in (("ab", "ba"), (" do ", "a"), ("aa", ""), ("é.", " "))),
                decoders.Strip(" ", 2, 0),
                decoders.Replace("a ", "ab"),
            ]
        )
    ),
    "clip-shapes": asset("clip-shapes"),
    "llava-shapes": asset("llava-shapes"),
}
"""Whose text can be shown token by token."""

WHOLE: dict[str, Tokenizer] = {
    "bpe": words(decoders.BPEDecoder(suffix="</w>")),
    "ctc": words(decoders.CTC()),
    "a pattern across tokens": words(decoders.Sequence([fuse, decoders.Replace(Regex("a+b"), "c")])),
    "cleaned as a whole": words(decoders.Sequence([fuse, decoders.WordPiece(cleanup=True)])),
    "bytes after a pattern": sentencepiece(decoders.Replace(Regex("<0x4[0-9]>"), "<0xFF>"), fallback),
}
"""Whose text comes at the end."""

TOKENIZERS = CUT | WHOLE


def whole(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text


def until_stop(text: str, stop: Sequence[str]) -> str:
    found = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(found)] if found else text


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, list[int]]:
    """A tokenizer and ids: in any order, or the tokens of a text, byte by byte where it has no other; some that are in no vocabulary."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    some = st.integers(0, size + 1)
    late = st.integers(max(0, size - 60), size + 1)  # words and special tokens
    run = st.sampled_from(list(SAMPLE)).map(lambda character: byte_ids(tokenizer, character))
    part = st.lists(some, max_size=3) | st.lists(late, max_size=6) | run
    ids = [id_ for ids in draw(st.lists(part, max_size=10)) for id_ in ids]
    return name, ids


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as one token per byte, or as tokens of its characters; empty where there are none."""
    characters = byte_characters()
    for names in (
        [f"<0x{byte:02X}>" for byte in text.encode()],
        [characters[byte] for byte in text.encode()],
        list(text),
    ):
        ids = [tokenizer.token_to_id(name) for name in names]
        if None not in ids:
            return [id_ for id_ in ids if id_ is not None]
    return []


@st.composite
def stops(draw: st.DrawFn, text: str) -> list[str]:
    """Stop strings, some of them from the text itself."""
    ends = st.integers(0, len(text))
    inside = st.tuples(ends, ends).map(lambda ends: text[min(ends) : max(ends)][:12]).filter(bool)
    either = st.sampled_from(STOPS) | inside if text else st.sampled_from(STOPS)
    return draw(st.lists(either, max_size=4))


@settings(max_examples=200)
@given(answer=answers())
def test_pieces_joined_are_the_whole(answer: tuple[str, list[int]]) -> None:
    name, ids = answer
    tokenizer = TOKENIZERS[name]
    stream = TextStream(tokenizer)
    pieces: list[str] = []
    for id_ in ids:
        pieces.append(stream.push(id_))
        assert stream.text == "".join(pieces)
        assert whole(tokenizer, stream.ids) + stream.remainder == stream.text
        assert stream.ids == ids[: len(stream.ids)]
    shown = stream.text
    pieces.append(stream.finish())
    expected = whole(tokenizer, ids)
    assert "".join(pieces) == stream.text == expected
    assert (stream.ids, stream.remainder, stream.stopped) == (ids, "", False)
    assert stream.finish() == ""
    assert name in CUT or shown == ""


@settings(max_examples=100)
@given(answer=answers())
def test_text_is_held_back_no_longer_than_it_must(answer: tuple[str, list[int]]) -> None:
    name, ids = answer
    if name in WHOLE:
        return
    tokenizer = CUT[name]
    stream = TextStream(tokenizer)
    special = {tokenizer.token_to_id("</s>"), None}
    last = ""
    for number, id_ in enumerate(ids, 1):
        stream.push(id_)
        text = whole(tokenizer, ids[:number])
        token = tokenizer.id_to_token(id_)
        if id_ not in special and token:
            last = token
        if name in ("word piece, joined", "llava-shapes"):
            assert len(text) - len(stream.text) <= 8
        elif name.startswith("byte-level"):
            assert stream.text in (text, text.removesuffix(REPLACEMENT))
        elif not last.startswith("<0x") or name in ("metaspace", "metaspace, never", "pattern"):
            assert stream.text == text


@settings(max_examples=200)
@given(answer=answers(), data=st.data())
def test_text_ends_before_the_first_stop_string(answer: tuple[str, list[int]], data: st.DataObject) -> None:
    name, ids = answer
    tokenizer = TOKENIZERS[name]
    stop = data.draw(stops(whole(tokenizer, ids)))
    text = whole(tokenizer, ids)
    expected = until_stop(text, stop)
    stream = TextStream(tokenizer, stop)
    for id_ in ids:
        shown = stream.push(id_)
        # In particular no beginning of a stop string, and no half character.
        assert expected.startswith(stream.text)
        assert stream.text.endswith(shown)
        assert whole(tokenizer, stream.ids) + stream.remainder == stream.text
        if stream.stopped:
            break
    stream.finish()
    assert stream.text == expected
    assert stream.stopped is (expected != text)
    kept = stream.ids
    assert kept == ids[: len(kept)]
    assert whole(tokenizer, kept) + stream.remainder == expected
    if stream.stopped:
        assert stream.finish() == ""
    if name in CUT:
        # No further token has its text within what is shown.
        for count in range(len(kept) + 1, len(ids) + 1):
            further = whole(tokenizer, ids[:count])
            assert len(further) > len(expected) or not text.startswith(further)


def test_text_is_the_same_however_it_is_cut_into_tokens() -> None:
    tokenizer = CUT["byte-level"]
    text = "naïve café 😀 stop here, 日本 STOP not shown"
    stream = TextStream(tokenizer, ["STOP", "stop there"])
    pieces = [stream.push(id_) for id_ in byte_ids(tokenizer, text)]
    assert stream.stopped
    assert stream.text == "".join(pieces) == "naïve café 😀 stop here, 日本 "
    assert "stop h" in pieces  # held back until it could not become a stop string any more
    assert (whole(tokenizer, stream.ids), stream.remainder) == (stream.text, "")
    assert stream.push(1) == ""


def test_a_stop_string_in_the_middle_of_a_token_leaves_a_remainder() -> None:
    vocabulary = {"one": 0, "two.END.three": 1, "four": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="one"))
    stream = TextStream(tokenizer, [".END."])
    assert [stream.push(0), stream.push(1), stream.push(2)] == ["one", " two", ""]
    assert (stream.stopped, stream.text, stream.ids, stream.remainder) == (True, "one two", [0], " two")


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["b", "abc"], "xabc", "x"),  # the one that begins first, though the other is complete before
        (["b", "abc"], "xabd", "xa"),
        (["b", "abc"], "xab", "xa"),
        (["aab"], "aaab", "a"),
        (["abab", "ba"], "abab", ""),
        (["x" * 1000], "x" * 999, "x" * 999),
        (["x" * 1000], "y" + "x" * 1003, "y"),
    ],
)
def test_stop_strings_that_overlap(stop: list[str], text: str, expected: str) -> None:
    tokenizer = CUT["byte-level"]
    stream = TextStream(tokenizer, stop)
    for id_ in byte_ids(tokenizer, text):
        stream.push(id_)
    stream.finish()
    assert (stream.text, stream.stopped) == (expected, expected != text)


def test_a_run_of_bytes_is_shown_when_it_has_ended() -> None:
    tokenizer = CUT["llama"]
    smile = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in ("😀" * 3).encode()]
    a = tokenizer.token_to_id("a")
    stream = TextStream(tokenizer)
    assert [stream.push(id_) for id_ in [*smile, a]] == [""] * 12 + ["😀😀😀a"]
    # One byte that is none of UTF-8 takes the good ones with it.
    stream = TextStream(tokenizer)
    bad = tokenizer.token_to_id("<0xFF>")
    assert [stream.push(id_) for id_ in [*smile, bad, a]] == [""] * 13 + [REPLACEMENT * 13 + "a"]


def test_a_stop_string_within_a_run_of_bytes() -> None:
    tokenizer = CUT["llama"]
    run = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é日!é".encode()]
    ids = [tokenizer.token_to_id("a"), *run, tokenizer.token_to_id("b")]
    stream = TextStream(tokenizer, ["!"])
    assert "".join(map(stream.push, ids)) == "aé日"
    assert (stream.ids, stream.remainder, stream.stopped) == (ids[:6], "", True)


@pytest.mark.parametrize("name", sorted(CUT))
def test_a_token_costs_the_same_at_any_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = CUT[name].get_vocab_size()
    rng = random.Random(1)
    # A word after some tokens that may be bytes: a run of bytes is decoded when it has ended.
    ids = [rng.randrange(0 if number % 5 else size - 14, size) for number in range(1500)]
    check_cost(CUT[name], ids, monkeypatch)


@pytest.mark.parametrize(
    "tokens",
    [[b"\xf0\x9f", b"\x98", b"\x80"], [b"\xff"], [b"\x82\xac\xe2"], [b"\xe2", b"\x82"], [b"\xef\xbf\xbd"]],
)
def test_bytes_that_never_end_a_character_cost_no_more(
    tokens: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, characters = CUT["byte-level"], byte_characters()
    names = ["".join(characters[byte] for byte in token) for token in tokens]
    ids = [tokenizer.token_to_id(name) for name in names]
    assert None not in ids
    check_cost(tokenizer, ids * 500, monkeypatch)


def test_a_character_after_many_bytes_that_are_none() -> None:
    tokenizer = CUT["byte-level"]
    noise = [tokenizer.token_to_id("ÿ")]
    for count in range(1, 24):
        ids = [*noise * count, *byte_ids(tokenizer, "😀é"), *noise * count, *byte_ids(tokenizer, "日")]
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.push, ids), stream.finish()]) == whole(tokenizer, ids)


def check_cost(tokenizer: Tokenizer, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens are decoded with every further one, and their text is right."""
    stream = TextStream(tokenizer)
    sizes: list[int] = []
    join = Stages.join

    def counted(stages: Stages, tokens: Sequence[str]) -> str:
        sizes.append(len(tokens))
        return join(stages, tokens)

    monkeypatch.setattr(Stages, "join", counted)
    for id_ in ids:
        stream.push(id_)
    assert max(sizes) <= 20
    assert len(sizes) <= 2 * len(ids)
    stream.finish()
    assert stream.text == whole(tokenizer, ids)


def test_a_hundred_long_stop_strings_hold_nothing_up() -> None:
    tokenizer = CUT["byte-level"]
    stop = [("a" * 999 + chr(0x100 + number)) for number in range(100)]
    ids = byte_ids(tokenizer, "a" * 1500 + "b")
    stream = TextStream(tokenizer, stop)
    began = time.process_time()
    for id_ in ids:
        stream.push(id_)
    assert time.process_time() - began < 5
    assert stream.text == "a" * 1500 + "b"


def test_an_answer_of_nothing() -> None:
    for tokenizer in TOKENIZERS.values():
        stream = TextStream(tokenizer, ["."])
        assert (stream.text, stream.ids, stream.remainder, stream.stopped) == ("", [], "", False)
        assert stream.finish() == ""
        with pytest.raises(RuntimeError, match="ended"):
            stream.push(0)


def test_special_tokens_have_no_text_and_are_kept() -> None:
    tokenizer = CUT["words"]
    a, special, b = (tokenizer.token_to_id(name) for name in ("a", "</s>", "b"))
    stream = TextStream(tokenizer, ["b"])
    assert [stream.push(id_) for id_ in (special, a, special, 10_000, b)] == ["", "a", "", "", " "]
    assert (stream.ids, stream.remainder) == ([special, a, special, 10_000], " ")


def test_a_decoder_written_in_python_is_followed_at_the_end() -> None:
    class Shout:
        def decode_chain(self, tokens: list[str]) -> list[str]:
            return ["".join(tokens).upper()]

    tokenizer = words(decoders.Decoder.custom(Shout()))
    stream = TextStream(tokenizer, ["C"])
    assert [stream.push(tokenizer.token_to_id(name)) for name in "abc"] == ["", "", ""]
    assert (stream.finish(), stream.stopped) == ("AB", True)
    assert whole(tokenizer, stream.ids) + stream.remainder == "AB"


def test_a_decoder_that_fails_is_told_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = words(decoders.Strip(" ", 1, 1))  # the library fails over a token of one blank
    stream = TextStream(tokenizer)
    stream.push(tokenizer.token_to_id(" "))
    with pytest.raises(CheckpointError, match="tokenizer: cannot decode its own tokens: ") as caught:
        stream.finish()
    assert "\n" not in str(caught.value)
    capfd.readouterr()


@pytest.mark.parametrize(
    ("stop", "says"),
    [
        ([str(number) for number in range(101)], "101 stop strings: are more than 100"),
        ([""], "stop string '': is empty"),
        (["a", ""], "stop string '': is empty"),
        ("", "stop string '': is empty"),
        (["x" * 1001], "has 1001 characters"),
        ([3], "stop string 3: is not text"),
        ([b"x"], "is not text"),
        ([None], "is not text"),
        (["\ud800"], "is not valid text"),
        (3, "stop 3: is not a list of texts"),
        (None, "is not a list of texts"),
        (b"ab", "is not a list of texts"),
        ({"a": 1}, "is not a list of texts"),
    ],
)
def test_bad_stop_strings_are_refused_in_one_line(stop: Any, says: str) -> None:
    for check in (check_stop, lambda given: TextStream(CUT["words"], given)):
        with pytest.raises(InputError) as caught:
            check(stop)
        message = str(caught.value)
        assert says in message
        assert "\n" not in message
        assert len(message) < 300


def test_stop_strings_come_back_as_given() -> None:
    assert check_stop(()) == ()
    assert check_stop("END") == ("END",)
    assert check_stop(["a\n", "x" * 1000, "a\n"]) == ("a\n", "x" * 1000, "a\n")
    assert len(check_stop(["x"] * 100)) == 100
