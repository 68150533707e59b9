"""Small tokenizers of every kind that checkpoints have, all with the same special tokens."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

UNKNOWN = "<unk>"
NAMES = (
    UNKNOWN,
    "<s>",
    "</s>",
    "<<s>>",
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "[SEP]",
)
"""Ids 0, 1, ...; some are parts of others, or begin as others end."""

CORPUS = [
    "where is the red circle? it is on the left of the mug, isn't it",
    "user assistant system the s image im_start im_end of what you see",
    "ab abc bcd </s> <s> <|im_end|> naïve café [1.0, 2.5]",
] * 3
BLANK = "\u2581"


def byte_level(normalized: bool) -> Tokenizer:
    """As of GPT-2 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _train(
        tokenizer,
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=[*NAMES]),
        normalized,
    )
    return tokenizer


def llama(normalized: bool) -> Tokenizer:
    """SentencePiece as of Llama 2: a blank in front, bytes where there is no piece."""
    tokenizer = _with_bytes(normalized)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace(normalized: bool) -> Tokenizer:
    """The same in its newer form."""
    tokenizer = _with_bytes(normalized)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram(normalized: bool) -> Tokenizer:
    """As of T5, compatibility forms taken for each other."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(BLANK)
    tokenizer.decoder = decoders.Metaspace(BLANK)
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=[*NAMES], unk_token=UNKNOWN, show_progress=False
    )
    _train(tokenizer, trainer, normalized)
    return tokenizer


def word_piece(normalized: bool) -> Tokenizer:
    """As of BERT: lower case, no accents, control characters and those of private use left out."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=140, special_tokens=[*NAMES], show_progress=False)
    _train(tokenizer, trainer, normalized)
    return tokenizer


def words(normalized: bool) -> Tokenizer:
    """A list of words, as of the bundled model."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=80, special_tokens=[*NAMES], show_progress=False)
    _train(tokenizer, trainer, normalized)
    return tokenizer


def greedy_names(normalized: bool) -> Tokenizer:
    """Special tokens that take the blanks around them, or stand as words alone."""
    tokenizer = byte_level(normalized)
    _add(tokenizer, normalized, lstrip=True, rstrip=True, single_word=True)
    return tokenizer


KINDS: dict[str, Callable[[bool], Tokenizer]] = {
    each.__name__: each for each in (byte_level, llama, metaspace, unigram, word_piece, words)
}


def with_start(tokenizer: Tokenizer) -> Tokenizer:
    """One that puts `<s>` in front of every text."""
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return tokenizer


def _with_bytes(normalized: bool) -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(BLANK)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=110, show_progress=False))
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token=UNKNOWN))
    import json

    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    listed = [*NAMES, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer.model = models.BPE(
        {piece: id_ for id_, piece in enumerate(listed)},
        merges,
        byte_fallback=True,
        fuse_unk=True,
        unk_token=UNKNOWN,
    )
    _add(tokenizer, normalized)
    return tokenizer


def _train(tokenizer: Tokenizer, trainer: object, normalized: bool) -> None:
    tokenizer.train_from_iterator(CORPUS, trainer)
    _add(tokenizer, normalized)


def _add(tokenizer: Tokenizer, normalized: bool, **flags: bool) -> None:
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=normalized, **flags) for name in NAMES]
    )
    assert [tokenizer.token_to_id(name) for name in NAMES] == list(range(len(NAMES)))
