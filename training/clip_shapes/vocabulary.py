"""The tokenizer of `clip-shapes`, and what an expression names.

A word-level vocabulary of the words of scene expressions. Text is lower-cased, everything but words is dropped, an unknown
word becomes `<unk>`. The tokenizer puts the start and the end token around the text. As in OpenAI's CLIP the end token has
the highest id, so that both ways to find it (by its id, by the largest id of a row) agree, and is the padding too: a causal
tower pooled at the first end token never sees what follows.
"""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel

from gap_export.boxes.scenes import COLOURS, SHAPES, SIZES

UNK, BOS, EOS = "<unk>", "<|startoftext|>", "<|endoftext|>"
_GRAMMAR_WORDS = ("the", "on", "at", "of", "left", "right", "top", "bottom", "above", "below")
VOCABULARY: tuple[str, ...] = (UNK, *_GRAMMAR_WORDS, *SIZES, *COLOURS, *SHAPES, BOS, EOS)
TOKEN_ID: dict[str, int] = {token: index for index, token in enumerate(VOCABULARY)}
CONTEXT = 24  # tokens; the longest expression of a scene takes 12 with start and end

ANY = -1
Kind = tuple[int, int, int]
"""What a phrase says of an object: index of shape, of colour, of size; `ANY` where it says nothing."""

_PHRASE = re.compile(rf"the (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})")


def build_tokenizer() -> Tokenizer:
    """The tokenizer as it is written to tokenizer.json."""
    tokenizer = Tokenizer(WordLevel(TOKEN_ID, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, TOKEN_ID[BOS]), (EOS, TOKEN_ID[EOS])]
    )
    tokenizer.add_special_tokens([UNK, BOS, EOS])
    return tokenizer


def text_ids(expressions: list[str]) -> list[list[int]]:
    """Token ids of the expressions, all rows `CONTEXT` long."""
    tokenizer = build_tokenizer()
    tokenizer.enable_padding(length=CONTEXT, pad_id=TOKEN_ID[EOS], pad_token=EOS)
    return [encoding.ids for encoding in tokenizer.encode_batch(expressions)]


def named_kinds(expression: str) -> tuple[Kind, Kind]:
    """What the expression names: the meant object and the one it is related to, or the meant one twice.

    Raises:
        ValueError: the expression is not one of the scene grammar.
    """
    kinds = [
        (
            SHAPES.index(shape),
            COLOURS.index(colour) if colour else ANY,
            SIZES.index(size) if size else ANY,
        )
        for size, colour, shape in _PHRASE.findall(expression)
    ]
    if len(kinds) not in (1, 2):
        raise ValueError(f"names {len(kinds)} objects, not one or two: {expression!r}")
    return kinds[0], kinds[-1]
