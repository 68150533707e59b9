"""The small Llama of checkpoints in the layouts of their authors: its sizes and its tokenizer."""

from __future__ import annotations

from pathlib import Path

VOCABULARY, WIDTH, LAYERS, HEADS = 64, 64, 2, 4
LLAMA = {"width": WIDTH, "hidden": 96, "layers": LAYERS, "heads": HEADS, "kv_heads": HEADS}
WORDS = [
    "USER", ":", "?", "ASSISTANT", "where", "is", "the", "red", "green", "blue",
    "circle", "square", "large", "on", "left", "in", "a", "picture", "mug", "cat",
]  # fmt: skip


def write_tokenizer(folder: Path, added: list[str]) -> None:
    """Words for ids from 3 on; added tokens take the last ids of the table."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    words = ["<unk>", "<s>", "</s>", *WORDS]
    words += [f"w{number}" for number in range(VOCABULARY - len(words) - len(added))]
    vocabulary = {word: id_ for id_, word in enumerate([*words, *added])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [AddedToken(word, special=True, normalized=False) for word in ("<unk>", "<s>", "</s>", *added)]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
