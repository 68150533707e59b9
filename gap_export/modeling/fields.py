"""What a field of a configuration may be: see `config_fields.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gap_export.modeling.field_values import Value


@dataclass(frozen=True)
class Fields:
    """Of one object in a file.

    Attributes:
        followed: names of fields that the export goes by, or whose values a family checks itself.
        only: name -> values that are supported.
        without_effect: names of fields that change neither tokens nor pixels nor answers.
        values: name -> what the value must be, of fields that are not what `field_values.VALUES` says of their name.
    """

    followed: frozenset[str] = frozenset()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    without_effect: frozenset[str] = frozenset()
    values: Mapping[str, Value] = field(default_factory=dict)

    def __or__(self, other: Fields) -> Fields:
        """Both: values of the other where both have some."""
        return Fields(
            self.followed | other.followed,
            {**self.only, **other.only},
            self.without_effect | other.without_effect,
            {**self.values, **other.values},
        )

    def knows(self, name: str) -> bool:
        """Whether the field stands in one of the lists."""
        return name in self.followed or name in self.only or name in self.without_effect


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())
