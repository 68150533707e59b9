"""A running digest: every line says what it and all lines before it were, so that one that was changed, moved or taken out is noticed.

    {"id": "a", ..., "digest": "0f3c..."}

The digest is the beginning of SHA-256 over the digest before and the line's content, and the first digest is that of the settings. It
notices what happens to files, and what somebody edits; who computes all of them anew is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import re

from gap_export.records import Record

_DIGITS = 16
_LINE = re.compile(rb'(\{.*),"digest":"([0-9a-f]{%d})"\}' % _DIGITS, re.DOTALL)


def first_digest(settings: Record, *names: str) -> str:
    """What a run of digests begins with.

    Args:
        settings: that all lines have in common.
        names: of what is told apart under the same settings.
    """
    return _digest("", json.dumps([settings.model_dump(mode="json"), *names], sort_keys=True).encode())


def sealed(row: Record, before: str) -> tuple[str, str]:
    """A row as a line with its digest, and the digest.

    Args:
        row: at least one field.
        before: digest of the line before.
    """
    content = row.model_dump_json()
    digest = _digest(before, content.encode())
    return f'{content[:-1]},"digest":"{digest}"}}', digest


def unsealed(line: bytes, before: str) -> tuple[bytes, str]:
    """A row out of its line, and the digest.

    Args:
        line: without its end.
        before: digest of the line before.

    Raises:
        ValueError: it has no digest, or another.
    """
    found = _LINE.fullmatch(line)
    if found is None:
        raise ValueError("has no digest: it is cut short, or was written by another version or by hand")
    content, digest = found[1] + b"}", found[2].decode()
    if digest != _digest(before, content):
        raise ValueError(f"was changed, or what stood before it was: digest {digest} is of something else")
    return content, digest


def sha256_of_bytes(content: bytes) -> str:
    """Hash of a file's content, to tell whether it is still the one that was written."""
    return hashlib.sha256(content).hexdigest()


def _digest(before: str, content: bytes) -> str:
    return hashlib.sha256(before.encode() + b"\n" + content).hexdigest()[:_DIGITS]
