"""Count the fields of a serialized model without parsing it: two bytes of a file can become hundreds in memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
"""Wire types of protobuf."""


def count_fields(content: bytes, most: int) -> int:
    """How many fields a model has, those of messages within it included; weights are one field each.

    Args:
        content: a serialized ModelProto; what is none is counted as far as it can be read.
        most: counting stops above it.
    """
    found = 0
    pending: list[tuple[int, int, Any]] = [(0, len(content), onnx.ModelProto.DESCRIPTOR)]
    while pending and found <= most:
        at, end, message = pending.pop()
        within = _messages(message)
        while at < end and found <= most:
            found += 1
            key, at = _number(content, at)
            wire = key & 7
            if not key >> 3:
                break  # no field has this number: the parser will say what is wrong
            if wire == _LENGTH:
                length, at = _number(content, at)
                if length and key >> 3 in within:
                    pending.append((at, min(at + length, end), within[key >> 3]))
                at += length
            elif wire == _VARINT:
                _, at = _number(content, at)
            elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
                at += 8 if wire == _EIGHT_BYTES else 4
            else:
                break
    return found


@cache
def _messages(message: Any) -> dict[int, Any]:
    """Number of a field -> the kind of message that it holds."""
    return {field.number: field.message_type for field in message.fields if field.message_type is not None}


def _number(content: bytes, at: int) -> tuple[int, int]:
    """A number in protobuf's variable length, and where the next byte is."""
    number = shift = 0
    while at < len(content) and shift < 70:
        byte = content[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            break
    return number, at
