"""What an execution provider of ONNX Runtime is called in one text, with its options: `NAME`, or `NAME{key: value}`.

A provider is either built into ONNX Runtime and has its name there (`CUDAExecutionProvider`), or is a plug-in and has the name of the package
that brings it (`onnxruntime-ep-openvino`). Options are a YAML mapping of strings. Several providers, the first that has a kernel for a node
first, are joined with `+`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gap_export.errors import SessionError, first_line, shown

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_BUILT_IN = "ExecutionProvider"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_LONGEST = 1024


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        name: in ONNX Runtime, or of the package that brings it.
        options: its own, as it spells them.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_plug_in(self) -> bool:
        """Whether a package brings it."""
        return not self.name.endswith(_BUILT_IN)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        import yaml  # here and below: few runs name options, and all would wait for the import

        return self.name + yaml.safe_dump(
            dict(self.options),
            default_flow_style=True,
            default_style='"',
            allow_unicode=True,
            width=2 * _LONGEST,
        ).strip("\n")


def providers_in(text: str) -> tuple[Provider, ...]:
    """The providers that a text names, in its order.

    Raises:
        SessionError: it is none, or names one twice.
    """
    if len(text) > _LONGEST:
        raise _refusal(text, f"has {len(text)} characters: at most {_LONGEST} are read")
    found = tuple(_provider(part) for part in split_outside_braces(text, "+"))
    names = [each.name for each in found]
    for name in names:
        if names.count(name) > 1:
            raise SessionError("is named twice", subject=f"provider {name}", hint="name it once")
    return found


def split_outside_braces(text: str, separator: str) -> list[str]:
    """Parts of a text between separators; those inside of options do not count.

    Raises:
        SessionError: options do not end.
    """
    parts, first, at = [], 0, 0
    while at < len(text):
        if text[at] == separator:
            parts.append(text[first:at])
            first = at + 1
        at = _end_of_options(text, at) if text[at] == "{" else at + 1
    return [*parts, text[first:]]


def _end_of_options(text: str, start: int) -> int:
    """The place after a mapping; where YAML says that it ends, for what is quoted may hold braces."""
    import yaml

    depth = 0
    try:
        for token in yaml.scan(text[start:], Loader=yaml.SafeLoader):
            depth += isinstance(token, yaml.FlowMappingStartToken)
            if depth > 1:
                raise _refusal(text, "has options that are no mapping of strings to strings")
            if isinstance(token, yaml.FlowMappingEndToken):
                return start + int(token.end_mark.index)
    except (yaml.YAMLError, RecursionError) as error:
        raise _refusal(text, f"cannot be read: {first_line(error)}") from error
    raise _refusal(text, "has options that do not end")


def _provider(text: str) -> Provider:
    name, brace, rest = text.strip().partition("{")
    if not _NAME.fullmatch(name):
        raise _refusal(text, "is not a name, with options or without")
    return Provider(name, _options(name, brace + rest) if brace else {})


def _options(name: str, text: str) -> dict[str, str]:
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise _refusal(text, f"cannot be read: {first_line(error)}", name) from error
    if not isinstance(node, yaml.MappingNode):
        raise _refusal(text, "is no mapping", name)
    found: dict[str, str] = {}
    for key, value in node.value:
        # Scalars as they are written: what would be a number or a truth value elsewhere is a string to a provider.
        if not isinstance(key, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode) or not key.value:
            raise _refusal(text, "is no mapping of strings to strings", name)
        if not (key.value + value.value).isprintable():
            raise _refusal(text, "has characters that cannot be printed", name)
        if key.value in found:
            raise _refusal(text, f"gives {shown(key.value)} twice", name)
        found[key.value] = value.value
    return found


def _refusal(text: str, reason: str, name: str = "") -> SessionError:
    return SessionError(
        reason,
        subject=f"options of provider {name}: {shown(text)}" if name else f"provider {shown(text)}",
        hint="write CUDAExecutionProvider, a package such as onnxruntime-ep-openvino, or NAME{option: value}",
    )
