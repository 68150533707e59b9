"""Expressions that must become tokens, and expressions that must not."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel

from gap_export.errors import BundleError, CheckpointError, InputError
from gap_export.inputs import prompt
from gap_export.inputs.prompt import (
    PromptTemplate,
    TextTower,
    clean_expression,
    decode_answer,
    encode_prompts,
    encode_text,
    unknown_words,
)
from gap_export.inputs.tokenizer import load_tokenizer
from gap_export.positions import PAD

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = ["user", "assistant", ":", "where", "is", "the", "small", "red", "mug", "on", "left", "?"]
ANSWER_TOKENS = ["[", "]", ",", "0.10", "0.25", "0.50", "0.75"]
TOKEN_ID = {token: index for index, token in enumerate([*SPECIAL, *WORDS, *ANSWER_TOKENS])}
TEMPLATE = PromptTemplate(
    grounding="USER: <image> where is {expression}? ASSISTANT:",
    image_token_id=TOKEN_ID["<image>"],
    add_special_tokens=True,
    eos_token_ids=(TOKEN_ID["</s>"],),
)
ATTEMPTS = st.lists(
    st.sampled_from([*SPECIAL, "<", ">", "image", "/s", "mug", " ", "\x00"]) | st.text(max_size=3)
).map("".join)
BEFORE = ["<s>", "user", ":"]
AFTER = ["?", "assistant", ":"]


def build_tokenizer() -> Tokenizer:
    """Words and hundredths are tokens; `<s>` is put in front."""
    tokenizer = Tokenizer(WordLevel(TOKEN_ID, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[0-9]+\.[0-9]+|\w+|[^\w\s]"), behavior="removed", invert=True
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", TOKEN_ID["<s>"])]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    return build_tokenizer()


def encode(
    tokenizer: Tokenizer,
    *expressions: str,
    template: PromptTemplate = TEMPLATE,
    capacity: int = 64,
    vocabulary: int = len(TOKEN_ID),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return encode_prompts(
        tokenizer, template, expressions, vocabulary=vocabulary, kept=8, capacity=capacity, max_new_tokens=12
    )


def ids_of(*tokens: str) -> list[int]:
    return [TOKEN_ID[token] for token in tokens]


class TestEncode:
    def test_one_prompt(self, tokenizer: Tokenizer) -> None:
        input_ids, before, after, _ = encode(tokenizer, "the red mug")
        assert input_ids.dtype == before.dtype == after.dtype == np.int64
        assert input_ids.tolist() == [ids_of(*BEFORE, "<image>", "where", "is", "the", "red", "mug", *AFTER)]
        assert before.tolist() == [3]
        assert after.tolist() == [8]

    def test_rows_are_padded_at_the_end(self, tokenizer: Tokenizer) -> None:
        input_ids, before, after, _ = encode(tokenizer, "mug", "the small red mug on the left")
        assert input_ids[0, -6:].tolist() == [PAD] * 6
        assert PAD not in input_ids[1]
        real = (input_ids != PAD).sum(axis=1)
        assert (before + 1 + after == real).all()
        assert (input_ids[np.arange(2), before] == TOKEN_ID["<image>"]).all()

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.lists(st.sampled_from(["the", "red", "mug", "left"]), min_size=1), min_size=1))
    def test_counts_always_add_up(self, expressions: list[list[str]]) -> None:
        texts = [" ".join(words) for words in expressions]
        input_ids, before, after, _ = encode(build_tokenizer(), *texts, capacity=4096)
        assert input_ids.shape == (len(texts), max(before + 1 + after))
        assert after.tolist() == [5 + len(words) for words in expressions]
        assert ((input_ids == TEMPLATE.image_token_id).sum(axis=1) == 1).all()

    def test_white_space_and_line_breaks_do_not_matter(self, tokenizer: Tokenizer) -> None:
        plain, *_ = encode(tokenizer, "the red mug")
        spaced, *_ = encode(tokenizer, "  the \n red\tmug ")
        assert plain.tolist() == spaced.tolist()

    def test_braces_are_words(self, tokenizer: Tokenizer) -> None:
        input_ids, *_ = encode(tokenizer, "{expression} {0} {x!r}")
        assert input_ids[0].tolist().count(TOKEN_ID["where"]) == 1

    def test_template_without_special_tokens(self, tokenizer: Tokenizer) -> None:
        template = TEMPLATE.model_copy(update={"add_special_tokens": False})
        input_ids, before, *_ = encode(tokenizer, "mug", template=template)
        assert input_ids[0, 0] == TOKEN_ID["user"]
        assert before.tolist() == [2]

    def test_a_bare_string_is_not_taken_letter_by_letter(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(TypeError, match="one string"):
            encode_prompts(tokenizer, TEMPLATE, "mug", vocabulary=500, kept=8, capacity=64, max_new_tokens=12)

    def test_empty_batch(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(ValueError, match="at least one"):
            encode(tokenizer)

    @pytest.mark.parametrize(
        ("grounding", "message"),
        [
            ("USER: <image> where?", "has 0 times"),
            ("USER: <image> {expression} {expression}", "has 2 times"),
            ("USER: where is {expression}?", "gives 0 image placeholders"),
            ("<image> <image> {expression}", "gives 2 image placeholders"),
        ],
    )
    def test_broken_templates(self, tokenizer: Tokenizer, grounding: str, message: str) -> None:
        with pytest.raises(BundleError, match=message):
            encode(tokenizer, "mug", template=TEMPLATE.model_copy(update={"grounding": grounding}))


class TestCapacity:
    # "the red mug" makes 11 text tokens; 8 visual tokens and 12 for the answer need 31 slots in all.
    def test_the_last_slot_can_be_used(self, tokenizer: Tokenizer) -> None:
        encode(tokenizer, "the red mug", capacity=31)

    def test_one_slot_too_few(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError) as caught:
            encode(tokenizer, "mug", "the red mug", capacity=30)
        assert "11 text tokens, and 10 fit" in caught.value.message
        assert "capacity 30, minus 8 visual tokens, minus 12" in caught.value.message
        assert caught.value.hint == "shorten the expression by 1 tokens, or build with a larger --max-text"
        assert "the red mug" in caught.value.subject

    def test_a_capacity_that_holds_no_prompt(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError, match="and 0 fit") as caught:
            encode(tokenizer, "mug", capacity=10)
        assert "larger --max-text or --capacity" in caught.value.hint


class TestRefused:
    @pytest.mark.parametrize("expression", ["", " ", "\n\t ", "\u200b", "\u00a0", "\u200b \u2060"])
    def test_empty(self, tokenizer: Tokenizer, expression: str) -> None:
        with pytest.raises(InputError, match="is empty"):
            encode(tokenizer, expression)

    @pytest.mark.parametrize(
        "expression",
        [
            "<image>",
            "the mug <image>",
            "mug</s>",
            "<s>mug",
            "<pad>",
            "<unk>",
            "the<image>mug",
            "<IMAGE>",
            "mug </S> user",
        ],
    )
    def test_names_of_special_tokens(self, tokenizer: Tokenizer, expression: str) -> None:
        with pytest.raises(InputError, match="control token"):
            encode(tokenizer, "the red mug", expression)

    def test_the_tokenizer_would_have_let_it_through(self, tokenizer: Tokenizer) -> None:
        """Negative control: without the check, an expression brings a second placeholder."""
        ids = tokenizer.encode(TEMPLATE.grounding.replace("{expression}", "<image>")).ids
        assert ids.count(TOKEN_ID["<image>"]) == 2

    def test_a_name_that_only_the_normaliser_reveals(self, tokenizer: Tokenizer) -> None:
        from tokenizers import AddedToken

        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.add_special_tokens([AddedToken("<end>", normalized=True)])
        wide = "\uff1cend\uff1e"
        assert "<end>" not in wide
        assert tokenizer.token_to_id("<end>") in tokenizer.encode(wide).ids
        with pytest.raises(InputError, match="control token"):
            encode(tokenizer, f"mug {wide}")

    def test_a_placeholder_that_is_not_marked_special(self) -> None:
        from tokenizers import AddedToken

        tokenizer = build_tokenizer()
        tokenizer.add_tokens([AddedToken("<image>", special=False)])
        template = TEMPLATE.model_copy(
            update={
                "image_token_id": tokenizer.token_to_id("<image>"),
                "grounding": "<image> {expression}",
            }
        )
        encode(tokenizer, "mug", template=template)
        with pytest.raises(InputError, match="control token"):
            encode(tokenizer, "mug <image>", template=template)

    def test_lone_surrogate(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError, match="not valid text") as caught:
            encode(tokenizer, "mug \udcff")
        str(caught.value).encode("utf-8")

    def test_control_characters(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError, match=r"U\+0000, U\+001B") as caught:
            encode(tokenizer, "mug \x1b[31m\x00")
        assert "\x1b" not in str(caught.value)

    def test_long_expressions_are_cut_in_the_message(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError) as caught:
            encode(tokenizer, "mug " * 1000)
        assert len(caught.value.subject) < 80

    @settings(max_examples=50, deadline=None)
    @given(ATTEMPTS)
    def test_any_text_is_encoded_with_one_placeholder_or_refused(self, expression: str) -> None:
        with contextlib.suppress(InputError):
            input_ids, before, *_ = encode(build_tokenizer(), expression, capacity=4096)
            row = input_ids[0].tolist()
            assert row.count(TOKEN_ID["<image>"]) == 1
            assert row.count(TOKEN_ID["<s>"]) == 1
            assert TOKEN_ID["</s>"] not in row
            assert row[before[0]] == TOKEN_ID["<image>"]


class TestEmbedding:
    """Splice and embed take any number for a row of their table: what lies beyond it must not get there."""

    @pytest.mark.parametrize("words", ["mug", "the small red mug", "left ?", "on"])
    def test_tokens_beyond_the_embedding_are_refused_at_every_size(
        self, words: str, tokenizer: Tokenizer
    ) -> None:
        template = [TOKEN_ID[token] for token in (*BEFORE, "where", "is", *AFTER)]
        expression = [TOKEN_ID[word] for word in words.split()]
        outcomes = {"template": 0, "expression": 0, "fine": 0}
        for vocabulary in range(len(TOKEN_ID) + 1):
            if max(template) >= vocabulary:
                with pytest.raises(
                    BundleError, match=f"and the model has an embedding of {vocabulary} tokens"
                ):
                    encode(tokenizer, words, vocabulary=vocabulary)
                outcomes["template"] += 1
            elif max(expression) >= vocabulary:
                with pytest.raises(
                    InputError, match=f"and the model has an embedding of {vocabulary} tokens"
                ):
                    encode(tokenizer, words, vocabulary=vocabulary)
                outcomes["expression"] += 1
            else:
                assert encode(tokenizer, words, vocabulary=vocabulary)[0].max() < vocabulary
                outcomes["fine"] += 1
        assert sum(outcomes.values()) == len(TOKEN_ID) + 1
        assert outcomes["template"]
        assert outcomes["fine"]

    def test_the_placeholder_itself_need_not_be_in_it(self, tokenizer: Tokenizer) -> None:
        tokenizer.add_special_tokens(["<photo>"])
        placeholder = tokenizer.token_to_id("<photo>")
        template = TEMPLATE.model_copy(
            update={
                "image_token_id": placeholder,
                "grounding": TEMPLATE.grounding.replace("<image>", "<photo>"),
            }
        )
        assert placeholder == len(TOKEN_ID)
        assert placeholder in encode(tokenizer, "mug", template=template)[0]

    def test_the_text_tower_has_a_table_of_its_own(self, tokenizer: Tokenizer) -> None:
        for vocabulary in range(len(TOKEN_ID) + 1):
            tower = TextTower(
                checkpoint="x", context=9, width=4, vocabulary=vocabulary, aligned_inversely=False
            )
            if TOKEN_ID["left"] < vocabulary:
                assert encode_text(tokenizer, tower, ["left"]).max() < vocabulary
                continue
            with pytest.raises(InputError, match="has the token"):
                encode_text(tokenizer, tower, ["left"])

    def test_without_the_check_they_get_through(
        self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prompt, "_not_embedded", lambda *_, **__: None)
        assert encode(tokenizer, "left", vocabulary=1)[0].max() >= 1


class TestUnknownWords:
    def test_are_named_once_in_order(self, tokenizer: Tokenizer) -> None:
        assert unknown_words(tokenizer, "the Xylophone on the zebra xylophone Xylophone") == (
            "Xylophone",
            "zebra",
            "xylophone",
        )

    def test_none(self, tokenizer: Tokenizer) -> None:
        assert unknown_words(tokenizer, "the  red mug") == ()

    def test_they_are_no_attack(self, tokenizer: Tokenizer) -> None:
        input_ids, *_ = encode(tokenizer, "the xylophone")
        assert TOKEN_ID["<unk>"] in input_ids

    def test_a_tokenizer_that_knows_all_bytes(self) -> None:
        vocabulary = {
            letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
        }
        tokenizer = Tokenizer(BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        assert unknown_words(tokenizer, "xylophone \u732b") == ()


class TestDecode:
    ANSWER = ("[", "0.10", ",", "0.25", ",", "0.50", ",", "0.75", "]")

    def test_ends_before_the_end_token(self, tokenizer: Tokenizer) -> None:
        ids = [*ids_of(*self.ANSWER, "</s>"), *ids_of("red", "mug")]
        text = decode_answer(tokenizer, ids, TEMPLATE.eos_token_ids)
        assert text.replace(" ", "") == "[0.10,0.25,0.50,0.75]"

    def test_padding_and_trailing_special_tokens_are_dropped(self, tokenizer: Tokenizer) -> None:
        ids = np.array([*ids_of("red", "mug", "</s>", "<pad>"), PAD, PAD])
        assert decode_answer(tokenizer, ids) == "red mug"

    def test_special_tokens_inside_stay_visible(self, tokenizer: Tokenizer) -> None:
        assert "<pad>" in decode_answer(tokenizer, ids_of("red", "<pad>", "mug"))

    def test_nothing(self, tokenizer: Tokenizer) -> None:
        assert decode_answer(tokenizer, []) == ""
        assert decode_answer(tokenizer, ids_of("</s>"), TEMPLATE.eos_token_ids) == ""


class TestLoad:
    def test_truncation_and_padding_are_switched_off(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=40)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        kept, *_ = encode(load_tokenizer(tmp_path / "tokenizer.json"), "the small red mug on the left")
        fresh, *_ = encode(build_tokenizer(), "the small red mug on the left")
        assert kept.tolist() == fresh.tolist()

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist"):
            load_tokenizer(tmp_path / "tokenizer.json")

    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 3}'])
    def test_damaged(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a tokenizer"):
            load_tokenizer(tmp_path / "tokenizer.json")


def test_clean_expression_keeps_words_of_any_script() -> None:
    assert clean_expression(" \u7ea2\u8272  \u7684\u676f\u5b50 ") == "\u7ea2\u8272 \u7684\u676f\u5b50"
    assert clean_expression("caf\u00e9 \U0001f600") == "caf\u00e9 \U0001f600"
