"""Tokens that were added to a tokenizer, as `tokenizer_config.json` and `added_tokens.json` describe them."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import AddedToken

from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError, named, shown

CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
_DESCRIBED, _FLAGS = "added_tokens_decoder", ("lstrip", "rstrip", "single_word", "normalized", "special")
_LARGEST_ID = 10**8


def described_tokens(checkpoint: Checkpoint, *, normalized: bool | None = None) -> dict[int, AddedToken]:
    """Id -> token, in ascending order, of `added_tokens_decoder` in tokenizer_config.json.

    Args:
        checkpoint: whose file it is.
        normalized: whether they are looked for in normalised text, whatever the file says.

    Raises:
        CheckpointError: it describes no tokens.
    """
    stored = checkpoint.json(CONFIG).get(_DESCRIBED)
    if stored is None:
        return {}
    if not isinstance(stored, dict):
        raise _refused(checkpoint, CONFIG, f"{_DESCRIBED} is {shown(stored)}", "an object")
    tokens = {}
    for id_, described in stored.items():
        field = f"{_DESCRIBED}.{named(id_)}"
        if not (id_.isascii() and id_.isdigit() and int(id_[:20]) <= _LARGEST_ID):
            raise _refused(checkpoint, CONFIG, f"{field} is no id", "numbers from 0 on")
        content = described.get("content") if isinstance(described, dict) else None
        if not isinstance(content, str) or not content:
            raise _refused(checkpoint, CONFIG, f"{field} is {shown(described)}", "an object with content")
        flags = {name: bool(described[name]) for name in _FLAGS if name in described}
        if normalized is not None:
            flags["normalized"] = normalized
        tokens[int(id_)] = AddedToken(content, **flags)
    return dict(sorted(tokens.items()))


def named_ids(checkpoint: Checkpoint) -> Mapping[str, int]:
    """Name -> id of the tokens in added_tokens.json.

    Raises:
        CheckpointError: it lists no ids by name.
    """
    ids = checkpoint.json(ADDED)
    for name, id_ in ids.items():
        if type(id_) is not int or not 0 <= id_ <= _LARGEST_ID or not name:
            raise _refused(checkpoint, ADDED, f"{named(name)} is {shown(id_)}", "ids by name")
    return ids


def _refused(checkpoint: Checkpoint, file: str, found: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{found} (expected: {wanted})",
        subject=str(checkpoint.folder / file),
        hint="fetch it again: it belongs to the tokenizer that the checkpoint was published with",
    )


def truth(checkpoint: Checkpoint, field: str, otherwise: bool) -> bool:
    """A field of tokenizer_config.json that is true or false; null is the same as no field.

    Raises:
        CheckpointError: it is something else.
    """
    value = checkpoint.json(CONFIG).get(field)
    if value is None:
        return otherwise
    if not isinstance(value, bool):
        raise _refused(checkpoint, CONFIG, f"{field} is {shown(value)}", "true or false")
    return value
