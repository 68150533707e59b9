"""What the stages of a tokenizer's decoder say of where its text can be cut.

What a decoder makes of a list of tokens is in general not what it makes of its parts: the first token loses its leading blank, a
character is spread over several tokens, and a run of byte tokens that is not UTF-8 becomes replacement characters as a whole, good
characters in it included. From the stages follows where that can happen:

- stages that act on every token alone, or on whether it is the first: the text can be cut after every token;
- `ByteFallback` among them: after every token that is no byte;
- `ByteLevel`: after every token, but for a replacement character at the end, which may be a character that is not complete;
- then, on the joined text, texts that are replaced and characters that are taken from its beginning: these are done here, piece by
  piece.

Any other decoder (`CTC`, `BPEDecoder`, patterns on the joined text, decoders written in Python) has text that cannot be cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import decoders

_LONGEST_REPLACED = 100
"""Characters of a text that is replaced in joined text."""


@dataclass(frozen=True)
class Replaced:
    """A text that is replaced wherever it stands.

    Attributes:
        text: not empty.
        by: what takes its place.
    """

    text: str
    by: str

    def held(self, piece: str) -> int:
        """How many characters at the end of a piece may be the beginning of the text."""
        longest = min(len(piece), len(self.text) - 1)
        return next((size for size in range(longest, 0, -1) if piece.endswith(self.text[:size])), 0)


@dataclass(frozen=True)
class Stripped:
    """A character that is taken from the beginning.

    Attributes:
        content: the character.
        most: how often.
    """

    content: str
    most: int


TextStage = Replaced | Stripped


@dataclass(frozen=True)
class Stages:
    """A decoder whose text can be cut.

    Attributes:
        tokens: turns tokens into text; None for tokens with blanks between them.
        text: what happens to that text then.
        replaced: what happens to every token before `ByteFallback` looks at it; None without that stage.
        lossy: whether a replacement character at the end of a text may be an incomplete character.
    """

    tokens: decoders.Decoder | None = None
    text: tuple[TextStage, ...] = ()
    replaced: tuple[Replaced, ...] | None = None
    lossy: bool = False

    def join(self, tokens: Sequence[str]) -> str:
        """The text of tokens, before the stages that act on text."""
        if self.tokens is None:
            return " ".join(tokens)
        text: str = self.tokens.decode(list(tokens))
        return text

    def may_be_byte(self, token: str) -> bool:
        """Whether `ByteFallback` may take a token for a byte: `<0x0A>`."""
        if self.replaced is None:
            return False
        for each in self.replaced:
            token = token.replace(each.text, each.by)
        return token.startswith("<0x") and token.endswith(">") and len(token.encode()) == 6


class StagedText:
    """Text that comes piece by piece through the stages that act on text.

    Args:
        stages: in their order.
    """

    def __init__(self, stages: tuple[TextStage, ...]) -> None:
        self._stages = stages
        self._waiting = [""] * len(stages)
        self._left = [stage.most if isinstance(stage, Stripped) else 0 for stage in stages]

    @property
    def waits(self) -> bool:
        """Whether characters are held back that may be the beginning of a text that is replaced."""
        return any(self._waiting)

    def push(self, piece: str, *, last: bool = False) -> str:
        """Take a piece and give what becomes of it, and of what waited, whatever follows.

        Args:
            piece: further text.
            last: whether nothing follows.
        """
        for number, stage in enumerate(self._stages):
            if isinstance(stage, Stripped):
                while self._left[number] and piece:
                    if not piece.startswith(stage.content):
                        self._left[number] = 0
                    else:
                        self._left[number] -= 1
                        piece = piece[len(stage.content) :]
            else:
                *before, end = (self._waiting[number] + piece).split(stage.text)
                held = 0 if last else stage.held(end)
                self._waiting[number] = end[len(end) - held :]
                piece = stage.by.join([*before, end[: len(end) - held]])
        return piece

    def between(self, text: str) -> str:
        """What becomes of a whole text that stands in the middle, where nothing waits before it."""
        for stage in self._stages:
            if isinstance(stage, Replaced):
                text = text.replace(stage.text, stage.by)
        return text


def read_stages(decoder: Any) -> Stages | None:
    """What is known of a decoder.

    Args:
        decoder: of a tokenizer; None where it has none.

    Returns:
        Its stages; None where its text cannot be cut.
    """
    if decoder is None:
        return Stages()
    try:
        described = json.loads(decoder.__getstate__())
    except Exception:  # the library has no type of error for a decoder that is written in Python
        return None
    on_tokens: list[dict[str, Any]] = []
    on_text: list[TextStage] = []
    known: list[Replaced] | None = []  # what happened to every token, while that is all
    replaced: tuple[Replaced, ...] | None = None
    joined = lossy = False
    for stage in _single(described):
        match stage:
            case {"type": "ByteLevel"} if not on_tokens:
                joined = lossy = True
            case {"type": "Fuse"} if not joined:
                joined = True
            case {"type": "Fuse"}:
                continue
            case {"type": "ByteFallback"} if not joined and replaced is None and known is not None:
                replaced = tuple(known)
            case {"type": "Replace", "pattern": {"String": str(text)}, "content": str(by)} if text:
                if joined:
                    if len(text) > _LONGEST_REPLACED:
                        return None
                    on_text.append(Replaced(text, by))
                    continue
                known = None if known is None else [*known, Replaced(text, by)]
            case {"type": "Strip", "content": str(content), "start": int(most), "stop": 0} if joined:
                on_text.append(Stripped(content, most))
                continue
            case {"type": "Replace" | "Metaspace" | "WordPiece"} | {"type": "Strip", "stop": 0} if not joined:
                known = None
            case _:
                return None
        on_tokens.append(stage)
    tokens = decoders.Sequence([])
    tokens.__setstate__(json.dumps({"type": "Sequence", "decoders": on_tokens}).encode())
    return Stages(tokens, tuple(on_text), replaced, lossy)


def _single(described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Stages of a decoder in the order in which they act."""
    if described["type"] == "Sequence":
        for inner in described["decoders"]:
            yield from _single(inner)
    else:
        yield described
