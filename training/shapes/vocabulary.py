"""The tokenizer of `llava-shapes` and the one prompt it was trained with.

A word-level vocabulary: every word of the prompt and of the expressions is one token, and so is every coordinate
from 0.00 to 0.99. Text is lower-cased, punctuation is split off ("square?" -> "square", "?"), an unknown word
becomes `<unk>`. The tokenizer itself puts `<s>` in front, as Llama's does, so a prompt does not spell it out.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel

from gap_export.boxes.scenes import COLOURS, SHAPES, SIZES

SYSTEM_PROMPT = (
    "The assistant answers every question about the picture with the box of the object that is meant."
)
PROMPT = SYSTEM_PROMPT + " USER: <image> where is {expression}? ASSISTANT:"
ANSWER = "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]"
COORDINATE_BINS = 100

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, IMAGE)
PUNCTUATION = (".", ",", "?", ":", "[", "]")
_PROMPT_WORDS = [
    "the",
    "assistant",
    "answers",
    "every",
    "question",
    "about",
    "picture",
    "with",
    "box",
    "of",
    "object",
    "that",
    "is",
    "meant",
    "user",
    "where",
]
_EXPRESSION_WORDS = ["on", "at", "left", "right", "top", "bottom", "above", "below"]

VOCABULARY: tuple[str, ...] = (
    *SPECIAL_TOKENS,
    *PUNCTUATION,
    *(f"{bin_ / COORDINATE_BINS:.2f}" for bin_ in range(COORDINATE_BINS)),
    *_PROMPT_WORDS,
    *_EXPRESSION_WORDS,
    *SIZES,
    *COLOURS,
    *SHAPES,
)
TOKEN_ID: dict[str, int] = {token: index for index, token in enumerate(VOCABULARY)}
FIRST_COORDINATE_ID = TOKEN_ID["0.00"]


def build_tokenizer() -> Tokenizer:
    """The tokenizer as it is written to tokenizer.json."""
    tokenizer = Tokenizer(WordLevel(TOKEN_ID, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    # Keep what matches, drop the rest: a coordinate, a word, or one punctuation mark.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[0-9]+\.[0-9]+|\w+|[^\w\s]"), behavior="removed", invert=True
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, TOKEN_ID[BOS])]
    )
    # WordPiece is used for its joining alone: spaces between words, none before a comma.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace("[ ", "["),
            decoders.Replace(" ]", "]"),
        ]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def prefix_ids() -> list[int]:
    """Ids of everything before the image: `<s>`, the system prompt, "USER:"."""
    return build_tokenizer().encode(PROMPT.split(IMAGE)[0]).ids


def question_ids(expression: str) -> list[int]:
    """Ids of everything between the image and the answer. `expression` in lower case, words split by single spaces."""
    words = ("where is " + expression + " ? assistant :").split()
    return [TOKEN_ID[word] for word in words]


def answer_ids(bins: tuple[int, int, int, int]) -> list[int]:
    """Ids of the answer, end token included: 10 tokens. `bins` are the coordinates in hundredths."""
    comma = TOKEN_ID[","]
    x0, y0, x1, y1 = (FIRST_COORDINATE_ID + bin_ for bin_ in bins)
    return [TOKEN_ID["["], x0, comma, y0, comma, x1, comma, y1, TOKEN_ID["]"], TOKEN_ID[EOS]]
