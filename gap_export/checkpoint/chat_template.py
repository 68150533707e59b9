"""The chat template of a checkpoint, and the special tokens that it may write, found as transformers finds them.

What comes first is what a processor reads, then what a tokenizer reads (transformers 5.23, `processing_utils.get_processor_dict` and
`tokenization_utils_base._from_pretrained`); the first that is there counts:

- `chat_template` in processor_config.json
- chat_template.json, `{"chat_template": ...}`
- chat_template.jinja; a folder `additional_chat_templates` beside it holds further ones by name
- `chat_template` in tokenizer_config.json

Where there are several by name, plain chat takes the one named `default`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.forms import in_folder
from gap_export.checkpoint.processor import PROCESSOR
from gap_export.errors import CheckpointError, named, shown
from gap_export.files import is_folder, kinds, read_text

JINJA, LEGACY, ADDITIONAL = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
LONGEST = 1_000_000
"""Characters of a template."""

_FIELD, _DEFAULT = "chat_template", "default"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Tokens that every tokenizer may have; further ones have names that end in `_token` too."""
_EXTRA, _DESCRIBED = "extra_special_tokens", "added_tokens_decoder"
_FETCH = "fetch it again, or remove it: the family's own frame is used then"


@dataclass(frozen=True)
class StoredTemplate:
    """A chat template that lies in a checkpoint.

    Attributes:
        text: in Jinja.
        source: name of its file in the checkpoint's folder, for messages.
    """

    text: str
    source: str


def stored_template(checkpoint: Checkpoint) -> StoredTemplate | None:
    """The checkpoint's own chat template.

    Args:
        checkpoint: whose folder is looked through.

    Returns:
        The template for plain chat; None where there is none, and for weights without a config.json, which are no checkpoint of
        transformers.

    Raises:
        CheckpointError: a file that is damaged, of another form or too large, or templates by name of which none is the default.
    """
    if not checkpoint.config:
        return None
    for source, value in _candidates(checkpoint):
        if value is not None:
            subject = str(checkpoint.folder / source)
            return StoredTemplate(_checked(_default_of(value, subject), subject), source)
    return None


def special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """Texts of the special tokens that a template may name, as `special_tokens_map` of transformers' tokenizers has them.

    Args:
        checkpoint: whose tokenizer_config.json and special_tokens_map.json are read; the second counts where the first does not describe
            added tokens, as in older checkpoints.

    Returns:
        name (`bos_token`, `eos_token`, `image_token`, ...) -> text.

    Raises:
        CheckpointError: a damaged file, or a token that is no text.
    """
    if not checkpoint.config:
        return {}
    config = checkpoint.json(TOKENIZER_CONFIG)
    older = {} if _DESCRIBED in config else checkpoint.json(SPECIAL_TOKENS_MAP)
    found: dict[str, str] = {}
    for file, values in ((TOKENIZER_CONFIG, config), (SPECIAL_TOKENS_MAP, older)):
        subject = str(checkpoint.folder / file)
        found |= _texts({name: values.get(name) for name in _NAMED}, subject)
        further = {
            name: value
            for name, value in values.items()
            if name.endswith("_token") and name not in _NAMED and _is_token(value)
        }
        found |= _texts(further, subject)
    for file, values in ((TOKENIZER_CONFIG, config), (SPECIAL_TOKENS_MAP, older)):
        extra = values.get(_EXTRA)
        found |= _texts(extra, str(checkpoint.folder / file)) if isinstance(extra, dict) else {}
    return found


def _is_token(value: Any) -> bool:
    """Whether a value is a token, as a text or as an object: other settings have names that end in `_token` too (`add_bos_token`)."""
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _candidates(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Where a template may stand and what stands there, None for nothing, in transformers' order; a file is read when it is asked for."""
    folder = checkpoint.folder
    by_name = _additional(folder)
    has_legacy = os.path.lexists(folder / LEGACY)
    if has_legacy and by_name:
        raise CheckpointError(
            f"stands beside {ADDITIONAL}/{next(iter(by_name.values())).name}: which of the two forms is meant cannot be told",
            subject=str(folder / LEGACY),
            hint=f"take {LEGACY} out, or the folder",
        )
    yield PROCESSOR, checkpoint.json(PROCESSOR).get(_FIELD)
    if has_legacy:
        legacy = checkpoint.json(LEGACY)
        if _FIELD not in legacy:
            raise CheckpointError(f"has no {_FIELD}", subject=str(folder / LEGACY), hint=_FETCH)
        yield LEGACY, legacy[_FIELD]
    if os.path.lexists(folder / JINJA):
        yield JINJA, _read(folder / JINJA)
    elif _DEFAULT in by_name:
        path = by_name[_DEFAULT]
        yield f"{ADDITIONAL}/{path.name}", _read(path)
    elif by_name:
        raise _without_default(by_name, str(folder / ADDITIONAL))
    yield TOKENIZER_CONFIG, checkpoint.json(TOKENIZER_CONFIG).get(_FIELD)


def _additional(folder: Path) -> dict[str, Path]:
    """Name -> file of the templates beside chat_template.jinja."""
    if not is_folder(folder / ADDITIONAL):
        return {}
    return {path.stem: path for path in in_folder(folder / ADDITIONAL, ".jinja")}


def _read(path: Path) -> str:
    """A file's text, with ends of lines as Python reads them."""
    return read_text(path, kinds.CHAT_TEMPLATE).replace("\r\n", "\n").replace("\r", "\n")


def _default_of(value: Any, subject: str) -> Any:
    """The template for plain chat of what a file has: one, or several by name in either of two forms."""
    if isinstance(value, list):
        for entry in value:
            if not (
                isinstance(entry, dict)
                and isinstance(entry.get("name"), str)
                and entry.keys() >= {"template"}
            ):
                raise _refused(f"has {shown(entry)} in {_FIELD}", "objects with name and template", subject)
        value = {entry["name"]: entry["template"] for entry in value}
    if not isinstance(value, dict):
        return value
    if _DEFAULT not in value:
        raise _without_default(value, subject)
    return value[_DEFAULT]


def _checked(text: Any, subject: str) -> str:
    if not isinstance(text, str):
        raise _refused(f"{_FIELD} is {shown(text)}", "a text, or texts by name", subject)
    if len(text) > LONGEST:
        raise CheckpointError(
            f"has a chat template of {len(text)} characters, and at most {LONGEST} are read",
            subject=subject,
            hint=_FETCH,
        )
    if not text.strip():
        raise CheckpointError("has an empty chat template", subject=subject, hint=_FETCH)
    return text


def _texts(values: Mapping[str, Any], subject: str) -> dict[str, str]:
    """Tokens, each given as a text or as an object with `content`; those that are null left out."""
    texts = {}
    for name, value in values.items():
        if value is None:
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise _refused(f"{named(name)} is {shown(value)}", "a text, or an object with content", subject)
        texts[name] = text
    return texts


def _without_default(names: Mapping[str, Any], subject: str) -> CheckpointError:
    listed = ", ".join(named(name) for name in sorted(names)[:5]) or "nothing"
    return CheckpointError(
        f"has no chat template named {_DEFAULT}, which plain chat takes (it has {listed})",
        subject=subject,
        hint=f"name the one that is meant {_DEFAULT}, or save it as {JINJA}",
    )


def _refused(found: str, wanted: str, subject: str) -> CheckpointError:
    return CheckpointError(f"{found} (expected: {wanted})", subject=subject, hint=_FETCH)
