"""Names of special tokens in what people write are words, and never the tokens themselves.

A tokenizer turns `</s>` into the token of that name wherever it stands, so a question could end the turn, or bring an image that is not there. What a
template writes must become tokens, what people write must not, and a rendered conversation is one text. So names in people's texts are hidden while
the template is rendered; then the template's names are replaced by random ones, people's are put back, and the whole is encoded by a copy of the
tokenizer that knows its special tokens by the random names. All else is split into the same tokens as ever.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from typing import Any

from tokenizers import Encoding, Tokenizer

from gap_export.errors import CheckpointError, named
from gap_export.inputs.tokenizer import tokenizer_errors

_FIRST, _LAST, _DIGITS = 0xE100, 0xF8FF, 0xE000
"""Characters of private use: no normaliser changes them, no template trims them or changes their case."""
_NONCE_LENGTH, _BASE = 12, 128


class PlainWords:
    """A tokenizer whose special tokens answer to random names.

    Args:
        tokenizer: of the prompt.
        guarded: ids of further tokens, special or not, whose names are words in people's texts: the image's placeholder, ends of answers.

    Raises:
        CheckpointError: its tokens cannot be renamed.
    """

    def __init__(self, tokenizer: Tokenizer, guarded: Collection[int] = ()) -> None:
        added = tokenizer.get_added_tokens_decoder()
        special = {id_ for id_, token in added.items() if token.special}
        # (`id_to_token` gives names of added tokens as a normaliser would change them.)
        held = (
            (id_, added[id_].content if id_ in added else tokenizer.id_to_token(id_))
            for id_ in sorted({*special, *guarded})
        )
        self._names = {name: id_ for id_, name in held if name}
        # All have nothing in common: the end of one, what somebody wrote, and the beginning of the next make up no third.
        self._hidden = {name: _nonce() for name in self._names}
        self._random = {name: _nonce() for name in self._names}
        self._border, self._marker, self._marker_end = _nonce(), _nonce(), _nonce()
        self._heads = {name[:end] for name in self._names for end in range(1, len(name))}
        self._tails = {name[start:] for name in self._names for start in range(1, len(name))}
        self._longest = max(map(len, self._names), default=0)
        self._find = _any_of(self._names)
        self._find_hidden = _any_of(self._hidden.values())
        self._shown = {hidden: name for name, hidden in self._hidden.items()}
        self._renamed = _renamed(tokenizer, self._names, self._random)

    def hide(self, text: str) -> str:
        """What somebody wrote, ready to be given to a template."""
        hidden = self._find.sub(lambda match: self._hidden[match[0]], text)
        # What a template writes before and behind a text could make a name of its ends.
        told = text.strip()
        within = len(told) < self._longest and any(told in name for name in self._names)
        lengths = range(1, self._longest) if told else ()
        if within or any(told[:length] in self._tails for length in lengths):
            blanks = len(hidden) - len(hidden.lstrip())
            hidden = f"{hidden[:blanks]}{self._border}{hidden[blanks:]}"
        if any(told[-length:] in self._heads for length in lengths):
            end = len(hidden.rstrip())
            hidden = f"{hidden[:end]}{self._border}{hidden[end:]}"
        return hidden

    def marker(self, number: int) -> str:
        """A text that stands in no other: for what is put into a rendered conversation afterwards."""
        return f"{self._marker}{_number(number)}{self._marker_end}"

    def revealed(self, rendered: str) -> str:
        """A rendered text, or a piece of it, as `encode` takes it: the template's names replaced by random ones, people's put back."""
        renamed = self._find.sub(lambda match: self._random[match[0]], rendered)
        return self._find_hidden.sub(lambda match: self._shown[match[0]], renamed.replace(self._border, ""))

    def encode(self, revealed: str) -> Encoding:
        """Token ids of what `revealed` gave, without any that the tokenizer adds by itself."""
        with tokenizer_errors("the conversation", "cannot be split into tokens"):
            return self._renamed.encode(revealed, add_special_tokens=False)


def _nonce() -> str:
    """A text that stands in no other, random and of private use."""
    return "".join(chr(_FIRST + secrets.randbelow(_LAST - _FIRST + 1)) for _ in range(_NONCE_LENGTH))


def _parts(merge: str | list[str]) -> set[str]:
    """What a merge of byte pairs joins, and what it gives."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return {*parts, "".join(parts)}


def _number(number: int) -> str:
    """A number in characters of private use; two of them."""
    return chr(_DIGITS + number // _BASE % _BASE) + chr(_DIGITS + number % _BASE)


def _any_of(names: Collection[str]) -> re.Pattern[str]:
    """Any of these names, the longest that fits; of none, a pattern that fits nothing."""
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _renamed(tokenizer: Tokenizer, names: dict[str, int], random: dict[str, str]) -> Tokenizer:
    """A copy of a tokenizer that knows tokens by other names.

    Args:
        tokenizer: left as it is.
        names: name -> id.
        random: name -> the other one.

    Raises:
        CheckpointError: the copy gives a name another id.
    """
    by_id = {id_: random[name] for name, id_ in names.items()}
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        if token["id"] in by_id:
            # Names are found before a normaliser can change them, and beside whatever stands there.
            token |= {"content": by_id[token["id"]], "normalized": False, "single_word": False}
    listed = {token["id"] for token in content["added_tokens"]}
    content["added_tokens"] += [
        {
            "id": id_,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for id_, name in by_id.items()
        if id_ not in listed
    ]
    content["added_tokens"].sort(key=lambda token: token["id"])
    model = content["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {
            by_id[id_] if names.get(word) == id_ else word: id_ for word, id_ in vocabulary.items()
        }
    elif isinstance(
        vocabulary, list
    ):  # of a unigram model: pairs of a piece and its score, in the order of ids
        model["vocab"] = [[by_id.get(id_, piece), score] for id_, (piece, score) in enumerate(vocabulary)]
    if model.get("merges"):  # none gives a name any more
        model["merges"] = [merge for merge in model["merges"] if not _parts(merge) & names.keys()]
    if model.get("unk_token") in names:
        model["unk_token"] = random[model["unk_token"]]
    # Nothing is added by itself: where a start token belongs is known elsewhere, and this may name it.
    content["post_processor"] = content["truncation"] = content["padding"] = None
    with tokenizer_errors("tokenizer.json", "has special tokens that cannot be renamed"):
        copy = Tokenizer.from_str(json.dumps(content))
    wrong = [name for name, id_ in names.items() if copy.token_to_id(random[name]) != id_]
    if wrong:
        raise CheckpointError(
            f"has special tokens that cannot be told apart: {named(wrong[0])}",
            subject="tokenizer.json",
            hint="use the tokenizer that the checkpoint was published with",
        )
    return copy
